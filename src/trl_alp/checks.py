# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What must hold, when a trainer is built, for the importance ratio to be what the equations say."""

from collections.abc import Callable, Sized
from functools import wraps
from typing import Any

import torch
from accelerate.logging import get_logger
from trl import GRPOConfig, GRPOTrainer

from .config import ALPGRPOConfig
from .sampling import reshaping


logger = get_logger(__name__)  # speaks on the main process only


def check_args(args: ALPGRPOConfig) -> None:
    """Raise a `ValueError` unless `args` is an [`ALPGRPOConfig`] that can be trained on this device and backend."""
    if not isinstance(args, ALPGRPOConfig):
        raise ValueError(
            f"args is a {type(args).__name__}; ALPGRPOTrainer needs an `ALPGRPOConfig`, which adds the `alp_*` fields "
            "and changes four defaults of `GRPOConfig`. Replace `GRPOConfig(...)` by `ALPGRPOConfig(...)`."
        )
    if args.fp16 and (args.deepspeed_plugin is not None or args.device.type == "cpu"):
        backend, reason = (
            ("with DeepSpeed", "it steps the policy inside backward, with a loss scale that sigma's gradient keeps")
            if args.deepspeed_plugin is not None
            else ("on a cpu", "accelerate would train in fp32 without saying so")
        )
        raise ValueError(f"fp16=True {backend} is not supported: {reason}. Set `bf16=True`, or neither for fp32.")
    if args.full_determinism and args.alp_ratio_level.startswith("cumulative") and args.device.type == "cuda":
        raise ValueError(
            f"full_determinism=True with alp_ratio_level={args.alp_ratio_level!r} is not supported on a GPU: torch "
            "has no deterministic cumulative sum there. Use another level, or `full_determinism=False`."
        )


def check_dataset(dataset: Any, args: GRPOConfig) -> None:
    """Raise a `ValueError` if a dataset whose size is known has fewer prompts than one batch of rollouts takes; TRL
    would train nothing and say nothing."""
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Sized) and len(dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, fewer than the {prompts} of one batch of rollouts "
            f"(generation_batch_size={args.generation_batch_size} // num_generations={args.num_generations}), so that "
            "nothing would be trained. Use more prompts, or lower `steps_per_generation`, "
            "`per_device_train_batch_size` or `generation_batch_size`."
        )


def check_server(trainer: GRPOTrainer) -> None:
    """Raise a `ValueError` unless a vLLM server reports log-probs of the distribution it samples from; TRL makes this
    check only with its own correction on, and as a warning."""
    if trainer.use_vllm and trainer.vllm_mode == "server" and trainer.accelerator.is_main_process:
        mode = trainer.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                f"The vLLM server runs with `--logprobs-mode {mode}`, so its log-probs are not those of the "
                "distribution it samples from, and ALP's importance ratio would be biased. Restart it with "
                "`--logprobs-mode processed_logprobs`."
            )


def warn_of_sampling(trainer: GRPOTrainer) -> None:
    """Warn of what the model's own `generation_config` adds to the sampling that was asked for: `generate` acts on it
    wherever TRL says nothing. What was asked for is told by the config; vLLM and a `rollout_func` do not read it."""
    if trainer.use_vllm or trainer.rollout_func is not None:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    used, _ = model._prepare_generation_config(trainer.generation_config)
    asked = trainer.generation_config.to_dict()
    added = {
        name: value
        for name, value in reshaping(used.to_dict(), trainer.temperature).items()
        if asked.get(name) is None
    }
    if added:
        logger.warning(
            f"The model's own generation_config adds {', '.join(f'{name}={value}' for name, value in added.items())} "
            "to the sampling: completions come from a truncated or reweighted distribution, and the importance ratio "
            "against it is biased. Clear them before `train()`: "
            f"`{'; '.join(f'trainer.model.generation_config.{name} = None' for name in added)}`."
        )


def warn_of_dropout(trainer: GRPOTrainer) -> None:
    """Warn of dropout in the policy, of its modules and of its attention, which `disable_dropout` does not reach."""
    modules = trainer.model.modules()
    attention = getattr(trainer.model.config.get_text_config(), "attention_dropout", 0) or 0
    for rate, way_out in (
        (max((m.p for m in modules if isinstance(m, torch.nn.Dropout)), default=0), "`disable_dropout=True`"),
        (attention, "`attention_dropout=0` in the model's config"),
    ):
        if rate > 0:
            logger.warning(
                f"The policy has dropout (p={rate}), which makes the importance ratio noisy by an amount nobody "
                f"trains, on top of ALP's perturbation. Set {way_out}."
            )


def checked(rollout_func: Callable, when_done: Callable[[bool], None]) -> Callable:
    """
    Wrap a `rollout_func` so that what it returns is checked before TRL stumbles over it, and its traces are removed.

    Args:
        rollout_func (`Callable`):
            The user's.
        when_done (`Callable[[bool], None]`):
            Called after it with whether it reported log-probs.

    Returns:
        `Callable`: The same function, which raises a `ValueError` for empty prompts, empty completions and log-probs
            that are not one for each token, and puts back the mode (training or not) of a model that it changed.
    """
    warned = False

    @wraps(rollout_func)
    def wrapper(prompts, trainer):
        nonlocal warned
        training = trainer.model.training
        output = rollout_func(prompts, trainer)
        if trainer.model.training != training:
            trainer.model.train(training)
            if not warned:
                warned = True
                left, back = ("evaluation", "train()") if training else ("training", "eval()")
                logger.warning(
                    f"rollout_func left the model in {left} mode; it was put back. Call `trainer.model.{back}` at the "
                    "end of the function."
                )
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
        when_done(logprobs is not None)
        return output

    return wrapper
