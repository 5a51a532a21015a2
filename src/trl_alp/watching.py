# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Attaches instruments to a trainer, ALP's or stock, from outside: what is measured, when, and where it is logged.

A watcher stands around the trainer's own methods and steers nothing. What the instruments do with what they are given
is in `instruments.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from trl import GRPOTrainer

from .console import attach_console
from .instruments import Instruments
from .rewards import nan_told_from_none


logger = get_logger(__name__)  # speaks on the main process only


class Loss:
    """A loss being computed: what is known of its micro-batch before it is scored."""

    def __init__(self, inputs: dict[str, Any], clip: tuple[float, float, float]):
        mask, tool_mask = inputs.get("completion_mask"), inputs.get("tool_mask")
        self.mask = mask if mask is None or tool_mask is None else mask * tool_mask  # (B, T)
        self.engine_logps = inputs.get("sampling_per_token_logps")  # (B, T), as those of the old policy
        self.old_logps = inputs.get("old_per_token_logps")
        self.advantages = inputs.get("advantages")  # (B,) or (B, T)
        self.clip = clip  # low, high and dual, as they are outside of any loss
        self.scored = False


class Watcher(TrainerCallback):
    """
    Watches the rollouts, the scoring and the log of a [`~trl.GRPOTrainer`], and feeds its instruments.

    Over all processes it pools where a log is due and at the end of training, which all of them reach; `log` alone may
    be called by one.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer; its `instruments` are given what is seen.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.updates = 0  # optimiser steps so far; unlike `state.global_step` it goes on when `train` is called again
        self.generated_at = 0  # of them, when the latest rollouts were generated
        self._loss: Loss | None = None
        self._pending: dict[str, float] = {}  # measured, for the row of the log that comes next
        self._rewards = [0, 0]  # completions that no reward function scored, and batches of rollouts
        self._saw_scoring = False  # since the last optimiser step
        self._warned: set[str] = set()
        for name, watch in (
            ("_generate_and_score_completions", self.watch_rollouts),
            ("_calculate_rewards", self.watch_rewards),
            ("compute_loss", self.watch_loss),
            ("_compute_loss", self.watch_loss),
            ("_get_per_token_logps_and_entropies", self.watch_scoring),
            ("_maybe_log_save_evaluate", self.watch_logging),
            ("_finalize_training", self.watch_end),
            ("log", self.watch_log),
        ):
            setattr(trainer, name, partial(watch, getattr(trainer, name)))

    def warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning(message)

    # ---- Rollouts ----

    def watch_rollouts(self, generate: Callable, inputs):
        training = self.trainer.model.training
        output = generate(inputs)
        if training:
            self.generated_at = self.updates
        return output

    def watch_rewards(self, calculate: Callable, *args, **kwargs):
        with nan_told_from_none(self.trainer):
            rewards = calculate(*args, **kwargs)  # (N, number of reward functions), of all processes
        if not torch.is_tensor(rewards) or rewards.dim() != 2:  # a subclass's own
            return rewards
        infinite = int(torch.isinf(rewards).sum())
        if self.trainer.model.training:
            self._rewards[0] += int(torch.isnan(rewards).all(dim=1).sum())
            self._rewards[1] += 1
        if infinite:
            self.warn_once(
                "rewards",
                f"{infinite} rewards are infinite, which leaves the advantages of their groups without meaning (TRL "
                "makes them 0, or the largest number there is). Let the reward function return a finite number, or "
                "None where it cannot score.",
            )
        return rewards

    # ---- The loss ----

    def watch_loss(self, compute: Callable, model, inputs, *args, **kwargs):
        outer = self._loss
        if torch.is_grad_enabled():  # an evaluation has none
            self._loss = Loss(inputs, self._clip() if outer is None else outer.clip)
        try:
            return compute(model, inputs, *args, **kwargs)
        finally:
            self._loss = outer

    def _clip(self) -> tuple[float, float, float]:
        trainer = self.trainer
        dual = next((c for c in (trainer.args.delta, getattr(trainer.args, "alp_dual_clip", None)) if c), math.inf)
        return trainer.epsilon_low, trainer.epsilon_high, dual

    def watch_scoring(self, score: Callable, *args, **kwargs):
        loss = self._loss
        # The loss of a subclass may score more than once; a pass without gradient is of another policy.
        if loss is None or loss.scored or not torch.is_grad_enabled():
            return score(*args, **kwargs)
        loss.scored = True
        noise_off = self.look_without_noise(score, *args, **kwargs)
        output = score(*args, **kwargs)
        logps = output[0].detach()
        if loss.mask is not None and logps.shape == loss.mask.shape:
            self._saw_scoring = True
            self.measure(loss, logps, noise_off)
        return output

    def look_without_noise(self, score: Callable, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def measure(self, loss: Loss, logps: torch.Tensor, noise_off: tuple | None) -> None:
        """Give the instruments one scored micro-batch; `logps` are (B, T)."""
        record, staleness = self.trainer.instruments.record, self.updates - self.generated_at
        engine, old = loss.engine_logps, loss.old_logps
        # On-policy TRL scores no old policy: it is the current one.
        behaviour = next(each for each in (engine, old, logps) if each is not None)
        means = self.further_means(loss, logps, behaviour, staleness, noise_off)
        record("update", logps, behaviour, loss.mask, staleness, means, engine is not None)
        if engine is not None and old is not None:
            record("old", old, engine, loss.mask, staleness=0)

    @property
    def is_first_micro_batch(self) -> bool:
        """Whether the loss that is being computed is the first of its optimiser step."""
        return self.trainer._step % self.trainer.current_gradient_accumulation_steps == 0

    def further_means(self, *args) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.updates += 1
        if not self._saw_scoring:
            self.warn_once(
                "scoring",
                f"The loss of {type(self.trainer).__name__} does not score the policy as GRPOTrainer's does (by "
                "`_get_per_token_logps_and_entropies`, inside `compute_loss`, a micro-batch at a time); the "
                "instruments have nothing to measure.",
            )
        self._saw_scoring = False

    # ---- The log ----

    def on_train_begin(self, args, state, control, **kwargs):
        self._pending, self._rewards = {}, [0, 0]
        model = getattr(self.trainer.model.config, "_name_or_path", "")
        # `to_dict` masks tokens.
        config = {"trainer": type(self.trainer).__name__, "model": model} | args.to_dict()
        self.trainer.instruments.begin(state.global_step, state.log_history, config)

    def watch_logging(self, maybe_log: Callable, *args, **kwargs):
        state = self.trainer.state
        if self.trainer.control.should_log and state.global_step > self.trainer._globalstep_last_logged:
            self.flush()
        return maybe_log(*args, **kwargs)

    def watch_end(self, finalize: Callable, *args, **kwargs):
        self.flush()
        return finalize(*args, **kwargs)

    def watch_log(self, log: Callable, logs: dict[str, float], *args, **kwargs):
        if not any(name.startswith("eval_") for name in logs):
            logs.update(self._pending)
            self._pending = {}
        return log(logs, *args, **kwargs)

    def flush(self) -> None:
        """Pool all that was measured since the last time over processes, for the row of the log that comes next."""
        callbacks = self.trainer.callback_handler.callbacks
        tensorboard = next((c.tb_writer for c in callbacks if getattr(c, "tb_writer", None) is not None), None)
        metrics = self.trainer.instruments.flush(self.trainer.state.global_step, tensorboard)
        unscored, batches = self._rewards
        if batches:
            metrics["alp/unscored_rewards"] = unscored / batches
        self._rewards = [0, 0]
        self._pending |= metrics

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.instruments.append(state.log_history[-1])


def attach_instruments(trainer: GRPOTrainer, level: str, **kwargs) -> None:
    """
    Give a trainer its `instruments`.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        level (`str`):
            Level of the importance ratio in its loss, unless TRL's own sequence level aggregates it.
        **kwargs:
            For [`Instruments`].
    """
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) in (torch.bfloat16, torch.float16):
        logger.warning(
            f"FSDP2 casts what the model returns to output_dtype={policy.output_dtype}, TRL's log-probs included: "
            "near -6 they come in steps of 1/32 in bf16, a mismatch of its own. Train with DeepSpeed ZeRO-3, which "
            "does not, or before `train()` set `plugin.mixed_precision_policy = dataclasses.replace("
            "plugin.mixed_precision_policy, output_dtype=torch.float32)` for `plugin = "
            "trainer.accelerator.state.fsdp_plugin`."
        )
    if trainer.args.push_to_hub and kwargs.get("log_files", True):
        logger.warning(
            "push_to_hub=True uploads `output_dir/alp/`, the log and the envelope of the run, with the model; "
            "`alp_log_files=False` writes none."
        )
    attach_console(trainer)
    # TRL's own sequence level makes the geometric mean of the token ratios.
    level = "sequence_geometric" if trainer.importance_sampling_level == "sequence" else level
    neftune = bool(trainer.args.neftune_noise_alpha)
    trainer.instruments = Instruments(
        trainer.accelerator, trainer.args.output_dir, trainer.args.report_to, level, neftune=neftune, **kwargs
    )


def instrument(trainer: GRPOTrainer, alp_log_files: bool = True) -> GRPOTrainer:
    """
    Give a stock [`~trl.GRPOTrainer`] the instruments of [`ALPGRPOTrainer`]: no noise, and no change to what it trains.

    Logged under `alp/`: the policy of the update against the behaviour policy (the engine's log-probs where there are
    any, else the old policy's), before TRL's truncation or mask; under `alp/old/`, where both are known, the old
    policy against the engine: the training-inference mismatch alone. See `docs/metrics.md`. A loss that does not score
    the policy as GRPOTrainer's does leaves nothing to measure; a warning says so.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, before `train()`. An [`ALPGRPOTrainer`] has the instruments already, and is left as it is.
        alp_log_files (`bool`, *optional*, defaults to `True`):
            Whether to write the log and the envelope to `output_dir/alp/`.

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
    attach_instruments(trainer, "token", log_files=alp_log_files)
    trainer.add_callback(Watcher(trainer))
    return trainer
