# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What the gap between trainer and engine is made of: counterfactuals on the same sampled tokens.

Every hypothesis is a way the engine could have come to its log-probs `q`, and predicts them:

    p(h) = log-probs of the sampled tokens, scored by the training model under hypothesis h

The gap is `p - q` with `p` scored as the trainer does. A hypothesis is believed for the gap it removes, and the search
goes on from there: the hypothesis that leaves the least of the gap is taken up, then the next on top of it, until none
removes enough. Two things that one scoring cannot tell are asked of the engine itself: whether it scores fixed tokens
as the training model does, and whether it does once the weights have been synced again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch

from .counterfactuals import Case, Scorer, State, score_as_trl
from .engines import Engine, GenerationSetting, Prompt, Samples, tokenise
from .gap import by_position, by_probability, gap_statistics, magnitude, t_statistic, within_published


# Share of the tokens without a log-prob above which a run is not healthy: single ones are usual in vLLM.
MAX_UNSCORED = 0.1
# Of fewer scored tokens nothing is said.
MIN_TOKENS = 100
# Nats per token. Two fp32 implementations agree to 1e-5 (docs/compatibility.md); no gap below this is looked into.
FLOOR = 1e-4
# A hypothesis is believed if it removes this share of the gap. For what the engine shows (other prompt ids, its own
# scores) or declares (its dtype, whose kernels round in another order than transformers) a tenth is enough.
MIN_REMOVED = 0.5
MIN_REMOVED_KNOWN = 0.1
# ... and if what it removes is this many standard errors of the mean above 0, over tokens.
MIN_T = 5.0
# Rounding differs between kernels: up to this many times the rounding of transformers in the engine's dtype counts as
# precision. Measured with vLLM in bf16, with and without an fp8 KV cache: 0.9 to 1.5 times.
ROUNDING_FACTOR = 3.0
# Largest credible |z| of the surprise of the samples; 6 has a chance of 2e-9 and leaves room for an inexact model.
MAX_SURPRISE = 6.0
# Samples from p favour another distribution by a log-likelihood ratio above this with probability below e^-10.
MIN_LOG_LIKELIHOOD_RATIO = 10.0
# Above this gap, in nats, the training model knows too little about the engine to judge its samples by it.
MAX_GAP_FOR_SURPRISE = 0.05

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
    "trainer": "Look for NaN or an overflow in the training model's weights and activations (fp16?); the engine is "
    "not to blame, and was not synced.",
    "unscored": "Ask the engine for the log-prob of every sampled token; those without one are left out of the ratio.",
    "unknown": "No hypothesis explains it; compare one row by hand, layer by layer.",
    "healthy": "Nothing to do.",
}


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
            `"staleness"`, `"weights or staleness"`, `"trainer"` (it scores tokens as NaN), `"unscored"` (the engine
            reports too few log-probs) or `"unknown"`. Healthy means that what is left of the gap is no larger than
            rounding, and within what is published.
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
        engine ([`~trl_alp.doctor.Engine`]):
            The engine.
        prompts (`Sequence[str | list[dict]]`):
            One for each completion; all of them texts or all of them conversations.
        setting ([`~trl_alp.doctor.GenerationSetting`], *optional*):
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
        `ValueError`: If there are no prompts, texts are mixed with conversations, the engine returns no finite
            log-probs or not one for each token, or fewer than 100 tokens can be compared, of which nothing is said.
    """
    if not prompts or len({isinstance(prompt, str) for prompt in prompts}) != 1:
        raise ValueError("prompts must be a non-empty list, either all texts or all conversations.")
    setting = setting or GenerationSetting()
    candidates = dict(candidates or {})

    def gather(seed: int) -> tuple[Case, torch.Tensor, torch.Tensor]:
        """Sample, and score as the trainer does: the case, p and q."""
        progress("sample")
        samples = engine.sample(prompts, setting, seed)
        trainer_ids = [tokenise(tokenizer, prompt) for prompt in prompts]
        if not any(samples.completion_ids):
            raise ValueError("The engine returned no tokens at all.")
        for row, (ids, values) in enumerate(zip(samples.completion_ids, samples.logprobs, strict=True)):
            if len(ids) != len(values):
                raise ValueError(
                    f"The engine returned {len(values)} log-probs for the {len(ids)} tokens of row {row}."
                )
        kept = [row for row, completion in enumerate(samples.completion_ids) if completion]
        samples = Samples(*([column[row] for row in kept] for column in samples))
        trainer_ids = [trainer_ids[row] for row in kept]
        q = _flat(samples.logprobs)
        if not torch.isfinite(q).any():
            raise ValueError("The engine returned no finite log-probs; ask it for those of the sampled tokens.")
        progress("score as the trainer")
        p = _flat(score(model, trainer_ids, samples.completion_ids, setting.temperature))
        return Case(model, engine, setting, samples, trainer_ids, candidates, batch_size, progress), p, q

    with _evaluating(model):
        case, p, q = gather(seed)
        known = torch.isfinite(q) & ~torch.isnan(p)
        missing = _missing(p, q)
        if int(known.sum()) < MIN_TOKENS:
            if not missing:
                raise ValueError(
                    f"Could not tell: only {int(known.sum())} tokens can be compared, of at least {MIN_TOKENS} that "
                    "are needed. Give more prompts, or let completions be longer."
                )
            return _of_what_is_missing(case, p, q, missing)
        sync = sync and not bool(torch.isnan(p).any())  # NaN is not brought into the engine
        probe = _ask(engine, model, case.samples, sync, progress)
        case.scores = probe.before if probe.after is None else probe.after
        examined = _examine(case, p, q, probe.changed)
        findings, tokens = examined.findings, examined.tokens
        if probe.changed:
            # The weights are one cause; fresh samples of the synced engine show what the others are.
            weights = _weights_before_sync(case, probe)
            fresh, *gap = gather(seed + 1)
            fresh.scores = _flat(engine.score(fresh.samples.prompt_ids, fresh.samples.completion_ids))
            findings = _examine(fresh, *gap, probe.changed).findings
            if weights.cause == "weights" or not any(finding.cause == "weights" for finding in findings):
                findings.append(weights)
            tokens["explained"] = (p + (probe.before - probe.after) / setting.temperature)[known]
            left = magnitude(tokens["explained"] - tokens["engine"])
            total = examined.statistics["abs_mean"]
            predicts = "a sync changes the engine's scores by just the gap"
            examined.evidence.append(_row("staleness", "weights older than the trainer's", predicts, left, total))
        findings = sorted([*missing, *findings], key=lambda finding: finding.gap_after - finding.gap_before)

        statistics = {"tokens": len(q), "unscored": int((~known).sum())} | examined.statistics
        if probe.before is not None:
            now = case.reference(State(ids="engine"), case.raw)
            statistics["engine_repeat"] = magnitude(probe.before - probe.again)
            statistics["engine_before_sync"] = magnitude(now - probe.before)
            if probe.after is not None:
                statistics["engine_after_sync"] = magnitude(now - probe.after)
    gap = tokens["trainer"] - tokens["engine"]
    return Diagnosis(
        findings[0].cause if findings else "healthy",
        _verdict(findings, statistics, engine),
        findings,
        examined.evidence,
        statistics,
        by_position(gap, tokens["position"]),
        by_probability(gap, tokens["engine"]),
        tokens,
    )


def _missing(p: torch.Tensor, q: torch.Tensor) -> list[Finding]:
    """What is wrong where log-probs are missing; each missing one counts as a gap of 1."""
    findings = []
    for cause, what, lost, most in (
        ("trainer", "the training model scores {:.0%} of the tokens as NaN", torch.isnan(p), 0.0),
        (
            "unscored",
            "the engine reports no finite log-prob for {:.0%} of its tokens",
            ~torch.isfinite(q),
            MAX_UNSCORED,
        ),
    ):
        share = float(lost.double().mean())
        if share > most:
            findings.append(Finding(cause, what.format(share), share, 0.0))
    return findings


def _of_what_is_missing(case: Case, p: torch.Tensor, q: torch.Tensor, findings: list[Finding]) -> Diagnosis:
    """The diagnosis where too little is left to compare."""
    known = torch.isfinite(q) & ~torch.isnan(p)
    statistics = {"tokens": len(q), "unscored": int((~known).sum())}
    positions = torch.cat([torch.arange(len(row)) for row in case.samples.completion_ids])
    tokens = {"trainer": p[known], "engine": q[known], "explained": p[known], "position": positions[known]}
    gap = tokens["trainer"] - tokens["engine"]
    first, *others = findings
    also = "".join(f" Also: {f.cause} ({f.what})." for f in others)
    verdict = f"{first.cause}: {first.what}, and too few are left to compare. {WAYS_OUT[first.cause]}{also}"
    bins = by_position(gap, tokens["position"]), by_probability(gap, tokens["engine"])
    return Diagnosis(first.cause, verdict, findings, [], statistics, *bins, tokens)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ---- Weights: ask the engine ----


@dataclass
class _Probe:
    """The engine's own scores of the sampled tokens at temperature 1 (`None`: it cannot), twice, and after a sync."""

    before: torch.Tensor | None = None
    again: torch.Tensor | None = None
    after: torch.Tensor | None = None

    @property
    def changed(self) -> bool | None:
        """Whether the sync changed the scores by more than scoring twice does (`None`: there was none)."""
        if self.after is None:
            return None
        noise = magnitude(self.before - self.again)
        return magnitude(self.before - self.after) > max(FLOOR, ROUNDING_FACTOR * noise)


