# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Behaviour policies for the lab: copies of the policy in other numerics, or some weight versions old.

The two dials of off-policy collapse. `numerics` is the training-inference mismatch: `exact`, `bf16`, `int8`, `int6`,
`int5`, ... (each decoder weight matrix rounded per output channel, symmetrically, as a weight-only quantised engine
does), `int4-32` and the like (a scale for each 32 weights), `fp8` and `nvfp4` (these as in `trl_alp.formats`),
`gauss-S` (Gaussian weight noise of S times each matrix's standard deviation, fresh at each sync) or `noise-S`
(layerwise perturbation of S times the hidden RMS while sampling: exploration noise on the behaviour side, as QeRL
has it); `int3+noise-S` is both. `lag` is staleness on top of the updates per batch of rollouts: the weights are as
many batches old.
"""

import re
from collections import deque
from contextlib import nullcontext

import torch
from sampling import sample

from trl_alp import LayerwisePerturbation
from trl_alp.formats import round_matrices


GROUP = 32


def round_weights(model: torch.nn.Module, bits: int) -> None:
    """Round every weight matrix of the decoder layers to `bits` bits, one scale for each output channel, in place."""
    largest = 2 ** (bits - 1) - 1
    for layer in model.model.layers:
        for weight in layer.parameters():
            if weight.dim() == 2:
                scale = weight.abs().amax(1, keepdim=True) / largest
                weight.copy_((weight / scale).round() * scale)


def shake_weights(model: torch.nn.Module, size: float, generator: torch.Generator) -> None:
    """Add Gaussian noise of `size` times its standard deviation to every weight matrix of the decoder layers."""
    for layer in model.model.layers:
        for weight in layer.parameters():
            if weight.dim() == 2:
                weight.add_(
                    torch.randn(weight.shape, generator=generator, device=weight.device) * weight.std(), alpha=size
                )


def parse_numerics(numerics: str) -> list[tuple[str, float]]:
    """`"int3+noise-0.1"` as `[("int3", 0.0), ("noise", 0.1)]`."""
    return [(kind, float(size or 0)) for kind, _, size in (part.partition("-") for part in numerics.split("+"))]


def check_numerics(numerics: str) -> None:
    """Raise a `ValueError` unless a behaviour policy can have these numerics."""
    for kind, size in parse_numerics(numerics):
        known = ("exact", "bf16", "gauss", "noise", "fp8", "nvfp4")
        if kind not in known and not re.fullmatch(r"int[348]" if size == GROUP else r"int[2-8]", kind):
            raise ValueError(f"numerics={kind!r} is unknown; see benchmarks/lab/behaviour.py.")


def blank_copy(policy: torch.nn.Module) -> torch.nn.Module:
    """A model like the policy, for [`load_as`]."""
    # Not `copy.deepcopy`: TRL patches `forward` of the policy, and a copy of that would run the policy itself.
    return type(policy)(policy.config).to(policy.device).eval()


@torch.no_grad()
def load_as(
    numerics: str, copy: torch.nn.Module, weights: dict[str, torch.Tensor], generator: torch.Generator | None = None
) -> None:
    """Load `weights` into `copy` as an engine of that number format holds them; `gauss` draws from `generator`."""
    check_numerics(numerics)
    for module in copy.float().modules():
        if isinstance(module, torch.nn.Linear):
            module._forward_pre_hooks.clear()  # those of fp8
    copy.load_state_dict(weights)
    for kind, size in parse_numerics(numerics):
        if kind == "bf16":
            for parameter in copy.parameters():  # `copy.bfloat16()` would round the rotary frequencies too, for good
                parameter.data = parameter.data.bfloat16()
        elif kind in ("fp8", "nvfp4") or size == GROUP:
            for layer in copy.model.layers:
                round_matrices(layer, kind)
        elif kind.startswith("int"):
            round_weights(copy, int(kind.removeprefix("int")))
        elif kind == "gauss":
            shake_weights(copy, size, generator)


class Behaviour:
    """A `rollout_func`: samples from a copy of the policy, and reports the log-probs it sampled with.

    Args:
        numerics (`str`): See the top of this module.
        lag (`int`): How many batches of rollouts old the weights are.
        seed (`int`): Seeds the sampling, the same for every arm.
        device (`str`, *optional*, defaults to `"cpu"`): The policy's.
    """

    def __init__(self, numerics: str, lag: int, seed: int, device: str = "cpu"):
        self.numerics = numerics
        self.weights: deque[dict[str, torch.Tensor]] = deque(maxlen=lag + 1)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.copy = self.perturbation = None

    @torch.no_grad()
    def sync(self, policy: torch.nn.Module) -> None:
        if self.copy is None:
            self.copy = blank_copy(policy)
            if sigma := dict(parse_numerics(self.numerics)).get("noise"):
                self.perturbation = LayerwisePerturbation(self.copy, sigma_init=sigma, noise_scale="rms")
                self.copy.register_forward_pre_hook(self._draw_anew)
        self.weights.append({name: value.clone() for name, value in policy.state_dict().items()})
        load_as(self.numerics, self.copy, self.weights[0], self.generator)

    def _draw_anew(self, *_) -> None:
        # The same seed and shape would give every token of a completion the same noise.
        self.perturbation.seed = int(torch.randint(2**31, (), generator=self.generator, device=self.generator.device))

    def __call__(self, prompts: list[str], trainer) -> dict[str, list]:
        self.sync(trainer.model)
        tokenizer, limit = trainer.processing_class, trainer.args.max_completion_length
        prompt_ids = tokenizer(prompts)["input_ids"]
        padded = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt")
        noise = nullcontext() if self.perturbation is None else self.perturbation.applied(seed=0)
        # On a GPU the policy is trained under autocast; without it here that would be a mismatch of its own.
        with noise, torch.autocast("cuda", torch.bfloat16, enabled=self.generator.device.type == "cuda"):
            ids, logprobs = sample(
                self.copy, padded["input_ids"], tokenizer.eos_token_id, self.generator, limit, padded["attention_mask"]
            )
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": logprobs}
