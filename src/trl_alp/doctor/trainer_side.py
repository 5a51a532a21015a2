# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What is wrong with no engine at all: log-probs that are missing, a trainer that disagrees with itself, and an
adapter whose merging changes the base weights."""

import copy
from dataclasses import replace

import torch

from .counterfactuals import Case, Scorer, State, is_lora
from .engines import packed
from .findings import Finding
from .gap import FLOOR, ROUNDING_FACTOR, gap_statistics, magnitude, share_outside, within_published
from .weights import flat


# Share of the tokens without a log-prob above which a run is not healthy: single ones are usual in vLLM.
MAX_UNSCORED = 0.1
# Rows that are scored alone and as this many copies of themselves.
ROWS, COPIES = 16, 4
_CYCLE = "the model after a merge and unmerge"


def missing(p: torch.Tensor, q: torch.Tensor) -> list[Finding]:
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


def batch_variance(case: Case, score: Scorer, rounding: float) -> tuple[list[Finding], dict[str, float]]:
    """
    The trainer against itself: rows scored alone, and in a batch of copies, which needs no padding either.

    It is a finding if it is out of the published bounds, or larger than `rounding`, what the training model's own
    dtype explains (trl#6789: in bf16, 8 % of the ratios were outside of [0.9, 1.1]).
    """
    alone, among = [], []
    for prompt, completion in zip(case.ids["trainer"][:ROWS], case.samples.completion_ids[:ROWS], strict=True):
        alone += score(case.model, [prompt], [completion], case.setting.temperature)
        among += score(case.model, [prompt] * COPIES, [completion] * COPIES, case.setting.temperature)[:1]
    gap = flat(alone) - flat(among)
    if bool(torch.isnan(gap).any()):
        return [], {}
    size, share = magnitude(gap), share_outside(gap, 0.9, 1.1)
    statistics = {"batch_variance": size, "batch_variance_share": share}
    if size <= max(FLOOR, ROUNDING_FACTOR * rounding) and within_published(gap_statistics(gap)):
        return [], statistics
    what = (
        f"the trainer disagrees with itself: the same rows in a batch of 1 and of {COPIES} differ by {size:.2g} nats, "
        f"and {share:.1%} of the ratios are outside of [0.9, 1.1] with no engine at all"
    )
    return [Finding("batch variance", what, size, 0.0)], statistics


def merge_cycle(case: Case) -> tuple[list[Finding], dict[str, float]]:
    """
    What one merge and unmerge of the adapter, as TRL makes with every sync, does to the base weights (trl#6688).

    In fp32 it leaves rounding that does not grow; in 16 bits each cycle adds to it.
    """
    if not is_lora(case.model) or packed(case.model):  # merging into packed weights quantises them anew
        return [], {}
    from peft.tuners.lora import LoraLayer

    after = copy.deepcopy(case.model)
    weights = [layer.get_base_layer().weight for layer in after.modules() if isinstance(layer, LoraLayer)]
    before = [weight.detach().clone() for weight in weights]
    after.merge_adapter()
    after.unmerge_adapter()
    changed = sum(int((new != old).sum()) for new, old in zip(weights, before, strict=True))
    share = changed / sum(weight.numel() for weight in before)
    case.candidates[_CYCLE] = after
    state = State(ids="engine")
    now = case.reference(state, case.raw)
    gap = magnitude(case.reference(replace(state, weights=_CYCLE), case.raw) - now)
    del case.candidates[_CYCLE]
    statistics = {"merge_cycle": gap, "merge_cycle_share": share}
    if gap <= FLOOR:
        return [], statistics
    what = (
        f"one merge and unmerge of the adapter, as TRL makes with every sync, changes {share:.1%} of the base weights "
        f"and the log-probs by {gap:.2g} nats, and this adds up"
    )
    return [Finding("merge", what, gap, 0.0)], statistics
