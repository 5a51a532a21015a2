# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The sampled tokens' log-probs under the training model, as the trainer scores them and under any hypothesis.

A hypothesis is a change of `State`: other positions, prompt ids, weights, numerics, or another way from logits to the
log-probs that the engine reports.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .engines import GenerationSetting, load_model, plain_copy, unpadded_logits


# Tried where the engine's temperature may be another than the trainer thinks.
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0)

Scorer = Callable[[torch.nn.Module, Sequence[list[int]], Sequence[list[int]], float], Sequence[Sequence[float]]]


def score_as_trl(model, prompt_ids, completion_ids, temperature: float = 1.0, batch_size: int = 16):
    """
    Score completions as TRL's trainer does: prompts padded on the left, completions on the right, an attention mask,
    no position ids.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The training model.
        prompt_ids, completion_ids (`Sequence[list[int]]`):
            Token ids.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows in one batch.

    Returns:
        `list[list[float]]`: Log-probs of the completions' tokens, in nats.
    """
    scores = []
    device = next(model.parameters()).device
    for start in range(0, len(prompt_ids), batch_size):
        prompts, completions = prompt_ids[start : start + batch_size], completion_ids[start : start + batch_size]
        left, right = max(map(len, prompts)), max(map(len, completions))
        ids = torch.zeros(len(prompts), left + right, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens = torch.tensor([*prompt, *completion], device=device)
            ids[row, left - len(prompt) : left + len(completion)] = tokens
            mask[row, left - len(prompt) : left + len(completion)] = 1
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=right + 1).logits[:, :-1].float()
        values = (logits / temperature).log_softmax(-1).gather(-1, ids[:, left:, None])[..., 0].tolist()
        scores += [row[: len(completion)] for row, completion in zip(values, completions, strict=True)]
    return scores


@dataclass(frozen=True)
class State:
    """What is assumed of the engine; the defaults are what the trainer assumes."""

    padded: bool = True  # scored by the trainer's own scorer, with whatever its batches do
    shift: tuple[int, int] = (0, 0)  # of the positions of prompt and completion
    ids: str = "trainer"
    weights: str = "current"
    numerics: str = "as loaded"
    mode: str = "temperature"
    measured: bool = False  # its forward pass as the engine itself scores the tokens, whatever its weights are


