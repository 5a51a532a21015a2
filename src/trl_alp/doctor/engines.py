# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Inference engines as the doctor sees them: they sample, score fixed tokens, and take new weights.

An engine of your own needs the members of [`Engine`]; `score`, `score_top` and `sync` may raise `NotImplementedError`,
and the doctor then says what it could not tell apart.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..profile import tokens_of


Prompt = str | list[dict]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class GenerationSetting:
    """
    What the engine is asked to sample with; the names and neutral values are those of [`~trl.GRPOConfig`].

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; the trainer divides its own by it too, as TRL does.
        top_p, top_k, min_p, repetition_penalty (*optional*, default to off):
            Truncations and penalty of the engine, which the trainer's log-probs do not have.
        max_tokens (`int`, *optional*, defaults to `32`):
            Longest completion, in tokens.

    Raises:
        `ValueError`: If a value is out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 32

    def __post_init__(self):
        for name, allowed, valid in (
            ("temperature", "above 0 (greedy completions have no log-probs to compare)", self.temperature > 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("top_k", "0 (off) or a number of tokens", self.top_k >= 0),
            ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("max_tokens", "at least 1", self.max_tokens >= 1),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} is out of range: it must be {allowed}.")

    def distortions(self) -> str:
        """The settings that keep the samples from following the trainer's distribution, in words; `""` for none."""
        neutral = GenerationSetting()
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        return ", ".join(f"{n}={getattr(self, n)}" for n in names if getattr(self, n) != getattr(neutral, n))


