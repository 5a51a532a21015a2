# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The noise that [`LayerwisePerturbation`] adds to a hidden state, and its gradient.

    out = h + sigma * s(h) * delta(seed),      delta ~ N(0, I),      sigma = exp(log_sigma)
    dL/dh = g,      dL/dlog_sigma = sum(g * sigma * s(h) * delta(seed)),      g = dL/dout

with `s(h) = 1` (absolute), the detached RMS of each token, or a given size of each channel. `delta` is drawn again in
the backward and never stored.

Two backends behind [`add_noise`]: torch, the reference, and one Triton kernel each way for CUDA, in which the noise
never leaves the registers: the forward reads and writes `h` once, the backward reads `g` once. They draw different
noise from the same seed. A layer does that and no more: what is done once for all layers of a scoring pass is in
[`NoiseLevels`].
"""

from collections.abc import Callable
from typing import Literal

import torch


try:
    from . import noise_triton
except ImportError:
    noise_triton = None

NoiseScale = Literal["absolute", "rms", "channel"]
NoiseBackend = Literal["auto", "torch", "triton"]
NOISE_SCALES: tuple[str, ...] = ("absolute", "rms", "channel")
NOISE_BACKENDS: tuple[str, ...] = ("auto", "torch", "triton")
# Positions of each sequence looked at when measuring how much of the noise survives rounding.
_MEASURED_POSITIONS = 64
# ROCm counts as CUDA in torch, but has no part in these kernels.
_HAS_TRITON = noise_triton is not None and torch.version.hip is None


class NoiseLevels:
    """
    The noise levels of all layers in one scoring pass, on one device, and what is done once for all of them.

    `exp(log_sigma)` is taken once. In the backward each layer leaves `sum(g * s(h) * delta)` in its row of a buffer;
    one node of autograd, to which `token` leads from every layer, sums the rows when the last layer is done and hands
    `log_sigma` its gradient. Splitting `log_sigma` into one tensor a layer would cost five kernels each instead, or
    fail where reentrant checkpointing goes through the node that splits it once for every layer.

    Args:
        log_sigma (`torch.Tensor` of shape `(L,)`):
            Natural logarithm of the noise level of each layer.
        device (`torch.device`, *optional*):
            Device of the layers, where it is not that of `log_sigma`.
        measured (`bool`, *optional*, defaults to `False`):
            Whether the forward measures how much of the noise survives rounding.
        channels (`torch.Tensor` of shape `(L, H)`, *optional*):
            Size of each channel at each layer, for the noise scale `"channel"`.

    Attributes:
        sigma (`torch.Tensor` of shape `(L,)`):
            Noise levels, detached.
        token (`torch.Tensor` of shape `()`):
            Leads the gradient to `log_sigma`. `None` if that does not require one.
    """

    def __init__(
        self,
        log_sigma: torch.Tensor,
        device: torch.device | None = None,
        measured: bool = False,
        channels: torch.Tensor | None = None,
    ) -> None:
        self.sigma = log_sigma.detach().exp().to(device or log_sigma.device)
        self.channels = None if channels is None else channels.to(self.sigma.device)
        self.of_layer = self.sigma.unbind()
        self.measured, self.closed = measured, False
        self._sums: _Buffers = {}
        self._powers: _Buffers = {}
        self._scales: _Buffers = {}
        self.token = None
        if log_sigma.requires_grad:
            with torch.enable_grad():  # reentrant checkpointing runs its forward without
                self.token = _Levels.apply(log_sigma, self.sigma, self._sums)

    def close(self) -> None:
        """End the forward of the pass: what its layers compute from now on, they compute again for their backward."""
        self.measured, self.closed = False, True
        self._scales.clear()  # the graph keeps those it needs

    def sums(self, call: int, parts: int, dtype: torch.dtype) -> torch.Tensor:
        """Where the layers leave the parts of their gradients in one call of the model.  # (L, parts)"""
        return _once(self._sums, self.sigma.new_zeros, (len(self.sigma), parts), call, dtype)

    def powers(self, call: int, parts: int, dtype: torch.dtype) -> torch.Tensor:
        """Where they leave the mean square of their noise, asked and realised, of parts of equal size.
        # (L, parts, 2)"""
        return _once(self._powers, self.sigma.new_zeros, (len(self.sigma), parts, 2), call, dtype)

    def scale(self, call: int, position: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """Where the layer at `position` leaves the RMS of each row, and its place there.  # (L or 1, rows)"""
        if self.closed:
            return self.sigma.new_empty(1, rows, dtype=dtype), 0
        return _once(self._scales, self.sigma.new_empty, (len(self.sigma), rows), call, dtype), position

    def take_power(self) -> torch.Tensor:
        """Mean square of each layer's noise, asked and realised, added up over the calls of the model; once.
        # (L, 2)"""
        none = self.sigma.new_zeros(len(self.sigma), 2)
        power = sum((powers.mean(1).to(none) for powers in self._powers.values()), none)
        self._powers.clear()
        return power


_Buffers = dict[tuple, torch.Tensor]


def _once(buffers: _Buffers, new: Callable, shape: tuple[int, ...], call: int, dtype: torch.dtype) -> torch.Tensor:
    """The buffer of that shape and dtype for one call of the model, made when it is first asked for."""
    key = (call, shape, dtype)
    if key not in buffers:
        buffers[key] = new(shape, dtype=dtype)
    return buffers[key]


class _Levels(torch.autograd.Function):
    """Carries nothing forward. Its backward comes after that of all layers, and may come several times."""

    @staticmethod
    def forward(ctx, log_sigma, sigma, sums):
        ctx.sigma, ctx.sums, ctx.device, ctx.dtype = sigma, sums, log_sigma.device, log_sigma.dtype
        return sigma.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        # A sum for each part and then theirs, in a fixed order: the same bits every time, unlike with atomics.
        total = sum((sums.sum(1) for sums in ctx.sums.values()), torch.zeros_like(ctx.sigma))
        ctx.sums.clear()
        return (total * ctx.sigma).to(ctx.device, ctx.dtype), None, None


def add_noise(
    hidden: torch.Tensor,
    levels: NoiseLevels,
    position: int,
    seed: int | torch.Tensor,
    noise_scale: NoiseScale = "absolute",
    backend: NoiseBackend = "auto",
    call: int = 0,
    trained: bool = True,
) -> torch.Tensor:
    """
    Add Gaussian noise of trainable size to the hidden state of one layer.

    The noise of an element depends on the seed and on the element's index in the row-major order of `hidden` alone,
    not on memory layout; the same seed gives the same noise for the same shape, dtype, device and backend. Computed in
    fp32 (fp64 for fp64) and rounded once, so that as much of the noise survives as the format of `hidden` can hold.

    Args:
        hidden (`torch.Tensor` of shape `(..., T, H)`):
            Hidden state, of any floating-point dtype, any number of leading dimensions and any strides.
        levels ([`NoiseLevels`]):
            Those of the scoring pass, on the device of `hidden`.
        position (`int`):
            Which of them is this layer's.
        seed (`int` or `torch.Tensor` of shape `()`):
            Seed in `[0, 2**64)`. A tensor must be on the CPU; either way the kernels take it as a launch argument, and
            nothing waits for a device.
        noise_scale (`str`, *optional*, defaults to `"absolute"`):
            `"absolute"`: noise `sigma * delta`. `"rms"`: noise `sigma * RMS(h) * delta`, with the detached RMS of
            each token. `"channel"`: noise `sigma * c * delta`, with the layer's row `c` of `levels.channels`.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"`, `"triton"`, or `"auto"`: Triton for a tensor on an NVIDIA GPU where Triton is installed, else
            torch.
        call (`int`, *optional*, defaults to 0):
            Which call of the layer in this pass it is; the buffers of two calls are apart.
        trained (`bool`, *optional*, defaults to `True`):
            Whether this layer's sigma gets a gradient, if `log_sigma` requires one.

    Returns:
        `torch.Tensor`: The perturbed hidden state, contiguous, of the shape and dtype of `hidden`.
    """
    triton = backend == "triton" or (backend == "auto" and _HAS_TRITON and hidden.is_cuda)
    function = noise_triton.AddNoiseTriton if triton else _AddNoise
    return function.apply(hidden, levels.token if trained else None, levels, position, int(seed), noise_scale, call)


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
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- torch ----


def _standard_normal(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw N(0, 1) of `like`'s shape on its device, in fp32 or wider, from a generator of its own."""
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=_at_least_fp32(like.dtype))


class _AddNoise(torch.autograd.Function):
    """The reference. It keeps the seed instead of `delta` for its backward."""

    @staticmethod
    def forward(ctx, hidden, token, levels, position, seed, noise_scale, call):
        scale, sigma = None, levels.of_layer[position]
        if noise_scale == "rms":
            scale = hidden.to(_at_least_fp32(hidden.dtype)).square().mean(dim=-1, keepdim=True).sqrt_()  # (..., T, 1)
        elif noise_scale == "channel":
            scale = levels.channels[position]  # (H,)
        noise = _standard_normal(hidden, seed).mul_(sigma)
        if scale is not None:
            noise.mul_(scale)
        out = noise.add_(hidden).to(hidden.dtype)
        if levels.measured:
            levels.powers(call, 1, noise.dtype)[position, 0] = _noise_power(hidden, out, sigma, scale)
        ctx.save_for_backward(scale)
        ctx.levels, ctx.position, ctx.seed, ctx.call = levels, position, seed, call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.needs_input_grad[1]:
            (scale,) = ctx.saved_tensors
            product = _standard_normal(grad, ctx.seed).mul_(grad)
            if scale is not None:
                product.mul_(scale)
            ctx.levels.sums(ctx.call, 1, product.dtype)[ctx.position].copy_(product.sum())
        return (grad, *[None] * 6)


def _noise_power(hidden, perturbed, sigma, scale):
    sample = (..., slice(None, None, max(1, hidden.shape[-2] // _MEASURED_POSITIONS)), slice(None))
    hidden, perturbed = hidden[sample], perturbed[sample]
    realised = (perturbed.to(_at_least_fp32(hidden.dtype)) - hidden).square().mean(-1, keepdim=True)
    asked = sigma.square().expand_as(realised)
    if scale is not None:
        asked = asked * (scale if scale.dim() == 1 else scale[sample]).square().mean(-1, keepdim=True)
    # All-zero rows are the embedding of the padding token; around 0 every format resolves any noise.
    real = hidden.any(-1, keepdim=True)
    return torch.stack([(asked * real).mean(), (realised * real).mean()])
