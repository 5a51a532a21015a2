# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
Figures of `docs/results.md`, tables and figures of `docs/results_tables.md`, from `benchmarks/results/lab/`:

    python benchmarks/lab/figures.py            # writes docs/assets/lab_*.png and the tables inside the second page
    python benchmarks/lab/figures.py --check    # says whether the tables are those of the results
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import tables
from appendix_figures import DIALS, draw_ablation, draw_disease, draw_grid, draw_noise, draw_tune
from readings import (
    YARDSTICKS,
    Runs,
    T,
    at_three_bits,
    by_label,
    by_noise,
    differences,
    interval,
    level_of,
    sampled,
    served,
    started,
)
from results import ROOT, final, finished

from trl_alp.report.drawing import COLOURS as PALETTE


matplotlib.use("Agg")
plt.rcParams["axes.grid"] = True
plt.rcParams["grid.alpha"] = 0.3
PAGE = ROOT / "docs" / "results_tables.md"
ASSETS = ROOT / "docs" / "assets"
WIDTH = 9  # inches; at 100 dots each a figure is as wide as the page shows it
# By what corrects for the mismatch: colour and marker, so that either tells.
KINDS = {
    "no correction": (PALETTE[0], "o"),
    "TIS, MIS": (PALETTE[1], "s"),
    "one ratio": (PALETTE[2], "^"),
    "one ratio, noise": (PALETTE[3], "D"),
    "rounded forward": (PALETTE[4], "P"),
}


def kind_of(label: str) -> str:
    if label.startswith(("alp", "bypass")):
        return "one ratio, noise" if label.startswith("alp") else "one ratio"
    if label == "rounded_forward":
        return "rounded forward"
    return "TIS, MIS" if re.match(r"tis|mis|gspo_mis|centred_tis", label) else "no correction"


def spread(values: list[float]) -> tuple[float, float]:
    """The interval of the mean, or of fewer runs than that needs the least and the largest."""
    return interval(values) if len(values) in T else (min(values), max(values))