class Samples(NamedTuple):
    """Completions as the engine reports them: token ids of its prompts and completions, log-probs in nats."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]


class Engine(Protocol):
    """An inference engine.

    `dtype` and `kv_cache_dtype` are what it declares to compute and cache in (`None`: unknown), `quantization` the
    format of its weights (`None`: not quantised).
    """

    dtype: torch.dtype | None
    kv_cache_dtype: str | None
    quantization: str | None

    def sample(self, prompts: Sequence[Prompt], setting: GenerationSetting, seed: int) -> Samples:
        """One completion for each prompt, which the engine tokenises itself."""

    def score(self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]) -> list[list[float]]:
        """Log-probs of the given completions at temperature 1, without truncation or penalty."""

    def score_top(
        self, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]], count: int
    ) -> list[list[dict[int, float]]]:
        """As `score`, of the `count` most probable tokens in the place of each token and of that token itself."""

    def sync(self, model: PreTrainedModel) -> None:
        """Take over the weights of the training model, in the way training does it."""


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as TRL's trainer makes them: the chat template for messages, the tokenizer for text. A
    `ValueError` where there are none."""
    ids = tokens_of(prompt, tokenizer)
    if not ids:
        raise ValueError(f"The tokenizer makes no token of the prompt {str(prompt)[:60]!r}. Give prompts it knows.")
    return ids


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def plain_copy(model: torch.nn.Module, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """A copy of the model, its adapter merged, packed weights unpacked, and its parameters, not its buffers, cast to
    `dtype`."""
    model = copy.deepcopy(model)
    if packed(model):
        _unpack(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if dtype is not None:
        for parameter in model.parameters():  # `model.to` would round the frequencies of rotary embeddings too
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model.eval()


def packed(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that hold packed integers, as bitsandbytes' 4-bit ones do."""
    return [name for name, value in model.named_parameters() if not value.is_floating_point()]


def _unpack(model: torch.nn.Module) -> None:
    """Put a plain linear layer in the place of each packed one, its LoRA merged."""
    from peft.tuners.lora import LoraLayer

    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            base = child.get_base_layer() if isinstance(child, LoraLayer) else child
            if not isinstance(base, torch.nn.Linear) or base.weight.is_floating_point():
                continue
            # What the layer makes of the unit vectors: bitsandbytes packs in several ways, on a CPU anew in a forward.
            units = torch.eye(base.in_features, dtype=dtype, device=base.weight.device)
            with torch.no_grad():
                weight = base(units)
                weight = (weight if base.bias is None else weight - base.bias).T.to(dtype)
            if base is not child:
                weight = weight + sum(child.get_delta_weight(one).to(dtype) for one in child.active_adapters)
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], base.bias is not None, weight.device, dtype)
            plain.weight.data.copy_(weight)
            if base.bias is not None:
                plain.bias.data.copy_(base.bias)
            setattr(parent, name, plain)
    for module in model.modules():  # else it would be saved, and taken, as a quantised one
        if getattr(getattr(module, "config", None), "quantization_config", None) is not None:
            del module.config.quantization_config
        if getattr(module, "hf_quantizer", None) is not None:
            module.hf_quantizer, module.is_quantized = None, False
            module.is_loaded_in_4bit = module.is_loaded_in_8bit = False


def equal_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of equal length, so that no batch needs padding."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


@torch.no_grad()
def unpadded_logits(
    model: torch.nn.Module,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    batch_size: int = 16,
    shift_prompt: int = 0,
    shift_completion: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """
    The reference forward: no padding, every position counted from 0.

    Args:
        model, prompt_ids, completion_ids, batch_size:
            Model and rows; rows of equal length share a batch.
        shift_prompt, shift_completion (`int`, *optional*, default to `0`):
            Added to the positions of prompt and completion.

    Yields:
        `tuple[int, torch.Tensor]`: Index of a row and the logits of its completion, fp32, of shape `(T, vocabulary)`.
    """
    rows = [list(p) + list(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    device = next(model.parameters()).device
    for indices in equal_lengths(rows, batch_size):
        input_ids = torch.tensor([rows[i] for i in indices], device=device)
        starts = torch.tensor([[len(prompt_ids[i])] for i in indices], device=device)
        positions = torch.arange(input_ids.shape[1], device=device).repeat(len(indices), 1)
        positions = positions + torch.where(positions < starts, shift_prompt, shift_completion)
        keep = max(len(completion_ids[i]) for i in indices) + 1
        logits = model(input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
        for row, i in zip(logits, indices, strict=True):
            yield i, row[-len(completion_ids[i]) - 1 : -1].float()


class TransformersEngine:
    """
    A second copy of the model under transformers: another dtype, a quantised copy, or the same weights.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The copy, with any adapter merged.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which may be another than the trainer's.
        logprobs_mode (`str`, *optional*, defaults to `"processed_logprobs"`):
            As in vLLM: whether log-probs are those after temperature, truncation and penalty, or `"raw_logprobs"`.
        batch_size (`int`, *optional*, defaults to `32`):
            Most rows in one batch.
    """

    kv_cache_dtype = None

    def __init__(self, model, tokenizer, logprobs_mode: str = "processed_logprobs", batch_size: int = 32):
        check_logprobs_mode(logprobs_mode)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.logprobs_mode, self.batch_size = logprobs_mode, batch_size
        self.dtype = model.dtype
        quantization = getattr(model.config, "quantization_config", None)
        self.quantization = None if quantization is None else type(quantization).__name__

    @torch.no_grad()
    def sample(self, prompts, setting, seed):
        prompt_ids = [tokenise(self.tokenizer, prompt) for prompt in prompts]
        eos = self.model.generation_config.eos_token_id
        eos = {eos} if isinstance(eos, int) else set(eos or [self.tokenizer.eos_token_id])
        # None of the model's own defaults (a `top_k` of 50, say): the setting is the setting.
        generation = GenerationConfig(
            do_sample=True,
            max_new_tokens=setting.max_tokens,
            temperature=setting.temperature,
            top_p=setting.top_p,
            top_k=setting.top_k,
            min_p=setting.min_p or None,
            repetition_penalty=setting.repetition_penalty,
            eos_token_id=sorted(eos),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            return_dict_in_generate=True,
            output_scores=self.logprobs_mode == "processed_logprobs",
            output_logits=self.logprobs_mode == "raw_logprobs",
        )
        completions, logprobs = [[] for _ in prompts], [[] for _ in prompts]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for indices in equal_lengths(prompt_ids, self.batch_size):
                input_ids = torch.tensor([prompt_ids[i] for i in indices], device=self.model.device)
                out = self.model.generate(
                    input_ids, attention_mask=torch.ones_like(input_ids), generation_config=generation
                )
                steps = out.scores if self.logprobs_mode == "processed_logprobs" else out.logits
                tokens = out.sequences[:, input_ids.shape[1] :]
                scores = torch.stack([step.float() for step in steps], 1).log_softmax(-1)
                scores = scores.gather(-1, tokens[..., None])[..., 0]
                for i, row, row_scores in zip(indices, tokens.tolist(), scores.tolist(), strict=True):
                    length = next((t + 1 for t, token in enumerate(row) if token in eos), len(row))
                    completions[i], logprobs[i] = row[:length], row_scores[:length]
        return Samples(prompt_ids, completions, logprobs)

    def score(self, prompt_ids, completion_ids):
        scores: list[list[float]] = [[] for _ in prompt_ids]
        for i, logits in unpadded_logits(self.model, prompt_ids, completion_ids, self.batch_size):
            tokens = torch.tensor(completion_ids[i], device=logits.device)
            scores[i] = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        return scores

    def score_top(self, prompt_ids, completion_ids, count):
        out: list[list[dict[int, float]]] = [[] for _ in prompt_ids]
        for i, logits in unpadded_logits(self.model, prompt_ids, completion_ids, self.batch_size):
            logps = logits.log_softmax(-1)
            ids = logps.topk(min(count, logps.shape[-1]), -1).indices
            ids = torch.cat([ids, torch.tensor(completion_ids[i], device=ids.device)[:, None]], -1)
            values = logps.gather(-1, ids)
            out[i] = [dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
        return out

    def sync(self, model):
        if self.quantization is not None:
            raise NotImplementedError("a quantised copy takes no new weights")
        self.model.load_state_dict(plain_copy(model).state_dict())


def check_logprobs_mode(mode: str) -> None:
    """Raise a `ValueError` unless `mode` is one of vLLM's two modes that return log-probs."""
    if mode not in ("processed_logprobs", "raw_logprobs"):
        raise ValueError(f"logprobs_mode={mode!r} is unknown. Use 'processed_logprobs' or 'raw_logprobs'.")


def load_model(
    path: str | os.PathLike, dtype: torch.dtype | str = "auto", adapter: str | None = None, device: str = "cpu"
) -> torch.nn.Module:
    """A causal LM from a path or the hub, with a PEFT adapter (not merged) if one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval()
