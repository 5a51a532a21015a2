# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Layerwise perturbation, the first half of ALP (arXiv 2603.19470, section 3).

During the policy update, and only then, the input of every decoder layer `l` becomes

    h_l  <-  h_l + sigma_l * s(h_l) * delta_l,      delta_l ~ N(0, I),      sigma_l = exp(log_sigma_l)

before the layer's norm and residual branch, with one trainable scalar `log_sigma_l` per layer. `s(h) = 1` is the
paper's absolute scale; `s(h) = RMS(h)`, per token and detached, makes sigma mean the same at every depth and in every
model; the size of each channel, which `channels.py` measures, makes it mean the same in each of them too.

The noise is replayed, never stored: forward and backward draw the same `delta` from the same seed, so the perturbation
costs no activation memory and the global random state is never touched. `noise.py` computes the sum and its gradient,
here it enters the model. This module knows nothing of TRL.

A scoring pass is what runs inside `LayerwisePerturbation.applied`. Gradient checkpointing may run its layers again in
backward, and must then meet the same noise; a forward of the same layers that belongs to no pass must meet none. The
two are told apart by autograd's sequence numbers, which only ever grow: the node whose backward asks for a layer again
was made between the beginning and the end of its pass.
"""

import inspect
import math
import numbers
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .layers import find_decoder_layers, parse_layers
from .noise import NoiseBackend, NoiseLevels, NoiseScale, add_noise, check_noise_backend, check_noise_scale


# Odd multiplier (2**64 / golden ratio): spreads neighbouring seeds over the whole range, and being odd it maps
# distinct numbers to distinct numbers, both modulo 2**64 and modulo 2**32.
_ODD_MULTIPLIER = 0x9E3779B97F4A7C15
# How far the seeds of the forwards of one pass lie apart: more than a run has micro-batches, few enough to keep 16
# forwards of 32 layers distinct in the 32 bits of a seed that torch's CPU generator keeps.
_FORWARD_STRIDE = 2**23
# Scoring passes whose backward may still come. A trainer forgets them at each step; this bounds those who do not.
_REMEMBERED_PASSES = 1024


def noise_seed(run_seed: int, micro_batch: int) -> int:
    """
    Seed of one micro-batch's noise, to be passed to [`LayerwisePerturbation.applied`].

    Args:
        run_seed (`int`):
            Seed of the run.
        micro_batch (`int`):
            Index of the micro-batch over the whole run and all processes: `micro_step * world_size + rank`. One
            process with two accumulation steps therefore draws the same noise as two processes with one.

    Returns:
        `int`: A seed in `[0, 2**64)`, different for every micro-batch of the run.
    """
    return (run_seed * _ODD_MULTIPLIER + micro_batch) % 2**64


class ScoringPass:
    """
    A scoring pass: its noise, and what a recompute in backward has to know of the pass whose layers it runs again.

    Args:
        seed (`int`):
            Seed of its noise.
        log_sigma (`torch.Tensor` of shape `(L,)`):
            Natural logarithm of the noise level of each perturbed layer.
        measured (`bool`):
            Whether to measure how much of the noise survives rounding.
        channels (`torch.Tensor` of shape `(L, H)`, *optional*):
            Size of each channel at each perturbed layer, where the noise is relative to that.
    """

    def __init__(self, seed: int, log_sigma: torch.Tensor, measured: bool, channels: torch.Tensor | None = None):
        self.seed, self.log_sigma, self.measured, self.channels = seed, log_sigma, measured, channels
        self.began = torch._C._autograd._get_sequence_nr()
        self.ended: int | float = math.inf  # while it is open
        # Of each perturbed layer, the sequence number at each of its calls.
        self.calls: list[list[int]] = [[] for _ in range(len(log_sigma))]
        self.levels: dict[torch.device, NoiseLevels] = {}  # more than one where a model is spread over devices

    def levels_on(self, device: torch.device) -> NoiseLevels:
        """The noise levels of the layers that run on a device."""
        if device not in self.levels:
            self.levels[device] = NoiseLevels(self.log_sigma, device, self.measured, self.channels)
        return self.levels[device]

    def close(self) -> None:
        """End its forward."""
        self.ended = torch._C._autograd._get_sequence_nr()
        for levels in self.levels.values():
            levels.close()

    def take_power(self) -> torch.Tensor:
        """Mean square of the noise of each perturbed layer, asked and realised; zeros where it did not run.
        # (L, 2)"""
        none = self.log_sigma.new_zeros(len(self.log_sigma), 2)
        return sum((levels.take_power().to(none) for levels in self.levels.values()), none)

    @property
    def perturbed(self) -> bool:
        """Whether the noise entered at least one layer."""
        return any(self.calls)

    def add_call(self, position: int) -> int:
        """Note a call of a layer, and return which one of this pass it is, from 0."""
        # Reentrant checkpointing runs the layer without gradient, inside a node that has its number already.
        inside_a_node = not torch.is_grad_enabled()
        self.calls[position].append(torch._C._autograd._get_sequence_nr() - inside_a_node)
        return len(self.calls[position]) - 1

    def call_of(self, position: int, number: int) -> int:
        """Which call of a layer made the node with that sequence number."""
        return bisect_right(self.calls[position], number) - 1


