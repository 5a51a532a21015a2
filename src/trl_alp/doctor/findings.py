# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What the doctor has to say: findings, the diagnosis, and its verdict in words."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch


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
    "batch variance": "Score in the batch shape of the update, in a wider dtype, or with batch-invariant kernels; the "
    "engine is not to blame for this part.",
    "merge": "Keep the base weights in fp32, restore them after each sync, or serve the adapter without merging it.",
    "vocabulary": "Compare the rows of the output layer, `bad_words` and `logit_bias` of the engine, and a vocabulary "
    "that was resized.",
    "trainer": "Look for NaN or an overflow in the training model's weights and activations (fp16?); the engine is "
    "not to blame, and was not synced.",
    "unscored": "Ask the engine for the log-prob of every sampled token; those without one are left out of the ratio.",
    "unknown": "No hypothesis explains it; compare one row by hand, layer by layer.",
    "healthy": "Nothing to do.",
}
# Told in the verdict from this share of clipped tokens on.
MANY_CLIPPED = 0.01


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
            `"staleness"`, `"weights or staleness"`, `"batch variance"` (the trainer disagrees with itself),
            `"merge"` (merging the adapter and taking it out again changes the base weights), `"vocabulary"` (the
            sampled tokens agree, others do not), `"trainer"` (it scores tokens as NaN), `"unscored"` (the engine
            reports too few log-probs) or `"unknown"`. Healthy means that what is left of the gap is no larger than
            rounding, and within what is published.
        verdict (`str`):
            One line for a human, with the way out.
        findings (`list[Finding]`):
            All causes, the dominant one first.
        evidence (`list[dict]`):
            One row for each hypothesis: `cause`, `hypothesis`, `predicts`, `gap_left` (mean |gap| in nats, each token
            counting at most 1; `None` where the hypothesis is not about the gap) and `share_left`.
        statistics (`dict[str, float]`):
            Of the whole gap: `tokens`, `unscored`, `mean`, `abs_mean`, `median_abs`, `kl_k1`, `kl_k3`,
            `probability_error` = mean(exp(|p - q|)), `clipped` (share of tokens whose ratio leaves [0.8, 1.2], TRL's
            default clip range) and `rounding` (what the dtypes explain). Where they could be measured:
            `batch_variance` and `batch_variance_share` (the trainer against itself, and the share of its tokens whose
            ratio leaves [0.9, 1.1]), `merge_cycle` and `merge_cycle_share` (gap and share of base weights changed by
            one merge and unmerge), `vocabulary` and `vocabulary_rounding` (mean |gap| over the engine's most probable
            tokens, and what rounding makes there), `surprise`, `engine_repeat`, `engine_before_sync`,
            `engine_after_sync`, and of the log ratio as movement plus precision, `movement` and `movement_mean`
            (of the policy, by the sync), `precision` and `precision_mean` (what is left at matched weights), and
            `clipped_before_movement` (share of tokens that leave [0.8, 1.2] at matched weights).
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
        return finite(out)


def evidence_row(cause: str, hypothesis: str, predicts: str, gap_left: float | None, total: float) -> dict:
    """A row of the evidence; `gap_left=None` for a hypothesis about something else than the gap."""
    share = None if gap_left is None else gap_left / total if total else 0.0
    return {"cause": cause, "hypothesis": hypothesis, "predicts": predicts, "gap_left": gap_left, "share_left": share}


def verdict(findings: list[Finding], statistics: dict[str, float], precision: str) -> str:
    """One line: the first finding with its way out, then the others. `precision` is the engine's, in words."""
    size = "too few are left to compare"
    if "abs_mean" in statistics:
        size = f"mean |p - q| {statistics['abs_mean']:.2g} nats, KL {statistics['kl_k3']:.2g}"
    clipped = statistics.get("clipped_before_movement", 0.0)
    early = f" {clipped:.1%} of the tokens leave the clip range before the policy has moved." * (
        clipped >= MANY_CLIPPED
    )
    if not findings:
        return f"healthy: {size}; no more than {precision} explains.{early} {WAYS_OUT['healthy']}"
    first, *others = findings
    also = f" Also: {'; '.join(f'{f.cause} ({f.what})' for f in others)}." if others else ""
    return f"{first.cause}: {first.what} ({size}). {WAYS_OUT[first.cause]}{early}{also}"


# What people read, in this order; the keys are for JSON.
_STATISTICS = {
    "tokens": "tokens",
    "unscored": "of them without a log-prob",
    "mean": "mean p - q, nats",
    "abs_mean": "mean |p - q|, nats",
    "median_abs": "median |p - q|, nats",
    "kl_k1": "KL, k1",
    "kl_k3": "KL, k3",
    "probability_error": "mean exp(|p - q|)",
    "clipped": "share outside the clip range [0.8, 1.2]",
    "movement": "movement: mean |change| of a log-prob by the sync, nats",
    "movement_mean": "movement: mean change by the sync, nats",
    "precision": "precision: mean |p - q| at matched weights, nats",
    "precision_mean": "precision: mean p - q at matched weights, nats",
    "clipped_before_movement": "share outside the clip range at matched weights",
    "rounding": "rounding of the two dtypes, nats",
    "batch_variance": "the trainer against itself in another batch shape, nats",
    "batch_variance_share": "share of its ratios outside [0.9, 1.1]",
    "merge_cycle": "a merge and unmerge of the adapter, nats",
    "merge_cycle_share": "share of the base weights it changes",
    "vocabulary": "mean |p - q| over the engine's most probable tokens, nats",
    "vocabulary_rounding": "rounding there, nats",
    "surprise": "surprise of the samples, standard errors",
    "engine_repeat": "the engine against itself, nats",
    "engine_before_sync": "the engine's own scores against the model's, nats",
    "engine_after_sync": "the same after a sync, nats",
}


def report(diagnosis: Diagnosis) -> str:
    """The diagnosis as text: the verdict, the evidence, the gap by position and by probability."""
    evidence = sorted(diagnosis.evidence, key=lambda row: math.inf if row["gap_left"] is None else row["gap_left"])
    temperatures = [row for row in evidence if row["hypothesis"].startswith("another temperature")]
    evidence = [row for row in evidence if row not in temperatures[1:]]
    lines = [diagnosis.verdict, ""]
    lines += table(
        ("hypothesis", "predicts", "gap left", "of it"),
        [
            (
                f"{row['cause']}: {row['hypothesis']}",
                row["predicts"],
                "-" if row["gap_left"] is None else row["gap_left"],
                "-"
                if row["share_left"] is None
                else f"{row['share_left']:.0%}"
                if row["share_left"] < 10
                else "> 10x",
            )
            for row in evidence
        ],
    )
    said = [(name, diagnosis.statistics[key]) for key, name in _STATISTICS.items() if key in diagnosis.statistics]
    lines += ["", *table(("statistic", ""), said)]
    columns = {"tokens": "tokens", "mean": "mean", "abs_mean": "mean |.|", "p02": "P2", "p50": "P50", "p98": "P98"}
    for title, rows, name in (
        ("position", diagnosis.by_position, lambda row: f"{row['from']}-{row['to']}"),
        ("probability under the engine", diagnosis.by_probability, lambda row: f"{row['above']:g}-{row['to']:g}"),
    ):
        cells = [(name(row), *(row[column] for column in columns)) for row in rows]
        lines += ["", *table((title, *columns.values()), cells)]
    return "\n".join(lines)


def table(head: Sequence[str], rows: list[Sequence]) -> list[str]:
    """Lines of a table in columns."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def finite(value):
    """The same with None for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
