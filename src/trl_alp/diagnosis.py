# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What the gap between trainer and engine is made of: counterfactuals on the same sampled tokens.

Every hypothesis is a way the engine could have come to its log-probs `q`, and predicts them:

    p(h) = log-probs of the sampled tokens, scored by the training model under hypothesis h

The gap is `p - q` with `p` scored as the trainer does. A hypothesis is believed for the gap it removes, and the search
goes on from there: the hypothesis that leaves the least of the gap is taken up, then the next on top of it, until none
removes enough. Two things that one scoring cannot tell are asked of the engine itself: whether it scores fixed tokens
as the training model does, and whether it does once the weights have been synced again.
"""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .engines import (
    Engine,
    GenerationSetting,
    Prompt,
    Samples,
    load_model,
    plain_copy,
    tokenise,
    unpadded_logits,
)
from .ratio import kl_estimates, percentiles


# Healthy, as published: Tinker's documentation calls training stable with KL(sampler || learner) below 0.01 nats
# per token; prime-rl asks for less than 0.015 of a new architecture.
MAX_KL = 0.01
# NeMo-RL's guide to new models: mean(exp(|p - q|)) above 1.05 needs a look.
MAX_PROBABILITY_ERROR = 1.05
# Nats per token. Two fp32 implementations agree to 1e-5 (docs/compatibility.md); no gap below this is looked into.
FLOOR = 1e-4
# A hypothesis is believed if it removes this share of the gap; for one that is measured on the engine (a sync) or
# declared by it (its dtype) a tenth is enough.
MIN_REMOVED = 0.5
MIN_REMOVED_MEASURED = 0.1
# ... and if what it removes is this many standard errors of the mean above 0, over tokens.
MIN_T = 5.0
# Rounding differs between kernels: up to this many times the rounding of transformers in the engine's dtype counts as
# precision. Measured: vLLM in bf16 and in bf16 with an fp8 KV cache stay below 1.7 times.
ROUNDING_FACTOR = 3.0
# Largest credible |z| of the surprise of the samples; 6 has a chance of 2e-9 and leaves room for an inexact model.
MAX_SURPRISE = 6.0
# Samples from p have a log-likelihood ratio above this in favour of another distribution with probability below e^-14.
MIN_LOG_LIKELIHOOD_RATIO = 14.0
# Above this gap, in nats, the training model knows too little about the engine to judge its samples by it.
MAX_GAP_FOR_SURPRISE = 0.05
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0)
PROBABILITY_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1.0)

WAYS_OUT = {
    "weights": "Mend the weight sync (names, merged adapter, tied or prepacked layers), then run the doctor again.",
    "staleness": "Sync before generating, or generate less far ahead; the sync itself works.",
    "weights or staleness": "Let the doctor sync the engine (`--sync`) to tell which.",
    "sampling": "Sample without truncation and penalty, and return processed log-probs "
    "(vLLM: `--logprobs-mode processed_logprobs`, `--generation-config vllm`).",
    "precision": "Give the engine a wider dtype (bf16 KV cache, fp16 or fp32, unquantised weights), or the trainer "
    "the engine's.",
    "tokenisation": "Send the engine token ids, or give both the same tokenizer and chat template.",
    "padding": "Score with an attention mask and with position ids that count from each row's first token.",
    "unknown": "No hypothesis explains it; compare one row by hand, layer by layer.",
    "healthy": "Nothing to do.",
}

Scorer = Callable[[torch.nn.Module, Sequence[list[int]], Sequence[list[int]], float], Sequence[Sequence[float]]]


@dataclass
class Finding:
    """One cause: its name, what exactly, and the mean |gap| in nats before and after it is removed."""

    cause: str
    what: str
    gap_before: float
    gap_after: float


@dataclass
class Diagnosis:
    """
    What the doctor found.

    Args:
        cause (`str`):
            The dominant cause: `"healthy"`, `"weights"`, `"sampling"`, `"precision"`, `"tokenisation"`, `"padding"`,
            `"staleness"`, `"weights or staleness"` or `"unknown"`.
        verdict (`str`):
            One line for a human, with the way out.
        findings (`list[Finding]`):
            All causes, the dominant one first.
        evidence (`list[dict]`):
            One row for each hypothesis: `cause`, `hypothesis`, `predicts`, `gap_left` (mean |gap| in nats, each token
            counting at most 1) and `share_left`.
        statistics (`dict[str, float]`):
            Of the whole gap: `tokens`, `unscored`, `mean`, `abs_mean`, `median_abs`, `kl_k1`, `kl_k3`,
            `probability_error` = mean(exp(|p - q|)), `rounding` (what the engine's dtype explains) and, where they
            could be measured, `surprise`, `engine_repeat`, `engine_before_sync`, `engine_after_sync`.
        by_position, by_probability (`list[dict]`):
            The gap by position in the completion and by behaviour-policy probability.
        tokens (`dict[str, torch.Tensor]`):
            `trainer` (p), `engine` (q), `explained` (p under all findings) and `position`, one value for each token.
    """

    cause: str
    verdict: str
    findings: list[Finding]
    evidence: list[dict]
    statistics: dict[str, float]
    by_position: list[dict]
    by_probability: list[dict]
    tokens: dict[str, torch.Tensor] = field(repr=False)

    @property
    def healthy(self) -> bool:
        return self.cause == "healthy"

    def to_dict(self) -> dict:
        """Everything but the tokens, for JSON; values that are not finite become `None`."""
        out = {
            "schema": 1,
            "healthy": self.healthy,
            "cause": self.cause,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
            "evidence": self.evidence,
            "statistics": self.statistics,
            "by_position": self.by_position,
            "by_probability": self.by_probability,
        }
        return _finite(out)


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


def diagnose(
    model: torch.nn.Module,
    tokenizer,
    engine: Engine,
    prompts: Sequence[Prompt],
    setting: GenerationSetting | None = None,
    score: Scorer = score_as_trl,
    candidates: Mapping[str, str | torch.nn.Module] | None = None,
    sync: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """
    Sample completions from the engine, score them with the training model, and say what the gap is made of.

    Args:
        model ([`~transformers.PreTrainedModel`] or `peft.PeftModel`):
            The training model; it is not changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The trainer's tokenizer.
        engine ([`~trl_alp.engines.Engine`]):
            The engine.
        prompts (`Sequence[str | list[dict]]`):
            One for each completion; all of them texts or all of them conversations.
        setting ([`~trl_alp.engines.GenerationSetting`], *optional*):
            What to sample with.
        score (`Callable`, *optional*, defaults to [`score_as_trl`]):
            How the trainer scores: `score(model, prompt_ids, completion_ids, temperature)`.
        candidates (`Mapping[str, str | torch.nn.Module]`, *optional*):
            Weights the engine may have instead: checkpoints or adapters (by path) or models, by name.
        sync (`bool`, *optional*, defaults to `True`):
            Whether the engine's weights may be synced, which tells staleness from a broken sync.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows scored at once.
        progress (`Callable[[str], None]`, *optional*):
            Called with the name of each step when it begins.

    Returns:
        [`Diagnosis`].

    Raises:
        `ValueError`: If there are no prompts, texts are mixed with conversations, or the engine returns no finite
            log-probs or not one for each token.
    """
    if not prompts or len({isinstance(prompt, str) for prompt in prompts}) != 1:
        raise ValueError("prompts must be a non-empty list, either all texts or all conversations.")
    setting = setting or GenerationSetting()
    progress("sample")
    samples = engine.sample(prompts, setting, seed)
    for name, ids, values in zip(range(len(prompts)), samples.completion_ids, samples.logprobs, strict=True):
        if len(ids) != len(values):
            raise ValueError(f"The engine returned {len(values)} log-probs for the {len(ids)} tokens of row {name}.")
    trainer_ids = [tokenise(tokenizer, prompt) for prompt in prompts]
    kept = [i for i, completion in enumerate(samples.completion_ids) if completion]
    samples = Samples(*([column[i] for i in kept] for column in samples))
    trainer_ids = [trainer_ids[i] for i in kept]
    q = _flat(samples.logprobs)
    if not torch.isfinite(q).any():
        raise ValueError("The engine returned no finite log-probs; ask it for those of the sampled tokens.")
    case = _Case(model, engine, setting, samples, trainer_ids, dict(candidates or {}), batch_size, progress)
    progress("score as the trainer")
    return _examine(case, _flat(score(model, trainer_ids, samples.completion_ids, setting.temperature)), q, sync)


# ---- The training model under a hypothesis ----


@dataclass(frozen=True)
class _State:
    """What is assumed of the engine; the defaults are what the trainer assumes."""

    padded: bool = True  # scored by the trainer's own scorer, with whatever its batches do
    shift: tuple[int, int] = (0, 0)  # of the positions of prompt and completion
    ids: str = "trainer"
    weights: str = "current"
    numerics: str = "as loaded"
    mode: str = "temperature"
    before_sync: bool = False


class _Case:
    """The sampled tokens, and their log-probs under any `_State`; each forward pass is made once."""

    def __init__(self, model, engine, setting, samples, trainer_ids, candidates, batch_size, progress):
        self.model, self.engine, self.setting = model, engine, setting
        self.samples, self.candidates = samples, candidates
        self.batch_size, self.progress = batch_size, progress
        self.ids = {"trainer": trainer_ids, "engine": samples.prompt_ids}
        self.modes = _modes(setting, getattr(model, "generation_config", None))
        self.padding = torch.zeros(())  # what the trainer's scorer adds to the reference
        self.scored: dict[tuple, torch.Tensor] = {}

    def reference(self, state: _State, mode: str | None = None) -> torch.Tensor:
        """Log-probs without padding.  # (N,)"""
        return self._pass(state, [mode or state.mode])[mode or state.mode]

    def predict(self, state: _State) -> torch.Tensor:
        """What the trainer would have to see if `state` were true of the engine.  # (N,)"""
        return self.reference(state) + (self.padding if state.padded else 0.0)

    def _pass(self, state: _State, modes: Sequence[str]) -> dict[str, torch.Tensor]:
        key = (state.shift, state.ids, state.weights, state.numerics)
        if any((*key, mode) not in self.scored for mode in modes):
            missing = [mode for mode in modes if (*key, mode) not in self.scored]
            collected = self._forward(state, missing, lambda tokens, logps: logps.gather(-1, tokens[:, None])[:, 0])
            for mode, rows in collected.items():
                self.scored[(*key, mode)] = torch.cat(rows)
        return {mode: self.scored[(*key, mode)] for mode in modes}

    def _forward(self, state, modes, statistic) -> dict[str, list[torch.Tensor]]:
        """A statistic of the full distributions, `statistic(tokens (T,), logps (T, vocabulary))`, of every row."""
        prompt_ids, completion_ids = self.ids[state.ids], self.samples.completion_ids
        self.progress(_describe(state))
        out = {mode: [torch.empty(0)] * len(prompt_ids) for mode in modes}
        with self._model(state.weights, state.numerics) as model:
            for i, logits in unpadded_logits(model, prompt_ids, completion_ids, self.batch_size, *state.shift):
                tokens = torch.tensor(completion_ids[i], device=logits.device)
                for mode in modes:
                    logps = self.modes[mode](logits, prompt_ids[i], completion_ids[i])
                    out[mode][i] = statistic(tokens, logps).cpu()
        return out

    def surprise(self, state: _State, mode: str) -> float:
        """z of `sum(-log p(token) - entropy)`: 0 on average if the tokens were drawn from p, with variance 1."""

        def moments(tokens, logps):
            finite = logps.masked_fill(torch.isinf(logps), 0.0)
            entropy = -(logps.exp() * finite).sum(-1)
            variance = (logps.exp() * finite.square()).sum(-1) - entropy.square()
            taken = finite.gather(-1, tokens[:, None])[:, 0]
            return torch.stack([-taken - entropy, variance], -1)

        rows = torch.cat(self._forward(state, [mode], moments)[mode]).double()
        return float(rows[:, 0].sum() / rows[:, 1].clamp(min=0).sum().sqrt().clamp(min=1e-9))

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
            with _scaled_adapter(self.model, 2.0):
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
def _scaled_adapter(model, factor: float):
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
        setting ([`~trl_alp.engines.GenerationSetting`]):
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


def _modes(setting: GenerationSetting, generation_config) -> dict[str, Callable]:
    """The ways an engine may turn logits into the log-probs it reports, by name. The trainer's is the first."""

    def at(temperature):
        return lambda logits, prompt, completion: (logits / temperature).log_softmax(-1)

    def with_setting(what):
        return lambda logits, prompt, completion: processed(logits, prompt, completion, what)

    modes = {"temperature": at(setting.temperature)}
    if setting.temperature != 1.0:
        modes["raw: without the temperature"] = at(1.0)
    if setting.distortions():
        modes[f"processed: with {setting.distortions()}"] = with_setting(setting)
    # A vLLM server fills in what a request leaves open from the model's own generation_config.
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    own = {name: getattr(generation_config, name, None) for name in names}
    own = {name: value for name, value in own.items() if value not in (None, getattr(GenerationSetting(), name))}
    if own and replace(setting, **own) != setting:
        text = ", ".join(f"{name}={value}" for name, value in own.items())
        modes[f"processed: with the model's own generation_config ({text})"] = with_setting(replace(setting, **own))
    for temperature in TEMPERATURES:
        if temperature not in (1.0, setting.temperature):
            modes[f"another temperature, about {temperature}"] = at(temperature)
    return modes


# ---- The examination ----


def _examine(case: _Case, p: torch.Tensor, q: torch.Tensor, sync: bool) -> Diagnosis:
    unscored = int((~torch.isfinite(q) | torch.isnan(p)).sum())
    known = torch.isfinite(q) & ~torch.isnan(p)
    engine, setting = case.engine, case.setting
    baseline = _State()
    case._pass(baseline, list(case.modes))
    case.padding = p - case.reference(baseline)

    def left(prediction: torch.Tensor) -> float:
        return magnitude((prediction - q)[known])

    probe = _probe(case, sync)
    rounding = _rounding(case)
    evidence, findings = [], []
    state, total = baseline, left(p)
    hypotheses = _hypotheses(case, probe)
    believed: list[tuple[str, str, float, float, bool]] = []  # cause, what, before, after, whether it is rounding
    while left(_predicted(case, probe, state)) > FLOOR:
        now = _predicted(case, probe, state)
        before = left(now)
        options = []
        for cause, what, predicts, change in hypotheses:
            if all(getattr(state, name) == value for name, value in change.items()):
                continue
            prediction = _predicted(case, probe, replace(state, **change))
            after = left(prediction)
            if not believed:
                evidence.append(_row(cause, what, predicts, after, total))
            gain = ((now - q).abs().clamp(max=1) - (prediction - q).abs().clamp(max=1))[known]
            measured = "before_sync" in change or "numerics" in change
            need = MIN_REMOVED_MEASURED if measured else MIN_REMOVED
            enough = before - after > need * before and _t(gain) > MIN_T
            if "padded" in change or "shift" in change:  # as good as another draw of the rounding
                enough &= before - after > ROUNDING_FACTOR * rounding
            if enough:
                options.append((after, cause, what, change))
        if not options:
            break
        least = min(option[0] for option in options)
        # What is named precisely goes before what is merely measured, among hypotheses that do as well.
        close = [option for option in options if option[0] <= least + max(FLOOR, 0.1 * (before - least))]
        after, cause, what, change = close[0]
        believed.append((cause, what, before, after, cause == "precision"))
        state = replace(state, **change)
    now = _predicted(case, probe, state)
    remainder = left(now)
    if not evidence:
        evidence = _all_evidence(case, probe, hypotheses, baseline, left, total)

    for cause, what, before, after, is_rounding in believed:
        if is_rounding:
            continue
        if cause == "engine weights":
            cause, what = _weights_cause(case, probe, what, engine)
        findings.append(Finding(cause, what, before, after))

    # What no hypothesis has named: is it in the engine's forward pass?
    forward = _forward_gap(case, probe, state)
    if forward is not None:
        size, after = magnitude(forward[known]), left(now + forward / setting.temperature)
        what = "the engine's forward pass" + (", after a sync" if probe.synced else "")
        evidence.append(
            _row("weights", what, "what is left is in the engine's scores of fixed tokens", after, total)
        )
        explains = remainder > FLOOR and remainder - after > MIN_REMOVED * remainder
        breaks = probe.synced and size > 2 * max(remainder, FLOOR)
        if size > max(FLOOR, ROUNDING_FACTOR * rounding) and (explains or breaks) and engine.quantization is None:
            if not probe.synced:
                cause, what = "weights or staleness", "the engine's weights are not the trainer's"
            elif explains:
                cause, what = "weights", "after a sync the engine still has other weights than the trainer"
            else:
                cause, what = "weights", "the engine's weights were right, and a sync made them wrong"
            findings.append(Finding(cause, what, max(remainder, size), min(after, remainder)))
    unexplained = not any("weights" in finding.cause for finding in findings)

    surprise = None
    if remainder < MAX_GAP_FOR_SURPRISE and not state.before_sync and unexplained:
        surprise, sampling = _sampling(case, state, evidence)
        if sampling is not None and not any(f.cause == "sampling" for f in findings):
            findings.append(Finding("sampling", sampling, remainder, remainder))

    # What is left is rounding, as far as rounding of the engine's kind goes.
    rest = (_predicted(case, probe, replace(state, numerics="as loaded")) - q)[known]
    if unexplained and not within_published(gap_statistics(rest)):
        size = magnitude(rest)
        if engine.quantization is not None:
            cause, what = "precision", f"weights quantised by {engine.quantization}"
        elif size <= ROUNDING_FACTOR * rounding:
            cause, what = "precision", f"rounding in {_precision(engine)}"
        else:
            cause, what = "unknown", "no hypothesis explains this"
        findings.append(Finding(cause, what, size, remainder))
    findings.sort(key=lambda f: f.gap_after - f.gap_before if f.gap_before != f.gap_after else -FLOOR)

    statistics = {"tokens": len(q), "unscored": unscored} | gap_statistics((p - q)[known]) | {"rounding": rounding}
    if surprise is not None:
        statistics["surprise"] = surprise
    statistics |= probe.sizes(case, known)
    positions = torch.cat([torch.arange(len(row)) for row in case.samples.completion_ids])
    cause = findings[0].cause if findings else "healthy"
    return Diagnosis(
        cause,
        _verdict(findings, statistics, engine),
        findings,
        evidence,
        statistics,
        by_position((p - q)[known], positions[known]),
        by_probability((p - q)[known], q[known]),
        {"trainer": p[known], "engine": q[known], "explained": now[known], "position": positions[known]},
    )


@dataclass
class _Probe:
    """The engine's own scores of the sampled tokens at temperature 1, before and after a sync (`None`: cannot)."""

    before: torch.Tensor | None
    again: torch.Tensor | None
    after: torch.Tensor | None

    @property
    def synced(self) -> bool:
        return self.after is not None

    def sizes(self, case: _Case, known: torch.Tensor) -> dict[str, float]:
        """Mean |difference| in nats between the training model and the engine's scores."""
        if self.before is None:
            return {}
        reference = case.reference(_State(ids="engine", mode=_raw(case)))
        sizes = {
            "engine_repeat": magnitude((self.before - self.again)[known]),
            "engine_before_sync": magnitude((reference - self.before)[known]),
        }
        if self.after is not None:
            sizes["engine_after_sync"] = magnitude((reference - self.after)[known])
        return sizes


def _probe(case: _Case, sync: bool) -> _Probe:
    ids = case.samples.prompt_ids, case.samples.completion_ids
    try:
        case.progress("let the engine score")
        before = _flat(case.engine.score(*ids))
        again = _flat(case.engine.score(*ids))
    except NotImplementedError:
        return _Probe(None, None, None)
    if not sync:
        return _Probe(before, again, None)
    try:
        case.progress("sync and let the engine score again")
        case.engine.sync(case.model)
    except NotImplementedError:
        return _Probe(before, again, None)
    return _Probe(before, again, _flat(case.engine.score(*ids)))


def _predicted(case: _Case, probe: _Probe, state: _State) -> torch.Tensor:
    prediction = case.predict(state)
    if state.before_sync:
        prediction = prediction + (probe.before - probe.after) / case.setting.temperature
    return prediction


def _forward_gap(case: _Case, probe: _Probe, state: _State) -> torch.Tensor | None:
    scores = probe.before if probe.after is None else probe.after
    if scores is None:
        return None
    return scores - case.reference(replace(state, ids="engine"), _raw(case))


def _raw(case: _Case) -> str:
    return "temperature" if case.setting.temperature == 1.0 else "raw: without the temperature"


def _hypotheses(case: _Case, probe: _Probe) -> list[tuple[str, str, str, dict]]:
    """Cause, name, what it predicts, and what it changes in the state; the more precise ones first."""
    out = []
    if case.ids["trainer"] != case.ids["engine"]:
        out.append(
            ("tokenisation", _difference(case.ids), "scored with the engine's prompt ids it is gone", {"ids": "engine"})
        )
    out.append(("padding", "the trainer's padded batch", "row by row, without padding, it is gone", {"padded": False}))
    longest = max(len(p) + len(c) for p, c in zip(case.ids["engine"], case.samples.completion_ids, strict=True))
    limit = getattr(case.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if longest < limit:
        for what, shift in (
            ("the engine's completion starts one position late", (0, 1)),
            ("the engine counts positions from 1", (1, 1)),
        ):
            out.append(("padding", what, "with positions shifted so it is gone", {"shift": shift}))
    for mode in list(case.modes)[1:]:
        out.append(("sampling", mode, "with log-probs computed so it is gone", {"mode": mode}))
    if hasattr(case.model, "disable_adapter"):
        out.append(("weights", "the adapter is missing", "with the adapter off it is gone", {"weights": "adapter off"}))
        if _is_lora(case.model):
            twice = {"weights": "adapter twice"}
            out.append(("weights", "the adapter is applied twice", "with the adapter doubled it is gone", twice))
    for name in case.candidates:
        out.append(("engine weights", f"the weights of {name}", "with these weights it is gone", {"weights": name}))
    if probe.synced:
        predicts = "a sync changes the engine's scores by just the gap"
        out.append(("engine weights", "weights older than the trainer's", predicts, {"before_sync": True}))
    for numerics in _numerics(case):
        out.append(("precision", numerics, "computed so it shrinks", {"numerics": numerics}))
    return out


def _all_evidence(case, probe, hypotheses, baseline, left, total) -> list[dict]:
    rows = []
    for cause, what, predicts, change in hypotheses:
        after = left(_predicted(case, probe, replace(baseline, **change)))
        rows.append(_row(cause, what, predicts, after, total))
    return rows


def _weights_cause(case: _Case, probe: _Probe, what: str, engine: Engine) -> tuple[str, str]:
    """Old weights are stale if a sync brings the new ones, and never synced if it does not."""
    if not probe.synced:
        return "weights or staleness", f"the engine has {what}"
    known = torch.isfinite(probe.before) & torch.isfinite(probe.after)
    change = magnitude((probe.before - probe.after)[known])
    noise = magnitude((probe.before - probe.again)[known])
    if change > max(FLOOR, ROUNDING_FACTOR * noise):
        return "staleness", f"the engine had {what}, and a sync brought the trainer's"
    return "weights", f"the engine has {what}, and a sync does not change that"


def _rounding(case: _Case) -> float:
    """Mean |difference| that the dtypes of trainer and engine explain, in nats, as transformers rounds."""
    state = _State(ids="engine")
    exact = "as loaded" if case.model.dtype == torch.float32 else "float32"
    truth = case.reference(replace(state, numerics=exact))
    kinds = {"as loaded", *(_numerics(case) or ["as loaded"])} - {exact}
    sizes = [magnitude(case.reference(replace(state, numerics=kind)) - truth) for kind in kinds]
    own = magnitude(case.reference(state) - truth)
    return max([*sizes, 0.0]) + (own if case.engine.dtype == case.model.dtype else 0.0)


def _numerics(case: _Case) -> list[str]:
    """The engine's declared numerics where they are not the training model's."""
    engine = case.engine
    dtype = str(engine.dtype or torch.bfloat16).removeprefix("torch.")
    out = [] if engine.dtype == case.model.dtype else [dtype]
    if str(engine.kv_cache_dtype).startswith("fp8"):
        out.append(f"{dtype}, fp8 KV cache")
    return out


def _precision(engine: Engine) -> str:
    cache = f" with a KV cache in {engine.kv_cache_dtype}" if str(engine.kv_cache_dtype).startswith("fp8") else ""
    return str(engine.dtype or "the engine's dtype").removeprefix("torch.") + cache


def _sampling(case: _Case, state: _State, evidence: list[dict]) -> tuple[float, str | None]:
    """Whether the samples follow the log-probs: by a likelihood ratio where the alternative is known, and by their
    surprise where it is not."""
    surprise, own = case.surprise(state, state.mode), case.reference(state)
    for mode in [mode for mode in case.modes if mode.startswith(("processed", "raw")) and mode != state.mode]:
        # Rounding may put a token just outside the truncated support: it counts -5, not minus infinity.
        ratio = float((case.reference(state, mode) - own).double().clamp(min=-5).sum())
        if ratio > MIN_LOG_LIKELIHOOD_RATIO:
            what = f"the samples follow another distribution than the log-probs: {mode}"
            evidence.append(_row("sampling", what, f"log-likelihood ratio of the samples {ratio:.0f}", math.nan, 0.0))
            return surprise, what
    if abs(surprise) > MAX_SURPRISE:
        what = "the samples follow another distribution than the log-probs, which no setting given here explains"
        predicts = f"the samples' surprise is off by {surprise:.0f} standard errors"
        evidence.append(_row("sampling", what, predicts, math.nan, 0.0))
        return surprise, what
    return surprise, None


# ---- Numbers and words ----


def magnitude(gap: torch.Tensor) -> float:
    """Mean |gap| in nats, each token counting at most 1, so that a few wild tokens do not decide."""
    gap = torch.nan_to_num(gap.double(), nan=0.0, posinf=1.0, neginf=-1.0)
    return float(gap.abs().clamp(max=1).mean()) if gap.numel() else 0.0


def gap_statistics(gap: torch.Tensor) -> dict[str, float]:
    """Mean, mean and median |gap|, KL estimates and NeMo-RL's probability error of a gap `p - q` of shape `(N,)`."""
    gap = torch.nan_to_num(gap.double(), posinf=20.0, neginf=-20.0)
    kl = kl_estimates(gap)
    return {
        "mean": float(gap.mean()),
        "abs_mean": magnitude(gap),
        "median_abs": float(gap.abs().median()),
        "kl_k1": float(kl["kl/k1"]),
        "kl_k3": float(kl["kl/k3"]),
        "probability_error": float(gap.abs().clamp(max=20).exp().mean()),
    }


def within_published(statistics: dict[str, float]) -> bool:
    """Whether the gap is within the thresholds that Tinker and NeMo-RL publish."""
    return statistics["kl_k3"] < MAX_KL and statistics["probability_error"] < MAX_PROBABILITY_ERROR


def by_position(gap: torch.Tensor, position: torch.Tensor) -> list[dict]:
    """The gap by position in the completion, in bins that double."""
    edges = [0]
    while edges[-1] <= int(position.max()):
        edges.append(max(1, 2 * edges[-1]))
    rows = []
    for low, high in zip(edges, edges[1:], strict=False):
        values = gap[(position >= low) & (position < high)]
        if len(values):
            rows.append({"from": low, "to": high - 1} | _bin(values))
    return rows


def by_probability(gap: torch.Tensor, q: torch.Tensor) -> list[dict]:
    """The gap by the probability the engine gave the token."""
    probability = q.exp()
    rows = []
    for low, high in zip(PROBABILITY_EDGES, PROBABILITY_EDGES[1:], strict=False):
        values = gap[((probability > low) | (low == 0)) & ((probability <= high) | (high == 1))]
        if len(values):
            rows.append({"above": low, "to": high} | _bin(values))
    return rows


def _bin(gap: torch.Tensor) -> dict:
    p02, _, p50, _, p98 = percentiles(gap).tolist()
    return {
        "tokens": len(gap),
        "mean": float(gap.mean()),
        "abs_mean": magnitude(gap),
        "p02": p02,
        "p50": p50,
        "p98": p98,
    }


def _t(gain: torch.Tensor) -> float:
    gain = gain.double()
    return float(gain.mean() / (gain.std() / math.sqrt(len(gain))).clamp(min=1e-12)) if len(gain) > 1 else 0.0


def _row(cause, hypothesis, predicts, gap_left, total) -> dict:
    name = "weights or staleness" if cause == "engine weights" else cause
    share = gap_left / total if total else 0.0
    return {"cause": name, "hypothesis": hypothesis, "predicts": predicts, "gap_left": gap_left, "share_left": share}


def _difference(ids: dict[str, list[list[int]]]) -> str:
    """Say in a few words how the engine's prompts differ."""
    pairs = [(t, e) for t, e in zip(ids["trainer"], ids["engine"], strict=True) if t != e]
    trainer, engine = pairs[0]
    if all(e[1:] == t for t, e in pairs):
        kind = "doubled" if trainer[:1] == engine[:1] else "added"
        return f"the engine's prompts have token {engine[0]} {kind} in front (a double BOS?)"
    if all(t[1:] == e for t, e in pairs):
        return f"the engine's prompts lack token {trainer[0]} in front (a missing BOS?)"
    first = next((i for i, (a, b) in enumerate(zip(trainer, engine, strict=False)) if a != b), min(map(len, pairs[0])))
    return f"{len(pairs)} of {len(ids['trainer'])} prompts differ, the first from token {first} on (template?)"


def _is_lora(model) -> bool:
    from peft.tuners.lora import LoraLayer

    return any(isinstance(module, LoraLayer) for module in model.modules())


def _describe(state: _State) -> str:
    changed = [f"{name}={value}" for name, value in asdict(state).items() if value != getattr(_State(), name)]
    return "score " + (", ".join(changed) or "without padding")


def _verdict(findings: list[Finding], statistics: dict[str, float], engine: Engine) -> str:
    size = f"mean |p - q| {statistics['abs_mean']:.2g} nats, KL {statistics['kl_k3']:.2g}"
    if not findings:
        return f"healthy: {size}; no more than {_precision(engine)} explains. {WAYS_OUT['healthy']}"
    first, *others = findings
    also = f" Also: {'; '.join(f'{f.cause} ({f.what})' for f in others)}." if others else ""
    return f"{first.cause}: {first.what} ({size}). {WAYS_OUT[first.cause]}{also}"


def _flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.cat([torch.as_tensor([math.nan if x is None else x for x in row]).float() for row in rows])


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
