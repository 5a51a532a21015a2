# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
Tables and figures of `docs/results.md`, from the results in `benchmarks/results/lab/`:

    python benchmarks/lab/figures.py            # writes docs/assets/lab_*.png and the tables inside docs/results.md
    python benchmarks/lab/figures.py --check    # says whether the tables are those of the results
"""

import argparse
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from study import ARMS, CLIPS, POINTS, RATES, ROOT, choices, final, finished


matplotlib.use("Agg")
PAGE = ROOT / "docs" / "results.md"
ASSETS = ROOT / "docs" / "assets"
COLOURS = dict(zip(ARMS, plt.get_cmap("tab10").colors, strict=False))
WITHOUT_NOISE = {"alp_token": "bypass_token", "alp_sequence": "bypass_sequence", "alp_tis": "tis"}


# ---- Numbers of one run ----


def best(row: dict) -> float:
    return max(value for _, value in row["accuracy"])


def collapsed(row: dict) -> bool:
    """Whether the run ends below where it started."""
    return final(row) < row["accuracy"][0][1]


def curve(row: dict, name: str, largest: bool = False) -> list[float]:
    """One value a window of updates: the mean over it, or the largest; windows without a value are left out."""
    return [pair[largest] for pair in row["curves"].get(name, []) if pair[largest] is not None]


def mean_of(name: str) -> Callable[[dict], float]:
    return lambda row: statistics.mean(curve(row, name) or [float("nan")])


def peak_of(name: str) -> Callable[[dict], float]:
    return lambda row: max(curve(row, name, largest=True), default=float("nan"))


def width_of(prefix: str) -> Callable[[dict], float]:
    """P98 - P2 of the log ratio, nats, mean over the run."""
    return lambda row: mean_of(f"{prefix}/log_ratio/p98")(row) - mean_of(f"{prefix}/log_ratio/p02")(row)


def interval(values: Iterable[float], draws: int = 10000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean over runs."""
    values, source = list(values), random.Random(0)
    means = sorted(statistics.fmean(source.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


# ---- Tables ----


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)])


def number(value: float) -> str:
    return "" if value != value else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def averaged(rows: list[dict], measure: Callable[[dict], float]) -> str:
    return number(statistics.fmean(measure(row) for row in rows))


def with_interval(rows: list[dict]) -> str:
    values = [final(row) for row in rows]
    low, high = interval(values)
    return f"{statistics.fmean(values):.3f} [{low:.3f}, {high:.3f}]"


def gain(differences: list[float]) -> str:
    low, high = interval(differences)
    return f"{statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def disease_table() -> str:
    groups: dict[tuple, list[dict]] = {}
    for row in finished("disease").values():
        s = row["settings"]
        groups.setdefault((s["arm"], s["numerics"], s["updates_per_rollout"], s["lag"]), []).append(row)
    numerics = ["exact", "bf16", "int8", "int6", "int5", "int4", "int3", "gauss-0.1", "gauss-0.3"]
    order = sorted(groups, key=lambda key: (key[2:] != (8, 0), numerics.index(key[1]), *key[2:], key[0]))
    lines = []
    for arm, kind, updates, lag in order:
        rows = groups[arm, kind, updates, lag]
        lines.append(
            [kind, str(updates), str(lag), arm, ", ".join(f"{final(row):.3f}" for row in rows), averaged(rows, best)]
            + [averaged(rows, peak_of(name)) for name in ("grad_norm", "alp/kl/k3")]
            + [averaged(rows, mean_of(name)) for name in ("alp/kl/k3", "entropy", "alp/token/ess", "alp/sequence/ess")]
            + [averaged(rows, width_of(f"alp/{level}")) for level in ("token", "sequence")]
        )
    head = ["behaviour", "updates", "lag", "arm", "final, each seed", "best", "peak grad norm", "peak k3", "mean k3"]
    head += ["entropy", "token ESS", "sequence ESS", "token P2-P98", "sequence P2-P98"]
    return markdown(head, lines)


def tune_table() -> str:
    rows = finished("tune").values()
    rates = sorted({row["settings"]["learning_rate"] for row in rows})
    clips = sorted({row["settings"]["overrides"]["epsilon"] for row in rows})
    lines = []
    for arm in ARMS:
        line = [arm]
        for clip in clips:
            for rate in rates:
                here = [
                    final(row) for row in rows
                    if (row["settings"]["arm"], row["settings"]["learning_rate"]) == (arm, rate)
                    and row["settings"]["overrides"]["epsilon"] == clip
                ]  # fmt: skip
                line.append(f"{statistics.fmean(here):.3f}" if here else "")
        chosen = choices()[arm]
        lines.append([*line, f"{chosen[0]}, {chosen[1]:g}"])
    head = [f"{'narrow' if clip == 0.2 else 'wide'}, {rate:g}" for clip in clips for rate in rates]
    return markdown(["arm", *head, "chosen"], lines)


