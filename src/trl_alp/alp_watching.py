# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What an [`ALPGRPOTrainer`] is watched for besides what `watching.py` watches in any trainer: clipping, sigma, the
noise, and now and then the policy without it."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate.logging import get_logger

from .mismatch import clamped_gap
from .pool import Pool
from .ratio import log_importance_ratio
from .watching import Loss, Watcher


logger = get_logger(__name__)  # speaks on the main process only

# Loss types of TRL that clip the ratio; the others (cispo, sapo, vespo) bound it in their own way.
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Realised over asked standard deviation of the noise, below which it is said that rounding eats it.
_LOST_NOISE = 0.5
# Share of tokens clipped before any update since their generation that earns a warning.
_CLIPPED_MISMATCH = 0.1


class ALPWatcher(Watcher):
    """
    Watches an [`ALPGRPOTrainer`]: also how much is clipped, the size of the noise and of sigma, and, in the updates
    that `alp_monitor_every` chooses, the policy without noise.

    Args:
        trainer ([`ALPGRPOTrainer`]):
            The trainer, with its `perturbation` and `sigma_optimizer`.
    """

    def __init__(self, trainer) -> None:
        super().__init__(trainer)
        self._sigma, self._effective = Pool(), Pool()

    def is_due(self) -> bool:
        """Whether the policy without noise is looked at: once in `alp_monitor_every` optimiser steps, and at the first
        fresh rollouts in each two times as many, whose mismatch is the engine's alone."""
        trainer, args = self.trainer, self.trainer.args
        step, every, age = trainer.state.global_step, args.alp_monitor_every, self.updates - self.generated_at
        if not args.alp_enabled or every == 0 or not self.is_first_micro_batch:
            return False
        lifetime = max(1, args.steps_per_generation * trainer.num_iterations // args.gradient_accumulation_steps)
        return is_monitored(step, every) or (age == 0 and is_first_fresh(step, every, lifetime))

    def look_without_noise(self, score: Callable, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probs and entropies of the micro-batch without noise, if this update is monitored.  # (B, T) each"""
        due, scale = self.is_due(), self.trainer.channel_scale
        # The noise of this very micro-batch needs the size of the channels.
        first = scale is not None and self.trainer.perturbation.channel_rms is None
        # How much of the noise survives rounding changes slowly, and looking takes time in every layer.
        self.trainer.perturbation.measuring = due or self._effective.is_empty
        if not due and not first:
            return None
        mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
        kwargs = kwargs | {"compute_entropy": True, "compute_aux_loss": False}
        device = self.trainer.accelerator.device
        # A policy with dropout draws from the global generator; looking must not change the run.
        measured = nullcontext() if scale is None else scale.measured(mask)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), measured:
            looked = score(*args, **kwargs)[:2]
        if first:
            scale.update()
        return looked if due else None

    def measure(self, loss: Loss, logps: torch.Tensor, noise_off: tuple | None) -> None:
        super().measure(loss, logps, noise_off)
        if noise_off is not None:
            plain, entropies = noise_off
            behaviour = next(each for each in (loss.engine_logps, loss.old_logps, plain) if each is not None)
            staleness, engine = self.updates - self.generated_at, loss.engine_logps is not None
            means = {"entropy": (entropies, loss.mask), **self._clip_means(loss, plain, behaviour, staleness)}
            self.trainer.instruments.record("noise_off", plain, behaviour, loss.mask, staleness, means, engine)
            if self.trainer.sigma_fit is not None and staleness == 0:
                # Without an engine the behaviour policy is the policy itself, whatever its arithmetic makes of that.
                self.trainer.sigma_fit.record(logps, plain, behaviour if engine else plain, loss.mask)
        if self.trainer.args.alp_enabled:
            perturbation = self.trainer.perturbation
            self._sigma.add(perturbation.sigma)
            if perturbation.measuring:
                self._effective.add(perturbation.effective_noise())
                perturbation.measuring = False

    def further_means(self, loss, logps, behaviour, staleness, noise_off):
        means = self._clip_means(loss, logps, behaviour, staleness)
        gap = torch.zeros_like(logps) if noise_off is None else clamped_gap(logps, noise_off[0])
        return means | {"noise/kl/k3": (gap.expm1() - gap, loss.mask * (noise_off is not None))}

    def _clip_means(self, loss, logps, behaviour, staleness) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Which tokens the loss clips, as values and weights (B, T)."""
        if self.trainer.loss_type not in CLIPPED_LOSSES or loss.advantages is None:
            return {}
        ratio = log_importance_ratio(logps, behaviour, loss.mask, self.trainer.instruments.level).exp()
        epsilon_low, epsilon_high, bound = loss.clip
        advantages = loss.advantages if loss.advantages.dim() > 1 else loss.advantages.unsqueeze(1)
        low = (advantages < 0) & (ratio < 1 - epsilon_low)
        high = (advantages > 0) & (ratio > 1 + epsilon_high)
        dual = (advantages < 0) & (ratio > bound)
        # Before any update since the generation it is mismatch and noise that are clipped.
        fresh = loss.mask * (staleness == 0)
        return {
            "clip/low": (low, loss.mask),
            "clip/high": (high, loss.mask),
            "clip/dual": (dual, loss.mask),
            "clip/fresh": (low | high, fresh),
        }

    # ---- Sigma and its noise ----

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._sigma, self._effective = Pool(), Pool()

    def flush(self) -> None:
        super().flush()
        if self.trainer.sigma_optimizer is not None:
            self._pending |= self.trainer.sigma_optimizer.metrics(by_layer=self.trainer.args.alp_log_layers)
        if self.trainer.sigma_fit is not None:
            self._pending |= self.trainer.sigma_fit.metrics()
        self._warn_of_clipped_mismatch(self._pending.get("alp/clip/fresh", 0.0))
        if not self._effective.is_empty:
            self._pending |= self._noise_metrics()

    def _noise_metrics(self) -> dict[str, float]:
        """Metrics of the perturbation since the last log; warns of noise that rounding eats."""
        accelerator, layers = self.trainer.accelerator, self.trainer.perturbation.layer_indices
        sigma, effective = self._sigma.over(accelerator), self._effective.over(accelerator)
        self._sigma, self._effective = Pool(), Pool()
        metrics = {}
        for name, (sums, counts, lowest, highest) in (("sigma", sigma), ("noise/effective", effective)):
            metrics[f"alp/{name}/mean"] = (sums.sum() / counts.sum()).item()
            metrics[f"alp/{name}/min"] = lowest.min().item()
            metrics[f"alp/{name}/max"] = highest.max().item()
        if self.trainer.args.alp_log_layers:
            for index, value in zip(layers, (sigma[0] / sigma[1]).tolist(), strict=True):
                metrics[f"alp/sigma/layer_{index:02d}"] = value
        worst = effective[2]  # (L,)
        lost = (worst < _LOST_NOISE).nonzero().flatten().tolist()
        if lost:
            dtype = str(self.trainer.perturbation.hidden_dtype).removeprefix("torch.")
            self.warn_once(
                "lost",
                f"Noise is lost in rounding: in {dtype}, with sigma between {metrics['alp/sigma/min']:.3g} and "
                f"{metrics['alp/sigma/max']:.3g} (alp_noise_scale={self.trainer.args.alp_noise_scale!r}), only "
                f"{worst.min():.0%} of its standard deviation reaches the input of the worst of the layers "
                f"{[layers[i] for i in lost]}. Raise `alp_sigma_init` (and `alp_sigma_min`), use "
                "`alp_noise_scale='rms'`, or train with fp32 weights and bf16 autocast on one GPU or under DDP, which "
                "keep the residual stream in fp32.",
            )
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _warn_of_clipped_mismatch(self, clipped: float) -> None:
        args = self.trainer.args
        if clipped <= _CLIPPED_MISMATCH or (args.epsilon_high or args.epsilon) >= 1:
            return
        start = (
            f"{clipped:.0%} of the tokens are clipped before any update since their generation: with "
            f"epsilon={args.epsilon} and epsilon_high={args.epsilon_high} it is training-inference mismatch and noise "
            "that are clipped, not the update. "
        )
        if self.trainer.instruments.level == "sequence_geometric":
            # The mean over a sequence is small, and so is its clip range: widening it would clip nothing.
            way_out = "At the level of a geometric mean the range is right to be narrow: lower `alp_sigma_init`" + (
                ", or see `alp/noise_off/` for the share of the mismatch."
            )
        else:
            way_out = "Widen the range (the paper: `epsilon=0.5, epsilon_high=3.0`)."
        self.warn_once("clipped", start + way_out)


def is_monitored(step: int, every: int) -> bool:
    """Whether the update after `step` optimiser steps is the one that is looked at in its window of `every`: its place
    moves on by the golden ratio from window to window, so that rollouts of every age are seen also where `every` and
    their lifetime share a divisor."""
    return step % every == int(step // every * 0.6180339887498949 % 1 * every)


def is_first_fresh(step: int, every: int, lifetime: int) -> bool:
    """Whether fresh rollouts, `lifetime` updates after the last fresh ones, are the first in `2 * every` steps."""
    return step // (2 * every) != (step - lifetime) // (2 * every)