class Case:
    """The sampled tokens, and their log-probs under any `State`; each forward pass is made once."""

    def __init__(self, model, engine, setting, samples, trainer_ids, candidates, batch_size, progress):
        self.model, self.engine, self.setting = model, engine, setting
        self.samples, self.candidates = samples, candidates
        self.batch_size, self.progress = batch_size, progress
        self.ids = {"trainer": trainer_ids, "engine": samples.prompt_ids}
        self.modes = reported_modes(setting, getattr(model, "generation_config", None))
        self.raw = "temperature" if setting.temperature == 1.0 else "raw: without the temperature"
        self.padding = torch.zeros(())  # what the trainer's scorer adds to the reference
        self.scores: torch.Tensor | None = None  # the engine's own, of the same tokens at temperature 1
        # ... and of its most probable tokens in each place, by token id; for each row, for each place
        self.top: list[list[dict[int, float]]] | None = None
        self.scored: dict[tuple, torch.Tensor] = {}
        self.scored_top: dict[tuple, torch.Tensor] = {}

    def reference(self, state: State, mode: str | None = None) -> torch.Tensor:
        """Log-probs without padding.  # (N,)"""
        mode = mode or state.mode
        self.score(state, [mode])
        return self.scored[(*self._forward_key(state), mode)]

    def reference_top(self, state: State) -> torch.Tensor:
        """Log-probs of the engine's most probable tokens, in the order of `top`.  # (M,)"""
        self.score(state, [self.raw])
        return self.scored_top[self._forward_key(state)]

    def predict(self, state: State) -> torch.Tensor:
        """What the trainer would have to see if `state` were true of the engine.  # (N,)"""
        prediction = self.reference(state) + (self.padding if state.padded else 0.0)
        if state.measured:
            prediction = prediction + self.forward_gap(state) / self.modes[state.mode].temperature
        return prediction

    def forward_gap(self, state: State) -> torch.Tensor:
        """The engine's own scores minus those of the training model under `state`.  # (N,)"""
        return self.scores - self.reference(replace(state, ids="engine"), self.raw)

    def score(self, state: State, modes: Sequence[str]) -> None:
        """Make the forward pass of a state once for several modes."""
        key = self._forward_key(state)
        missing = [mode for mode in modes if (*key, mode) not in self.scored]
        if not missing:
            return
        rows = {mode: [torch.empty(0)] * len(self.samples.completion_ids) for mode in missing}
        top = [torch.empty(0)] * len(self.samples.completion_ids)
        for mode, i, logps in self._forward(state, missing):
            tokens = torch.tensor(self.samples.completion_ids[i], device=logps.device)
            rows[mode][i] = logps.gather(-1, tokens[:, None])[:, 0].cpu()
            if mode == self.raw and self.top is not None:
                places = [t for t, step in enumerate(self.top[i]) for _ in step]
                ids = [token for step in self.top[i] for token in step]
                top[i] = logps[places, ids].cpu()
        self.scored |= {(*key, mode): torch.cat(rows[mode]) for mode in missing}
        if self.raw in missing:
            self.scored_top[key] = torch.cat(top)

    def _forward(self, state, modes) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Mode, row and full distributions of shape `(T, vocabulary)`, of every row in every mode."""
        prompt_ids, completion_ids = self.ids[state.ids], self.samples.completion_ids
        self.progress(_describe(state))
        with self._model(state.weights, state.numerics) as model:
            for i, logits in unpadded_logits(model, prompt_ids, completion_ids, self.batch_size, *state.shift):
                for mode in modes:
                    yield mode, i, processed(logits, prompt_ids[i], completion_ids[i], self.modes[mode])

    def surprise(self, state: State, mode: str) -> float:
        """z of `sum(-log p(token) - entropy)`: 0 on average if the tokens were drawn from p, with variance 1."""
        excess = total_variance = 0.0
        for _, i, logps in self._forward(state, [mode]):
            tokens = torch.tensor(self.samples.completion_ids[i], device=logps.device)
            finite = logps.masked_fill(torch.isinf(logps), 0.0)
            entropy = -(logps.exp() * finite).sum(-1)
            variance = (logps.exp() * finite.square()).sum(-1) - entropy.square()
            taken = finite.gather(-1, tokens[:, None])[:, 0]
            excess += float((-taken - entropy).double().sum())
            total_variance += float(variance.double().clamp(min=0).sum())
        return excess / max(math.sqrt(total_variance), 1e-9)

    def _forward_key(self, state: State) -> tuple:
        ids = state.ids if self.ids["trainer"] != self.ids["engine"] else "trainer"
        return state.shift, ids, state.weights, state.numerics

    @contextmanager
    def _model(self, weights: str, numerics: str):
        with self._weights(weights) as model:
            if numerics == "as loaded":
                yield model
            else:
                dtype, _, cache = numerics.partition(", ")
                model = plain_copy(model, getattr(torch, dtype))
                if cache:
                    model.set_attn_implementation("alp_fp8_kv_cache")
                yield model

    @contextmanager
    def _weights(self, name: str):
        if name == "current":
            yield self.model
        elif name == "adapter off":
            yield without_adapter(self.model)
        elif name == "adapter twice":
            with scaled_adapter(self.model, 2.0):
                yield self.model
        else:
            candidate = self.candidates[name]
            if isinstance(candidate, str):
                candidate = load_candidate(candidate, self.model)
            yield candidate.eval()


def load_candidate(path: str, model: torch.nn.Module) -> torch.nn.Module:
    """A checkpoint, or an adapter on the base weights of `model`, in its dtype and on its device."""
    device = str(next(model.parameters()).device)
    if not os.path.exists(os.path.join(path, "adapter_config.json")):
        return load_model(path, model.dtype, device=device)
    from peft import PeftModel

    return PeftModel.from_pretrained(without_adapter(model), path).to(device)


def without_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model without its adapter."""
    model = copy.deepcopy(model)
    return model.unload() if hasattr(model, "unload") else model


