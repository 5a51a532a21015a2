# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The size of each channel at the input of each perturbed layer, for `noise_scale="channel"`: a running RMS.

A few channels hold most of a hidden state's energy, so noise of 1 % of its RMS is several per cent of an ordinary
channel. Relative to each channel's own size it costs less divergence for as much noise.

    c_l^2  <-  c_l^2 + rate * (mean of h_l^2 over tokens - c_l^2)

The hidden states are those of the policy without noise, in the forwards that the monitor makes anyway. A few tokens
are a hundred times as large as all others (attention sinks, most often the first of a sequence), and one of them in a
hundred would decide the size of its channels: a token far above the median is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .perturbation import LayerwisePerturbation


# Ours, both. Part of the way that a measurement after the first moves the running mean square.
_RATE = 0.25
# A token whose RMS is above so many times the median of its micro-batch is left out. SmolLM2-135M: the first token of
# a sequence is at 160 medians in the middle layers, the others within 3; with it in, noise costs 25 times the k3.
_LARGEST_TOKEN = 4.0


def towers(mean_square: torch.Tensor) -> torch.Tensor:
    """Whether each token is far above the median; NaN is left out of that.  # of any shape"""
    return mean_square > _LARGEST_TOKEN**2 * mean_square.nanmedian()


class ChannelScale(TrainerCallback):
    """
    Measures the size of the channels, and gives it to the perturbation.

    Args:
        perturbation ([`LayerwisePerturbation`]):
            The perturbation; its `channel_rms` is set.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            The trainer's; measurements are summed over its processes, so that all have the same sizes.

    Example:

    ```python
    >>> perturbation = LayerwisePerturbation(model, noise_scale="channel")
    >>> scale = ChannelScale(perturbation)
    >>> with torch.no_grad(), scale.measured(attention_mask):
    ...     model(input_ids, attention_mask=attention_mask)
    >>> scale.update()
    ```
    """

    def __init__(self, perturbation: LayerwisePerturbation, accelerator: Accelerator | None = None) -> None:
        self.perturbation, self.accelerator = perturbation, accelerator
        self._sums: list[torch.Tensor | None] = []  # of each layer, since the latest update: squares, then tokens
        self._rows: list[int] = []  # of the mask that each layer has seen

    @contextmanager
    def measured(self, mask: torch.Tensor | None = None) -> Iterator[None]:
        """Measure in the forwards of the model inside the context; they are not perturbed.

        Args:
            mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                Nonzero for the tokens that count, of all rows in their order. Passed over where the hidden states have
                another shape.
        """
        layers = len(self.perturbation.layer_indices)
        self._sums = self._sums or [None] * layers
        self._rows = [0] * layers
        with self.perturbation.observed(lambda hidden, position: self._add(hidden, position, mask)):
            yield

    def _add(self, hidden: torch.Tensor, position: int, mask: torch.Tensor | None) -> None:
        squares = hidden.detach().to(torch.float32).square()  # (..., T, H)
        size = squares.mean(-1)
        known = size.isfinite() & (size > 0)
        if mask is not None and hidden.dim() == 3 and hidden.shape[1] == mask.shape[1]:
            start = self._rows[position]
            self._rows[position] += len(hidden)
            rows = mask[start : start + len(hidden)]
            known &= rows.to(known.device).bool() if len(rows) == len(hidden) else True
        weight = (known & ~towers(torch.where(known, size, torch.nan))).to(torch.float32)
        squares = torch.where(weight.unsqueeze(-1) > 0, squares, 0.0).flatten(0, -2).sum(0)
        sums = torch.cat([squares, weight.sum().reshape(1)]).to(self.perturbation.log_sigma.device)
        before = self._sums[position]
        self._sums[position] = sums if before is None else before + sums

    def update(self) -> None:
        """Move the running RMS to what was measured since the latest update, if anything was; the first measurement
        sets it. Over several processes all of them have to get here."""
        if not self._sums:  # in all processes, or in none
            return
        width = next(sums.numel() for sums in self._sums if sums is not None)
        none = torch.zeros(width, device=self.perturbation.log_sigma.device)
        sums = torch.stack([none if each is None else each for each in self._sums])  # (L, H + 1)
        self._sums = []
        if self.accelerator is not None:
            sums = self.accelerator.reduce(sums, reduction="sum")
        square, before = sums[:, :-1] / sums[:, -1:].clamp(min=1), self.perturbation.channel_rms
        if before is not None:
            square = torch.where(sums[:, -1:] > 0, before.square().lerp(square, _RATE), before.square())
        # A new tensor: passes whose backward is still to come keep the old one.
        self.perturbation.channel_rms = square.sqrt()

    def on_train_begin(self, args, state, control, **kwargs):
        self._sums = []  # an interrupted run may have left some

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update()
