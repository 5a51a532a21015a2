# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The arms of the study: ways to correct for off-policy rollouts, each a trainer class and what it changes.

| arm | ratio in the loss | correction of the mismatch |
|---|---|---|
| `grpo` | policy / old policy | none |
| `gspo` | the same, geometric mean over the sequence | none |
| `tis` | policy / old policy | times old policy / engine per token, at most 5 (`token_truncate`, the paper's cap) |
| `mis` | policy / old policy | times old policy / engine per sequence, zero above 3 (`sequence_mask`, TRL's default) |
| `bypass_token`, `bypass_sequence` | policy / engine | inside the ratio |
| `dppo` | policy / engine | inside the ratio; the bound is on the probability, not on the ratio |
| `alp_token`, `alp_sequence`, `alp_geometric` | perturbed policy / engine | inside the ratio, with noise |
| `alp_tis` | perturbed policy / old policy | as `tis`: noise on top of the split ratio |
| `bypass_geometric` | policy / engine, geometric mean over the sequence | inside the ratio |
| `bypass_mask`, `alp_mask` | as `bypass_sequence`, `alp_sequence` | inside the ratio; a sequence above 3 is left out |
| `gspo_mis` | as `gspo` | as `mis` |
| `centred`, `centred_tis` | as `grpo`, `tis` | the score's mean under the engine is subtracted (arXiv 2609.20807) |
| `rounded_forward` | as `grpo` | the engine's rounded weights in every forward of the trainer |

The old policy is the trainer's own, scored when the rollouts are made.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace

import torch
from behaviour import blank_copy, load_as
from trl import GRPOConfig, GRPOTrainer

import trl_alp.perturbation
from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, instrument
from trl_alp.ratio import log_probability_gap
from trl_alp.sigma import SigmaOptimizer


TIS = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 5.0}
MASKED_ABOVE = 3.0  # TRL's default
MIS = {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": MASKED_ABOVE}
DPPO_LARGEST_RATIO = 20.0  # the DPPO paper's
GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}  # as TRL says for GSPO
ARMS: dict[str, tuple[str, dict]] = {
    "grpo": ("stock", {}),
    "gspo": ("stock", GSPO),
    "tis": ("corrected", TIS),
    "mis": ("corrected", MIS),
    "bypass_token": ("alp", {"alp_enabled": False}),
    "bypass_sequence": ("alp", {"alp_enabled": False, "alp_ratio_level": "sequence"}),
    "dppo": ("divergence", {"alp_enabled": False, "epsilon": 0.15, "epsilon_high": 0.15}),
    "alp_token": ("alp", {}),
    "alp_sequence": ("alp", {"alp_ratio_level": "sequence"}),
    "alp_geometric": ("alp", {"alp_ratio_level": "sequence_geometric"}),
    "alp_tis": ("split", TIS),
    "bypass_geometric": ("alp", {"alp_enabled": False, "alp_ratio_level": "sequence_geometric"}),
    "bypass_mask": ("mask", {"alp_enabled": False, "alp_ratio_level": "sequence"}),
    "alp_mask": ("mask", {"alp_ratio_level": "sequence"}),
    "gspo_mis": ("corrected", MIS | GSPO),
    "centred": ("centred", {}),
    "centred_tis": ("centred_corrected", TIS),
    "rounded_forward": ("rounded_forward", {}),
}


class LabTrainer(ALPGRPOTrainer):
    """Looks at the policy without noise in every `alp_monitor_every`-th update, so that the same updates of the arms
    without noise can be picked out to compare with; where sigma is fitted, in those of the package besides."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._shipped = self.watcher.is_due
        self.watcher.is_due = self._look_is_due

    def _look_is_due(self):
        every = self.args.alp_monitor_every
        due = self.args.alp_enabled and every > 0 and self.state.global_step % every == 0
        return due or (self.sigma_fit is not None and self._shipped())


class SplitRatioTrainer(LabTrainer):
    """Noise on top of TRL's split ratio: perturbed policy / old policy, times truncated old policy / engine."""

    def _compute_loss(self, model, inputs):
        # Without the engine's log-probs ALP's denominator is the old policy's; the engine is in TRL's factor.
        return super()._compute_loss(model, {k: v for k, v in inputs.items() if k != "sampling_per_token_logps"})


class DivergenceMaskTrainer(LabTrainer):
    """DPPO with the binary total variation (arXiv 2602.04879): a token is left out where its probability pi moved away
    from the engine's, mu, by more than `epsilon`. |pi - mu| <= epsilon is |pi / mu - 1| <= epsilon / mu, so this is
    TRL's clipping with a range for each token."""

    def _clip_range(self, inputs, epsilon_low, epsilon_high, delta):
        probability = inputs["sampling_per_token_logps"].exp()
        return epsilon_low / probability, epsilon_high / probability, DPPO_LARGEST_RATIO


class SequenceMaskTrainer(LabTrainer):
    """One ratio, and what MIS does with its own: a sequence whose product of ratios is above 3 is left out."""

    def _set_denominator(self, logps):
        known, inputs = super()._set_denominator(logps), self._update
        gap = log_probability_gap(logps.detach(), inputs["sampling_per_token_logps"], inputs["completion_mask"])
        above = gap.sum(-1) > math.log(MASKED_ABOVE)  # (B,)
        inputs["advantages"] = inputs["advantages"].masked_fill(above, 0.0)
        return known


class CentredTrainer(GRPOTrainer):
    """Score centering: from the score of each token its mean under what weighs the tokens is subtracted.

    `E_q[w A s]` has a part, `E_q[A] E_q[w s]`, that pulls the policy towards the sampler whatever is rewarded. Here
    the vocabulary is small, so the mean is exact: `m = sum_v q(v) w(v) s(v) / sum_v q(v) w(v)`, `s` the gradient of
    log p. The log-probs keep their values and get the gradient `s - m`; what TRL multiplies them with stays as it is.
    """

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        logps, *rest = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if torch.is_grad_enabled():
            weights = self._weights(input_ids, attention_mask, logits_to_keep)
            mean = (weights * distribution(model, input_ids, attention_mask, logits_to_keep)).sum(-1)
            logps = logps - (mean - mean.detach())
        return (logps, *rest)

    @cached_property
    def _old_policy(self) -> torch.nn.Module:
        return blank_copy(self.rollout_func.copy)

    @torch.no_grad()
    def _weights(self, *tokens) -> torch.Tensor:
        """The engine's probabilities of every token, times the truncated correction if there is one: (B, T, V)."""
        behaviour = self.rollout_func
        weights = distribution(behaviour.copy, *tokens).exp()
        if self.vllm_importance_sampling_correction:
            load_as("exact", self._old_policy, behaviour.weights[-1])
            old = distribution(self._old_policy, *tokens).exp()
            weights = torch.minimum(old, weights * self.args.vllm_importance_sampling_clip_max)
        return weights / weights.sum(-1, keepdim=True)


def distribution(model, input_ids, attention_mask, logits_to_keep: int) -> torch.Tensor:
    """Log-probs of every token of the vocabulary where a completion has one: (B, T, V)."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits[:, -logits_to_keep - 1 : -1].float().log_softmax(-1)


class RoundedForwardTrainer(GRPOTrainer):
    """Quantisation-aware training: every forward of an update, also the old policy's, has the engine's weights, and
    the gradient with respect to them is applied to the unrounded ones (a straight-through estimator)."""

    def training_step(self, *args, **kwargs):
        with self._rounded():
            return super().training_step(*args, **kwargs)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        load_as(self.rollout_func.numerics, self.model, kept)
        try:
            yield
        finally:
            load_as("exact", self.model, kept)


# ALP's trainers, and TRL's.
TRAINERS = {
    "alp": LabTrainer,
    "split": SplitRatioTrainer,
    "divergence": DivergenceMaskTrainer,
    "mask": SequenceMaskTrainer,
}
STOCK_TRAINERS = {
    "stock": GRPOTrainer,
    "corrected": GRPOTrainer,
    "centred": CentredTrainer,
    "centred_corrected": CentredTrainer,
    "rounded_forward": RoundedForwardTrainer,
}


def build_trainer(arm: str, overrides: dict, common: dict, place: str | None = None, **kwargs) -> GRPOTrainer:
    """
    Build an instrumented trainer.

    Args:
        arm (`str`): One of `ARMS`.
        overrides (`dict`): Fields of the config that differ from the arm's.
        common (`dict`): Fields that all arms share.
        place (`str`, *optional*): `"final"` puts ALP's noise on the final hidden state alone.
        **kwargs: For the trainer.
    """
    kind, changes = ARMS[arm]
    settings = common | changes | overrides
    corrected = kind in ("corrected", "centred_corrected", "split")
    if kind in STOCK_TRAINERS:
        settings["vllm_importance_sampling_correction"] = corrected
        trainer = STOCK_TRAINERS[kind](args=GRPOConfig(**settings), **kwargs)
    else:
        settings["vllm_importance_sampling_correction"] = corrected
        trainer = TRAINERS[kind](
            args=ALPGRPOConfig(**{"alp_log_layers": True, "alp_noise_target": None} | settings), **kwargs
        )
        if place == "final":
            _perturb_final_state(trainer)
    if corrected and not trainer.use_vllm:
        # TRL applies its correction with vLLM only. Of vLLM it then asks for the weight sync alone, since the rollouts
        # are the `rollout_func`'s.
        trainer.use_vllm, trainer.vllm_mode = True, "server"
        trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = -1
    return instrument(trainer)


def _perturb_final_state(trainer: ALPGRPOTrainer) -> None:
    """Move the noise from the decoder layers to the input of the final norm."""
    args, find = trainer.args, trl_alp.perturbation.find_decoder_layers
    trl_alp.perturbation.find_decoder_layers = lambda model: torch.nn.ModuleList([model.model.norm])
    try:
        trainer.perturbation.remove()
        trainer.perturbation = trl_alp.LayerwisePerturbation(
            trainer.model,
            sigma_init=args.alp_sigma_init,
            learnable=args.alp_learn_sigma,
            noise_scale=args.alp_noise_scale,
        )
    finally:
        trl_alp.perturbation.find_decoder_layers = find
    if trainer.sigma_optimizer is not None:
        trainer.remove_callback(trainer.sigma_optimizer)
        trainer.sigma_optimizer = SigmaOptimizer(
            trainer.perturbation, trainer.accelerator, args.alp_sigma_lr, args.max_grad_norm
        )
        trainer.add_callback(trainer.sigma_optimizer)
