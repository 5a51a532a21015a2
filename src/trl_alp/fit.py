# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Sigma by measurement: the size of the noise follows that of the training-inference mismatch.

A micro-batch of fresh rollouts that the monitor looks at is scored without noise, and then with noise by the update;
its behaviour policy has scored it before. So two divergences are known on the same tokens:

    mismatch = k3(policy, behaviour policy),      noise = k3(perturbed policy, policy)

k3 of the noise grows with the square of sigma, hence the sigma whose noise is `target` times the mismatch:

    sigma <- sigma * sqrt(target * mismatch / noise)

The first measurement sets it, later ones move it by a part of the way in log space, all layers alike.
"""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .mismatch import clamped_gap
from .perturbation import LayerwisePerturbation


logger = get_logger(__name__)  # speaks on the main process only

# Ours, all four; `benchmarks/fit.py` shows what the first measurement is worth.
# Part of the way, in log space, that a measurement after the first moves sigma.
_RATE = 0.25
# Tokens that a measurement takes at least; fewer are kept for the next one.
_ENOUGH = 64
# A divergence, in k3, of what two fp32 implementations differ by anyway: log-probs that agree to 1e-5.
FLOOR = 1e-10
# As much as one measurement may raise sigma: the square holds near what was measured, and too much noise does harm.
_LARGEST_RISE = 10.0


class SigmaFit(TrainerCallback):
    """
    Fits sigma to the mismatch of fresh rollouts, after optimiser steps of which a micro-batch was measured.

    Args:
        perturbation ([`LayerwisePerturbation`]):
            The perturbation.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's; measurements are summed over its processes, so that all have the same sigma.
        target (`float`):
            Divergence of the noise, in units of the mismatch's.
    """

    def __init__(self, perturbation: LayerwisePerturbation, accelerator: Accelerator, target: float) -> None:
        self.perturbation, self.accelerator, self.target = perturbation, accelerator, target
        self._new: torch.Tensor | None = None  # sums over this process since the last optimiser step
        self._kept = [0.0] * 3  # over all processes: k3 of the noise, of the mismatch, tokens; too few so far
        self._fitted = 0  # times, but for those that were cut short
        self._latest: dict[str, float] = {}
        self._said = False

    def record(self, noisy: torch.Tensor, plain: torch.Tensor, behaviour: torch.Tensor, mask: torch.Tensor) -> None:
        """Take the log-probs of one micro-batch of fresh rollouts.  # (B, T) each"""
        noise, mismatch = clamped_gap(noisy, plain), clamped_gap(plain, behaviour)
        known = mask.bool() & noise.isfinite() & mismatch.isfinite()
        wide = torch.float32 if noise.device.type == "mps" else torch.float64  # mps has no float64
        k3 = [torch.where(known, gap.expm1() - gap, 0.0).sum(dtype=wide) for gap in (noise, mismatch)]
        sums = torch.stack([*k3, known.sum()])
        self._new = sums if self._new is None else self._new + sums

    def on_train_begin(self, args, state, control, **kwargs):
        self._new = None  # an interrupted run may have left some

    def on_train_end(self, args, state, control, **kwargs):
        if not self._said:
            self._said = True
            logger.warning(
                f"alp_noise_target={self.target:g}: sigma was never fitted and stayed at {self.level:.2g}. Of fresh "
                f"rollouts {self._kept[2]:.0f} tokens were measured, and {_ENOUGH} are needed: let the run be longer, "
                "lower `alp_monitor_every`, or set `alp_noise_target=None`."
            )

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._new is None:  # in all processes, or in none
            return
        sums = self.accelerator.reduce(self._new, reduction="sum").tolist()
        self._new, self._kept = None, [old + new for old, new in zip(self._kept, sums, strict=True)]
        if self._kept[2] >= _ENOUGH:
            self.fit(*self._kept)
            self._kept = [0.0] * 3

    def fit(self, noise: float, mismatch: float, tokens: float) -> None:
        """Move sigma, given the sums of both divergences, in nats, over so many tokens."""
        noise, mismatch, before = noise / tokens, mismatch / tokens, self.level
        floor = mismatch < FLOOR
        if floor:
            wanted = self.perturbation.sigma_min
        else:
            wanted = before * math.sqrt(self.target * mismatch / max(noise, FLOOR))
        wanted = min(max(wanted, self.perturbation.sigma_min), self.perturbation.sigma_max)
        rate = 1.0 if self._fitted == 0 else _RATE
        cut_short = wanted > before * _LARGEST_RISE
        wanted = min(wanted, before * _LARGEST_RISE)
        with torch.no_grad():
            self.perturbation.log_sigma.add_(rate * math.log(wanted / before))
        self.perturbation.bound_()
        self._fitted += not cut_short  # so that the next measurement goes all of the way that is left
        self._latest = {
            "alp/noise/fit/target": self.target,
            "alp/noise/fit/k3_mismatch": mismatch,
            "alp/noise/fit/k3_noise": noise,
            "alp/noise/fit/sigma": self.level,
        }
        self._say(noise, mismatch, before, floor)

    @property
    def level(self) -> float:
        """Geometric mean of sigma over the layers."""
        return self.perturbation.log_sigma.detach().mean().exp().item()

    def _say(self, noise: float, mismatch: float, before: float, floor: bool) -> None:
        if self._said:
            return
        self._said = True
        found = (
            f"alp_noise_target={self.target:g}: on fresh rollouts the policy is {mismatch:.2g} nats (k3) from the one "
            f"that sampled"
        )
        if floor:
            logger.warning(
                f"{found}, no more than its own arithmetic makes, so there is nothing for the noise to cover: sigma "
                f"goes to alp_sigma_min={self.perturbation.sigma_min:g}. For noise of a fixed size set "
                "`alp_noise_target=None`."
            )
        else:
            # Not `info`, which nobody sees by default: it decides how much noise the run has.
            logger.warning(
                f"{found}, and noise of sigma {before:.2g} moves it by {noise:.2g}. Sigma is now {self.level:.2g}."
            )

    def metrics(self) -> dict[str, float]:
        """The latest fit since the last call."""
        metrics, self._latest = self._latest, {}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the same in all processes after an optimiser step."""
        return {"kept": self._kept, "fitted": self._fitted, "said": self._said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what [`~SigmaFit.state_dict`] gave."""
        self._kept, self._fitted, self._said = state["kept"], state["fitted"], state["said"]
