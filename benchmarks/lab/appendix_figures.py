# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The figures of `docs/results_tables.md`, which `figures.py` writes."""

import itertools
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from readings import (
    T,
    ablation_groups,
    by_point_and_arm,
    curve,
    interval,
    level_of,
    log_factors,
    pairs,
    width_of,
    width_off,
)
from results import final, finished
from stages import ARMS, CLIPS, DEFAULT_SIGMA, POINTS, RATES, STRONG_SIGMA, choices

from trl_alp.report.drawing import COLOURS as PALETTE


# The report's colours; there are more arms, of which the later ones are dashed and square.
COLOURS = dict(zip(ARMS, itertools.cycle(PALETTE)))
DASHES = {arm: "-" if index < len(PALETTE) else "--" for index, arm in enumerate(ARMS)}
MARKERS = {arm: "o" if index < len(PALETTE) else "s" for index, arm in enumerate(ARMS)}


def draw_grid(path: Path) -> None:
    """Final accuracy of every arm at every point: each run a dot, and the interval of the mean."""
    groups = by_point_and_arm()
    points = [point for point in POINTS if any((point, arm) in groups for arm in ARMS)]
    figure, axes = plt.subplots(
        1, len(points), figsize=(2.8 * len(points), 3.6), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axis, point in zip(axes[0], points, strict=True):
        for y, arm in enumerate(ARMS):
            values = [final(row) for row in groups.get((point, arm), [])]
            if values:
                axis.plot(values, [y] * len(values), MARKERS[arm], ms=4, color=COLOURS[arm], alpha=0.5)
                if len(values) in T:
                    axis.plot(interval(values), [y, y], color=COLOURS[arm], lw=5, alpha=0.35)
        axis.set_yticks(range(len(ARMS)), [f"{arm}, {choices()[arm][1]:g}" for arm in ARMS])
        axis.set(title=point.replace("_", ", "), xlabel="final accuracy")
        axis.grid(alpha=0.3)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_noise(path: Path) -> None:
    """What the noise changes, all else equal: accuracy, and the band of the policy itself against what sampled."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 5.5), sharey=True, layout="constrained")
    sizes = {DEFAULT_SIGMA: PALETTE[0], STRONG_SIGMA: PALETTE[1]}
    rows = [pair for pair in pairs() if pair[0][4] in sizes and pair[0][1] != "alp_tis" and len(pair[1]) in T]
    places = list(dict.fromkeys((point, arm, rate) for (point, arm, _, rate, _), _, _ in rows))
    for (point, arm, _, rate, sigma), noisy, plain in rows:
        level = level_of(arm)
        y = places.index((point, arm, rate)) + (0.15 if sigma == STRONG_SIGMA else -0.15)
        gains = [final(noisy[seed]) - final(plain[seed]) for seed in noisy]
        bands = [log_factors(noisy, plain, measure(f"alp/{level}" if measure is width_of else level))
                 for measure in (width_off, width_of)]  # fmt: skip
        for axis, values, change in zip(axes, (gains, *bands), (float, math.exp, math.exp), strict=True):
            axis.plot([change(end) for end in interval(values)], [y, y], color=sizes[sigma], lw=2, alpha=0.6)
            axis.plot(change(statistics.fmean(values)), y, "o", ms=4, color=sizes[sigma])
    for axis, title, nothing in zip(
        axes,
        ("final accuracy, minus without noise", "P2-P98 of the policy itself, over the same\nwithout noise",
         "P2-P98 of the ratio in the loss, over the same\nwithout noise"),
        (0, 1, 1), strict=True,
    ):  # fmt: skip
        axis.axvline(nothing, color="grey", lw=0.8)
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    for sigma, colour in sizes.items():
        axes[0].plot([], [], "o-", color=colour, label=f"sigma {sigma:g}")
    axes[0].legend(fontsize="small", loc="lower left")
    axes[2].set_xscale("log")
    axes[2].set_xticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    axes[2].minorticks_off()
    axes[0].set_yticks(range(len(places)), [f"{point}, {arm}, {rate:g}" for point, arm, rate in places])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
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
            axis.plot(*zip(*means, strict=True), DASHES[arm], marker=MARKERS[arm], color=COLOURS[arm], label=arm)
        low, high = bounds.values()
        axis.set(title=f"clip range {clip}: {1 - low:g} to {1 + high:g}", xlabel="learning rate", xscale="log")
        axis.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("final accuracy")
    axes[1].legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# What a figure of the disease shows over time: name, title, and of a window the largest instead of the mean.
PANELS = (
    ("accuracy", "accuracy on held-out problems", False), ("grad_norm", "gradient norm, peak", True),
    ("alp/kl/k1", "k1 (policy from behaviour)", False), ("alp/kl/k3", "k3, peak", True), ("entropy", "entropy", False),
    ("alp/token/log_ratio", "P2-P98, tokens", False), ("alp/sequence/log_ratio", "P2-P98, sequences", False),
    ("alp/sequence/ess", "effective sample size, sequences", False),
)  # fmt: skip
LOGARITHMIC = ("grad_norm", "alp/kl/k3", "alp/token/log_ratio", "alp/sequence/log_ratio")
DIALS = {
    "mismatch": ("exact-u8-lag0", "int5-u8-lag0", "int4-u8-lag0", "gauss-0.3-u8-lag0", "int3-u8-lag0"),
    "stale": ("exact-u8-lag0", "exact-u32-lag0", "exact-u8-lag1", "exact-u8-lag4"),
}


def over_time(row: dict, name: str, largest: bool) -> tuple[list[float], list[float]]:
    """Updates, and the value at each."""
    if name == "accuracy":
        steps, values = zip(*row["accuracy"], strict=True)
        return list(steps), list(values)
    if name.endswith("/log_ratio"):
        pairs = zip(curve(row, f"{name}/p98"), curve(row, f"{name}/p02"), strict=True)
        values = [high - low for high, low in pairs]
    else:
        values = curve(row, name, largest)
    return [row["window"] * (i + 1) for i in range(len(values))], values


def draw_disease(path: Path, dial: str) -> None:
    """Uncorrected and Bypass runs over time as a dial turns, mean over seeds."""
    done = finished("disease")
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for (label, colour), (arm, style) in itertools.product(
        zip(DIALS[dial], PALETTE, strict=False), (("grpo", "-"), ("bypass_token", "--"))
    ):
        rows = [row for name, row in done.items() if name.rpartition("-")[0] == f"{label}-{arm}"]
        for axis, (name, title, largest) in zip(axes.flat, PANELS, strict=True):
            curves = [over_time(row, name, largest) for row in rows]
            if not curves:
                continue
            values = [statistics.fmean(v) for v in zip(*(v for _, v in curves), strict=True)]
            axis.plot(curves[0][0], values, style, color=colour, lw=1.2, label=f"{label}, {arm}")
            axis.set_title(title)
            axis.set_yscale("log" if name in LOGARITHMIC else "linear")
    for axis in axes.flat:
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_ablation(path: Path) -> None:
    """Final accuracy of every change: each run a dot, the mean a line; and where sigma goes, layer by layer."""
    groups = {label: by_seed for label, by_seed in ablation_groups().items() if by_seed}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for y, by_seed in enumerate(groups.values()):
        values = [final(row) for row in by_seed.values()]
        left.plot(values, [y] * len(values), "o", ms=4, color=PALETTE[0], alpha=0.6)
        left.plot([statistics.fmean(values)] * 2, [y - 0.3, y + 0.3], color=PALETTE[1])
    left.axvline(statistics.fmean(map(final, next(iter(groups.values())).values())), color="grey", lw=0.8)
    left.set_yticks(range(len(groups)), groups)
    left.invert_yaxis()
    left.set(xlabel="final accuracy", title="one change at a time")
    left.grid(alpha=0.3)
    moving = {
        label: by_seed for label, by_seed in groups.items() if label.startswith(("sigma-", "learned", "absolute"))
    }
    for index, (label, by_seed) in enumerate(moving.items()):
        colour, marker = PALETTE[index % len(PALETTE)], None if index < len(PALETTE) else "s"
        first = next(iter(by_seed.values()))
        start = first["settings"]["overrides"].get("alp_sigma_init", DEFAULT_SIGMA)
        layers = [name for name in first["curves"] if name.startswith("alp/sigma")]
        for layer, style in zip(layers, ("-", "--", "-.", ":"), strict=False):
            over_seeds = zip(*(curve(row, layer) for row in by_seed.values()), strict=True)
            values = [statistics.fmean(v) / start for v in over_seeds]
            steps = [first["window"] * (i + 1) for i in range(len(values))]
            label_once = label if layer == layers[0] else None
            right.plot(steps, values, style, marker=marker, ms=3, markevery=5, color=colour, lw=1, label=label_once)
    right.set(xlabel="update", title="sigma over its start; layers 0 to 3: — -- -. ..")
    right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