def draw_dial(path: Path) -> None:
    """Final accuracy of uncorrected GRPO and Bypass as the engine loses bits, on both yardsticks."""
    bits = ("exact", "int8", "int6", "int5", "int4", "int3")
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True, layout="constrained")
    for axis, (title, measure) in zip(
        axes, {"as trained": final, "as served (rollouts)": sampled}.items(), strict=True
    ):
        for arm, style, (colour, marker) in (
            ("grpo", "-", KINDS["no correction"]), ("bypass_token", "--", KINDS["one ratio"]),
        ):  # fmt: skip
            runs = by_label("disease")
            means = [statistics.fmean(map(measure, runs[f"{name}-u8-lag0-{arm}"].values())) for name in bits]
            axis.plot(bits, means, style, marker=marker, color=colour, label=arm)
        axis.axhline(started()["exact"], color="grey", lw=0.8, ls=":")
        axis.set(title=title, xlabel="number format of the engine")
    axes[0].set_ylabel("final accuracy")
    axes[0].legend()
    figure.suptitle("At 3 bits the policy that trains falls back to its start; down to 4 bits little is lost")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_headline(path: Path, groups: dict[str, Runs], title: str) -> None:
    """Accuracy over updates from a 3-bit engine: mean over seeds and its interval, on both yardsticks."""
    arms = {
        "grpo-narrow": "GRPO", "mis-narrow": "MIS, TRL's default correction",
        "bypass_token-wide": "one ratio, no noise (Bypass)", "alp_token-fitted": "ALP, fitted noise",
    }  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for axis, (yardstick, name) in zip(
        axes, {"accuracy": "as trained", "served": "as a 3-bit engine serves it"}.items(), strict=True
    ):
        for label, words in arms.items():
            if label not in groups:
                continue
            runs, (colour, marker) = groups[label].values(), KINDS[kind_of(label)]
            steps = [step for step, _ in next(iter(runs))[yardstick]]
            values = list(zip(*([value for _, value in row[yardstick]] for row in runs), strict=True))
            axis.plot(steps, [statistics.fmean(v) for v in values], marker=marker, ms=5, color=colour, label=words)
            axis.fill_between(steps, *zip(*map(spread, values), strict=True), color=colour, alpha=0.12, lw=0)
        axis.set(xlabel="update", title=name, ylim=(0.2, 0.8))
    axes[0].set_ylabel("accuracy on held-out problems")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_front(path: Path, groups: dict[str, Runs], start: tuple[float, float], title: str) -> None:
    """As served against as trained: each arm a point with its interval, and where all of them started."""
    figure, axis = plt.subplots(figsize=(WIDTH, 5.6), layout="constrained")
    for label, runs in groups.items():
        trained, as_served = ([measure(row) for row in runs.values()] for measure in (final, served))
        x, y = statistics.fmean(trained), statistics.fmean(as_served)
        colour, marker = KINDS[kind_of(label)]
        axis.plot(spread(trained), [y, y], color=colour, lw=1, alpha=0.5)
        axis.plot([x, x], spread(as_served), color=colour, lw=1, alpha=0.5)
        hollow = label.endswith("narrow")
        axis.plot(x, y, marker, ms=8, color=colour, mfc="white" if hollow else colour)
        left = "token" in label or "narrow" in label  # so that fewer names meet
        shift, side = ((-7, 5), "right") if left else ((7, -9), "left")
        axis.annotate(label, (x, y), shift, textcoords="offset points", fontsize=8, ha=side)
    axis.plot(*start, "*", ms=13, color="black")
    axis.annotate("start", start, (8, -4), textcoords="offset points", fontsize=9)
    for kind, (colour, marker) in KINDS.items():
        if kind in map(kind_of, groups):
            axis.plot([], [], marker, color=colour, label=kind)
    axis.plot([], [], "o", color="grey", mfc="white", label="hollow: narrow range")
    axis.set(xlabel="final accuracy as trained (fp32)", ylabel="final accuracy as served", title=title)
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_gains(path: Path, pairs: dict[str, tuple[Runs, Runs]], title: str) -> None:
    """What noise changes on each yardstick: every seed a dot, the mean, and its interval."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 1.5 + 0.36 * len(pairs)), sharey=True, layout="constrained")
    for axis, (yardstick, measure) in zip(axes, YARDSTICKS.items(), strict=True):
        for y, (noisy, plain) in enumerate(pairs.values()):
            values = differences(noisy, plain, measure)
            axis.plot(values, [y] * len(values), "o", ms=3, color="grey", alpha=0.6)
            axis.plot(spread(values), [y, y], color=PALETTE[1], lw=2)
            axis.plot(statistics.fmean(values), y, "D", ms=6, color=PALETTE[1])
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"accuracy {yardstick}", xlabel="minus the same without noise")
    axes[0].set_yticks(range(len(pairs)), pairs)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


WORDS = {"healthy": "exact", "mismatch_edge": "4 bits", "mismatch_beyond": "3 bits", "stale_beyond": "stale"}


def noise_pairs() -> dict[str, tuple[Runs, Runs]]:
    """Fitted and strong noise beside none, at every point where both were measured."""
    pairs = {}
    for (point, arm), by in by_noise().items():
        if {"none", "fitted"} <= by.keys():
            pairs[f"{WORDS[point]}, {level_of(arm)}, fitted"] = by["fitted"], by["none"]
    groups = at_three_bits()
    for arm in ("token", "sequence"):
        if {f"alp_{arm}-0.1", f"bypass_{arm}-wide"} <= groups.keys():
            pairs[f"3 bits, {arm}, 0.1"] = groups[f"alp_{arm}-0.1"], groups[f"bypass_{arm}-wide"]
    if {"alp_mask", "bypass_mask"} <= groups.keys():
        pairs["3 bits, mask, fitted"] = groups["alp_mask"], groups["bypass_mask"]
    longer = by_label("length")
    for noisy, plain in (("alp_sequence-fitted", "bypass_sequence"), ("alp_mask-fitted", "bypass_mask")):
        if {noisy, plain} <= longer.keys():
            pairs[f"12 digits, {'mask' if 'mask' in noisy else 'sequence'}, fitted"] = longer[noisy], longer[plain]
    return pairs


def draw_length(path: Path, title: str) -> None:
    """Accuracy over updates at 12 digits, on both yardsticks: the mean over seeds, and each seed."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True, layout="constrained")
    for axis, yardstick in zip(axes, ("accuracy", "served"), strict=True):
        for label, runs in by_label("length").items():
            colour, marker = KINDS[kind_of(label)]
            steps = [step for step, _ in next(iter(runs.values()))[yardstick]]
            values = list(zip(*([value for _, value in row[yardstick]] for row in runs.values()), strict=True))
            style = "--" if "mask" in label or "0.1" in label else "-"
            axis.plot(
                steps, [statistics.fmean(v) for v in values], style, marker=marker, ms=5, color=colour, label=label
            )
            axis.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
        axis.set(xlabel="update", title="as trained" if yardstick == "accuracy" else "as served, 4 bits")
    axes[0].set_ylabel("accuracy on held-out problems")
    axes[1].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_flatness(path: Path, groups: dict[str, Runs], title: str) -> None:
    """How far noise of 0.1, and rounding to 3 bits, move the final policies."""
    groups = {label: runs for label, runs in groups.items() if all("flatness" in row for row in runs.values())}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 1.4 + 0.24 * len(groups)), sharey=True, layout="constrained")
    order = sorted(groups, key=lambda label: statistics.fmean(r["flatness"]["0.1"][0] for r in groups[label].values()))
    for axis, (name, heading) in zip(axes, {"0.1": "noise of 0.1", "int3": "rounded to 3 bits"}.items(), strict=True):
        for y, label in enumerate(order):
            values = [row["flatness"][name][0] for row in groups[label].values()]
            colour, marker = KINDS[kind_of(label)]
            axis.plot(spread(values), [y, y], color=colour, lw=2, alpha=0.6)
            axis.plot(statistics.fmean(values), y, marker, color=colour, ms=6)
        axis.set(title=heading, xlabel="k3, nats a token", xscale="log")
    axes[0].set_yticks(range(len(order)), order)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def with_tables(text: str) -> str:
    """The page with each of its tables, between `<!-- table: NAME -->` and `<!-- end -->`, made anew."""
    made: dict[str, Callable[[], str]] = {table.__name__: table for table in tables.TABLES}

    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n\n{made[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def draw_all() -> None:
    """Every figure whose runs are there. The titles say what the committed runs show."""
    three_bits, start = at_three_bits(), started()
    draw_dial(ASSETS / "lab_dial.png")
    draw_headline(
        ASSETS / "lab_headline.png", three_bits,
        "From a 3-bit engine MIS trains best and uncorrected GRPO serves best;\n"
        "fitted noise improves what one ratio serves",
    )  # fmt: skip
    draw_front(
        ASSETS / "lab_front.png", three_bits, (start["exact"], start["int3"]),
        "A correction protects the policy that trains; without one the policy that serves gains most",
    )  # fmt: skip
    draw_gains(
        ASSETS / "lab_noise_gains.png", noise_pairs(),
        "Fitted noise improves what a 3-bit engine serves, and changes nothing elsewhere",
    )  # fmt: skip
    draw_flatness(
        ASSETS / "lab_flatness.png", three_bits, "Training with noise of the mismatch's size makes a policy less sharp"
    )
    if finished("length"):
        draw_length(ASSETS / "lab_length.png", "Four times the tokens bring the edge from 3 to 4 bits")
    draw_tune(ASSETS / "lab_tune.png")
    for dial in DIALS:
        draw_disease(ASSETS / f"lab_disease_{dial}.png", dial)
    draw_ablation(ASSETS / "lab_ablation.png")
    draw_noise(ASSETS / "lab_noise.png")
    draw_grid(ASSETS / "lab_grid.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    if parser.parse_args().check:
        sys.exit(0 if with_tables(text) == text else f"{PAGE.name} has other tables than the results; run figures.py")
    PAGE.write_text(with_tables(text))
    draw_all()


if __name__ == "__main__":
    main()
