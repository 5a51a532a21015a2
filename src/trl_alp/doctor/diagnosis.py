# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What the gap between trainer and engine is made of: counterfactuals on the same sampled tokens.

Every hypothesis is a way the engine could have come to its log-probs `q`, and predicts them:

    p(h) = log-probs of the sampled tokens, scored by the training model under hypothesis h

The gap is `p - q` with `p` scored as the trainer does. `examination.py` searches among the hypotheses. Two things that
one scoring cannot tell are asked of the engine itself (`weights.py`): whether it scores fixed tokens as the training
model does, and whether it does once the weights have been synced again. And some are asked of the trainer alone
(`trainer_side.py`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from .counterfactuals import Case, Scorer, State, score_as_trl
from .engines import Engine, GenerationSetting, Prompt, Samples, evaluating, tokenise
from .examination import examine, own_rounding, precision
from .findings import Diagnosis, Finding, evidence_row, verdict
from .gap import CLIP_RANGE, by_position, by_probability, magnitude, share_outside
from .trainer_side import batch_variance, merge_cycle, missing
from .weights import Probe, ask, ask_top, before_sync, failed_sync, flat


# Of fewer scored tokens nothing is said.
MIN_TOKENS = 100


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
        q = flat(samples.logprobs)
        if not torch.isfinite(q).any():
            raise ValueError("The engine returned no finite log-probs; ask it for those of the sampled tokens.")
        progress("score as the trainer")
        p = flat(score(model, trainer_ids, samples.completion_ids, setting.temperature))
        return Case(model, engine, setting, samples, trainer_ids, candidates, batch_size, progress), p, q

    with evaluating(model):
        case, p, q = gather(seed)
        known = torch.isfinite(q) & ~torch.isnan(p)
        lost = missing(p, q)
        if int(known.sum()) < MIN_TOKENS:
            if not lost:
                raise ValueError(
                    f"Could not tell: only {int(known.sum())} tokens can be compared, of at least {MIN_TOKENS} that "
                    "are needed. Give more prompts, or let completions be longer."
                )
            return _of_what_is_missing(case, p, q, lost)
        broken = bool(torch.isnan(p).any())
        probe = ask(engine, model, case.samples, sync and not broken, progress)  # NaN is not brought into the engine
        case.scores = probe.before if probe.after is None else probe.after
        ask_top(engine, case)
        if broken:
            varying, merged, of_trainer = [], [], {}
        else:
            progress("score in another batch shape")
            varying, of_trainer = batch_variance(case, score, own_rounding(case))
            merged, of_merging = merge_cycle(case)
            of_trainer |= of_merging
        variance = of_trainer.get("batch_variance", 0.0)
        examined = examine(case, p, q, probe.changed, variance, bool(varying))
        findings, tokens = examined.findings, examined.tokens
        if probe.changed:
            # The weights are one cause; fresh samples of the synced engine show what the others are.
            weights = before_sync(case, probe)
            fresh, *gap = gather(seed + 1)
            fresh.scores = flat(engine.score(fresh.samples.prompt_ids, fresh.samples.completion_ids))
            ask_top(engine, fresh)
            findings = examine(fresh, *gap, probe.changed, variance, bool(varying)).findings
            if weights.cause == "weights" or not any(finding.cause == "weights" for finding in findings):
                findings.append(weights)
            tokens["explained"] = (p + (probe.before - probe.after) / setting.temperature)[known]
            left = magnitude(tokens["explained"] - tokens["engine"])
            total = examined.statistics["abs_mean"]
            predicts = "a sync changes the engine's scores by just the gap"
            row = evidence_row("staleness", "weights older than the trainer's", predicts, left, total)
            examined.evidence.append(row)
        findings += [*lost, *varying, *merged, *failed_sync(model, probe, examined.statistics["abs_mean"])]
        findings = sorted(findings, key=lambda finding: finding.gap_after - finding.gap_before)

        statistics = {"tokens": len(q), "unscored": int((~known).sum())} | examined.statistics | of_trainer
        statistics |= _of_the_engine(case, probe, p - q, known)
    return _diagnosis(findings, examined.evidence, statistics, tokens, engine)


def _of_the_engine(case: Case, probe: Probe, gap: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    """The engine against itself and the model, and the log ratio as movement of the policy plus precision."""
    if probe.before is None:
        return {}
    now = case.reference(State(ids="engine"), case.raw)
    out = {"engine_repeat": magnitude(probe.before - probe.again), "engine_before_sync": magnitude(now - probe.before)}
    if probe.after is None:
        return out
    movement = ((probe.after - probe.before) / case.setting.temperature)[known]
    matched = gap[known] - movement
    return out | {
        "engine_after_sync": magnitude(now - probe.after),
        "movement": magnitude(movement),
        "movement_mean": float(movement.double().mean()),
        "precision": magnitude(matched),
        "precision_mean": float(matched.double().mean()),
        "clipped_before_movement": share_outside(matched, *CLIP_RANGE),
    }


def _of_what_is_missing(case: Case, p: torch.Tensor, q: torch.Tensor, findings: list[Finding]) -> Diagnosis:
    """The diagnosis where too little is left to compare."""
    known = torch.isfinite(q) & ~torch.isnan(p)
    statistics = {"tokens": len(q), "unscored": int((~known).sum())}
    positions = torch.cat([torch.arange(len(row)) for row in case.samples.completion_ids])
    tokens = {"trainer": p[known], "engine": q[known], "explained": p[known], "position": positions[known]}
    return _diagnosis(findings, [], statistics, tokens, case.engine)


def _diagnosis(findings, evidence, statistics, tokens, engine: Engine) -> Diagnosis:
    gap = tokens["trainer"] - tokens["engine"]
    return Diagnosis(
        findings[0].cause if findings else "healthy",
        verdict(findings, statistics, precision(engine)),
        findings,
        evidence,
        statistics,
        by_position(gap, tokens["position"]),
        by_probability(gap, tokens["engine"]),
        tokens,
    )
