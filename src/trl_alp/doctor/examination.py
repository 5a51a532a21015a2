# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The search among counterfactuals: how may the engine have come to its log-probs?

A hypothesis is believed for the gap it removes, and the search goes on from there: the hypothesis that leaves the
least of the gap is taken up, then the next on top of it, until none removes enough. What is left is rounding, or
unknown.
"""

import math
from dataclasses import dataclass, replace

import torch

from .counterfactuals import Case, State
from .engines import Engine, packed
from .findings import Finding, evidence_row
from .gap import (
    CLIP_RANGE,
    FLOOR,
    MIN_T,
    ROUNDING_FACTOR,
    gap_statistics,
    magnitude,
    share_outside,
    t_statistic,
    within_published,
)
from .weights import packing, weights_of, where_weights


# A hypothesis is believed if it removes this share of the gap. For what the engine shows (other prompt ids, its own
# scores) or declares (its dtype, whose kernels round in another order than transformers) a tenth is enough.
MIN_REMOVED = 0.5
MIN_REMOVED_KNOWN = 0.1
# Largest credible |z| of the surprise of the samples; 6 has a chance of 2e-9 and leaves room for an inexact model.
MAX_SURPRISE = 6.0
# Samples from p favour another distribution by a log-likelihood ratio above this with probability below e^-10.
MIN_LOG_LIKELIHOOD_RATIO = 10.0
# Above this gap, in nats, the training model knows too little about the engine to judge its samples by it.
MAX_GAP_FOR_SURPRISE = 0.05
# A token that the engine gave this often among its most probable ones is looked at by itself.
MIN_SEEN = 20


@dataclass
class Examination:
    """What the counterfactuals say of one set of samples."""

    findings: list[Finding]
    evidence: list[dict]
    statistics: dict[str, float]
    tokens: dict[str, torch.Tensor]


def examine(
    case: Case, p: torch.Tensor, q: torch.Tensor, sync_changed: bool | None, variance: float, varying: bool
) -> Examination:
    """
    Look for what makes the gap `p - q`.

    Args:
        case ([`~trl_alp.doctor.counterfactuals.Case`]):
            The sampled tokens.
        p, q (`torch.Tensor` of shape `(N,)`):
            Their log-probs as the trainer scores and as the engine reports them, NaN where there is none.
        sync_changed (`bool`, *optional*):
            Whether a sync changed the engine's scores; `None` if there was none.
        variance (`float`):
            How far the trainer disagrees with itself, in nats. No smaller gap is looked into.
        varying (`bool`):
            Whether that is a finding already.

    Returns:
        [`Examination`].
    """
    known = torch.isfinite(q) & ~torch.isnan(p)
    engine = case.engine

    def left(prediction: torch.Tensor) -> float:
        return magnitude((prediction - q)[known])

    case.score(State(), list(case.modes))
    case.padding = p - case.reference(State())
    dtypes = rounding(case)
    floor = max(dtypes, variance)
    hypotheses = _hypotheses(case)
    total = left(p)
    evidence = []
    for cause, what, predicts, change in hypotheses:
        evidence.append(evidence_row(cause, what, predicts, left(case.predict(replace(State(), **change))), total))

    state, findings = State(), []
    while left(case.predict(state)) > FLOOR:
        now = case.predict(state)
        before, options = left(now), []
        for cause, what, _, change in hypotheses:
            changed = replace(state, **change)
            if changed == state:
                continue
            if "measured" in change and magnitude(case.forward_gap(state)[known]) < ROUNDING_FACTOR * floor:
                continue
            prediction = case.predict(changed)
            after = left(prediction)
            gain = ((now - q).abs().clamp(max=1) - (prediction - q).abs().clamp(max=1))[known]
            known_to_be_so = cause in ("tokenisation", "precision") or "measured" in change
            need = MIN_REMOVED_KNOWN if known_to_be_so else MIN_REMOVED
            enough = before - after > need * before and t_statistic(gain) > MIN_T
            if cause == "padding":  # as good as another draw of the rounding
                enough &= before - after > ROUNDING_FACTOR * floor
            if enough:
                options.append((after, cause, what, changed))
        if not options:
            break
        least = min(option[0] for option in options)
        # Of hypotheses that do about as well, the first in the list, which is the more precise one.
        after, cause, what, state = next(o for o in options if o[0] <= least + max(FLOOR, 0.1 * (before - least)))
        if cause == "weights":
            cause, what = where_weights(what, sync_changed)
            what += packing(case.model)
        if cause != "precision":  # rounding is judged below
            findings.append(Finding(cause, what, before, after))
    now = case.predict(state)
    remainder = left(now)
    unexplained = not any("weights" in finding.cause for finding in findings)

    statistics = gap_statistics((p - q)[known]) | {"clipped": share_outside((p - q)[known], *CLIP_RANGE)}
    if remainder < MAX_GAP_FOR_SURPRISE and unexplained:
        statistics["surprise"], sampling = _sampling(case, state, evidence)
        if sampling is not None:
            findings.append(Finding("sampling", sampling, remainder, remainder))
    if unexplained and case.top is not None and engine.quantization is None:
        findings += _vocabulary(case, statistics, evidence)

    # What is left is rounding, as far as rounding of the engine's kind goes. What is larger has a cause, whatever its
    # size; only beside a cause that was found is it asked to be out of bounds, since those may leave something.
    rest = (case.predict(replace(state, numerics="as loaded")) - q)[known]
    size, within = magnitude(rest), within_published(gap_statistics(rest))
    rounded = size <= max(FLOOR, ROUNDING_FACTOR * floor)
    if unexplained and engine.quantization is not None and not within:
        findings.append(Finding("precision", f"weights quantised by {engine.quantization}", size, remainder))
    elif unexplained and rounded and not within and not (varying and size > ROUNDING_FACTOR * dtypes):
        findings.append(Finding("precision", f"rounding in {precision(engine)}", size, remainder))
    elif unexplained and not rounded and engine.quantization is None and not (within and findings):
        what = f"{size:.2g} nats are left, where rounding in {precision(engine)} makes {floor:.2g}"
        findings.append(Finding("unknown", f"{what}; {_ruled_out(case)}", size, remainder))
    statistics["rounding"] = dtypes
    positions = torch.cat([torch.arange(len(row)) for row in case.samples.completion_ids])
    tokens = {"trainer": p[known], "engine": q[known], "explained": now[known], "position": positions[known]}
    return Examination(findings, evidence, statistics, tokens)


def rounding(case: Case) -> float:
    """Mean |difference| that the dtypes of trainer and engine explain, in nats, as transformers rounds."""
    state = State(ids="engine")
    truth = case.reference(replace(state, numerics=_exact(case)))
    engine = [magnitude(case.reference(replace(state, numerics=n)) - truth) for n in _numerics(case)]
    return own_rounding(case) + max(engine, default=own_rounding(case))


def own_rounding(case: Case) -> float:
    """The training model's part of it."""
    state = State(ids="engine")
    return magnitude(case.reference(state) - case.reference(replace(state, numerics=_exact(case))))


