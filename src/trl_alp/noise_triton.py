# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The Triton backend of `noise.py`, which has the equations: one kernel for the forward, one for the backward.

A program works on `ROWS` rows, `COLS` columns at a time. Element `n` of the row-major order gets word `n % 4` of
Philox4x32 at counter `n // 4` under the 64-bit seed as key: no two (seed, element) pairs share a word, and neither
tiles nor memory layout enter. To keep up with memory the noise must take few instructions; hence the hardware's
logarithm, sine and cosine, of which `tl.randn4x` takes software ones (120 machine instructions an element on sm_90,
against about 20 here), and a Philox of our own, which also keeps the noise the same in every version of Triton.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice


# Triton reads this when a kernel is defined, that is now.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LIBDEVICE = tl.constexpr(not INTERPRETED)  # into which the interpreter cannot call
# The fewest rounds of Philox4x32 that pass all of TestU01's BigCrush (Salmon et al. 2011, table 2).
_ROUNDS = tl.constexpr(7)
_WARPS = 4
_THREAD = 8  # elements a thread works on at a time: 16 bytes of bf16, the widest load there is
# Of so many programs one measures how much of its noise survived rounding; odd, so as not to meet the same positions
# of each sequence.
_MEASURED_EVERY = 7
# Bytes of a thread's share of its rows up to which they stay in registers between the RMS and the sum.
_KEPT_BYTES = 256


@triton.jit
def _uniform(bits):
    """The upper 23 of 32 random bits as a number in (0, 1], through the mantissa of one in [1, 2)."""
    return 2.0 - ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _normal_pair(a, b):
    """Box-Muller: radius sqrt(-2 ln u) and a uniform angle."""
    u, angle = _uniform(a), 6.283185307179586 * (_uniform(b) - 0.5)
    if _LIBDEVICE:
        log2, cos, sin = libdevice.fast_log2f(u), libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        log2, cos, sin = tl.log2(u), tl.cos(angle), tl.sin(angle)
    radius = tl.sqrt(tl.maximum(-1.3862943611198906 * log2, 0.0))
    return radius * cos, radius * sin


@triton.jit
def _four_normals(seed, counter):
    """N(0, 1) from each of the four words of Philox4x32 at `counter` (int64) under `seed`."""
    key = seed.to(tl.int64)  # small seeds arrive as int32
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    a, b = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c = a * 0
    d = c
    for _ in tl.static_range(_ROUNDS):
        low, high = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, b = (high >> 32).to(tl.uint32) ^ b ^ k0, high.to(tl.uint32)
        c, d = (low >> 32).to(tl.uint32) ^ d ^ k1, low.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    n0, n1 = _normal_pair(a, b)
    n2, n3 = _normal_pair(c, d)
    return n0, n1, n2, n3


