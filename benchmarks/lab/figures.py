# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""
Tables and figures of `docs/results.md`, from the results in `benchmarks/results/lab/`:

    python benchmarks/lab/figures.py            # writes docs/assets/lab_*.png and the tables inside docs/results.md
    python benchmarks/lab/figures.py --check    # says whether the tables are those of the results
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from study import (
    ARMS,
    CLIPS,
    DEFAULT_SIGMA,
    PAIRS,
    POINTS,
    RATES,
    RESULTS,
    ROOT,
    SEEDS,
    STRONG_SIGMA,
    WIDE,
    ablation,
    choices,
    final,
    finished,
    fitted,
)

from trl_alp.report.drawing import COLOURS as PALETTE


matplotlib.use("Agg")
PAGE = ROOT / "docs" / "results.md"
ASSETS = ROOT / "docs" / "assets"
# The report's colours; there are more arms, of which the later ones are dashed and square.
COLOURS = dict(zip(ARMS, itertools.cycle(PALETTE)))
DASHES = {arm: "-" if index < len(PALETTE) else "--" for index, arm in enumerate(ARMS)}
MARKERS = {arm: "o" if index < len(PALETTE) else "s" for index, arm in enumerate(ARMS)}
WITHOUT_NOISE = dict(PAIRS) | {"alp_tis": "tis"}


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


def without_noise(row: dict, name: str) -> float:
    """Mean of a metric of the policy without noise, over the same updates for every arm."""
    off = "alp/noise_off/" if row["settings"]["arm"] in WITHOUT_NOISE else "alp/"
    # The instruments count the entropy that the loss sees as TRL does, without a prefix.
    return row["monitored"].get("entropy" if off + name == "alp/entropy" else off + name, math.nan)


def off(name: str) -> Callable[[dict], float]:
    return lambda row: without_noise(row, name)


def width_off(level: str) -> Callable[[dict], float]:
    """P98 - P2 of the log ratio of the policy without noise, nats."""
    p98, p02 = f"{level}/log_ratio/p98", f"{level}/log_ratio/p02"
    return lambda row: without_noise(row, p98) - without_noise(row, p02)


