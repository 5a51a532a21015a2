# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The noise that [`LayerwisePerturbation`] adds to a hidden state, and its gradient.

    out = h + sigma * s(h) * delta(seed),      delta ~ N(0, I),      sigma = exp(log_sigma)
    dL/dh = g,      dL/dlog_sigma = sum(g * sigma * s(h) * delta(seed)),      g = dL/dout

with `s(h) = 1` (absolute) or the detached RMS of each token. `delta` is drawn again in the backward and never stored.

Two backends behind [`add_noise`]: torch, the reference, and one Triton kernel each way for CUDA, in which the noise
never leaves the registers: the forward reads and writes `h` once, the backward reads `g` once. They draw different
noise from the same seed.
"""

from typing import Literal

import torch


try:
    from . import noise_triton
except ImportError:
    noise_triton = None

NoiseScale = Literal["absolute", "rms"]
NoiseBackend = Literal["auto", "torch", "triton"]
NOISE_SCALES: tuple[str, ...] = ("absolute", "rms")
NOISE_BACKENDS: tuple[str, ...] = ("auto", "torch", "triton")
# Positions of each sequence looked at when measuring how much of the noise survives rounding.
_MEASURED_POSITIONS = 64
# ROCm counts as CUDA in torch, but has no part in these kernels.
_HAS_TRITON = noise_triton is not None and torch.version.hip is None


def add_noise(
    hidden: torch.Tensor,
    log_sigma: torch.Tensor,
    seed: int | torch.Tensor,
    noise_scale: NoiseScale = "absolute",
    backend: NoiseBackend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Add Gaussian noise of trainable size to a hidden state.

    The noise of an element depends on the seed and on the element's index in the row-major order of `hidden` alone,
    not on memory layout; the same seed gives the same noise for the same shape, device and backend. Computed in fp32
    (fp64 for fp64) and rounded once, so that as much of the noise survives as the format of `hidden` can hold.

    Args:
        hidden (`torch.Tensor` of shape `(..., T, H)`):
            Hidden state, of any floating-point dtype, any number of leading dimensions and any strides.
        log_sigma (`torch.Tensor` of shape `()`):
            Natural logarithm of the noise level, on the device of `hidden`.
        seed (`int` or `torch.Tensor` of shape `()`):
            Seed in `[0, 2**64)`. A tensor must be on the CPU; either way the kernels take it as a launch argument, and
            nothing waits for a device.
        noise_scale (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`: noise `sigma * delta`. `"rms"`: noise `sigma * RMS(h) * delta`, with the detached RMS of
            each token.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"`, `"triton"`, or `"auto"`: Triton for a tensor on an NVIDIA GPU where Triton is installed, else
            torch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The perturbed hidden state, contiguous, of the shape and dtype of
            `hidden`; and the mean square of the noise (asked, realised after rounding) over a sample of positions,
            shape `(2,)`, detached, NaN if there are none.
    """
    seed = int(seed)
    if backend == "triton" or (backend == "auto" and _HAS_TRITON and hidden.is_cuda):
        return noise_triton.AddNoiseTriton.apply(hidden, log_sigma, seed, noise_scale)
    scale = None
    if noise_scale == "rms":
        wide = hidden.detach().to(_at_least_fp32(hidden.dtype))
        scale = wide.square().mean(dim=-1, keepdim=True).sqrt()  # (..., T, 1)
    perturbed = _AddNoise.apply(hidden, log_sigma, scale, seed)
    return perturbed, _noise_power(hidden.detach(), perturbed.detach(), log_sigma.detach().exp(), scale)


def check_noise_scale(noise_scale: str, name: str = "noise_scale") -> None:
    """Raise a `ValueError`, which calls it `name`, unless `noise_scale` is known."""
    if noise_scale not in NOISE_SCALES:
        raise ValueError(f"{name}={noise_scale!r} is unknown. Use one of {list(NOISE_SCALES)}.")


def check_noise_backend(backend: str, use_cpu: bool = False, name: str = "noise_backend") -> None:
    """Raise a `ValueError`, which calls it `name`, unless `backend` is known and can run here (with `use_cpu`, on the
    CPU)."""
    if backend not in NOISE_BACKENDS:
        raise ValueError(f"{name}={backend!r} is unknown. Use one of {list(NOISE_BACKENDS)}.")
    if backend != "triton":
        return
    way_out = 'use `"auto"`, which falls back to torch.'
    if noise_triton is None:
        raise ValueError(f"{name}='triton' needs Triton: `pip install triton`, or {way_out}")
    if not noise_triton.INTERPRETED and (use_cpu or not _HAS_TRITON or not torch.cuda.is_available()):
        raise ValueError(f"{name}='triton' needs an NVIDIA GPU, and this run uses none; {way_out}")


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- torch ----


def _standard_normal(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw N(0, 1) of `like`'s shape on its device, in fp32 or wider, from a generator of its own."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=_at_least_fp32(like.dtype))


class _AddNoise(torch.autograd.Function):
    """The reference. It keeps the seed instead of `delta` for its backward."""

    @staticmethod
    def forward(ctx, hidden, log_sigma, scale, seed):
        # hidden (..., H), log_sigma (), scale (..., 1) or None
        noise = _standard_normal(hidden, seed).mul_(log_sigma.exp())
        if scale is not None:
            noise.mul_(scale)
        ctx.save_for_backward(log_sigma, scale)
        ctx.seed = seed
        return noise.add_(hidden).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        log_sigma, scale = ctx.saved_tensors
        grad_log_sigma = None
        if ctx.needs_input_grad[1]:
            product = _standard_normal(grad, ctx.seed).mul_(grad)
            if scale is not None:
                product.mul_(scale)
            grad_log_sigma = (product.sum() * log_sigma.exp()).to(log_sigma.dtype)
        return grad, grad_log_sigma, None, None


def _noise_power(hidden, perturbed, sigma, scale):
    sample = (..., slice(None, None, max(1, hidden.shape[-2] // _MEASURED_POSITIONS)), slice(None))
    hidden, perturbed = hidden[sample], perturbed[sample]
    realised = (perturbed.to(_at_least_fp32(hidden.dtype)) - hidden).square().mean(-1, keepdim=True)
    asked = sigma.square().expand_as(realised) if scale is None else sigma.square() * scale[sample].square()
    # All-zero rows are the embedding of the padding token; around 0 every format resolves any noise.
    real = hidden.any(-1, keepdim=True)
    return torch.stack([(asked * real).mean(), (realised * real).mean()])