def _ask(engine: Engine, model, samples: Samples, sync: bool, progress) -> _Probe:
    ids = samples.prompt_ids, samples.completion_ids
    try:
        progress("let the engine score")
        before, again = _flat(engine.score(*ids)), _flat(engine.score(*ids))
    except NotImplementedError:
        return _Probe()
    if not sync:
        return _Probe(before, again)
    try:
        progress("sync, and let the engine score again")
        engine.sync(model)
    except NotImplementedError:
        return _Probe(before, again)
    return _Probe(before, again, _flat(engine.score(*ids)))


def _weights_before_sync(case: Case, probe: _Probe) -> Finding:
    """The finding where a sync changed the engine: were its weights old, or right until then?"""
    now = case.reference(State(ids="engine"), case.raw)
    before, after = magnitude(now - probe.before), magnitude(now - probe.after)
    gain = (now - probe.before).abs().clamp(max=1) - (now - probe.after).abs().clamp(max=1)
    if t_statistic(gain) < -MIN_T:
        return Finding("weights", "the engine's weights were closer to the trainer's before a sync", after, before)
    named = "weights older than the trainer's"
    for name, change in _weights_of(case):
        if magnitude(case.reference(State(ids="engine", weights=change), case.raw) - probe.before) < 0.1 * before:
            named = name
            break
    return Finding("staleness", f"the engine had {named}, and a sync brought the trainer's", before, after)