# Student's t at 97.5 %, by number of runs. A bootstrap of so few is too narrow: of five normal values its 95 %
# interval holds the mean 84 times in 100 (`tests/test_lab.py`).
T = {5: 2.776, 10: 2.262}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean over runs, of which there have to be as many as `T` knows."""
    values = list(values)
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


# ---- Tables ----


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)])


def number(value: float) -> str:
    return "" if value != value else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def averaged(rows: list[dict], measure: Callable[[dict], float]) -> str:
    return number(statistics.fmean(measure(row) for row in rows))


def with_interval(rows: list[dict]) -> str:
    """Mean and interval of the final accuracy; of too few runs for an interval, the values."""
    values = [final(row) for row in rows]
    if len(values) not in T:
        return ", ".join(f"{value:.3f}" for value in values)
    low, high = interval(values)
    return f"{statistics.fmean(values):.3f} [{low:.3f}, {high:.3f}]"


def gain(differences: list[float]) -> str:
    if len(differences) not in T:
        return ", ".join(f"{difference:+.3f}" for difference in differences)
    low, high = interval(differences)
    return f"{statistics.fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}]"


def disease_table() -> str:
    means = ("alp/kl/k3", "alp/kl/k1", "entropy", "alp/token/ess", "alp/sequence/ess")
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
            + [averaged(rows, mean_of(name)) for name in means]
            + [averaged(rows, width_of(f"alp/{level}")) for level in ("token", "sequence")]
        )
    head = ["behaviour", "updates", "lag", "arm", "final, each seed", "best", "peak grad norm", "peak k3", "mean k3"]
    head += ["mean k1", "entropy", "token ESS", "sequence ESS", "token P2-P98", "sequence P2-P98"]
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
                line = [point, arm, f"{choices()[arm][1]:g}", with_interval(rows), averaged(rows, best)]
                line += [f"{sum(map(collapsed, rows))} of {len(rows)}", averaged(rows, peak_of("grad_norm"))]
                line.append("" if arm == "alp_tis" else averaged(rows, peak_of("alp/kl/k3")))
                lines.append([*line, averaged(rows, off("entropy"))])
    head = ["point", "arm", "rate", "final accuracy [95 %]", "best", "collapsed", "peak grad norm"]
    return markdown([*head, "peak k3, noise on", "entropy"], lines)


def clip_of(settings: dict) -> str:
    return "wide" if settings["overrides"]["epsilon"] == WIDE["epsilon"] else "narrow"


def by_settings() -> dict[tuple, dict[int, dict]]:
    """The runs of the stages that compare arms: by point, arm, clip range, learning rate and sigma, and by seed."""
    groups: dict[tuple, dict[int, dict]] = {}
    for stage in ("grid", "matched", "strong"):
        for name, row in finished(stage).items():
            settings = row["settings"]
            noisy = settings["arm"] in WITHOUT_NOISE
            sigma = settings["overrides"].get("alp_sigma_init", DEFAULT_SIGMA) if noisy else 0
            key = (name.split("-")[0], settings["arm"], clip_of(settings), settings["learning_rate"], sigma)
            groups.setdefault(key, {})[settings["seed"]] = row
    return groups


def log_factors(noisy: dict[int, dict], plain: dict[int, dict], measure: Callable[[dict], float]) -> list[float]:
    return [math.log(measure(noisy[seed]) / measure(plain[seed])) for seed in noisy]


def factor(noisy: dict[int, dict], plain: dict[int, dict], measure: Callable[[dict], float]) -> str:
    """A measure of the noisy runs over that of the runs of the same seeds without noise: geometric mean, interval."""
    logs = log_factors(noisy, plain, measure)
    if len(logs) not in T:
        return ", ".join(f"{math.exp(each):.2f}" for each in logs)
    low, high = interval(logs)
    return f"{math.exp(statistics.fmean(logs)):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


def pairs() -> Iterable[tuple[tuple, dict[int, dict], dict[int, dict]]]:
    """The runs with noise, and those without it that are equal in all else (point, clip range, rate), by seed."""
    groups = by_settings()
    order = {name: place for place, name in enumerate((*POINTS, *WITHOUT_NOISE))}
    for key in sorted(groups, key=lambda key: (order[key[0]], order.get(key[1], 0), *key[2:])):
        point, arm, clip, rate, _ = key
        noisy, plain = groups[key], groups.get((point, WITHOUT_NOISE.get(arm), clip, rate, 0), {})
        if seeds := sorted(noisy.keys() & plain.keys()):
            yield key, {seed: noisy[seed] for seed in seeds}, {seed: plain[seed] for seed in seeds}


def level_of(arm: str) -> str:
    return "sequence" if arm == "alp_sequence" else "token"


def paired_table() -> str:
    """What the noise changes, all else equal, seed by seed."""
    lines = []
    for (point, arm, _, rate, sigma), noisy, plain in pairs():
        seeds, level = list(noisy), level_of(arm)
        measures = (width_of(f"alp/{level}"), width_off(level), off("kl/k3"), off("fresh/kl/k3"), peak_of("alp/kl/k3"))
        # The ratio of `alp_tis` has another denominator than that of `tis`.
        ratios = ["" if arm == "alp_tis" else factor(noisy, plain, measure) for measure in measures]
        line = [point, arm, f"{rate:g}", f"{sigma:g}", str(len(seeds))]
        line.append(f"{statistics.fmean(final(noisy[seed]) for seed in seeds):.3f}")
        line.append(gain([final(noisy[seed]) - final(plain[seed]) for seed in seeds]))
        lines.append([*line, *ratios, factor(noisy, plain, peak_of("grad_norm"))])
    head = ["point", "arm", "rate", "sigma", "seeds", "accuracy", "minus no noise", "P2-P98, noise on"]
    head += ["P2-P98, noise off", "k3, noise off", "k3 of fresh rollouts, noise off", "peak k3, noise on"]
    return markdown([*head, "peak grad norm"], lines)


def matched_table() -> str:
    """Beyond the edge of the mismatch, every arm at both learning rates."""
    groups, lines = by_settings(), []
    for arm, rate in itertools.product(ARMS, RATES[:2]):
        sigma = DEFAULT_SIGMA if arm in WITHOUT_NOISE else 0
        by_seed = groups.get(("mismatch_beyond", arm, choices()[arm][0], rate, sigma), {})
        if rows := [row for seed, row in by_seed.items() if seed in SEEDS]:
            measures = [width_off("token"), width_off("sequence"), off("kl/k3")]
            ratios = [""] * 3 if arm == "alp_tis" else [averaged(rows, measure) for measure in measures]
            line = [arm, choices()[arm][0], f"{rate:g}", with_interval(rows)]
            line += [f"{sum(map(collapsed, rows))} of {len(rows)}", averaged(rows, peak_of("grad_norm"))]
            lines.append([*line, averaged(rows, off("entropy")), *ratios])
    head = ["arm", "clip", "rate", "final accuracy [95 %]", "collapsed", "peak grad norm", "entropy"]
    return markdown([*head, "token P2-P98", "sequence P2-P98", "k3"], lines)


def ablation_groups() -> dict[str, dict[int, dict]]:
    """The runs of the stage `ablation` by change and seed, after what they are changes of."""
    rate, at = RATES[0], by_settings()
    groups = {
        label: at.get(("mismatch_beyond", arm, "wide", rate, sigma), {})
        for label, arm, sigma in (
            ("no noise", "bypass_token", 0), (f"sigma-{DEFAULT_SIGMA:g}, as is", "alp_token", DEFAULT_SIGMA),
            (f"sigma-{STRONG_SIGMA:g}", "alp_token", STRONG_SIGMA),
            ("sequence", "alp_sequence", DEFAULT_SIGMA), ("sequence, no noise", "bypass_sequence", 0),
        )
    }  # fmt: skip
    done = finished("ablation")
    for name, settings in ablation():  # in this order
        if name in done:
            groups.setdefault(name.rpartition("-")[0], {})[settings["seed"]] = done[name]
    return groups


def ablation_table() -> str:
    groups = ablation_groups()
    plain = next(iter(groups.values()))
    lines = []
    for label, by_seed in groups.items():
        rows = list(by_seed.values())
        if not rows:
            continue
        sigma = [name for name in rows[0]["curves"] if name.startswith("alp/sigma")]
        ends = ", ".join(number(statistics.fmean(curve(row, name)[-1] for row in rows)) for name in sigma)
        gains = [final(row) - final(plain[seed]) for seed, row in by_seed.items() if by_seed is not plain]
        measured = [row for row in rows if curve(row, "alp/noise/kl/k3")]  # the seeds that were run last
        noise = averaged(measured, mean_of("alp/noise/kl/k3")) if measured else ""
        line = [
            label,
            with_interval(rows),
            gain(gains) if gains else "",
            f"{sum(map(collapsed, rows))} of {len(rows)}",
        ]
        line += [noise, averaged(rows, width_of("alp/token")), averaged(rows, peak_of("alp/kl/k3")), ends]
        lines.append(line)
    head = ["change", "final accuracy [95 %]", "minus bypass_token", "collapsed", "k3 of the noise", "token P2-P98"]
    return markdown([*head, "peak k3, noise on", "sigma at the end, by layer"], lines)


def survival_table() -> str:
    rows = json.loads((RESULTS / "survival.json").read_text())
    lines = [
        [row["scale"], f"{row['sigma']:g}"]
        + [number(row[precision][what]) for precision in ("fp32", "bf16") for what in ("survived", "log_ratio_std")]
        for row in rows["noise"]
    ]
    for name, std in rows["mismatch_log_ratio_std"].items():
        lines.append([f"none: {name} behaviour", "", "", number(std), "", ""])
    head = ["noise", "sigma", "fp32: survives", "fp32: std of log ratio", "bf16: survives", "bf16: std of log ratio"]
    return markdown(head, lines)


def engine_table() -> str:
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in finished("engine").values():
        groups.setdefault((row["settings"]["numerics"], row["settings"]["arm"]), []).append(row)
    lines = []
    order = ["vllm-fp32", "vllm-bf16", "vllm-bf16-fp8kv", *ARMS]
    for (numerics, arm), rows in sorted(groups.items(), key=lambda group: [order.index(name) for name in group[0]]):
        rate = rows[0]["settings"]["learning_rate"]
        lines.append(
            [numerics, arm, f"{rate:g}", ", ".join(f"{final(row):.3f}" for row in rows), averaged(rows, best)]
            + [averaged(rows, peak_of(name)) for name in ("grad_norm", "alp/kl/k3")]
            + [averaged(rows, mean_of(name)) for name in ("alp/kl/k3", "alp/token/ess", "alp/sequence/ess")]
            + [averaged(rows, width_of("alp/token"))]
        )
    head = ["behaviour", "arm", "rate", "final, each seed", "best", "peak grad norm", "peak k3", "mean k3"]
    return markdown([*head, "token ESS", "sequence ESS", "token P2-P98"], lines)


# ---- Fitted noise, on two yardsticks ----


def served(row: dict) -> float:
    """Final accuracy of the policy in the numerics that sampled its rollouts: the mean of its last three."""
    return statistics.fmean(value for _, value in row["served"][-3:])


YARDSTICKS = {"as trained": final, "as served": served}


def by_noise() -> dict[tuple[str, str], dict[str, dict[int, dict]]]:
    """The runs of the stage `fitted`: by point and arm, by noise, and by seed."""
    groups: dict[tuple[str, str], dict[str, dict[int, dict]]] = {}
    done = finished("fitted")
    for name, settings in fitted():  # in this order
        if name in done:
            point, arm, noise, _ = name.split("-")
            groups.setdefault((point, arm), {}).setdefault(noise, {})[settings["seed"]] = done[name]
    return groups


def against(noisy: dict[int, dict], plain: dict[int, dict], measure: Callable[[dict], float]) -> str:
    seeds = sorted(noisy.keys() & plain.keys())
    return gain([measure(noisy[seed]) - measure(plain[seed]) for seed in seeds])


def fitted_table() -> str:
    """Noise of the mismatch's size against none and against what ships, seed by seed, on both yardsticks."""
    lines = []
    for (point, arm), by in by_noise().items():
        for noise, runs in by.items():
            rows = list(runs.values())
            layers = [name for name in rows[0]["curves"] if name.startswith("alp/sigma/layer")]  # without noise none
            sigmas = [curve(row, layer)[-1] for row in rows for layer in layers] if noise != "none" else []
            means = [f"{statistics.fmean(map(measure, rows)):.3f}" for measure in YARDSTICKS.values()]
            gains = [
                "" if noise == other else against(runs, by.get(other, {}), measure)
                for other, measure in (("none", final), ("none", served), ("0.01", served))
            ]
            if noise == "none":
                gains[2] = ""
            sigma = f"{statistics.geometric_mean(sigmas):.2g}" if sigmas else ""
            lines.append([f"{point}, {level_of(arm)}", noise, sigma, *means, *gains])
    head = [
        "point, level",
        "noise",
        "sigma at the end",
        *YARDSTICKS,
        "as trained, minus none",
        "as served, minus none",
    ]
    return markdown([*head, "as served, minus 0.01"], lines)