def precision(engine: Engine) -> str:
    """What the engine computes in, in words."""
    cache = f" with a KV cache in {engine.kv_cache_dtype}" if str(engine.kv_cache_dtype).startswith("fp8") else ""
    return str(engine.dtype or "the engine's dtype").removeprefix("torch.") + cache


def _exact(case: Case) -> str:
    """Numerics without rounding; kernels for packed weights may compute in 16 bits, whatever the model's dtype is."""
    return "as loaded" if case.model.dtype == torch.float32 and not packed(case.model) else "float32"


def _numerics(case: Case) -> list[str]:
    """The engine's declared numerics where they are not the training model's; bf16 where it declares none."""
    engine = case.engine
    dtype = str(engine.dtype or torch.bfloat16).removeprefix("torch.")
    out = [] if engine.dtype == case.model.dtype else [dtype]
    if str(engine.kv_cache_dtype).startswith("fp8"):
        out.append(f"{dtype}, fp8 KV cache")
    return out


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
    for what, weights in weights_of(case):
        out.append(("weights", what, "scored with them it is gone", {"weights": weights}))
    if case.scores is not None and case.engine.quantization is None:
        predicts = "it is in the engine's scores of fixed tokens"
        out.append(("weights", "other weights than the trainer's", predicts, {"measured": True}))
    for numerics in _numerics(case):
        out.append(("precision", numerics, "computed so it shrinks", {"numerics": numerics}))
    return out


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