def _weights_of(case: Case) -> list[tuple[str, str]]:
    """The weights that an engine may have instead of the trainer's: how to say it, and their name in a `State`."""
    out = []
    if hasattr(case.model, "disable_adapter"):
        out.append(("the weights without the adapter", "adapter off"))
        if _is_lora(case.model):
            out.append(("the weights with the adapter applied twice", "adapter twice"))
    return out + [(f"the weights of {name}", name) for name in case.candidates]


# ---- Everything else: counterfactuals ----


@dataclass
class _Examination:
    """What the counterfactuals say of one set of samples."""

    findings: list[Finding]
    evidence: list[dict]
    statistics: dict[str, float]
    tokens: dict[str, torch.Tensor]


def _examine(case: Case, p: torch.Tensor, q: torch.Tensor, sync_changed: bool | None) -> _Examination:
    known = torch.isfinite(q) & ~torch.isnan(p)
    engine = case.engine

    def left(prediction: torch.Tensor) -> float:
        return magnitude((prediction - q)[known])

    case.score(State(), list(case.modes))
    case.padding = p - case.reference(State())
    rounding = _rounding(case)
    hypotheses = _hypotheses(case)
    total = left(p)
    evidence = []
    for cause, what, predicts, change in hypotheses:
        evidence.append(_row(cause, what, predicts, left(case.predict(replace(State(), **change))), total))

    state, findings = State(), []
    while left(case.predict(state)) > FLOOR:
        now = case.predict(state)
        before, options = left(now), []
        for cause, what, _, change in hypotheses:
            changed = replace(state, **change)
            if changed == state:
                continue
            if "measured" in change and magnitude(case.forward_gap(state)[known]) < ROUNDING_FACTOR * rounding:
                continue
            prediction = case.predict(changed)
            after = left(prediction)
            gain = ((now - q).abs().clamp(max=1) - (prediction - q).abs().clamp(max=1))[known]
            known_to_be_so = cause in ("tokenisation", "precision") or "measured" in change
            need = MIN_REMOVED_KNOWN if known_to_be_so else MIN_REMOVED
            enough = before - after > need * before and t_statistic(gain) > MIN_T
            if cause == "padding":  # as good as another draw of the rounding
                enough &= before - after > ROUNDING_FACTOR * rounding
            if enough:
                options.append((after, cause, what, changed))
        if not options:
            break
        least = min(option[0] for option in options)
        # Of hypotheses that do about as well, the first in the list, which is the more precise one.
        after, cause, what, state = next(o for o in options if o[0] <= least + max(FLOOR, 0.1 * (before - least)))
        if cause == "weights":
            cause, what = _where_weights(what, sync_changed)
        if cause != "precision":  # rounding is judged below
            findings.append(Finding(cause, what, before, after))
    now = case.predict(state)
    remainder = left(now)
    unexplained = not any("weights" in finding.cause for finding in findings)

    statistics = gap_statistics((p - q)[known])
    if remainder < MAX_GAP_FOR_SURPRISE and unexplained:
        statistics["surprise"], sampling = _sampling(case, state, evidence)
        if sampling is not None and not any(f.cause == "sampling" for f in findings):
            findings.append(Finding("sampling", sampling, remainder, remainder))

    # What is left is rounding, as far as rounding of the engine's kind goes. What is larger has a cause, whatever its
    # size; only beside a cause that was found is it asked to be out of bounds, since those may leave something.
    rest = (case.predict(replace(state, numerics="as loaded")) - q)[known]
    size, within = magnitude(rest), within_published(gap_statistics(rest))
    rounded = size <= max(FLOOR, ROUNDING_FACTOR * rounding)
    if unexplained and engine.quantization is not None and not within:
        findings.append(Finding("precision", f"weights quantised by {engine.quantization}", size, remainder))
    elif unexplained and rounded and not within:
        findings.append(Finding("precision", f"rounding in {_precision(engine)}", size, remainder))
    elif unexplained and not rounded and engine.quantization is None and not (within and findings):
        what = f"{size:.2g} nats are left, where rounding in {_precision(engine)} makes {rounding:.2g}"
        findings.append(Finding("unknown", f"{what}; {_ruled_out(case)}", size, remainder))
    statistics["rounding"] = rounding
    positions = torch.cat([torch.arange(len(row)) for row in case.samples.completion_ids])
    tokens = {"trainer": p[known], "engine": q[known], "explained": now[known], "position": positions[known]}
    return _Examination(findings, evidence, statistics, tokens)