def formats_table() -> str:
    """The final policies in every number format, less what the start has in it."""
    start = json.loads((RESULTS / "start.json").read_text())
    lines = [["start", "", *(f"{value:.3f}" for value in start.values())]]
    for (point, arm), by in by_noise().items():
        for noise, runs in by.items():
            gains = [
                statistics.fmean(row["formats"][name] for row in runs.values()) - value
                for name, value in start.items()
            ]
            lines.append([f"{point}, {level_of(arm)}", noise, *(f"{value:+.3f}" for value in gains)])
    return markdown(["point, level", "noise", *start], lines)


def draw_fitted(path: Path) -> None:
    """What the noise changes on both yardsticks: the mean over seeds, and its interval."""
    groups = by_noise()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    sizes = {"0.01": (PALETTE[0], "o", -0.14), "fitted": (PALETTE[1], "s", 0.14)}
    for axis, (yardstick, measure) in zip(axes, YARDSTICKS.items(), strict=True):
        for y, by in enumerate(groups.values()):
            for noise, (colour, marker, shift) in sizes.items():
                seeds = sorted(by.get(noise, {}).keys() & by.get("none", {}).keys())
                gains = [measure(by[noise][seed]) - measure(by["none"][seed]) for seed in seeds]
                if len(gains) in T:
                    axis.plot(interval(gains), [y + shift] * 2, color=colour, lw=2, alpha=0.6)
                if gains:
                    axis.plot(statistics.fmean(gains), y + shift, marker, ms=6, color=colour)
        axis.axvline(0, color="grey", lw=0.8)
        axis.set(title=f"accuracy {yardstick}", xlabel="minus the same runs without noise")
        axis.grid(alpha=0.3)
    for noise, (colour, marker, _) in sizes.items():
        axes[1].plot([], [], marker, color=colour, label=f"sigma {noise}" if noise != "fitted" else "sigma fitted")
    axes[1].legend(fontsize="small")
    axes[0].set_yticks(range(len(groups)), [f"{point}, {level_of(arm)}" for point, arm in groups])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


