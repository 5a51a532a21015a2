# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The doctor's figure."""

from pathlib import Path

import torch

from .findings import Diagnosis


def draw(diagnosis: Diagnosis, path: str | Path) -> None:
    """
    Draw the gap before and after the findings are removed: log-probs against each other, by position, by probability.
    Needs matplotlib.

    Args:
        diagnosis ([`Diagnosis`]):
            What to draw.
        path (`str` or `Path`):
            Where to write the PNG.
    """
    from matplotlib.figure import Figure

    tokens = diagnosis.tokens
    trainer, engine, explained = tokens["trainer"], tokens["engine"], tokens["explained"]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(diagnosis.verdict.split(". ")[0], fontsize=10)
    scatter, position, probability = figure.subplots(1, 3)
    scatter.plot(engine, trainer, ".", ms=2, alpha=0.5, label="as it is")
    if diagnosis.findings:
        scatter.plot(engine, explained, ".", ms=2, alpha=0.5, label="with the findings removed")
    low = float(torch.minimum(engine, trainer).clamp(min=-20).min()) if len(engine) else -20.0
    scatter.plot([low, 0], [low, 0], "k", lw=0.5)
    scatter.set(xlabel="log-prob of the engine, q", ylabel="log-prob of the trainer, p", xlim=(low, 0), ylim=(low, 0))
    scatter.legend(loc="upper left", fontsize=8)
    for axis, rows, name, label in (
        (position, diagnosis.by_position, lambda row: f"{row['from']}-{row['to']}", "position in the completion"),
        (probability, diagnosis.by_probability, lambda row: f"{row['above']:g}-", "probability under the engine"),
    ):
        ticks = range(len(rows))
        axis.fill_between(ticks, [row["p02"] for row in rows], [row["p98"] for row in rows], alpha=0.3, label="P2-P98")
        axis.plot(ticks, [row["p50"] for row in rows], "o-", ms=3, label="median")
        axis.axhline(0, color="k", lw=0.5)
        axis.set_xticks(list(ticks), [name(row) for row in rows], rotation=45, fontsize=8)
        axis.set(xlabel=label, ylabel="p - q, nats")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