def by_point_and_arm() -> dict[tuple[str, str], list[dict]]:
    groups: dict[tuple[str, str], list[dict]] = {}
    for name, row in finished("grid").items():
        point, arm, _ = name.split("-")
        groups.setdefault((point, arm), []).append(row)
    return groups


def grid_table() -> str:
    groups, lines = by_point_and_arm(), []
    for point in POINTS:
        for arm in ARMS:
            if rows := groups.get((point, arm)):
                lost = sum(map(collapsed, rows))
                lines.append(
                    [point, arm, with_interval(rows), averaged(rows, best), f"{lost} of {len(rows)}"]
                    + [averaged(rows, peak_of(name)) for name in ("grad_norm", "alp/kl/k3")]
                    + [averaged(rows, mean_of("entropy"))]
                )
    head = ["point", "arm", "final accuracy [95 %]", "best", "collapsed", "peak grad norm", "peak k3", "entropy"]
    return markdown(head, lines)


def paired_table() -> str:
    """ALP minus the same arm without noise, run by run: same point, same seed, each at its own best settings."""
    groups, lines = by_point_and_arm(), []
    for point in POINTS:
        for noisy, plain in WITHOUT_NOISE.items():
            seeds = [{row["settings"]["seed"]: row for row in groups.get((point, arm), [])} for arm in (noisy, plain)]
            gains = [final(seeds[0][s]) - final(seeds[1][s]) for s in sorted(seeds[0].keys() & seeds[1].keys())]
            if gains:
                wins = sum(each > 0 for each in gains)
                lines.append([point, f"{noisy} - {plain}", gain(gains), f"{wins} of {len(gains)}"])
    return markdown(["point", "difference", "final accuracy [95 %]", "seeds in favour"], lines)


def matched_table() -> str:
    """Beyond the edge of the mismatch, every arm at both learning rates, and what noise changes at the same rate."""
    runs: dict[tuple[str, float], dict[int, dict]] = {}
    for row in [*finished("grid").values(), *finished("matched").values()]:
        s = row["settings"]
        if s["numerics"] == POINTS["mismatch_beyond"]["numerics"]:
            runs.setdefault((s["arm"], s["learning_rate"]), {})[s["seed"]] = row
    lines = []
    for arm in ARMS:
        for rate in RATES[:2]:
            rows = runs.get((arm, rate), {})
            if not rows:
                continue
            plain = runs.get((WITHOUT_NOISE.get(arm), rate), {})
            gains = [final(row) - final(plain[seed]) for seed, row in rows.items() if seed in plain]
            # Noise is part of the ratio in the loss; the gap of the policy itself shows without it.
            off = "alp/noise_off" if arm in WITHOUT_NOISE else "alp"
            measures = (width_of("alp/token"), width_of(f"{off}/token"), width_of(f"{off}/sequence"))
            measures += (mean_of(f"{off}/kl/k3"), peak_of("grad_norm"), mean_of("entropy"))
            lines.append(
                [arm, choices()[arm][0], f"{rate:g}", with_interval(list(rows.values())), str(len(rows))]
                + [averaged(list(rows.values()), measure) for measure in measures]
                + [gain(gains) if gains else ""]
            )
    head = ["arm", "clip", "rate", "final accuracy [95 %]", "seeds", "token P2-P98", "token, noise off"]
    head += ["sequence, noise off", "k3, noise off", "peak grad norm", "entropy", "noise minus no noise [95 %]"]
    return markdown(head, lines)


def ablation_table() -> str:
    groups: dict[str, list[dict]] = {}
    for name, row in finished("ablation").items():
        groups.setdefault(name.rpartition("-")[0], []).append(row)
    lines = []
    for label, rows in groups.items():
        sigma = [name for name in rows[0]["curves"] if name.startswith("alp/sigma")]
        ends = ", ".join(number(statistics.fmean(curve(row, name)[-1] for row in rows)) for name in sigma)
        lines.append(
            [label, with_interval(rows), f"{sum(map(collapsed, rows))} of {len(rows)}"]
            + [averaged(rows, measure) for measure in (width_of("alp/token"), peak_of("grad_norm"))]
            + [ends]
        )
    head = [
        "change",
        "final accuracy [95 %]",
        "collapsed",
        "token P2-P98",
        "peak grad norm",
        "sigma at the end, by layer",
    ]
    return markdown(head, lines)


TABLES = {
    "disease": disease_table, "tune": tune_table, "grid": grid_table, "paired": paired_table,
    "matched": matched_table, "ablation": ablation_table,
}  # fmt: skip


