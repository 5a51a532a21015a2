# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The Triton backend of `noise.py`, which has the equations: one kernel for the forward, one for the backward.

A program works on `ROWS` rows, `COLS` columns at a time. The noise comes from Philox4x32 under the 64-bit seed as key.
Element `n` of the row-major order has word `n % 4` at counter `n // 4`; of 16 bits, where coarser noise does, it and
its neighbour have the halves of word `n % 8 // 2` at counter `n // 8`, and the noise ends at 4.85 standard deviations,
which one normal number in 800 000 exceeds. No two seeds or pairs of elements share a word, and neither tiles nor
memory layout enter. To keep up with memory the noise must take few instructions: hence the hardware's logarithm, sine
and cosine, of which `tl.randn4x` takes software ones (120 machine instructions an element on sm_90, against 15 to 21
here, see `benchmarks/instructions.py`), and a Philox of our own, which also keeps the noise the same in every version
of Triton.
"""

import functools
import os
from typing import Any

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
_MEASURED_EVERY = tl.constexpr(7)
# Bytes of a thread's share of its rows up to which they stay in registers between the RMS and the sum.
_KEPT_BYTES = 256


@triton.jit
def _box_muller(u, angle, NEAR_ONE: tl.constexpr):
    """Radius sqrt(-2 ln u) at a uniform angle; `NEAR_ONE` where the logarithm may come out above 0."""
    if _LIBDEVICE:
        log2, cos, sin = libdevice.fast_log2f(u), libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        log2, cos, sin = tl.log2(u), tl.cos(angle), tl.sin(angle)
    square = -1.3862943611198906 * log2
    radius = tl.sqrt(tl.maximum(square, 0.0) if NEAR_ONE else square)
    return radius * cos, radius * sin


@triton.jit
def _normals_of_words(a, b):
    """Two normals from the upper 23 bits of two words: numbers in (0, 1], through the mantissa of one in [1, 2)."""
    u = 2.0 - ((a >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    v = 2.0 - ((b >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return _box_muller(u, 6.283185307179586 * (v - 0.5), NEAR_ONE=True)


@triton.jit
def _normals_of_halves(word):
    """Two normals from the halves of a word, each through the lower mantissa of a number `128 + k / 2**16`: the radius
    from the upper one, in the middle of its cell, `(k + 1/2) / 2**16`, at most 4.85; the angle from the lower."""
    if _LIBDEVICE:  # one instruction, where shifting and masking take three
        bits = word.to(tl.int32, bitcast=True)
        high, low = libdevice.byte_perm(bits, 0x43000000, 0x7432), libdevice.byte_perm(bits, 0x43000000, 0x7410)
    else:
        high, low = (word >> 16) | 0x43000000, (word & 0xFFFF) | 0x43000000
    u = high.to(tl.float32, bitcast=True) - 127.99999237060547  # 128 - 2**-17
    angle = 6.283185307179586 * low.to(tl.float32, bitcast=True) - 807.3893119926768  # 257 pi
    return _box_muller(u, angle, NEAR_ONE=False)


@triton.jit
def _four_words(seed, counter):
    """Philox4x32 at `counter` (int64) under `seed`."""
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
    return a, b, c, d


@triton.jit
def _four_normals(seed, counter):
    """Two from each two words."""
    a, b, c, d = _four_words(seed, counter)
    n0, n1 = _normals_of_words(a, b)
    n2, n3 = _normals_of_words(c, d)
    return n0, n1, n2, n3


@triton.jit
def _eight_normals(seed, counter):
    """Two from each word."""
    a, b, c, d = _four_words(seed, counter)
    n0, n1 = _normals_of_halves(a)
    n2, n3 = _normals_of_halves(b)
    n4, n5 = _normals_of_halves(c)
    n6, n7 = _normals_of_halves(d)
    return n0, n1, n2, n3, n4, n5, n6, n7


@triton.jit
def _normal(
    seed, row, start, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SHORT: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The noise of columns `start` to `start + COLS` of the rows `row` (ROWS, 1).  # (ROWS, COLS)"""
    each: tl.constexpr = 8 if SHORT else 4  # elements of one counter
    if VECTOR:  # a thread computes the neighbours that it loads: no exchange between threads
        counter = row * (H // each) + (start // each + tl.arange(0, COLS // each)[None, :])
        if SHORT:
            n0, n1, n2, n3, n4, n5, n6, n7 = _eight_normals(seed, counter)
            n0, n1, n2, n3 = tl.join(n0, n4), tl.join(n1, n5), tl.join(n2, n6), tl.join(n3, n7)
        else:
            n0, n1, n2, n3 = _four_normals(seed, counter)
        return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, COLS))
    # Rows do not begin at a multiple: each element computes all of its counter's.
    n = row * H + start + tl.arange(0, COLS)[None, :]
    if SHORT:
        n0, n1, n2, n3, n4, n5, n6, n7 = _eight_normals(seed, n // 8)
        low = n % 8 < 4
        n0, n1, n2, n3 = tl.where(low, n0, n4), tl.where(low, n1, n5), tl.where(low, n2, n6), tl.where(low, n3, n7)
    else:
        n0, n1, n2, n3 = _four_normals(seed, n // 4)
    return tl.where(n % 4 < 2, tl.where(n % 2 == 0, n0, n1), tl.where(n % 2 == 0, n2, n3))


@triton.jit(do_not_specialize=["sigma", "position", "place", "seed", "rows"])
def _forward_kernel(
    hidden,
    out,
    sigma,  # (L,)
    position,  # the layer's in `sigma` and `power`
    scale,  # (any, rows), of which row `place` is written with RMS
    place,
    channels,  # (L, H), of which row `position` is read with CHANNEL
    power,  # (L, measuring programs, 2), of which row `position` is written with MEASURED: mean square of the noise
    seed,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHORT: tl.constexpr,
    VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    CHANNEL: tl.constexpr,
    KEPT: tl.constexpr,
    WIDE: tl.constexpr,
    MEASURED: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    level = tl.zeros((ROWS, 1), WIDE) + tl.load(sigma + position).to(WIDE)
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
        tl.store(scale + place.to(tl.int64) * rows + row, rms, mask=row < rows)
        level *= rms
    squares = tl.zeros((ROWS, COLS), WIDE)
    largest = tl.zeros((ROWS, COLS), WIDE)
    sizes = tl.zeros((1, COLS), WIDE)
    for start in tl.static_range(0, H, COLS):
        inside = (row < rows) & (start + col < H)
        if KEPT:
            h = kept[start // COLS].to(WIDE)
        else:
            h = tl.load(hidden + row * H + (start + col), mask=inside, other=0.0).to(WIDE)
        noise = level * _normal(seed, row, start, H, ROWS, COLS, SHORT, VECTOR).to(WIDE)
        if CHANNEL:
            size = tl.load(channels + position.to(tl.int64) * H + (start + col), mask=start + col < H, other=0.0)
            noise *= size.to(WIDE)
            sizes += size.to(WIDE) * size.to(WIDE)
        rounded = (h + noise).to(out.dtype.element_ty)
        tl.store(out + row * H + (start + col), rounded, mask=inside)
        # Nested, since `and` would be computed on the device and what hangs on it compiled, measured or not.
        if MEASURED:  # noqa: SIM102
            if program % _MEASURED_EVERY == 0:
                survived = tl.where(inside, rounded.to(WIDE) - h, 0.0)
                squares += survived * survived
                largest = tl.maximum(largest, tl.abs(h))
    if MEASURED:  # noqa: SIM102
        if program % _MEASURED_EVERY == 0:
            # All-zero rows are the embedding of the padding token; around 0 every format resolves any noise.
            real = tl.max(largest, axis=1, keep_dims=True) > 0
            weight = tl.where(real, 1.0, 0.0) / tl.minimum(rows - program * ROWS, ROWS)
            realised = tl.sum(squares, axis=1, keep_dims=True) / H
            asked = weight * (tl.sum(sizes) / H) if CHANNEL else weight
            pair = power + (position * tl.cdiv(tl.num_programs(0), _MEASURED_EVERY) + program // _MEASURED_EVERY) * 2
            tl.store(pair, tl.sum(level * level * asked))
            tl.store(pair + 1, tl.sum(realised * weight))


@triton.jit(do_not_specialize=["position", "place", "seed", "rows"])
def _backward_kernel(
    grad,
    scale,  # (any, rows), of which row `place` is read with RMS
    place,
    channels,  # (L, H), of which row `position` is read with CHANNEL
    sums,  # (L, programs), of which row `position` is written: each program's part of sum(g * s(h) * delta)
    position,
    seed,
    rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SHORT: tl.constexpr,
    VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    products = tl.zeros((ROWS, COLS), WIDE)
    for start in tl.static_range(0, H, COLS):
        inside = (row < rows) & (start + col < H)
        g = tl.load(grad + row * H + (start + col), mask=inside, other=0.0).to(WIDE)
        if CHANNEL:
            g *= tl.load(channels + position.to(tl.int64) * H + (start + col), mask=start + col < H, other=0.0).to(
                WIDE
            )
        products += g * _normal(seed, row, start, H, ROWS, COLS, SHORT, VECTOR).to(WIDE)
    if RMS:
        products *= tl.load(scale + place.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
    tl.store(sums + position * tl.num_programs(0) + program, tl.sum(products))


def _is_short(dtype: torch.dtype) -> bool:
    """Whether half a word is enough for each of an element's two uniforms, since the result is rounded to 16 bits."""
    return dtype.itemsize == 2


@functools.lru_cache
def _launch(elements: int, width: int, dtype: torch.dtype, short: bool, warps: int) -> tuple[int, int, dict[str, Any]]:
    """Rows, programs and the constants of both kernels."""
    tile = 32 * warps * _THREAD
    # A power of two that divides H leaves no lane idle; at most 16 steps to a row, since the loops are unrolled.
    cols = min(tile, max(width & -width, triton.next_power_of_2(width) // 16))
    rows, rows_at_a_time, each = elements // width, tile // cols, 8 if short else 4
    constants = {
        "H": width,
        "ROWS": rows_at_a_time,
        "COLS": cols,
        "SHORT": short,
        "VECTOR": width % each == 0 and cols % each == 0,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "num_warps": warps,
    }
    return rows, triton.cdiv(rows, rows_at_a_time), constants


class AddNoiseTriton(torch.autograd.Function):
    """`h + sigma * s(h) * delta(seed)`; keeps the seed and `s(h)`, one a row."""

    @staticmethod
    def forward(ctx, hidden, token, levels, position, seed, noise_scale, call, warps=_WARPS):
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        # Triton makes another kernel of an argument above 2**63; the same bits as an int64 need none.
        ctx.seed = seed - 2**64 if seed >= 2**63 else seed
        ctx.levels, ctx.position, ctx.call, ctx.warps = levels, position, call, warps
        ctx.rms, ctx.scale, ctx.place = noise_scale == "rms", None, 0
        ctx.channels = levels.channels if noise_scale == "channel" else None
        if hidden.numel() == 0:
            return out
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        short = _is_short(hidden.dtype)
        rows, programs, constants = _launch(hidden.numel(), hidden.shape[-1], hidden.dtype, short, warps)
        if ctx.rms:
            # Not saved as tensors are: a hook that offloads those would move the buffer of all layers for each.
            ctx.scale, ctx.place = levels.scale(call, position, rows, wide)
        power = None
        if levels.measured:
            power = levels.powers(call, triton.cdiv(programs, _MEASURED_EVERY.value), wide)
        row_bytes = triton.cdiv(constants["H"], constants["COLS"]) * _THREAD * hidden.element_size()
        with torch.cuda.device_of(hidden):
            _forward_kernel[(programs,)](
                hidden,
                out,
                levels.sigma,
                position,
                ctx.scale,
                ctx.place,
                ctx.channels,
                power,
                ctx.seed,
                rows,
                RMS=ctx.rms,
                CHANNEL=ctx.channels is not None,
                KEPT=ctx.rms and row_bytes <= _KEPT_BYTES,
                MEASURED=levels.measured,
                **constants,
            )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.needs_input_grad[1] and grad.numel() > 0:
            contiguous, short = grad.contiguous(), _is_short(grad.dtype)
            rows, programs, constants = _launch(grad.numel(), grad.shape[-1], grad.dtype, short, ctx.warps)
            wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
            sums = ctx.levels.sums(ctx.call, programs, wide)
            with torch.cuda.device_of(grad):
                _backward_kernel[(programs,)](
                    contiguous,
                    ctx.scale,
                    ctx.place,
                    ctx.channels,
                    sums,
                    ctx.position,
                    ctx.seed,
                    rows,
                    RMS=ctx.rms,
                    CHANNEL=ctx.channels is not None,
                    **constants,
                )
        return (grad, *[None] * 7)