class _InputHook:
    """Forward pre-hook of one decoder layer.

    It refers to its perturbation weakly, so the hook alone keeps nothing alive; a copy or a pickle of the model
    carries an inert hook, so no copy is ever perturbed.
    """

    def __init__(self, perturbation: "LayerwisePerturbation", position: int, input_name: str):
        self.perturbation = weakref.ref(perturbation)
        self.switch, self.seen = perturbation.switch, perturbation.seen
        self.position = position
        self.input_name = input_name

    def __reduce__(self):
        return (_inert_hook, ())

    # Outside a scoring pass `torch.compile` sees a hook that sets a flag, and the model stays one graph.
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if torch.is_grad_enabled():
            self.seen["ran"] = True
        return self.perturb_input(args, kwargs) if self.switch["on"] else None

    # Inside one the graph breaks here: a Python-int seed would recompile at every step, and a generator cannot be
    # traced.
    @torch.compiler.disable
    def perturb_input(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        perturb = self.perturbation().perturb
        if args:
            return (perturb(args[0], self.position), *args[1:]), kwargs
        return args, {**kwargs, self.input_name: perturb(kwargs[self.input_name], self.position)}


def _inert_hook():
    return _do_nothing


def _do_nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    return None


class LayerwisePerturbation(nn.Module):
    """
    Trainable Gaussian noise on the input of a model's decoder layers (arXiv 2603.19470, section 3).

    It lives beside the model, not in it: nothing is added to `model.named_parameters()` or to its state dict, so
    weight sync, PEFT, sharding and saving see the plain model. Outside [`~LayerwisePerturbation.applied`] the model
    computes exactly what it computed before.

    Args:
        model (`torch.nn.Module`):
            A Hugging Face decoder language model, bare or wrapped (PEFT, DDP, FSDP, DeepSpeed, `torch.compile`).
        layers (`list[int]`, `int` or `str`, *optional*):
            Which decoder layers to perturb: `None` for all (the paper's best, its layer ablation), an index, a list of
            indices, or a string such as `"0-5"`, `"first:6"`, `"last:5"` or `"0,3,7"`.
        sigma_init (`float`, *optional*, defaults to `0.01`):
            Initial noise level of every layer: a standard deviation (`"absolute"`), or a fraction of the RMS of the
            hidden state (`"rms"`) or of each of its channels (`"channel"`).
        learnable (`bool`, *optional*, defaults to `True`):
            Whether `log_sigma` gets gradients.
        noise_scale (`str`, *optional*, defaults to `"rms"`):
            `"rms"`, `sigma * RMS(h) * delta` with the detached RMS of each token; `"channel"`, `sigma * c * delta`
            with the size `c` of each channel at each layer, which [`ChannelScale`] measures; or `"absolute"`, the
            paper's `sigma * delta`. The default `sigma_init` is meant for `"rms"`.
        noise_backend (`str`, *optional*, defaults to `"auto"`):
            What adds the noise, see [`noise.add_noise`]: `"torch"`, `"triton"`, or `"auto"` for Triton on an NVIDIA
            GPU where it is installed and torch elsewhere. The backends draw different noise from the same seed.
        sigma_min (`float`, *optional*, defaults to `1e-6`):
            Lower bound that [`~LayerwisePerturbation.bound_`] holds sigma to.
        sigma_max (`float`, *optional*, defaults to `0.5`):
            Upper bound, likewise.

    Attributes:
        log_sigma (`torch.nn.Parameter` of shape `(L,)`, fp32):
            Natural logarithm of sigma, one entry per perturbed layer.
        layer_indices (`list[int]`):
            The perturbed layers, in the order of `log_sigma`.
        num_layers (`int`):
            How many decoder layers the model has.
        measuring (`bool`):
            Whether the passes that begin from now on measure how much of their noise survives rounding, for
            [`~LayerwisePerturbation.effective_noise`]. True at first.
        channel_rms (`torch.Tensor` of shape `(L, H)`, *optional*):
            Size of each channel at each perturbed layer, of the noise scale `"channel"`. `None` until it is measured.
        first_trained (`int`):
            Sigma of the layers below this one gets no gradient; their noise stays. 0 at first, see
            [`first_trained_layer`].

    Raises:
        `ValueError`: If the model has no decoder layers, `layers` does not fit it, `noise_scale` or
            `noise_backend` is unknown, the backend cannot run here, or the sigmas are not finite, positive and ordered
            `sigma_min <= sigma_init <= sigma_max`.

    Example:

    ```python
    >>> perturbation = LayerwisePerturbation(model, sigma_init=0.01)
    >>> with perturbation.applied(seed=0):
    ...     loss = model(input_ids, labels=input_ids).loss
    >>> loss.backward()
    >>> perturbation.log_sigma.grad.shape
    torch.Size([24])
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | int | str | None = None,
        sigma_init: float = 0.01,
        learnable: bool = True,
        noise_scale: NoiseScale = "rms",
        sigma_min: float = 1e-6,
        sigma_max: float = 0.5,
        noise_backend: NoiseBackend = "auto",
    ) -> None:
        super().__init__()
        check_sigma(sigma_init, sigma_min, sigma_max)
        check_noise_scale(noise_scale)
        check_noise_backend(noise_backend)
        decoder_layers = find_decoder_layers(model)
        self.num_layers = len(decoder_layers)
        self.layer_indices = parse_layers(layers, self.num_layers)
        self.noise_scale, self.noise_backend = noise_scale, noise_backend
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        size = (len(self.layer_indices),)
        self.log_sigma = nn.Parameter(
            torch.full(size, math.log(sigma_init), dtype=torch.float32), requires_grad=learnable
        )
        self.measuring = True
        # Mean square of the noise (asked, realised) at each layer, over a sample of positions of the latest pass.
        self.register_buffer("noise_power", torch.zeros(*size, 2), persistent=False)
        self.register_buffer("channel_rms", None, persistent=False)
        self.observe: Callable[[torch.Tensor, int], None] | None = None
        self.hidden_dtype: torch.dtype | None = None  # of the latest perturbed forward
        self.first_trained = 0
        self.scoring: ScoringPass | None = None  # the one that is open
        self.passes: deque[ScoringPass] = deque(maxlen=_REMEMBERED_PASSES)  # closed; their backward may still come
        # Shared with the hooks: whether they have a pass to look at, and whether a forward with gradient reached them.
        self.switch, self.seen = {"on": False}, {"ran": False}
        handles = []
        for position, index in enumerate(self.layer_indices):
            layer = decoder_layers[index]
            hook = _InputHook(self, position, next(iter(inspect.signature(layer.forward).parameters)))
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self.remove = weakref.finalize(self, _remove_hooks, handles)
        self.remove.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy awaits no backward; what the original awaits cannot be copied.
        return self.__dict__ | {"scoring": None, "observe": None, "passes": deque(maxlen=_REMEMBERED_PASSES)}

    @property
    def sigma(self) -> torch.Tensor:
        """Noise level of each perturbed layer, detached.  # (L,)"""
        return self.log_sigma.detach().exp()

    @contextmanager
    def applied(self, seed: int) -> Iterator[ScoringPass]:
        """
        A scoring pass: perturb every forward of the model inside the context.

        The backward may come when the context is closed, with other passes and plain forwards in between: where
        gradient checkpointing runs a layer again, it meets the noise of its own pass.

        Args:
            seed (`int`):
                Seed of the noise. The same seed gives the same noise for the same input shape, device and backend; no
                two (seed, layer) pairs share a stream, nor do two forwards of one pass. See [`noise_seed`].

        Raises:
            `RuntimeError`: If a pass is open already, or the size of the channels is not known yet.
        """
        if self.scoring is not None:
            raise RuntimeError("`applied` is already active; leave the outer context first.")
        if self.noise_scale == "channel" and self.channel_rms is None:
            raise RuntimeError('noise_scale="channel" needs the size of each channel: measure it by `ChannelScale`.')
        scoring = self.scoring = ScoringPass(int(seed), self.log_sigma, self.measuring, self.channel_rms)
        self.switch["on"] = True
        try:
            yield scoring
            scoring.close()
            if scoring.measured:
                self.noise_power = scoring.take_power()
            self.passes.append(scoring)
        finally:
            self.scoring = None
            self.switch["on"] = len(self.passes) > 0

    @contextmanager
    def observed(self, observe: Callable[[torch.Tensor, int], None]) -> Iterator[None]:
        """
        Look at the inputs of the perturbed layers in every forward of the model inside the context; none is perturbed.

        Args:
            observe (`Callable`):
                Called with the hidden state, of shape `(..., T, H)`, and the position of the layer in `layer_indices`.

        Raises:
            `RuntimeError`: If a pass is open.
        """
        if self.scoring is not None:
            raise RuntimeError("`applied` is active; leave its context first.")
        self.observe, self.switch["on"] = observe, True
        try:
            yield
        finally:
            self.observe = None
            self.switch["on"] = len(self.passes) > 0

    def forget_passes(self) -> None:
        """Forget the closed passes; to be called when their backward is done, or will not come."""
        self.passes.clear()
        self.switch["on"] = self.scoring is not None

    def perturb(self, hidden: torch.Tensor, position: int) -> torch.Tensor:
        """Add the noise of the perturbed layer at `position` to its input, if this forward belongs to a scoring pass.
        # (B, T, H) -> (B, T, H)"""
        if self.observe is not None:
            self.observe(hidden, position)
            return hidden
        scoring, call = self._pass_of_this_forward(position)
        if scoring is None:
            return hidden
        index = self.layer_indices[position]
        # Odd multiples of distinct numbers stay distinct modulo 2**32 too, which is all that torch's CPU generator
        # keeps of a seed.
        seed = ((scoring.seed + call * _FORWARD_STRIDE) * self.num_layers + index) * _ODD_MULTIPLIER % 2**64
        self.hidden_dtype = hidden.dtype
        return add_noise(
            hidden, scoring.levels_on(hidden.device), position, seed, self.noise_scale, self.noise_backend,
            call=call, trained=index >= self.first_trained,
        )  # fmt: skip

    def _pass_of_this_forward(self, position: int) -> tuple[ScoringPass | None, int]:
        """The pass of the forward that a layer is in, the open one or in backward the one it is recomputed for, and
        which of the layer's calls in that pass it is."""
        if torch._C._current_graph_task_id() == -1:  # not in backward
            return self.scoring, 0 if self.scoring is None else self.scoring.add_call(position)
        number = torch._C._current_autograd_node()._sequence_nr()
        passes = [*self.passes, *([] if self.scoring is None else [self.scoring])]
        scoring = next((each for each in passes if each.began <= number < each.ended), None)
        return scoring, 0 if scoring is None else scoring.call_of(position, number)

    def effective_noise(self) -> torch.Tensor:
        """
        Fraction of the asked noise that survived rounding at each layer's input, in the latest pass that measured it.

        Realised over asked standard deviation: about 1 where the format of the hidden states resolves the noise, 0
        where adding it changed no bit. Measured on a sample of positions; NaN for layers that did not run, and before
        the first pass.

        Returns:
            `torch.Tensor` of shape `(L,)`.
        """
        asked, realised = self.noise_power.unbind(-1)
        return (realised / asked).sqrt()

    @torch.no_grad()
    def bound_(self) -> None:
        """Hold sigma to `[sigma_min, sigma_max]`, in place; to be called after each optimiser step."""
        self.log_sigma.clamp_(math.log(self.sigma_min), math.log(self.sigma_max))

    def extra_repr(self) -> str:
        return f"layers={self.layer_indices} of {self.num_layers}, noise_scale={self.noise_scale!r}"


def check_sigma(sigma_init: float, sigma_min: float, sigma_max: float, prefix: str = "") -> None:
    """Raise a `ValueError` unless `0 < sigma_min <= sigma_init <= sigma_max`, all finite; `prefix` comes before the
    names."""
    for name, value in (("sigma_init", sigma_init), ("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if not is_finite_number(value) or value <= 0:
            raise ValueError(f"{prefix}{name}={value!r} must be a finite, positive number.")
    if not sigma_min <= sigma_init <= sigma_max:
        raise ValueError(
            f"{prefix}sigma_min={sigma_min} <= {prefix}sigma_init={sigma_init} <= {prefix}sigma_max={sigma_max} must "
            "hold."
        )


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a real number, no bool, and finite."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _remove_hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