@triton.jit
def _normal(seed, row, start, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VECTOR: tl.constexpr):
    """The noise of columns `start` to `start + COLS` of the rows `row` (ROWS, 1).  # (ROWS, COLS)"""
    if VECTOR > 1:  # a thread computes the `VECTOR` neighbours that it loads: no exchange between threads
        counter = row * (H // 4) + (start // 4 + VECTOR // 4 * tl.arange(0, COLS // VECTOR)[None, :])
        n0, n1, n2, n3 = _four_normals(seed, counter)
        if VECTOR == 8:
            n4, n5, n6, n7 = _four_normals(seed, counter + 1)
            n0, n1, n2, n3 = tl.join(n0, n4), tl.join(n1, n5), tl.join(n2, n6), tl.join(n3, n7)
        normal = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, COLS))
    else:  # rows do not begin at a multiple of four elements: each element computes all four words
        n = row * H + start + tl.arange(0, COLS)[None, :]
        n0, n1, n2, n3 = _four_normals(seed, n // 4)
        normal = tl.where(n % 4 < 2, tl.where(n % 4 == 0, n0, n1), tl.where(n % 4 == 2, n2, n3))
    return normal


@triton.jit(do_not_specialize=["log_sigma", "seed", "rows"])
def _forward_kernel(
    hidden,
    out,
    log_sigma,
    scale,  # (rows,), written with RMS
    power,  # (measuring programs, 2), written: mean square of the noise over each one's rows, asked and realised
    seed,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    MEASURED_EVERY: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    level = tl.zeros((ROWS, 1), WIDE) + tl.exp(tl.load(log_sigma).to(WIDE))
    kept = ()
    if RMS:
        squares = tl.zeros((ROWS, COLS), WIDE)
        for start in tl.static_range(0, H, COLS):
            inside = (row < rows) & (start + col < H)
            h = tl.load(hidden + row * H + (start + col), mask=inside, other=0.0)
            squares += h.to(WIDE) * h.to(WIDE)
            if KEPT:
                kept = kept + (h,)  # noqa: RUF005 (Triton's language has no unpacking)
        rms = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / H)
        tl.store(scale + row, rms, mask=row < rows)
        level *= rms
    measured = program % MEASURED_EVERY == 0
    squares = tl.zeros((ROWS, COLS), WIDE)
    largest = tl.zeros((ROWS, COLS), WIDE)
    for start in tl.static_range(0, H, COLS):
        inside = (row < rows) & (start + col < H)
        if KEPT:
            h = kept[start // COLS].to(WIDE)
        else:
            h = tl.load(hidden + row * H + (start + col), mask=inside, other=0.0).to(WIDE)
        noise = level * _normal(seed, row, start, H, ROWS, COLS, VECTOR).to(WIDE)
        rounded = (h + noise).to(out.dtype.element_ty)
        tl.store(out + row * H + (start + col), rounded, mask=inside)
        if measured:
            survived = tl.where(inside, rounded.to(WIDE) - h, 0.0)
            squares += survived * survived
            largest = tl.maximum(largest, tl.abs(h))
    if measured:
        # All-zero rows are the embedding of the padding token; around 0 every format resolves any noise.
        real = tl.max(largest, axis=1, keep_dims=True) > 0
        weight = tl.where(real, 1.0, 0.0) / tl.minimum(rows - program * ROWS, ROWS)
        realised = tl.sum(squares, axis=1, keep_dims=True) / H
        pair = power + program // MEASURED_EVERY * 2
        tl.store(pair, tl.sum(level * level * weight))
        tl.store(pair + 1, tl.sum(realised * weight))


@triton.jit(do_not_specialize=["log_sigma", "seed", "rows"])
def _backward_kernel(
    grad,
    log_sigma,
    scale,
    partial,  # (programs,), written: each program's part of the gradient of log_sigma
    seed,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    products = tl.zeros((ROWS, COLS), WIDE)
    for start in tl.static_range(0, H, COLS):
        inside = (row < rows) & (start + col < H)
        g = tl.load(grad + row * H + (start + col), mask=inside, other=0.0).to(WIDE)
        products += g * _normal(seed, row, start, H, ROWS, COLS, VECTOR).to(WIDE)
    if RMS:
        products *= tl.load(scale + row, mask=row < rows, other=0.0)
    tl.store(partial + tl.program_id(0), tl.sum(products) * tl.exp(tl.load(log_sigma).to(WIDE)))


def _launch(like: torch.Tensor, warps: int) -> tuple[int, int, dict[str, int]]:
    """Rows, programs and the constants of both kernels."""
    width, tile = like.shape[-1], 32 * warps * _THREAD
    # A power of two that divides H leaves no lane idle; at most 16 steps to a row, since the loops are unrolled.
    cols = min(tile, max(width & -width, triton.next_power_of_2(width) // 16))
    vector = min(_THREAD, 16 // like.element_size()) if like.element_size() <= 4 else 4
    rows, rows_at_a_time = like.numel() // width, tile // cols
    constants = {
        "H": width,
        "ROWS": rows_at_a_time,
        "COLS": cols,
        "VECTOR": vector if width % vector == 0 and cols % vector == 0 else 1,
        "WIDE": tl.float64 if like.dtype == torch.float64 else tl.float32,
        "num_warps": warps,
    }
    return rows, triton.cdiv(rows, rows_at_a_time), constants


class AddNoiseTriton(torch.autograd.Function):
    """`h + exp(log_sigma) * s(h) * delta(seed)` and the noise's mean square; keeps the seed and `s(h)`, one a row."""

    @staticmethod
    def forward(ctx, hidden, log_sigma, seed, noise_scale, warps=_WARPS):
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # Triton makes another kernel of an argument above 2**63; the same bits as an int64 need none.
        ctx.seed = seed - 2**64 if seed >= 2**63 else seed
        ctx.rms, ctx.warps = noise_scale == "rms", warps
        if hidden.numel() == 0:
            scale, power = None, hidden.new_full((2,), torch.nan, dtype=wide)
        else:
            rows, programs, constants = _launch(hidden, warps)
            scale = hidden.new_empty(rows if ctx.rms else 0, dtype=wide)
            measuring = triton.cdiv(programs, _MEASURED_EVERY)
            partial = hidden.new_empty(measuring, 2, dtype=wide)
            row_bytes = triton.cdiv(constants["H"], constants["COLS"]) * _THREAD * hidden.element_size()
            with torch.cuda.device_of(hidden):
                _forward_kernel[(programs,)](
                    hidden,
                    out,
                    log_sigma,
                    scale,
                    partial,
                    ctx.seed,
                    rows,
                    RMS=ctx.rms,
                    KEPT=ctx.rms and row_bytes <= _KEPT_BYTES,
                    MEASURED_EVERY=_MEASURED_EVERY,
                    **constants,
                )
            power = partial.mean(0)
        ctx.save_for_backward(log_sigma, scale)
        ctx.mark_non_differentiable(power)
        return out, power

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        log_sigma, scale = ctx.saved_tensors
        grad_log_sigma = None
        if ctx.needs_input_grad[1]:
            partial = grad.new_zeros(1, dtype=log_sigma.dtype)
            if grad.numel() > 0:
                contiguous = grad.contiguous()
                rows, programs, constants = _launch(contiguous, ctx.warps)
                partial = grad.new_empty(programs, dtype=torch.promote_types(grad.dtype, torch.float32))
                with torch.cuda.device_of(grad):
                    _backward_kernel[(programs,)](
                        contiguous, log_sigma, scale, partial, ctx.seed, rows, RMS=ctx.rms, **constants
                    )
            # A sum for each program and then theirs, in a fixed order: the same bits every time, unlike with atomics.
            grad_log_sigma = partial.sum().to(log_sigma.dtype)
        return grad, grad_log_sigma, None, None, None
