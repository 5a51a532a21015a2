# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Sigma's optimiser: steps `log_sigma` exactly when the policy's optimiser steps."""

import math

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .layers import first_trained_layer
from .perturbation import LayerwisePerturbation


logger = get_logger(__name__)  # speaks on the main process only


class SigmaOptimizer(TrainerCallback):
    """
    Trains the sigmas of a perturbation with an Adam of their own, without weight decay.

    Before each of the policy's steps their gradient is averaged over processes, freed of the gradient scaler's factor
    and bounded in norm, like the policy's but by itself. After it sigma steps too, unless the policy's step was
    skipped, and is held to its bounds. A gradient that is not finite makes sigma sit that step out, as a whole.

    Args:
        perturbation ([`LayerwisePerturbation`]):
            The perturbation, whose `log_sigma` requires a gradient.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        learning_rate (`float`):
            Constant learning rate of `log_sigma`.
        max_grad_norm (`float`):
            Bound on the norm of sigma's gradient; 0 for none.
        level_is_fitted (`bool`, *optional*, defaults to `False`):
            Whether the mean of `log_sigma` is another's to set: steps leave it where it is, and train how sigma
            differs between layers.
    """

    def __init__(
        self,
        perturbation: LayerwisePerturbation,
        accelerator: Accelerator,
        learning_rate: float,
        max_grad_norm: float,
        level_is_fitted: bool = False,
    ) -> None:
        self.level_is_fitted = level_is_fitted
        self.perturbation, self.accelerator, self.max_grad_norm = perturbation, accelerator, max_grad_norm
        self.adam = torch.optim.Adam([perturbation.log_sigma], lr=learning_rate)
        self._sums: list[float] = []  # of each layer's gradient, then of their norm, since the last `metrics`
        self._steps = 0
        self._warned = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.adam.zero_grad()  # an interrupted run may have left gradient behind
        self._sums, self._steps = [], 0
        # From the parameters, not from the hidden states that require a gradient: PEFT makes those of the embedding
        # require one under gradient checkpointing, and sigma must not depend on that.
        self.perturbation.first_trained = first_trained_layer(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.reduce_gradient()  # now, since the gradient scaler changes its scale after the step

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.step()

    def reduce_gradient(self) -> None:
        """Average sigma's gradient over processes, free it of the loss scale and bound its norm."""
        log_sigma = self.perturbation.log_sigma
        gradient = torch.zeros_like(log_sigma) if log_sigma.grad is None else log_sigma.grad
        gradient = self.accelerator.reduce(gradient, reduction="mean")
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            gradient = gradient / scaler.get_scale()
        log_sigma.grad = gradient
        by_layer = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([log_sigma], self.max_grad_norm or torch.inf)
        values = torch.cat([by_layer, norm.reshape(1)]).tolist()
        if math.isfinite(values[-1]):
            self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(values), values, strict=True)]
            self._steps += 1
        else:
            log_sigma.grad = None

    def step(self) -> None:
        """Step, unless the policy's step was skipped."""
        if not self.accelerator.optimizer_step_was_skipped:
            if self.perturbation.log_sigma.grad is None and not self._warned:
                self._warned = True
                logger.warning(
                    "The gradient of sigma is not finite, although the policy's step was made: sigma sits such steps "
                    "out. Look for log-probs that are not finite (`alp/unscored_tokens`)."
                )
            log_sigma = self.perturbation.log_sigma.detach()
            level = log_sigma.mean()
            self.adam.step()
            if self.level_is_fitted:
                log_sigma += level - log_sigma.mean()
            self.perturbation.bound_()
        self.adam.zero_grad()

    def metrics(self, by_layer: bool = True) -> dict[str, float]:
        """Means of the finite gradients since the last call: their norm, and each layer's, before clipping."""
        if self._steps == 0:
            return {}
        *gradients, norm = (value / self._steps for value in self._sums)
        self._sums, self._steps = [], 0
        metrics = {"alp/sigma/grad_norm": norm}
        if by_layer:
            names = [f"alp/sigma/grad/layer_{index:02d}" for index in self.perturbation.layer_indices]
            metrics |= zip(names, gradients, strict=True)
        return metrics
