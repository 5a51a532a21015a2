# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""NaN is not None: TRL makes the first of the second before it says which rewards it cannot use."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import iscoroutinefunction

import torch
from trl import GRPOTrainer


@contextmanager
def nan_told_from_none(trainer: GRPOTrainer) -> Iterator[None]:
    """
    Have TRL's warning that "All reward functions returned None" say NaN, where one of them returned that.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, whose reward functions are looked at inside the context; those that are models or
            asynchronous are not.
    """
    found_nan = False

    def noting(function: Callable) -> Callable:
        asynchronous = iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
        if isinstance(function, torch.nn.Module) or asynchronous:
            return function

        @wraps(function)
        def wrapper(*args, **kwargs):
            nonlocal found_nan
            rewards = list(function(*args, **kwargs))
            found_nan = found_nan or any(reward is not None and bool(reward != reward) for reward in rewards)
            return rewards

        return wrapper

    def correct(record: logging.LogRecord) -> bool:
        if found_nan:
            said = "All reward functions returned None"
            record.msg = str(record.msg).replace(said, "All reward functions returned NaN (or None)", 1)
        return True

    reward_funcs, logger = trainer.reward_funcs, logging.getLogger("trl.trainer.grpo_trainer")
    trainer.reward_funcs = [noting(function) for function in reward_funcs]
    logger.addFilter(correct)
    try:
        yield
    finally:
        logger.removeFilter(correct)
        trainer.reward_funcs = reward_funcs
