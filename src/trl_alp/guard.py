# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""ALP cannot come loose: whether the loss that moves the policy still goes through ALP's overrides.

A subclass, a base class in front of ours or a loss of one's own may leave an override of ours unreached. The run would
go on without a word, and without ALP. What the classes tell is an error at construction, the rest one before the
policy's optimiser steps.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from transformers import TrainerCallback


SCORING, LOSS, INNER_LOSS = "_get_per_token_logps_and_entropies", "compute_loss", "_compute_loss"


def check_overrides(trainer_class: type, ours: type) -> None:
    """
    Check that no class in front of `ours` hides an override that ALP needs.

    The scoring method has to reach ours, and so has one of the two loss methods: with a `_compute_loss` of its own a
    subclass works, since `compute_loss` calls it inside ours.

    Args:
        trainer_class (`type`):
            The class that is constructed.
        ours (`type`):
            The class among its bases whose overrides are needed.

    Raises:
        `ValueError`: If a method that was put in front of ours neither calls `super()` nor names the method.
    """
    in_front = trainer_class.__mro__[: trainer_class.__mro__.index(ours)]

    def hidden_by(method: str, *otherwise: str) -> type | None:
        wanted = {"super", "__class__", method, *otherwise}
        return next((c for c in in_front if method in vars(c) and not wanted & _names(vars(c)[method])), None)

    hidden, method = hidden_by(SCORING), SCORING
    if hidden is None and hidden_by(LOSS) is not None:
        hidden, method = hidden_by(LOSS, INNER_LOSS), LOSS
        if hidden is None:
            hidden, method = hidden_by(INNER_LOSS), INNER_LOSS
    if hidden is not None:
        raise ValueError(
            f"{hidden.__name__}.{method} does not reach {ours.__name__}.{method}, so {trainer_class.__name__} would "
            f"train without ALP. Call `super().{method}(...)` in it, or, where it is another trainer's, let "
            f"{ours.__name__} come before {hidden.__name__} among the bases."
        )


def _names(function: Any) -> set[str]:
    """Names that a function uses, in its own code and in the functions that it encloses or wraps."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType):
        return {"super"}  # a callable object: only running it can tell
    names, waiting, seen = set(), [function], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, FunctionType) and each not in seen:
            seen.add(each)
            waiting.append(each.__code__)
            for cell in each.__closure__ or ():
                with suppress(ValueError):  # a cell that is empty yet
                    waiting.append(cell.cell_contents)
        elif isinstance(each, CodeType):
            names |= {*each.co_names, *each.co_freevars}
            waiting += each.co_consts
    return names


class ScoringGuard(TrainerCallback):
    """
    Checks before each optimiser step that the policy was scored by ALP since the last one.

    Every scoring pass inside the loss must have gone through ALP's override; at least one must, if the policy ran with
    gradient at all; each must have met the noise (unless `alp_enabled=False`) and a behaviour policy's log-probs. With
    DeepSpeed, which steps the policy inside backward, the check comes after that step.

    Args:
        trainer ([`ALPGRPOTrainer`]):
            The trainer, which tells of each of its scoring passes by [`~ScoringGuard.scored`].
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.passes = 0
        self.faults: list[str] = []
        setattr(trainer, SCORING, partial(self._watch, getattr(trainer, SCORING)))

    def _watch(self, score: Callable, *args, **kwargs):
        before = self.passes
        output = score(*args, **kwargs)
        if self.trainer.in_update and self.passes == before:
            self.faults.append(
                f"a scoring pass inside the loss did not go through ALPGRPOTrainer's `{SCORING}`; call "
                f"`super().{SCORING}(...)` where it is overridden"
            )
        return output

    def scored(self, perturbed: bool, has_denominator: bool) -> None:
        """A scoring pass of the loss went through ALP's override."""
        self.passes += 1
        if not perturbed:
            self.faults.append(
                "the noise reached no decoder layer in a scoring pass of the loss: the model that was scored is not "
                "the one that ALP was built for. Score other models under `torch.no_grad()`, and build the trainer "
                "with the model that is trained"
            )
        if not has_denominator:
            self.faults.append(
                "the loss was given neither `sampling_per_token_logps` nor `old_per_token_logps`, so the perturbed "
                "policy would be its own behaviour policy, with a ratio of exactly 1. Call "
                "`super()._generate_and_score_completions(...)`, or put the behaviour policy's log-probs into the "
                "inputs"
            )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "The policy has no trainable parameter, so there is nothing to train. Load an adapter with "
                "`is_trainable=True`, pass `peft_config`, or unfreeze some of the model."
            )
        self._begin()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        faults = list(dict.fromkeys(self.faults))
        if self.passes == 0 and self.trainer.perturbation.seen["ran"]:
            faults.append(
                f"the policy ran with gradient, but no scoring pass went through the loss of ALPGRPOTrainer: "
                f"`{LOSS}` and `{INNER_LOSS}` of {type(self.trainer).__name__} must call `super()`, and score the "
                f"policy by `self.{SCORING}(...)`"
            )
        if faults:
            raise RuntimeError(
                f"This step would train {type(self.trainer).__name__} without ALP: {'; '.join(faults)}. To train "
                "without ALP, use `GRPOTrainer`."
            )
        self._begin()

    def _begin(self) -> None:
        self.passes, self.faults = 0, []
        self.trainer.perturbation.seen["ran"] = False

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.perturbation.forget_passes()
