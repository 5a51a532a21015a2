# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The decoder layers of a model: where they are, which of them are chosen, and which of them training reaches."""

import re
from collections.abc import Sequence

from torch import nn


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    Find the decoder layers of a Hugging Face decoder language model.

    Works on the bare model and through wrappers (PEFT, DDP, FSDP, DeepSpeed, `torch.compile`). Of a vision-language
    model, the layers of the text tower are returned.

    Args:
        model (`torch.nn.Module`):
            The model, bare or wrapped.

    Returns:
        `torch.nn.ModuleList`: The decoder layers, in order.

    Raises:
        `ValueError`: If the model is an encoder-decoder, or if there is not exactly one list of
            `config.get_text_config().num_hidden_layers` layers below `model.get_decoder()`.
    """
    base = next((m for m in model.modules() if hasattr(m, "get_decoder") and hasattr(m, "config")), None)
    if base is None:
        raise ValueError(
            f"No decoder layers found in {type(model).__name__}: looked for a Hugging Face model, that is a module "
            "with `config` and `get_decoder()`. ALP perturbs the decoder layers of a causal language model; pass one "
            "that `AutoModelForCausalLM` or `AutoModelForImageTextToText` loads."
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder (`config.is_encoder_decoder=True`). ALP is defined for "
            "decoder-only language models; use one of those."
        )
    text_config = base.config.get_text_config()
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if getattr(text_config, "model_type", None) == "longcat_flash":  # there it counts attentions, two to a layer
        num_layers = text_config.num_layers
    decoder = base.get_decoder()
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        is_layer_list = isinstance(module, nn.ModuleList) and len(module) == num_layers
        nested = any(name.startswith(f"{outer}.") for outer in found)
        # A layer may hold a list of as many experts; the outermost list is the layers'.
        if is_layer_list and not nested:
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"No unique decoder layers found in {type(base).__name__}: looked below `get_decoder()` "
            f"({type(decoder).__name__}) for one `ModuleList` of `config.get_text_config().num_hidden_layers` = "
            f"{num_layers} layers and found {len(found)}: {sorted(found)}. Open an issue with this line."
        )
    return next(iter(found.values()))


def first_trained_layer(model: nn.Module) -> int:
    """
    The lowest decoder layer whose input the gradient of the loss has to reach for the model's own parameters.

    Sigma of the layers below it is not worth training: its gradient would keep activations that nothing else needs.

    Args:
        model (`torch.nn.Module`):
            The model, bare or wrapped.

    Returns:
        `int`: Index of the lowest decoder layer that holds a trainable parameter, 0 if anything that feeds the layers
            (an embedding, a vision tower) is trainable, the number of layers if nothing but the final norm and the
            output embedding is.
    """
    layers = find_decoder_layers(model)
    base = next(m for m in model.modules() if hasattr(m, "get_decoder") and hasattr(m, "config"))
    decoder_modules = list(base.get_decoder().modules())
    place = next(i for i, module in enumerate(decoder_modules) if module is layers)
    in_layers = {id(module) for module in layers.modules()}

    def own_parameters(modules):
        return {id(p) for module in modules if id(module) not in in_layers for p in module.parameters(recurse=False)}

    front = own_parameters(decoder_modules[:place])  # a tied output embedding is one of them
    head = base.get_output_embeddings()
    behind = own_parameters([*decoder_modules[place:], *(head.modules() if head is not None else ())]) - front
    layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    trained = [id(p) for p in model.parameters() if p.requires_grad and id(p) not in behind]
    return min((layer_of.get(p, 0) for p in trained), default=len(layers))


def parse_layers(
    layers: Sequence[int] | int | str | None, num_layers: int | None, name: str = "layers"
) -> list[int] | None:
    """
    Turn a choice of layers into sorted layer indices.

    Args:
        layers (`list[int]`, `int` or `str`, *optional*):
            `None` or `"all"` for all layers, an index or a list of them, or a string of comma-separated parts, each
            of them an index (`"7"`), an inclusive range (`"0-5"`), `"first:6"` or `"last:5"`.
        num_layers (`int`, *optional*):
            How many layers the model has. `None` where there is no model yet: the choice is checked as far as it goes.
        name (`str`, *optional*, defaults to `"layers"`):
            What errors call the choice.

    Returns:
        `list[int]`: Layer indices, increasing; `None` without `num_layers`.

    Raises:
        `ValueError`: If the choice is empty, cannot be read, names a layer twice or one the model does not have.
    """
    has = "" if num_layers is None else f" The model has {num_layers} layers (0 to {num_layers - 1})."
    total = 10**6 if num_layers is None else num_layers

    def wrong(why: str) -> ValueError:
        return ValueError(f"{name}={layers!r} {why}.{has}")

    def read(part: str) -> range:
        if match := re.fullmatch(r"(first|last):(\d+)", part):
            count = int(match[2])
            if count == 0:
                raise wrong(f"chooses no layer at {part!r}; ask for at least one")
            if count > total:
                raise wrong(f"asks for more layers than there are at {part!r}")
            return range(count) if match[1] == "first" else range(total - count, total)
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise wrong(
                f"cannot be read at {part!r}; use indices and inclusive ranges (`'0-5,7'`), `'first:6'`, `'last:5'`, "
                "a list of integers, or None for all layers"
            )
        return range(int(match[1]), int(match[2] or match[1]) + 1)

    if layers is None or layers == "all":
        return None if num_layers is None else list(range(num_layers))
    if isinstance(layers, str):
        indices = [index for part in layers.split(",") if part.strip() for index in read(part.strip())]
    else:
        indices = list(layers) if isinstance(layers, Sequence) else [layers]
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
            raise wrong("must be an integer, a list of integers, a string such as `'first:6'`, or None for all layers")
    if not indices:
        raise wrong("chooses no layer; leave it None for all of them")
    if outside := [index for index in indices if not 0 <= index < total]:
        raise wrong(f"names the layers {outside}, which are not there")
    if len(set(indices)) != len(indices):
        raise wrong("names a layer more than once")
    return None if num_layers is None else sorted(indices)
