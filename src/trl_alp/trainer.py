# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""`ALPGRPOTrainer`: where the two halves of ALP meet TRL.

This is the only module that touches TRL's private names; `tests/test_trl_contract.py` asserts each of them.
"""

import math
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from .config import ALPGRPOConfig
from .instruments import Instruments
from .mismatch import clamped_gap
from .perturbation import LayerwisePerturbation, noise_seed
from .ratio import MAX_LOG_RATIO, log_probability_gap, raw_log_ratio


logger = get_logger(__name__)  # speaks on the main process only

STATE_NAME = "alp_state.pt"
ROLLOUTS_NAME = "alp_rollouts_{}.pt"  # one for each process, as with the random states
# Loss types of TRL that clip the ratio; the others (cispo, sapo, vespo) bound it in their own way and have no dual
# clip.
_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Below this fraction of surviving noise (realised over asked standard deviation) a layer counts as unperturbed.
_INERT_NOISE = 0.1
# With a narrow clip range: share of tokens clipped before any update since their generation that earns a warning.
_CLIPPED_MISMATCH = 0.1
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fractional part, times 2**64


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
    The perturbation is at `trainer.perturbation`; its state is saved as `alp_state.pt` in each checkpoint.

    Args:
        args ([`ALPGRPOConfig`], *optional*):
            Configuration. `None` builds a default [`ALPGRPOConfig`]; a plain [`~trl.GRPOConfig`] is an error.
        model, reward_funcs, train_dataset, **kwargs:
            As in [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: If `args` is not an [`ALPGRPOConfig`], the model has no decoder layers, `alp_layers` does not fit
            it, fp16 is combined with DeepSpeed or a CPU, `full_determinism` with a cumulative ratio on a GPU, or a
            vLLM server does not return processed log-probs.

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
            @article{alp2026,
                title        = {{Adaptive Layerwise Perturbation: Unifying Off-Policy Corrections for LLM RL}},
                year         = 2026,
                eprint       = {arXiv:2603.19470},
            }"""),
    }

    @wraps(GRPOTrainer.__init__)
    def __init__(self, model, reward_funcs=None, args=None, *other, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ALPGRPOConfig(f"{name.rstrip('/').split('/')[-1] or type(model).__name__}-ALP")
        if not isinstance(args, ALPGRPOConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; ALPGRPOTrainer needs an `ALPGRPOConfig`, which adds the `alp_*` "
                "fields and changes four defaults of `GRPOConfig`. Replace `GRPOConfig(...)` by `ALPGRPOConfig(...)`."
            )
        if args.fp16 and (args.deepspeed_plugin is not None or args.device.type == "cpu"):
            backend, reason = (
                (
                    "with DeepSpeed",
                    "it steps the policy inside backward, with a loss scale that sigma's gradient keeps",
                )
                if args.deepspeed_plugin is not None
                else ("on a cpu", "accelerate would train in fp32 without saying so")
            )
            raise ValueError(f"fp16=True {backend} is not supported: {reason}. Set `bf16=True`, or neither for fp32.")
        if args.full_determinism and args.alp_ratio_level.startswith("cumulative") and args.device.type == "cuda":
            raise ValueError(
                f"full_determinism=True with alp_ratio_level={args.alp_ratio_level!r} is not supported on a GPU: "
                "torch has no deterministic cumulative sum there. Use another level, or `full_determinism=False`."
            )
        # TRL replaces names of reward models, and appends environments' rewards, in the list it is given.
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
        super().__init__(model, reward_funcs, args, *other, **kwargs)
        self._check_behaviour_policy()
        if self.rollout_func is not None:
            self.rollout_func = _checked(self.rollout_func)

        self.perturbation = LayerwisePerturbation(
            self.model,
            layers=args.alp_layers,
            sigma_init=args.alp_sigma_init,
            learnable=args.alp_learn_sigma and args.alp_enabled,
            noise_scale=args.alp_noise_scale,
            sigma_min=args.alp_sigma_min,
            sigma_max=args.alp_sigma_max,
            noise_backend=args.alp_noise_backend,
        ).to(self.accelerator.device)
        self.sigma_optimizer: torch.optim.Adam | None = None
        if self.perturbation.log_sigma.requires_grad:
            self.sigma_optimizer = torch.optim.Adam([self.perturbation.log_sigma], lr=args.alp_sigma_lr)
        self.add_callback(_OptimizerStep(self))
        self.instruments = _instruments(
            self, args.alp_ratio_level, perturbed=args.alp_enabled, monitored=args.alp_monitor_every > 0
        )
        self.add_callback(_Instrumentation(self, self._perturbation_metrics))
        self._warn_about_dropout()

        self._micro_batches = 0  # perturbed micro-batches so far over the whole run and all processes; seeds the noise
        self._update: _Update | None = None  # the update whose loss is being computed
        self._noise_scope: ExitStack | None = None  # closes when the backward of the update has finished
        self._skip_scoring = False  # answer TRL's next scoring pass, the old policy's, with nothing
        self._updates = 0  # optimiser steps so far; unlike `state.global_step` it goes on when `train` is called again
        self._generated_at = 0  # of them, when the buffered rollouts were generated
        self._noise: list[
            torch.Tensor
        ] = []  # sigma and surviving noise of each micro-batch since the last log; (2, L)
        self._warned: set[str] = set()

    # ---- The method ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        # The noise enters in the scoring pass of the loss and must stay on through backward, where gradient
        # checkpointing may run the layers again; then, or after an exception, it is off.
        with ExitStack() as self._noise_scope:
            self._noise_scope.callback(setattr, self, "_noise_scope", None)
            return super().training_step(model, inputs, num_items_in_batch)

    def _compute_loss(self, model, inputs):
        self._update = _Update(inputs)
        try:
            with self._dual_clip(inputs["advantages"]):
                return super()._compute_loss(model, self._update.inputs)
        finally:
            self._update = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self._skip_scoring:
            self._skip_scoring = False
            return None, None, None
        if self._update is None:  # the old or the reference policy
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        training = self.model.training
        noise_off = None
        if training and self._monitor_is_due():
            noise_off = self._noise_off_scores(model, *args, **kwargs)
        with ExitStack() as this_pass:
            if training and self.args.alp_enabled:
                (self._noise_scope or this_pass).enter_context(self.perturbation.applied(self._next_seed()))
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._set_denominator(logps, noise_off)
        return logps, entropies, aux_loss

    def _set_denominator(self, logps: torch.Tensor, noise_off: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Put `old` into the inputs such that TRL's `log_ratio = logps - old` is ALP's `u`, value and gradient."""
        inputs, mask, level = self._update.inputs, self._update.mask, self.args.alp_ratio_level
        behaviour_logps = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if behaviour_logps is None:  # on-policy and without noise: the ratio is 1, as in TRL
            behaviour_logps = logps.detach()
        reported = behaviour_logps
        behaviour_logps = torch.where(torch.isfinite(reported), reported, logps.detach())
        gap = log_probability_gap(logps, behaviour_logps, mask)
        raw = raw_log_ratio(gap, mask, level)
        clamped = raw.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        # Where nothing was aggregated or clamped, `old` is the behaviour log-prob itself, bit for bit.
        inputs["old_per_token_logps"] = torch.where(
            clamped == logps - behaviour_logps, behaviour_logps, logps - clamped
        )
        # TRL's off-policy mask reads these, and would otherwise take the aggregated ones above.
        inputs["sampling_per_token_logps"] = behaviour_logps
        if not self.model.training:
            return
        if self.args.alp_enabled and self.args.logging_strategy != "no":
            self._noise.append(torch.stack([self.perturbation.sigma, self.perturbation.effective_noise()]))
        plain_logps, entropies = (logps.detach(), None) if noise_off is None else noise_off
        noise_gap = clamped_gap(logps.detach(), plain_logps)
        noise_k3 = noise_gap.expm1() - noise_gap, mask * (noise_off is not None)
        self._record("update", logps, reported, {"noise/kl/k3": noise_k3})
        if noise_off is not None:
            self._record("noise_off", plain_logps, reported, {"entropy": (entropies, mask)})

    @contextmanager
    def _dual_clip(self, advantages: torch.Tensor) -> Iterator[None]:
        """Bound the ratio by `alp_dual_clip` where the advantage is negative, through the knobs of TRL's loss.

        TRL's `delta` bounds it for either sign, and not at all below `1 + epsilon_high`; so both bounds vary by sign.
        """
        dual_clip = self.args.alp_dual_clip
        if dual_clip is None or self.args.delta is not None or self.loss_type not in _CLIPPED_LOSSES:
            yield
            return
        knobs = self.epsilon_low, self.epsilon_high
        advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)  # (B, 1)
        bound = torch.full_like(advantages, torch.inf).masked_fill(advantages < 0, dual_clip)
        try:
            self.args.delta = bound
            self.epsilon_low = torch.full_like(bound, self.epsilon_low)
            self.epsilon_high = (bound - 1).clamp(max=self.epsilon_high)
            yield
        finally:
            self.args.delta = None
            self.epsilon_low, self.epsilon_high = knobs

    # ---- The behaviour policy ----

    def _generate(self, prompts):
        output = super()._generate(prompts)
        # TRL scores the old policy next where a batch of rollouts outlives an optimiser step. With the engine's
        # log-probs at hand that forward is needless.
        engine_logps = output[4]
        self._skip_scoring = engine_logps is not None and not self._is_aligned()
        return output

    def _is_aligned(self) -> bool:
        """Whether every batch of rollouts is used up by one optimiser step."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def _generate_and_score_completions(self, inputs):
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._skip_scoring = False
        if self.model.training:
            self._generated_at = self._updates
            # TRL's shortcut for aligned batches, "the old policy is the current one", would take the perturbed policy.
            scored = "sampling_per_token_logps" in output or "old_per_token_logps" in output
            if self.args.alp_enabled and not scored:
                output["old_per_token_logps"] = self._score_rollouts(output)
        return output

    def _calculate_rewards(self, *args, **kwargs):
        # TRL leaves out a reward of None (NaN here). An infinite one would make every advantage of its group infinite.
        rewards = super()._calculate_rewards(*args, **kwargs)  # (N, number of reward functions), of all processes
        infinite = torch.isinf(rewards)
        if self.model.training:
            self._metrics["train"]["alp/unscored_rewards"].append((~torch.isfinite(rewards)).sum().item())
        if infinite.any() and "rewards" not in self._warned:
            self._warned.add("rewards")
            logger.warning(
                f"{int(infinite.sum())} rewards are infinite; they are left out, like None. `alp/unscored_rewards` "
                "counts them. Let the reward function return None where it cannot score."
            )
        return rewards.masked_fill(infinite, torch.nan)

    @torch.no_grad()
    def _score_rollouts(self, output: dict[str, Any]) -> torch.Tensor:
        """Log-probs of freshly generated completions under the unperturbed policy.  # (B, T)"""
        model_inputs = {
            name: output.get(name)
            for name in (
                "pixel_values",
                "image_grid_thw",
                "num_images",
                "pixel_attention_mask",
                "spatial_shapes",
                "num_tiles",
                "image_sizes",
                "token_type_ids",
                "mm_token_type_ids",
                "image_position_ids",
            )
        }
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **model_inputs,
            )
        return logps

    def _monitor_is_due(self) -> bool:
        args = self.args
        updates_per_batch = max(1, args.steps_per_generation * self.num_iterations // args.gradient_accumulation_steps)
        age = self._updates - self._generated_at
        step, every = self.state.global_step, args.alp_monitor_every
        if not args.alp_enabled or not is_monitored(step, every, age, updates_per_batch):
            return False
        return self._step % self.current_gradient_accumulation_steps == 0  # once per optimiser step

    @torch.no_grad()
    def _noise_off_scores(self, model, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies of the micro-batch without noise.  # (B, T) each"""
        kwargs.update(compute_entropy=True, compute_aux_loss=False)
        device = self.accelerator.device
        # A policy with dropout draws from the global generator; looking must not change the run.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)[:2]

    def _check_behaviour_policy(self) -> None:
        # TRL makes this check only with its own correction on, and as a warning.
        if self.use_vllm and self.vllm_mode == "server" and self.accelerator.is_main_process:
            mode = self.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                raise ValueError(
                    f"The vLLM server runs with `--logprobs-mode {mode}`, so its log-probs are not those of the "
                    "distribution it samples from, and ALP's importance ratio would be biased. Restart it with "
                    "`--logprobs-mode processed_logprobs`."
                )

    def _warn_about_dropout(self) -> None:
        config = self.model.config.get_text_config()
        rates = {
            "`disable_dropout=True`": max(
                (m.p for m in self.model.modules() if isinstance(m, torch.nn.Dropout)), default=0
            ),
            # Applied by the attention function, out of reach of `disable_dropout`.
            "`attention_dropout=0` in the model's config": getattr(config, "attention_dropout", 0) or 0,
        }
        for way_out, rate in rates.items():
            if rate > 0 and self.args.alp_enabled:
                logger.warning(
                    f"The policy has dropout (p={rate}), which makes the importance ratio noisy by an amount nobody "
                    f"trains, on top of ALP's perturbation. Set {way_out}."
                )

    # ---- Sigma: seeds, optimiser, state ----

    def _next_seed(self) -> int:
        seed = noise_seed(self.args.seed, self._micro_batches + self.accelerator.process_index)
        self._micro_batches += self.accelerator.num_processes
        return seed

    def _reduce_sigma_gradient(self) -> None:
        """Average sigma's gradient over processes, free it of the loss scale and bound its norm like the policy's."""
        log_sigma = self.perturbation.log_sigma
        gradient = torch.zeros_like(log_sigma) if log_sigma.grad is None else log_sigma.grad
        gradient = self.accelerator.reduce(gradient, reduction="mean")
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            gradient = gradient / scaler.get_scale()
        log_sigma.grad = gradient
        by_layer = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([log_sigma], self.args.max_grad_norm or torch.inf)
        *by_layer, norm = torch.cat([by_layer, norm.reshape(1)]).tolist()
        if not math.isfinite(norm):
            log_sigma.grad = None  # sigma sits this step out
        metrics = self._metrics["train"]
        metrics["alp/sigma/grad_norm"].append(norm)
        for index, value in zip(self.perturbation.layer_indices, by_layer, strict=True):
            metrics[f"alp/sigma/grad/layer_{index:02d}"].append(value)

    def _step_sigma(self) -> None:
        if not self.accelerator.optimizer_step_was_skipped:
            self.sigma_optimizer.step()
            self.perturbation.bound_()
        self.sigma_optimizer.zero_grad()

    # Overridden here because older checkpoints may be rotated away once `_save_checkpoint` returns.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        os.makedirs(output_dir, exist_ok=True)  # a process may get here before the one that saves the model
        rollouts = {
            "step": self._step,
            "updates": self._updates,
            "generated_at": self._generated_at,
            "buffered_inputs": self._buffered_inputs,
            "layout": self._rollout_layout(),
        }
        _save(rollouts, os.path.join(output_dir, ROLLOUTS_NAME.format(self.accelerator.process_index)))
        if self.args.should_save and self.args.alp_enabled:
            state = {
                "layer_indices": self.perturbation.layer_indices,
                "num_layers": self.perturbation.num_layers,
                "noise_scale": self.perturbation.noise_scale,
                "log_sigma": self.perturbation.log_sigma.detach().cpu(),
                "optimizer": self.sigma_optimizer.state_dict() if self.sigma_optimizer is not None else None,
                "micro_batches": self._micro_batches,
            }
            _save(state, os.path.join(output_dir, STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_rollouts(os.path.join(checkpoint, ROLLOUTS_NAME.format(self.accelerator.process_index)))
            if self.args.alp_enabled:
                self._load_sigma(os.path.join(checkpoint, STATE_NAME))

    def _rollout_layout(self) -> dict[str, int]:
        """How the buffered rollouts are cut into micro-batches, when they are used up, and what they hold."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
        layout = {name: getattr(self.args, name) for name in names}
        layout |= {"num_iterations": self.num_iterations, "num_processes": self.accelerator.num_processes}
        return layout | {"with_reference": self.beta != 0}

    def _load_rollouts(self, path: str) -> None:
        """Take up the buffered rollouts where the checkpoint was written; TRL alone would sample anew."""
        rollouts = _load(path, "start from freshly sampled rollouts")
        layout = self._rollout_layout()
        if not all(gather_object([rollouts is not None and rollouts.get("layout") == layout])):
            logger.warning(
                f"No buffered rollouts of {', '.join(f'{name}={value}' for name, value in layout.items())} at {path}: "
                "the run goes on with freshly sampled ones, and equals an uninterrupted run only if the checkpoint "
                "was written when all updates of a batch of rollouts were done."
            )
            self._step, self._buffered_inputs = 0, None
            return
        self._step = rollouts["step"]
        self._updates, self._generated_at = rollouts["updates"], rollouts["generated_at"]
        if rollouts["buffered_inputs"] is not None:
            self._buffered_inputs = send_to_device(rollouts["buffered_inputs"], self.accelerator.device)

    def _load_sigma(self, path: str) -> None:
        initial = f"start sigma from alp_sigma_init={self.args.alp_sigma_init}"
        # Read once for all processes: one that did not see the file would go on with another sigma.
        (state,) = broadcast_object_list([_load(path, initial) if self.accelerator.is_main_process else None])
        if state is None:
            logger.warning(
                f"The checkpoint has no {STATE_NAME} ({path}), so it was not written by ALP or with "
                f"`save_only_model=True`. The run will {initial}; to go on from another value, set `alp_sigma_init`."
            )
            return
        for name in ("num_layers", "layer_indices", "noise_scale"):
            saved, current = state[name], getattr(self.perturbation, name)
            if saved != current:
                raise ValueError(
                    f"{path} was written with {name}={saved}, but this run has {name}={current}: its sigma does not "
                    "fit. Resume with the same model, `alp_layers` and `alp_noise_scale`, or delete the file to "
                    f"{initial}."
                )
        with torch.no_grad():
            self.perturbation.log_sigma.copy_(state["log_sigma"])
        self.perturbation.bound_()
        self._micro_batches = state["micro_batches"]
        if self.sigma_optimizer is not None and state["optimizer"] is not None:
            self.sigma_optimizer.load_state_dict(state["optimizer"])
            self.sigma_optimizer.param_groups[0]["lr"] = self.args.alp_sigma_lr

    # ---- Metrics ----

    def _record(
        self,
        policy: str,
        logps: torch.Tensor,
        behaviour_logps: torch.Tensor,
        means: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Pool the statistics of one micro-batch, and further means (values, weights); all tensors are (B, T)."""
        mask = self._update.mask
        staleness = self._updates - self._generated_at
        if self.loss_type in _CLIPPED_LOSSES:
            gap = log_probability_gap(logps.detach(), behaviour_logps, mask)
            ratio = raw_log_ratio(gap, mask, self.instruments.level).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
            advantages = self._update.inputs["advantages"]
            advantages = advantages if advantages.dim() > 1 else advantages.unsqueeze(1)
            low = (advantages < 0) & (ratio < 1 - self.epsilon_low)
            high = (advantages > 0) & (ratio > 1 + self.epsilon_high)
            dual = (advantages < 0) & (ratio > (torch.inf if self.args.delta is None else self.args.delta))
            means = means | {"clip/low": (low, mask), "clip/high": (high, mask), "clip/dual": (dual, mask)}
            # Before any update since the generation it is mismatch and noise that are clipped.
            means["clip/fresh"] = (low | high, mask * (staleness == 0))
        engine = "sampling_per_token_logps" in self._update.given
        self.instruments.record(policy, logps, behaviour_logps, mask, staleness, means, engine)

    def _perturbation_metrics(self, mismatch: dict[str, float]) -> dict[str, float]:
        """Metrics of the perturbation since the last log; warns once of noise that does not act as it should."""
        self._warn_about_clipped_mismatch(mismatch.get("alp/clip/fresh", math.nan))
        if not self._noise:
            return {}
        noise = self.accelerator.gather(torch.stack(self._noise)).cpu()  # (micro-batches, 2, L)
        self._noise.clear()
        sigma, effective = noise.unbind(1)
        metrics = {}
        for name, values in (("sigma", sigma), ("noise/effective", effective)):
            # Layers that did not run have none, as the cross-attention layers of some models without an image.
            known = values[~values.isnan()].tolist() or [math.nan]
            metrics[f"alp/{name}/mean"] = sum(known) / len(known)
            metrics[f"alp/{name}/min"] = min(known)
            metrics[f"alp/{name}/max"] = max(known)
        for index, value in zip(self.perturbation.layer_indices, sigma.mean(0).tolist(), strict=True):
            metrics[f"alp/sigma/layer_{index:02d}"] = value
        inert = (effective < _INERT_NOISE).any(0).nonzero().flatten().tolist()
        if inert and "inert" not in self._warned:
            self._warned.add("inert")
            dtype = str(self.perturbation.hidden_dtype).removeprefix("torch.")
            logger.warning(
                f"The noise is lost in rounding: in {dtype}, with sigma between {sigma.min():.3g} and "
                f"{sigma.max():.3g} (alp_noise_scale={self.args.alp_noise_scale!r}), less than {_INERT_NOISE:.0%} of "
                f"it reaches the input of the layers {[self.perturbation.layer_indices[i] for i in inert]}. Raise "
                "`alp_sigma_init` (and `alp_sigma_min`), use `alp_noise_scale='rms'`, or train with fp32 weights and "
                "bf16 autocast on one GPU or under DDP, which keep the residual stream in fp32."
            )
        return metrics

    def _warn_about_clipped_mismatch(self, clipped: float) -> None:
        narrow = (self.args.epsilon_high or self.args.epsilon) < 1
        if narrow and clipped > _CLIPPED_MISMATCH and "clipped" not in self._warned:
            self._warned.add("clipped")
            logger.warning(
                f"{clipped:.0%} of the tokens are clipped before any update since their generation: with "
                f"epsilon={self.args.epsilon} and epsilon_high={self.args.epsilon_high} it is training-inference "
                "mismatch and noise that are clipped, not the update. Widen the range (the paper: `epsilon=0.5, "
                "epsilon_high=3.0`)."
            )


class _Update:
    """One call of the loss: a copy of the micro-batch, which TRL reuses across `num_iterations`, and its loss mask."""

    def __init__(self, inputs: dict[str, Any]):
        self.given, self.inputs = inputs, dict(inputs)
        tool_mask = inputs.get("tool_mask")
        completion_mask = inputs["completion_mask"]
        self.mask = completion_mask if tool_mask is None else completion_mask * tool_mask  # (B, T)


class _OptimizerStep(TrainerCallback):
    """Counts the policy's optimiser steps, and steps sigma's optimiser exactly then."""

    def __init__(self, trainer: ALPGRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # An interrupted run may have left gradient behind; the Trainer clears the policy's here.
        self.trainer.perturbation.zero_grad()
        self.trainer._noise.clear()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # Before the policy's step, since the gradient scaler changes its scale after it.
        if self.trainer.sigma_optimizer is not None:
            self.trainer._reduce_sigma_gradient()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._updates += 1
        if self.trainer.sigma_optimizer is not None:
            self.trainer._step_sigma()


class _Instrumentation(TrainerCallback):
    """Puts what the instruments measured into the trainer's log, and keeps that log beside it.

    Like the loss, it pools over all processes, so it acts at the Trainer's own logging steps, which all reach.
    """

    def __init__(self, trainer: GRPOTrainer, further_metrics: Callable | None = None):
        self.trainer = trainer
        self.further_metrics = further_metrics
        self.measured_at = -1  # the step of the latest flush

    def on_train_begin(self, args, state, control, **kwargs):
        self.measured_at = -1
        self.trainer.instruments.begin(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if not (control.should_log or control.should_training_stop):
            return None
        self.measured_at = state.global_step
        callbacks = self.trainer.callback_handler.callbacks
        tensorboard = next((c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None), None)
        metrics = self.trainer.instruments.flush(state.global_step, tensorboard)
        if self.further_metrics is not None:
            metrics |= self.further_metrics(metrics)
        for name, value in metrics.items():
            self.trainer._metrics["train"][name].append(value)
        if args.logging_strategy != "no":  # the last window too; an evaluation at the end would make it its own
            control.should_log = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):  # where `logging_strategy="epoch"` logs
        if self.measured_at == state.global_step:
            return None
        if control.should_training_stop:
            # An evaluation stopped the run, and TRL would take the last window for the evaluation's.
            self.trainer.model.train()
        return self.on_step_end(args, state, control)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.instruments.append(state.log_history[-1])


def is_monitored(step: int, every: int, age: int, updates_per_batch: int) -> bool:
    """
    Whether `alp_monitor_every` looks at the update after `step` optimiser steps, of rollouts of that `age`.

    One in each window of `every` steps, at a place that moves on by the golden ratio: at fixed places the age would be
    the same again and again wherever `every` and the updates per batch of rollouts share a divisor. And the first of
    fresh rollouts, whose mismatch is the engine's alone, in each two windows: by themselves those could be rare.

    Args:
        step (`int`):
            Optimiser steps before the update.
        every (`int`):
            `alp_monitor_every`; 0 for never.
        age (`int`):
            Optimiser steps since the rollouts were sampled.
        updates_per_batch (`int`):
            Optimiser steps made of each batch of rollouts, at least 1.
    """
    if every == 0:
        return False
    if age == 0 and step // (2 * every) != (step - updates_per_batch) // (2 * every):
        return True
    window, place = divmod(step, every)
    return place == (window * _GOLDEN_RATIO % 2**64 * every) >> 64


def _instruments(trainer: GRPOTrainer, level: str, **kwargs) -> Instruments:
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) in (torch.bfloat16, torch.float16):
        logger.warning(
            f"FSDP2 casts what the model returns to output_dtype={policy.output_dtype}, TRL's log-probs included: "
            "near -6 they come in steps of 1/32 in bf16, a mismatch of its own. Train with DeepSpeed ZeRO-3, which "
            "does not, or before `train()` set `plugin.mixed_precision_policy = dataclasses.replace("
            "plugin.mixed_precision_policy, output_dtype=torch.float32)` for `plugin = "
            "trainer.accelerator.state.fsdp_plugin`."
        )
    # TRL's own sequence level makes the geometric mean of the token ratios.
    level = "sequence_geometric" if trainer.importance_sampling_level == "sequence" else level
    return Instruments(trainer.accelerator, trainer.args.output_dir, trainer.args.report_to, level, **kwargs)


def instrument(trainer: GRPOTrainer) -> GRPOTrainer:
    """
    Give a stock [`~trl.GRPOTrainer`] the instruments of [`ALPGRPOTrainer`]: no noise, and no change to what it trains.

    Logged under `alp/`: the policy of the update against the behaviour policy (the engine's log-probs where there are
    any, else the old policy's), before TRL's truncation or mask; under `alp/old/`, where both are known, the old
    policy against the engine: the training-inference mismatch alone. See `docs/metrics.md`.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, before `train()`. An [`ALPGRPOTrainer`] has the instruments already, and is left as it is.

    Returns:
        [`~trl.GRPOTrainer`]: The same trainer.

    Raises:
        `ValueError`: If `trainer` is not a [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> trainer = instrument(GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=dataset))
    >>> trainer.train()
    ```
    """
    if not isinstance(trainer, GRPOTrainer):
        raise ValueError(
            f"instrument(trainer) got a {type(trainer).__name__}; it reads the importance ratio of a `GRPOTrainer` "
            "(or a subclass of it), which others do not have."
        )
    if isinstance(getattr(trainer, "instruments", None), Instruments):
        return trainer
    trainer.instruments = _instruments(trainer, "token")
    trainer.add_callback(_StockInstrumentation(trainer))
    return trainer


class _StockInstrumentation(_Instrumentation):
    """Watches a stock trainer's rollouts, scoring and loss from outside, where [`ALPGRPOTrainer`] overrides them."""

    def __init__(self, trainer: GRPOTrainer):
        super().__init__(trainer)
        self.in_loss = self.warned = False
        self.logps: torch.Tensor | None = None  # of the update whose loss is being computed
        self.updates = self.generated_at = 0
        for name, watch in (
            ("_generate_and_score_completions", self.watch_rollouts),
            ("_compute_loss", self.watch_loss),
            ("_get_per_token_logps_and_entropies", self.watch_scoring),
        ):
            setattr(trainer, name, partial(watch, getattr(trainer, name)))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.updates += 1

    def watch_rollouts(self, generate, inputs):
        output = generate(inputs)
        if self.trainer.model.training:
            self.generated_at = self.updates
        return output

    def watch_scoring(self, score, *args, **kwargs):
        output = score(*args, **kwargs)
        if self.in_loss and self.logps is None:  # the loss of a subclass may score more than once
            self.logps = output[0].detach()
        return output

    def watch_loss(self, compute_loss, model, inputs):
        self.in_loss = self.trainer.model.training
        try:
            loss = compute_loss(model, inputs)
            if self.in_loss:
                self.record(_Update(inputs))
        finally:
            self.in_loss, self.logps = False, None
        return loss

    def record(self, update: "_Update") -> None:
        if self.logps is None:
            if not self.warned:
                self.warned = True
                logger.warning(
                    f"{type(self.trainer).__name__}'s loss does not score the policy as GRPOTrainer's does; the "
                    "instruments have nothing to measure."
                )
            return
        old, engine = update.inputs.get("old_per_token_logps"), update.inputs.get("sampling_per_token_logps")
        # On-policy TRL scores no old policy: it is the current one.
        behaviour = next(each for each in (engine, old, self.logps) if each is not None)
        staleness, record = self.updates - self.generated_at, self.trainer.instruments.record
        record("update", self.logps, behaviour, update.mask, staleness, engine=engine is not None)
        if old is not None and engine is not None:
            record("old", old, engine, update.mask, staleness=0)


def _save(state: dict[str, Any], path: str) -> None:
    """Save so that an interrupted write leaves no half file behind."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def _load(path: str, otherwise: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({error}). Resume from another checkpoint, or delete the file to {otherwise}."
        ) from error


def _checked(rollout_func: Callable) -> Callable:
    """Wrap a `rollout_func` so that what it returns is checked before TRL stumbles over it."""

    @wraps(rollout_func)
    def checked(prompts, trainer):
        output = rollout_func(prompts, trainer)
        completions, logprobs = output.get("completion_ids"), output.get("logprobs")
        if any(len(prompt) == 0 for prompt in output.get("prompt_ids", ())):
            raise ValueError(
                "rollout_func returned an empty prompt (in `prompt_ids`). The first token of its completion would be "
                "scored from padding; return at least one token, for example the beginning-of-sequence token."
            )
        for index, completion in enumerate(completions if completions is not None else ()):
            if len(completion) == 0:
                raise ValueError(
                    f"rollout_func returned an empty completion (`completion_ids[{index}]`). Return at least one "
                    "token, for example the end-of-sequence token."
                )
            if logprobs is not None and len(logprobs[index]) != len(completion):
                raise ValueError(
                    f"rollout_func returned {len(logprobs[index])} `logprobs` for the {len(completion)} tokens of "
                    f"`completion_ids[{index}]`. Return one log-prob for each token."
                )
        return output

    return checked
