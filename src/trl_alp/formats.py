# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Number formats of inference engines, simulated: decoder layers that compute as an engine's would.

| format | weights | activations |
|---|---|---|
| `bf16` | bf16 | bf16 |
| `fp8` | e4m3, a scale for each output channel | e4m3, a scale for each token (vLLM's dynamic fp8) |
| `int8`, `int4`, `int3` | symmetric integers, a scale for each 32 weights of a row | unchanged |
| `nvfp4` | e2m1, an e4m3 scale for each 16 weights of a row, and one for the matrix | unchanged |

Where activations are unchanged, whatever the engine computes in besides (bf16, as a rule) is not in it. Embeddings,
router and output layer stay as they are, as in vLLM's quantised checkpoints. For 32 weights: Kimi K2's int4.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import find_decoder_layers


FORMATS: tuple[str, ...] = ("bf16", "fp8", "int8", "int4", "int3", "nvfp4")
_GROUP = 32
_BLOCK = 16
_E4M3_LARGEST = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def check_format(number_format: str, name: str = "number_format", others: tuple[str, ...] = ()) -> None:
    """Raise a `ValueError`, which calls it `name`, unless `number_format` is known."""
    if number_format not in FORMATS:
        raise ValueError(f"{name}={number_format!r} is unknown. Use one of {[*FORMATS, *others]}.")


@torch.no_grad()
def rounded(values: torch.Tensor, number_format: str) -> torch.Tensor:
    """
    Round to what a number format can hold.

    Args:
        values (`torch.Tensor` of shape `(..., K)`):
            A weight matrix, its last dimension the one that is summed over.
        number_format (`str`):
            One of `FORMATS`.

    Returns:
        `torch.Tensor`: The rounded values, of the shape and dtype of `values`.
    """
    check_format(number_format)
    wide = values.float()
    if number_format == "bf16":
        out = wide.bfloat16().float()
    elif number_format == "fp8":
        out = _e4m3(wide, wide.abs().amax(-1, keepdim=True) / _E4M3_LARGEST)
    elif number_format == "nvfp4":
        out = _nvfp4(wide)
    else:
        largest = 2 ** (int(number_format.removeprefix("int")) - 1) - 1
        groups = _grouped(wide, _GROUP)
        step = _positive(groups.abs().amax(-1, keepdim=True) / largest)
        out = _ungrouped((groups / step).round() * step, wide)
    return out.to(values.dtype)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _e4m3(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = _positive(scale)
    # The cast makes NaN of what is beyond the largest number, if only by rounding.
    return (values / scale).clamp(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).float() * scale


def _nvfp4(values: torch.Tensor) -> torch.Tensor:
    blocks = _grouped(values, _BLOCK)
    wanted = blocks.abs().amax(-1, keepdim=True) / _E2M1[-1]
    scale = _positive(_e4m3(wanted, wanted.amax() / _E4M3_LARGEST))
    grid = torch.tensor(_E2M1, device=values.device)
    between = (grid[1:] + grid[:-1]) / 2
    nearest = grid[torch.bucketize((blocks / scale).abs().contiguous(), between)]
    return _ungrouped(nearest * blocks.sign() * scale, values)


def _grouped(values: torch.Tensor, size: int) -> torch.Tensor:
    """(..., K) as (..., groups, size), the last group filled up with zeros."""
    return nn.functional.pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))


def _ungrouped(groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return groups.flatten(-2)[..., : like.shape[-1]]


def check_whole(layer: nn.Module, number_format: str) -> None:
    """Raise a `ValueError` if weights of the layer are packed (bitsandbytes) or sharded."""
    for name, value in layer.named_parameters():
        if not value.is_floating_point() or hasattr(value, "ds_id") or hasattr(value, "device_mesh"):
            raise ValueError(
                f"The weight {name} is packed or sharded, and cannot be rounded to {number_format}. Measure the model "
                "with whole weights, by `trl-alp doctor MODEL --noise`, and give the trainer the numbers."
            )


def layer_in_format(layer: nn.Module, number_format: str) -> nn.Module:
    """
    A copy of a decoder layer that computes in a number format.

    Args:
        layer (`torch.nn.Module`):
            The layer, which may hold LoRA adapters: an engine has them merged, and so has the copy.
        number_format (`str`):
            One of `FORMATS`.

    Returns:
        `torch.nn.Module`: The copy, without the hooks of the original, in evaluation mode.

    Raises:
        `ValueError`: If the format is unknown, or weights of the layer are packed (bitsandbytes) or sharded.
    """
    check_format(number_format)
    check_whole(layer, number_format)
    layer = copy.deepcopy(layer).eval()
    for module in layer.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):  # PEFT's
            module.merge()
    if number_format == "bf16":
        layer = layer.bfloat16()
        layer.register_forward_pre_hook(lambda _, args, kwargs: (_cast(args), _cast(kwargs)), with_kwargs=True)
        return layer
    round_matrices(layer, number_format)
    return layer


def round_matrices(layer: nn.Module, number_format: str) -> None:
    """
    Round the matrices of a layer in place, and in `fp8`, by hooks, what enters them.

    Args:
        layer (`torch.nn.Module`):
            The layer, whose vectors and LoRA adapters stay.
        number_format (`str`):
            One of `FORMATS` but `bf16`, in which whole layers compute.
    """
    for module in layer.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or "lora_" in name:
                continue
            across = isinstance(module, Conv1D)  # whose weight is (in, out)
            values = rounded(weight.data.mT if across else weight.data, number_format)
            weight.data = values.mT.contiguous() if across else values
        if number_format == "fp8" and isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], "fp8"), *args[1:]))


def _cast(value: Any) -> Any:
    """The same with its floating-point tensors in bf16."""
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_cast, value))
    return value


def put_in_format(model: nn.Module, number_format: str) -> nn.Module:
    """
    Put the decoder layers of a model into a number format, in place.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, of which nothing else should hold the layers. `bf16` takes the whole model, as an engine does.
        number_format (`str`):
            One of `FORMATS`.

    Returns:
        [`~transformers.PreTrainedModel`]: The same model.

    Raises:
        `ValueError`: As [`layer_in_format`].
    """
    check_format(number_format)
    if number_format == "bf16":
        for parameter in model.parameters():  # `model.to` would round the frequencies of rotary embeddings too
            parameter.data = parameter.data.bfloat16()
        model.config.dtype = torch.bfloat16
        return model
    layers = find_decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = layer_in_format(layer, number_format)
    return model