@contextmanager
def scaled_adapter(model, factor: float):
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scale_layer(factor)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer(factor)


def _fp8_kv_attention(module, query, key, value, *args, **kwargs):
    """Attention whose keys and values went through an fp8 cache (e4m3, scale 1: vLLM's default)."""

    def through_cache(x):
        limit = torch.finfo(torch.float8_e4m3fn).max
        return x.clamp(-limit, limit).to(torch.float8_e4m3fn).to(x.dtype)

    return sdpa_attention_forward(module, query, through_cache(key), through_cache(value), *args, **kwargs)


AttentionInterface.register("alp_fp8_kv_cache", _fp8_kv_attention)
AttentionMaskInterface.register("alp_fp8_kv_cache", sdpa_mask)


def processed(logits: torch.Tensor, prompt_ids: list[int], completion_ids: list[int], setting: GenerationSetting):
    """
    Log-probs after all that sampling does to the logits, in vLLM's order: repetition penalty, temperature, min_p,
    top_k, top_p.

    Args:
        logits (`torch.Tensor` of shape `(T, vocabulary)`):
            Logits that predict the completion.
        prompt_ids, completion_ids (`list[int]`):
            The row; the penalty counts prompt tokens too.
        setting ([`~trl_alp.doctor.GenerationSetting`]):
            What the engine sampled with.

    Returns:
        `torch.Tensor` of shape `(T, vocabulary)`: Log-probs, `-inf` where truncated.
    """
    if setting.repetition_penalty != 1.0:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[:, prompt_ids] = True
        for t, token in enumerate(completion_ids[:-1]):
            seen[t + 1 :, token] = True
        penalty = setting.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / setting.temperature
    if setting.min_p > 0:
        logps = logits.log_softmax(-1)
        logits = logits.masked_fill(logps < logps.amax(-1, keepdim=True) + math.log(setting.min_p), -torch.inf)
    if 0 < setting.top_k < logits.shape[-1]:
        smallest = logits.topk(setting.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if setting.top_p < 1:
        ordered, order = logits.sort(-1)
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - setting.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
    return logits.log_softmax(-1)


def reported_modes(setting: GenerationSetting, generation_config) -> dict[str, GenerationSetting]:
    """What may be in the log-probs that the engine reports, by name. The trainer's assumption is the first."""
    modes = {"temperature": GenerationSetting(setting.temperature)}
    if setting.temperature != 1.0:
        modes["raw: without the temperature"] = GenerationSetting()
    if setting.distortions():
        modes[f"processed: with {setting.distortions()}"] = setting
    # A vLLM server fills in what a request leaves open from the model's own generation_config.
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    own = {name: getattr(generation_config, name, None) for name in names}
    own = {name: value for name, value in own.items() if value not in (None, getattr(GenerationSetting(), name))}
    if own and replace(setting, **own) != setting:
        text = ", ".join(f"{name}={value}" for name, value in own.items())
        modes[f"processed: with the model's own generation_config ({text})"] = replace(setting, **own)
    for temperature in TEMPERATURES:
        if temperature not in (1.0, setting.temperature):
            modes[f"another temperature, about {temperature}"] = GenerationSetting(temperature)
    return modes


def _describe(state: State) -> str:
    changed = [f"{name}={value}" for name, value in asdict(state).items() if value != getattr(State(), name)]
    return "score " + (", ".join(changed) or "without padding")


def is_lora(model: torch.nn.Module) -> bool:
    """Whether the model has a LoRA adapter."""
    if not hasattr(model, "disable_adapter"):
        return False
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in model.modules())
