# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The profile of the noise over layers: how sigma differs between them, measured from a number format.

Where an engine's error enters differs by family of models. The *local error* of a layer is what the number format adds
to the layer's output when its input is exact:

    e_l = RMS of (layer in the format - layer)(h_l), relative to the scale of the noise

Sigma is given that shape; its level is another's to choose (`alp_sigma_init`, or the fit).
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from .channels import towers
from .formats import FORMATS, check_format, check_whole, layer_in_format
from .layers import find_decoder_layers
from .noise import NoiseScale, check_noise_scale
from .perturbation import is_finite_number


# Prompts of the training data that a trainer measures its profile on, and the most tokens of each.
_PROMPTS, _LONGEST = 8, 256


@torch.no_grad()
def local_errors(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    number_format: str,
    noise_scale: NoiseScale = "rms",
) -> torch.Tensor:
    """
    The error that each decoder layer adds to its output in a number format.

    Args:
        model (`torch.nn.Module`):
            A Hugging Face decoder language model with whole weights, bare or with PEFT adapters.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Tokens to measure on.
        attention_mask (`torch.Tensor` of shape `(B, T)`):
            Nonzero for those that count.
        number_format (`str`):
            One of `trl_alp.formats.FORMATS`.
        noise_scale (`str`, *optional*, defaults to `"rms"`):
            What it is relative to: the RMS of each token's output (`"rms"`), that of each channel over tokens
            (`"channel"`), or nothing (`"absolute"`).

    Returns:
        `torch.Tensor` of shape `(number of layers,)`: Root mean square over tokens and channels, fp32.

    Raises:
        `ValueError`: If the format or the scale is unknown, or the weights are packed or sharded.

    Example:

    ```python
    >>> errors = local_errors(model, input_ids, attention_mask, "int4")
    ```
    """
    check_format(number_format)
    check_noise_scale(noise_scale)
    layers = find_decoder_layers(model)
    for layer in layers:
        check_whole(layer, number_format)
    errors: list[torch.Tensor] = []

    def compare(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        other = layer_in_format(layer, number_format)(*args, **kwargs)
        exact, other = (_hidden(each).float() for each in (output, other))
        known = attention_mask.to(exact.device).bool()
        known = known if exact.shape[:-1] == known.shape else torch.ones(exact.shape[:-1], device=exact.device).bool()
        error, exact = (other - exact)[known].square(), exact[known].square()  # (N, H)
        if noise_scale == "rms":
            error = error.mean(-1) / exact.mean(-1)
        elif noise_scale == "channel":
            ordinary = ~towers(exact.mean(-1))
            error = error[ordinary].mean(0) / exact[ordinary].mean(0)
        errors.append(error[error.isfinite()].mean().sqrt().cpu())

    training = [(module, module.training) for module in model.modules()]
    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training:
            module.training = was
    return torch.stack(errors)


def _hidden(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def profile_offsets(profile: Sequence[float]) -> torch.Tensor:
    """What the profile adds to `log_sigma`: its logarithm without the mean, so that sigma's level stays.  # (L,)"""
    logarithm = torch.tensor(profile, dtype=torch.float64).log()
    return (logarithm - logarithm.mean()).float()


def parse_profile(
    profile: Sequence[float] | str | None, num_layers: int | None, name: str = "profile"
) -> list[float] | str | None:
    """
    Turn a choice of profile into numbers, or into the name of a format to measure it from.

    Args:
        profile (`list[float]` or `str`, *optional*):
            `None` for the same sigma in all layers, one of `trl_alp.formats.FORMATS`, or a positive number for each
            perturbed layer, as a list or as a string with commas. Only their ratios count.
        num_layers (`int`, *optional*):
            How many layers are perturbed. `None` where there is no model yet.
        name (`str`, *optional*, defaults to `"profile"`):
            What errors call the choice.

    Raises:
        `ValueError`: If it is none of these, or has another number of layers.
    """
    if profile is None or profile in FORMATS:
        return profile
    try:
        numbers = [float(part) for part in profile.split(",")] if isinstance(profile, str) else list(profile)
        valid = len(numbers) > 0 and all(is_finite_number(number) and number > 0 for number in numbers)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"{name}={profile!r} is no profile: use one of {list(FORMATS)}, a positive number for each perturbed "
            "layer, or None for the same sigma in all of them."
        )
    if num_layers is not None and len(numbers) != num_layers:
        raise ValueError(
            f"{name} has {len(numbers)} numbers, but {num_layers} layers are perturbed: give one for each."
        )
    return numbers


def profile_of_trainer(trainer, layer_indices: Sequence[int]) -> list[float]:
    """
    The profile that a trainer's `alp_noise_profile` asks for, one number for each perturbed layer.

    A format is measured on the first prompts of the training data by the main process, for all.

    Args:
        trainer ([`ALPGRPOTrainer`]):
            The trainer, under construction.
        layer_indices (`Sequence[int]`):
            The perturbed layers.

    Raises:
        `ValueError`: If the profile does not fit, or cannot be measured here.
    """
    profile = parse_profile(trainer.args.alp_noise_profile, len(layer_indices), "alp_noise_profile")
    if not isinstance(profile, str):
        return profile
    outcome: list[Any] = [None]
    if trainer.accelerator.is_main_process:
        try:
            outcome = [_measured(trainer, profile, layer_indices)]
        except ValueError as error:  # the others must not wait for it
            outcome = [str(error)]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], str):
        raise ValueError(outcome[0])
    return outcome[0]


def _measured(trainer, number_format: str, layer_indices: Sequence[int]) -> list[float]:
    asked = f"alp_noise_profile={number_format!r}"
    rows = list(islice(iter(trainer.train_dataset if trainer.train_dataset is not None else ()), _PROMPTS))
    if not rows:
        raise ValueError(f"{asked} is measured on prompts of `train_dataset`, which has none; give numbers instead.")
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    ids, mask = _padded([tokens_of(row["prompt"], tokenizer)[-_LONGEST:] for row in rows])
    device = next(trainer.model.parameters()).device
    try:
        errors = local_errors(
            trainer.model, ids.to(device), mask.to(device), number_format, trainer.args.alp_noise_scale
        )
    except ValueError as error:
        raise ValueError(f"{asked} cannot be measured on this model: {error}") from error
    profile = [errors[index].item() for index in layer_indices]
    if not all(is_finite_number(number) and number > 0 for number in profile):
        raise ValueError(
            f"{asked} changes nothing in some layers of this model, whose weights are in {trainer.model.dtype}: it is "
            "the format that the trainer computes in. Name the engine's, or leave the profile None."
        )
    return profile


def tokens_of(prompt: str | list[dict], tokenizer) -> list[int]:
    """Token ids of a prompt as TRL's trainer makes them: the chat template for messages, the tokenizer for text."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _padded(rows: Iterable[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows on the left of a rectangle, and its mask.  # (B, T) each"""
    rows = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask
