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

The old policy is the trainer's own, scored when the rollouts are made.
"""

from types import SimpleNamespace

import torch
from trl import GRPOConfig, GRPOTrainer

import trl_alp.perturbation
from trl_alp import ALPGRPOConfig, ALPGRPOTrainer, instrument
from trl_alp.sigma import SigmaOptimizer


TIS = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 5.0}
MIS = {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 3.0}
DPPO_LARGEST_RATIO = 20.0  # the DPPO paper's
ARMS: dict[str, tuple[str, dict]] = {
    "grpo": ("stock", {}),
    "gspo": ("stock", {"importance_sampling_level": "sequence", "loss_type": "grpo"}),  # as TRL says for GSPO
    "tis": ("corrected", TIS),
    "mis": ("corrected", MIS),
    "bypass_token": ("alp", {"alp_enabled": False}),
    "bypass_sequence": ("alp", {"alp_enabled": False, "alp_ratio_level": "sequence"}),
    "dppo": ("divergence", {"alp_enabled": False, "epsilon": 0.15, "epsilon_high": 0.15}),
    "alp_token": ("alp", {}),
    "alp_sequence": ("alp", {"alp_ratio_level": "sequence"}),
    "alp_geometric": ("alp", {"alp_ratio_level": "sequence_geometric"}),
    "alp_tis": ("split", TIS),
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


TRAINERS = {"alp": LabTrainer, "split": SplitRatioTrainer, "divergence": DivergenceMaskTrainer}


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
    if kind in ("stock", "corrected"):
        settings["vllm_importance_sampling_correction"] = kind == "corrected"
        trainer = GRPOTrainer(args=GRPOConfig(**settings), **kwargs)
    else:
        settings["vllm_importance_sampling_correction"] = kind == "split"
        trainer = TRAINERS[kind](
            args=ALPGRPOConfig(**{"alp_log_layers": True, "alp_noise_target": None} | settings), **kwargs
        )
        if place == "final":
            _perturb_final_state(trainer)
    if kind in ("corrected", "split") and not trainer.use_vllm:
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