def _hypotheses(case: Case) -> list[tuple[str, str, str, dict]]:
    """Cause, name, what it predicts, and what it changes in the state; the more precise ones first."""
    out = []
    if case.ids["trainer"] != case.ids["engine"]:
        predicts = "scored with the engine's prompt ids it is gone"
        out.append(("tokenisation", _difference(case.ids), predicts, {"ids": "engine"}))
    out.append(("padding", "the trainer's padded batch", "row by row, without padding, it is gone", {"padded": False}))
    longest = max(len(p) + len(c) for p, c in zip(case.ids["engine"], case.samples.completion_ids, strict=True))
    if longest < (getattr(case.model.config.get_text_config(), "max_position_embeddings", None) or math.inf):
        for what, shift in (
            ("the engine's completion starts one position late", (0, 1)),
            ("the engine counts positions from 1", (1, 1)),
        ):
            out.append(("padding", what, "with positions shifted so it is gone", {"shift": shift}))
    for mode in list(case.modes)[1:]:
        out.append(("sampling", mode, "with log-probs computed so it is gone", {"mode": mode}))
    for what, weights in _weights_of(case):
        out.append(("weights", what, "scored with them it is gone", {"weights": weights}))
    if case.scores is not None and case.engine.quantization is None:
        predicts = "it is in the engine's scores of fixed tokens"
        out.append(("weights", "other weights than the trainer's", predicts, {"measured": True}))
    for numerics in _numerics(case):
        out.append(("precision", numerics, "computed so it shrinks", {"numerics": numerics}))
    return out