TABLES = {
    "disease": disease_table, "tune": tune_table, "grid": grid_table, "paired": paired_table,
    "matched": matched_table, "ablation": ablation_table, "survival": survival_table, "engine": engine_table,
    "fitted": fitted_table, "formats": formats_table,
}  # fmt: skip


# ---- Figures ----


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


def draw_curves(path: Path, point: str) -> None:
    """Accuracy over updates at one point, mean over seeds, and the band of all of them."""
    groups = by_point_and_arm()
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm in ARMS:
        if rows := groups.get((point, arm)):
            steps = [step for step, _ in rows[0]["accuracy"]]
            values = list(zip(*([v for _, v in row["accuracy"]] for row in rows), strict=True))
            axis.plot(steps, [statistics.fmean(v) for v in values], DASHES[arm], color=COLOURS[arm], label=arm)
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
        for dial in DIALS:
            draw_disease(ASSETS / f"lab_disease_{dial}.png", dial)
    if finished("ablation"):
        draw_ablation(ASSETS / "lab_ablation.png")
    points = {point for point, _ in by_point_and_arm()}
    for point in points - {"healthy"}:
        draw_curves(ASSETS / f"lab_{point}.png", point)
    if by_noise():
        draw_fitted(ASSETS / "lab_fitted.png")
    if any(pairs()):
        draw_noise(ASSETS / "lab_noise.png")
    if len(points) > 1:
        draw_grid(ASSETS / "lab_grid.png")


if __name__ == "__main__":
    main()
