# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""`ALPGRPOTrainer`: where the two halves of ALP meet TRL.

The methods below `__init__` stand in the order in which a micro-batch passes them: its rollouts get a behaviour
policy, its loss gets its clip range, its scoring pass gets its noise and its denominator. TRL's code does the rest.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from .alp_watching import CLIPPED_LOSSES, ALPWatcher
from .card import add_to_card
from .channels import ChannelScale
from .checks import check_args, check_dataset, check_server, checked, warn_of_dropout, warn_of_sampling
from .config import ALPGRPOConfig
from .fit import SigmaFit
from .guard import ScoringGuard, check_overrides
from .layers import find_decoder_layers, parse_layers
from .perturbation import LayerwisePerturbation, noise_seed
from .profile import profile_of_trainer, profile_offsets
from .ratio import dual_clip, log_importance_ratio
from .resume import load_state, save_state
from .sigma import SigmaOptimizer
from .watching import attach_instruments


class ALPGRPOTrainer(GRPOTrainer):
    """
    Trainer for GRPO with Adaptive Layerwise Perturbation (ALP, [arXiv
    2603.19470](https://huggingface.co/papers/2603.19470)).

    During the policy update, and only then, Gaussian noise of trainable size enters the input of every decoder layer,
    and the perturbed policy is the numerator of one importance ratio against the untouched behaviour policy:

        h_l <- h_l + sigma_l * s(h_l) * delta_l,      delta_l ~ N(0, I)                      (`perturbation.py`)
        rho  = pi_{theta, delta} / pi_behaviour                                              (`ratio.py`)
        L    = max(-A rho, -A clip(rho, 1 - epsilon, 1 + epsilon_high));    A < 0: L = min(L, -A alp_dual_clip)

    The behaviour log-probs are those the engine reported (vLLM, or the `rollout_func`); with plain generation they are
    the unperturbed policy's at generation time. With the engine's log-probs at hand no old-policy forward is made.

    What ALP changes in [`~trl.GRPOTrainer`]: the forward of the update (noise), the denominator of the ratio, the
    upper bound on it for negative advantages, and an optimiser of its own for `log_sigma`. What it does not change:
    sampling, rewards, advantages, evaluation, the reference policy, the loss code (TRL's runs), and the saved model.
    The perturbation is at `trainer.perturbation`; its state is saved as `alp_state.pt` in each checkpoint, and beside
    it, as `alp_rollouts_N.pt`, the rollouts that process N has not used up.

    A subclass brings a loss of its own by overriding `_compute_loss(model, inputs)`. It scores the policy by
    `self._get_per_token_logps_and_entropies(model, ...)`, and reads `inputs["old_per_token_logps"]` after that: the
    difference of the two is ALP's log ratio. Policies other than the one that is trained are scored under
    `torch.no_grad()`. A loss that leaves ALP's overrides unreached is an error, see Raises.

    Args:
        args ([`ALPGRPOConfig`], *optional*):
            Configuration. `None` builds a default [`ALPGRPOConfig`]; a plain [`~trl.GRPOConfig`] is an error.
        model, reward_funcs, train_dataset, **kwargs:
            As in [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: If `args` is not an [`ALPGRPOConfig`], the model has no decoder layers, `alp_layers` or
            `alp_noise_profile` does not fit it, fp16 is combined with DeepSpeed or a CPU, `full_determinism` with a
            cumulative ratio on a GPU, a vLLM server does not return processed log-probs, or a method of a subclass
            hides one of ALP's. By `train()`: if the policy has no trainable parameter, or the dataset fewer prompts
            than a batch of rollouts.
        `RuntimeError`: By `train()`, before the policy steps, if the loss did not go through ALP's overrides.

    Example:

    ```python
    >>> from trl_alp import ALPGRPOTrainer
    >>> trainer = ALPGRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=accuracy_reward, train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "alp"]
    _name = "ALP"
    _paper = {
        "title": "Adaptive Layerwise Perturbation: Unifying Off-Policy Corrections for LLM RL",
        "id": "2603.19470",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ye2026alp,
                title        = {{Adaptive Layerwise Perturbation: Unifying Off-Policy Corrections for LLM RL}},
                author       = {Ye, Chenlu and Zhang, Xuanchang and Hao, Yifan and Yu, Zhou and Zhang, Ziji and
                                Gullapalli, Abhinav and Chen, Hao and Huang, Jing and Zhang, Tong},
                year         = 2026,
                eprint       = {arXiv:2603.19470},
            }"""),
    }

    @wraps(GRPOTrainer.__init__)
    def __init__(self, model, reward_funcs=None, args=None, *other, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ALPGRPOConfig(f"{name.rstrip('/').split('/')[-1] or type(model).__name__}-ALP")
        check_args(args)
        check_overrides(type(self), ALPGRPOTrainer)
        # TRL replaces names of reward models, and appends environments' rewards, in the list it is given.
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
        super().__init__(model, reward_funcs, args, *other, **kwargs)
        check_server(self)
        warn_of_sampling(self)
        if args.alp_enabled:
            warn_of_dropout(self)
        if self.rollout_func is not None:
            self.rollout_func = checked(self.rollout_func, self._choose_old_policy_scoring)

        self.perturbation = LayerwisePerturbation(
            self.model,
            layers=parse_layers(args.alp_layers, len(find_decoder_layers(self.model)), "alp_layers"),
            sigma_init=args.alp_sigma_init,
            learnable=args.alp_learn_sigma and args.alp_enabled,
            noise_scale=args.alp_noise_scale,
            sigma_min=args.alp_sigma_min,
            sigma_max=args.alp_sigma_max,
            noise_backend=args.alp_noise_backend,
        ).to(self.accelerator.device)
        if args.alp_noise_profile is not None and args.alp_enabled:
            profile = profile_of_trainer(self, self.perturbation.layer_indices)
            self.perturbation.log_sigma.data += profile_offsets(profile).to(self.accelerator.device)
            self.perturbation.bound_()
        self.micro_batches = 0  # perturbed so far, over the whole run and all processes; seeds the noise
        self._update: dict[str, Any] | None = None  # the inputs of the loss that is being computed
        self._knobs: tuple[Any, ...] = ()  # TRL's clip range outside of any loss
        self.guard = ScoringGuard(self)
        self.add_callback(self.guard)
        self.sigma_optimizer: SigmaOptimizer | None = None
        if self.perturbation.log_sigma.requires_grad:
            self.sigma_optimizer = SigmaOptimizer(
                self.perturbation, self.accelerator, args.alp_sigma_lr, args.max_grad_norm,
                level_is_fitted=args.alp_noise_target is not None,
            )  # fmt: skip
            self.add_callback(self.sigma_optimizer)
        self.channel_scale: ChannelScale | None = None
        if args.alp_noise_scale == "channel" and args.alp_enabled:
            self.channel_scale = ChannelScale(self.perturbation, self.accelerator)
            self.add_callback(self.channel_scale)
        self.sigma_fit: SigmaFit | None = None
        if args.alp_noise_target is not None and args.alp_enabled:
            self.sigma_fit = SigmaFit(self.perturbation, self.accelerator, args.alp_noise_target)
            self.add_callback(self.sigma_fit)
        attach_instruments(
            self, args.alp_ratio_level, perturbed=args.alp_enabled, monitored=args.alp_monitor_every > 0,
            fitted=self.sigma_fit is not None,
            log_files=args.alp_log_files,
        )  # fmt: skip
        self.watcher = ALPWatcher(self)
        self.add_callback(self.watcher)

    def get_train_dataloader(self):
        check_dataset(self.train_dataset, self.args)  # not at construction: one row is enough to evaluate
        return super().get_train_dataloader()

    # ---- The behaviour policy ----

    def _generate_and_score_completions(self, inputs):
        iterations = self.num_iterations
        if self.rollout_func is None:  # else it tells when it has returned
            self._choose_old_policy_scoring(engine=self.use_vllm)
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.num_iterations = iterations

    def _choose_old_policy_scoring(self, engine: bool) -> None:
        """Have TRL score the old policy where its log-probs are the denominator, and only there.

        TRL scores it unless `gradient_accumulation_steps` is a multiple of `steps_per_generation * num_iterations`.
        With an engine's log-probs at hand that forward is needless. Without them it is needed also where TRL takes the
        current policy for the old one, which under noise would be the perturbed one.
        """
        accumulation = self.args.gradient_accumulation_steps
        if engine:
            self.num_iterations = Fraction(accumulation, self.args.steps_per_generation)
        elif self.args.alp_enabled and self.model.training:
            self.num_iterations = Fraction(accumulation + 1, self.args.steps_per_generation)

    # ---- The loss ----

    @property
    def in_update(self) -> bool:
        """Whether the loss of an update is being computed; an evaluation computes its loss without gradient."""
        return self._update is not None and torch.is_grad_enabled()

    # TRL's first calls its second. A subclass may replace the second, or call it for parts of a micro-batch.
    def compute_loss(self, model, inputs, *args, **kwargs):
        with self._loss_of(inputs) as inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_loss(self, model, inputs):
        with self._loss_of(inputs) as inputs:
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _loss_of(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Set TRL's clip range to ALP's for the loss of `inputs`, and give a copy of them, which the loss may change:
        TRL reuses them across `num_iterations`."""
        outer, found = self._update, (self.epsilon_low, self.epsilon_high, self.args.delta)
        self._update = dict(inputs)
        if outer is None:
            self._knobs = found
        try:
            self.epsilon_low, self.epsilon_high, self.args.delta = self._clip_range(inputs, *self._knobs)
            yield self._update
        finally:
            self.epsilon_low, self.epsilon_high, self.args.delta = found
            self._update = outer

    def _clip_range(self, inputs: dict[str, Any], epsilon_low: float, epsilon_high: float, delta: float | None):
        """TRL's three knobs for one loss; a `delta` of the user's takes the place of the dual clip."""
        bound, advantages = self.args.alp_dual_clip, inputs.get("advantages")
        if bound is None or delta is not None or advantages is None or self.loss_type not in CLIPPED_LOSSES:
            return epsilon_low, epsilon_high, delta
        return dual_clip(advantages, epsilon_low, epsilon_high, bound)

    # ---- The scoring pass ----

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if not self.in_update:  # the old or the reference policy, an evaluation, or a look without noise
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self._noise() as scoring:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        has_denominator = self._set_denominator(logps)
        self.guard.scored(scoring is None or scoring.perturbed, has_denominator)
        return logps, entropies, aux_loss

    def _noise(self):
        """The noise of the next scoring pass, the same in its recompute; without ALP none."""
        if not self.args.alp_enabled:
            return nullcontext()
        seed = noise_seed(self.args.seed, self.micro_batches + self.accelerator.process_index)
        self.micro_batches += self.accelerator.num_processes
        return self.perturbation.applied(seed)

    def _set_denominator(self, logps: torch.Tensor) -> bool:
        """Put `old` into the inputs such that TRL's `log_ratio = logps - old` is ALP's `u`, value and gradient.

        Returns whether there was a behaviour policy. Without noise there need be none: where TRL's rollouts are
        on-policy it is the current policy, and the ratio 1.
        """
        inputs = self._update
        mask, tool_mask = inputs["completion_mask"], inputs.get("tool_mask")  # (B, T)
        mask = mask if tool_mask is None else mask * tool_mask
        if logps.shape != mask.shape:
            raise RuntimeError(
                f"A loss on completions of shape {tuple(mask.shape)} scored the policy on {tuple(logps.shape)}. To "
                "compute it in parts, call `super()._compute_loss(model, part)` with the inputs of each part."
            )
        behaviour = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        known = behaviour is not None
        behaviour = behaviour if known else logps.detach()
        behaviour = torch.where(torch.isfinite(behaviour), behaviour, logps.detach())
        log_ratio = log_importance_ratio(logps, behaviour, mask, self.args.alp_ratio_level)
        # Where nothing was aggregated or clamped, `old` is the behaviour log-prob itself, bit for bit.
        unchanged = log_ratio == logps - behaviour
        inputs["old_per_token_logps"] = torch.where(unchanged, behaviour, logps - log_ratio)
        # TRL's off-policy mask reads these, and would otherwise take the aggregated ones above.
        inputs["sampling_per_token_logps"] = behaviour
        return known or not self.args.alp_enabled

    # ---- What is written ----

    @wraps(GRPOTrainer.create_model_card)
    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir) / "README.md", self)

    # Overridden here because older checkpoints may be rotated away once `_save_checkpoint` returns.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(self, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self, checkpoint)