def _where_weights(what: str, sync_changed: bool | None) -> tuple[str, str]:
    """Other weights after a sync are the sync's fault; without one it cannot be told from staleness."""
    if sync_changed is None:
        return "weights or staleness", f"the engine has {what}"
    if sync_changed:
        return "weights", f"a sync changes the engine, but leaves it with {what}"
    return "weights", f"the engine has {what}, and a sync does not change that"


def _ruled_out(case: Case) -> str:
    """What an unknown gap is not, as far as it was looked into, and what would tell more."""
    out = ["the trainer's padding", "positions", "temperature and the other sampling options"]
    if case.ids["trainer"] == case.ids["engine"]:
        out.insert(0, "the prompts' tokens")
    more = "candidates (`--candidates`) may tell whose weights it has"
    if case.scores is None:
        more = "its weights cannot be ruled out, since it does not score fixed tokens; " + more
    else:
        out.append("the weights, as the engine scores with them")
    return f"it is not {', '.join(out)}; {more}"


def _rounding(case: Case) -> float:
    """Mean |difference| that the dtypes of trainer and engine explain, in nats, as transformers rounds."""
    state = State(ids="engine")
    exact = "as loaded" if case.model.dtype == torch.float32 else "float32"
    truth = case.reference(replace(state, numerics=exact))
    own = magnitude(case.reference(state) - truth)
    engine = [magnitude(case.reference(replace(state, numerics=n)) - truth) for n in _numerics(case)]
    return own + max(engine, default=own)


def _numerics(case: Case) -> list[str]:
    """The engine's declared numerics where they are not the training model's; bf16 where it declares none."""
    engine = case.engine
    dtype = str(engine.dtype or torch.bfloat16).removeprefix("torch.")
    out = [] if engine.dtype == case.model.dtype else [dtype]
    if str(engine.kv_cache_dtype).startswith("fp8"):
        out.append(f"{dtype}, fp8 KV cache")
    return out


def _precision(engine: Engine) -> str:
    cache = f" with a KV cache in {engine.kv_cache_dtype}" if str(engine.kv_cache_dtype).startswith("fp8") else ""
    return str(engine.dtype or "the engine's dtype").removeprefix("torch.") + cache


def _sampling(case: Case, state: State, evidence: list[dict]) -> tuple[float, str | None]:
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


# ---- Words ----


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