# ---- Figures ----


def draw_grid(path: Path) -> None:
    """Final accuracy of every arm at every point: each run a dot, and the interval of the mean."""
    groups = by_point_and_arm()
    points = [point for point in POINTS if any((point, arm) in groups for arm in ARMS)]
    figure, axes = plt.subplots(
        1, len(points), figsize=(3 * len(points), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axis, point in zip(axes[0], points, strict=True):
        for x, arm in enumerate(ARMS):
            values = [final(row) for row in groups.get((point, arm), [])]
            if values:
                low, high = interval(values)
                axis.plot([x] * len(values), values, "o", ms=3, color=COLOURS[arm], alpha=0.5)
                axis.plot([x, x], [low, high], color=COLOURS[arm], lw=4, alpha=0.6)
        axis.set_xticks(range(len(ARMS)), ARMS, rotation=90)
        axis.set_title(point.replace("_", ", "))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("final accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_tune(path: Path) -> None:
    """Final accuracy against the learning rate, for each arm and clip range."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, (clip, bounds) in zip(axes, CLIPS.items(), strict=True):
        for arm in ARMS:
            finals: dict[float, list[float]] = {}
            for row in finished("tune").values():
                s = row["settings"]
                if s["arm"] == arm and s["overrides"]["epsilon"] == bounds["epsilon"]:
                    finals.setdefault(s["learning_rate"], []).append(final(row))
            means = [(rate, statistics.fmean(values)) for rate, values in sorted(finals.items())]
            axis.plot(*zip(*means, strict=True), "o-", color=COLOURS[arm], label=arm)
        low, high = bounds.values()
        axis.set(title=f"clip range {clip}: {1 - low:g} to {1 + high:g}", xlabel="learning rate", xscale="log")
        axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("final accuracy")
    axes[1].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_disease(path: Path) -> None:
    """Runs of Bypass over time, as the mismatch dial turns."""
    panels = (
        ("accuracy", None), ("alp/kl/k3", "k3 (policy from behaviour), peak"), ("grad_norm", "gradient norm, peak"),
        ("alp/sequence/ess", "effective sample size, sequences"),
    )  # fmt: skip
    chosen = [
        (label, row) for label in ("exact-u8", "int5-u8", "int4-u8", "int3-u8", "exact-u32", "exact-u8-lag4")
        for name, row in finished("disease").items()
        if name == f"{label}{'' if 'lag' in label else '-lag0'}-bypass_token-s0"
    ]  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for (label, row), colour in zip(chosen, plt.get_cmap("viridis")([i / 5 for i in range(6)]), strict=False):
        for axis, (name, title) in zip(axes, panels, strict=True):
            if name == "accuracy":
                axis.plot(*zip(*row["accuracy"], strict=True), color=colour, label=label)
                axis.set_title("accuracy on held-out problems")
                continue
            values = curve(row, name, largest=name != "alp/sequence/ess")
            axis.plot([row["window"] * (i + 1) for i in range(len(values))], values, color=colour)
            axis.set_title(title)
            if name != "alp/sequence/ess":
                axis.set_yscale("log")
    for axis in axes:
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_curves(path: Path, point: str) -> None:
    """Accuracy over updates at one point, mean over seeds, and the band of all of them."""
    groups = by_point_and_arm()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in ARMS:
        if rows := groups.get((point, arm)):
            steps = [step for step, _ in rows[0]["accuracy"]]
            values = list(zip(*([v for _, v in row["accuracy"]] for row in rows), strict=True))
            axis.plot(steps, [statistics.fmean(v) for v in values], color=COLOURS[arm], label=arm)
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=COLOURS[arm], alpha=0.08, lw=0
            )
    axis.set(xlabel="update", ylabel="accuracy on held-out problems", title=point.replace("_", ", "))
    axis.legend(fontsize="small", ncols=2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def with_tables(text: str) -> str:
    """The page with each of its tables, between `<!-- table: NAME -->` and `<!-- end -->`, made anew."""

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    if parser.parse_args().check:
        sys.exit(0 if with_tables(text) == text else f"{PAGE.name} has other tables than the results; run figures.py")
    PAGE.write_text(with_tables(text))
    if finished("tune"):
        draw_tune(ASSETS / "lab_tune.png")
    if finished("disease"):
        draw_disease(ASSETS / "lab_disease.png")
    points = {point for point, _ in by_point_and_arm()}
    for point in points:
        draw_curves(ASSETS / f"lab_{point}.png", point)
    if len(points) > 1:
        draw_grid(ASSETS / "lab_grid.png")


if __name__ == "__main__":
    main()