def _sampling(case: Case, state: State, evidence: list[dict]) -> tuple[float, str | None]:
    """Whether the samples follow the log-probs: by a likelihood ratio where the alternative is known, and by their
    surprise where it is not.

    Log-probs that are reported without the temperature are a cause of their own, found by their gap, and the samples
    still follow the temperature then: they are held against what fits them better of the two.
    """

    def likelihood(mode: str) -> torch.Tensor:
        # Rounding may put a token just outside the truncated support: it counts -5, not minus infinity.
        return (case.reference(state, mode) - case.reference(state)).double().clamp(min=-5)

    assumed = max((state.mode, next(iter(case.modes))), key=lambda mode: float(likelihood(mode).sum()))
    surprise = case.surprise(state, assumed)
    others = [
        mode for mode in case.modes if mode.startswith(("processed", "raw")) and mode not in (state.mode, assumed)
    ]
    ratios = {mode: float((likelihood(mode) - likelihood(assumed)).clamp(min=-5).sum()) for mode in others}
    best = max(ratios, key=ratios.__getitem__, default=None)
    if best is not None and ratios[best] > MIN_LOG_LIKELIHOOD_RATIO:
        what = f"the samples follow another distribution than the log-probs: {best}"
        predicts = f"log-likelihood ratio of the samples {ratios[best]:.0f}"
    elif abs(surprise) > MAX_SURPRISE:
        what = "the samples follow another distribution than the log-probs, which no setting given here explains"
        predicts = f"the samples' surprise is off by {surprise:.0f} standard errors"
    else:
        return surprise, None
    evidence.append(evidence_row("sampling", what, predicts, None, 0.0))
    return surprise, what


def _vocabulary(case: Case, statistics: dict[str, float], evidence: list[dict]) -> list[Finding]:
    """Whether the engine's most probable tokens agree too, sampled or not: on average, and each by itself."""
    state = State(ids="engine")
    ids = torch.tensor([token for row in case.top for step in row for token in step])
    q = torch.tensor([value for row in case.top for step in row for value in step.values()])
    now = case.reference_top(state)
    gap = torch.nan_to_num(now - q, nan=1.0, posinf=1.0, neginf=-1.0).double().clamp(-1, 1)
    rounded = [
        (case.reference_top(replace(state, numerics=n)) - now).double().clamp(-1, 1)
        for n in {*_numerics(case), _exact(case)}
    ]
    size, explained = magnitude(gap), sum(map(magnitude, rounded))
    statistics |= {"vocabulary": size, "vocabulary_rounding": explained}

    seen = torch.bincount(ids).clamp(min=1)

    def by_token(values: torch.Tensor) -> torch.Tensor:
        mean = torch.zeros(len(seen), dtype=torch.float64).index_add(0, ids, values) / seen
        return torch.where(seen >= MIN_SEEN, mean.abs(), 0.0)

    own = by_token(gap)
    worst = int(own.argmax())
    most = max(FLOOR, ROUNDING_FACTOR * sum(float(by_token(one).max()) for one in rounded))
    predicts = f"the engine's most probable tokens differ by {size:.2g} nats, rounding makes {explained:.2g}"
    if size > max(FLOOR, ROUNDING_FACTOR * explained):
        what = (
            f"over the engine's most probable tokens, sampled or not, log-probs differ by {size:.2g} nats on average"
        )
    elif float(own[worst]) > 10 * most:
        what = f"the log-prob of token {worst} differs by {float(own[worst]):.2g} nats on average"
        predicts = f"single tokens differ, where rounding makes {most / ROUNDING_FACTOR:.2g} of one"
    else:
        return []
    evidence.append(evidence_row("vocabulary", what, predicts, None, 0.0))
    return [Finding("vocabulary", what, size, 0.0)]


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
