# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The tables of `docs/results_tables.md`, which `figures.py` writes. At most eight columns each."""

import itertools
import json
import math
import statistics
from collections.abc import Callable

from readings import (
    WITHOUT_NOISE,
    YARDSTICKS,
    Runs,
    T,
    ablation_groups,
    at_three_bits,
    by_label,
    by_noise,
    by_point_and_arm,
    by_settings,
    collapsed,
    curve,
    differences,
    interval,
    level_of,
    log_factors,
    mean_of,
    off,
    pairs,
    peak_of,
    sampled,
    served,
    sigma_at_the_end,
    started,
    width_off,
)
from results import RESULTS, final, finished
from stages import ARMS, DEFAULT_SIGMA, POINTS, RATES, SEEDS, choices


NOT_YET = "*Not yet measured.*"


# ---- Cells ----


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)])


def number(value: float) -> str:
    return "" if value != value else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def averaged(rows: list[dict], measure: Callable[[dict], float]) -> str:
    return number(statistics.fmean(measure(row) for row in rows))


def mean_or_each(values: list[float], sign: str = "") -> str:
    """Mean and interval; of too few values for an interval, the values."""
    if len(values) not in T:
        return ", ".join(f"{value:{sign}.3f}" for value in values)
    low, high = interval(values)
    return f"{statistics.fmean(values):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def accuracies(rows: list[dict], measure: Callable[[dict], float] = final) -> str:
    return mean_or_each([measure(row) for row in rows])


def gain(noisy: Runs, plain: Runs, measure: Callable[[dict], float]) -> str:
    return mean_or_each(differences(noisy, plain, measure), sign="+")


def factor(noisy: Runs, plain: Runs, measure: Callable[[dict], float]) -> str:
    """A measure of the noisy runs over that of the runs of the same seeds without noise: geometric mean, interval."""
    logs = log_factors(noisy, plain, measure)
    if len(logs) not in T:
        return ", ".join(f"{math.exp(each):.2f}" for each in logs)
    low, high = interval(logs)
    return f"{math.exp(statistics.fmean(logs)):.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


# ---- Stages whose served policy was not kept: it is told by the rollouts ----


def disease() -> str:
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
            [f"{kind}, {updates}, {lag}", arm, accuracies(rows), accuracies(rows, sampled)]
            + [averaged(rows, peak_of("grad_norm")), averaged(rows, mean_of("alp/kl/k3"))]
            + [averaged(rows, mean_of(f"alp/{level}/ess")) for level in ("token", "sequence")]
        )
    head = ["behaviour, updates, lag", "arm", "as trained", "rollouts", "peak grad norm", "mean k3", "token ESS"]
    return markdown([*head, "sequence ESS"], lines)


def tune() -> str:
    rows = finished("tune").values()
    rates = sorted({row["settings"]["learning_rate"] for row in rows})
    clips = sorted({row["settings"]["overrides"]["epsilon"] for row in rows})
    lines = []
    for arm in ARMS:
        line = [arm]
        for clip, rate in itertools.product(clips, rates):
            here = [
                row for row in rows
                if (row["settings"]["arm"], row["settings"]["learning_rate"]) == (arm, rate)
                and row["settings"]["overrides"]["epsilon"] == clip
            ]  # fmt: skip
            line.append(f"{accuracies(here)} / {accuracies(here, sampled)}" if here else "")
        chosen = choices()[arm]
        lines.append([*line, f"{chosen[0]}, {chosen[1]:g}"])
    head = [f"{'narrow' if clip == 0.2 else 'wide'}, {rate:g}" for clip in clips for rate in rates]
    return markdown(["arm", *head, "chosen"], lines)


def grid() -> str:
    groups, lines = by_point_and_arm(), []
    for point, arm in itertools.product(POINTS, ARMS):
        if rows := groups.get((point, arm)):
            line = [point, arm, f"{choices()[arm][1]:g}", accuracies(rows), accuracies(rows, sampled)]
            line += [f"{sum(map(collapsed, rows))} of {len(rows)}", averaged(rows, peak_of("grad_norm"))]
            lines.append([*line, averaged(rows, off("entropy"))])
    head = ["point", "arm", "rate", "as trained [95 %]", "rollouts [95 %]", "collapsed", "peak grad norm", "entropy"]
    return markdown(head, lines)


def paired() -> str:
    """What the noise changes, all else equal, seed by seed."""
    lines = []
    for (point, arm, _, rate, sigma), noisy, plain in pairs():
        measures = (width_off(level_of(arm)), off("fresh/kl/k3"))
        # The ratio of `alp_tis` has another denominator than that of `tis`.
        ratios = ["" if arm == "alp_tis" else factor(noisy, plain, measure) for measure in measures]
        line = [f"{point}, {arm}", f"{rate:g}", f"{sigma:g}", str(len(noisy))]
        lines.append([*line, *(gain(noisy, plain, measure) for measure in (final, sampled)), *ratios])
    head = ["point, arm", "rate", "sigma", "seeds", "as trained, minus no noise", "rollouts, minus no noise"]
    return markdown([*head, "P2-P98, noise off", "k3 of fresh rollouts, noise off"], lines)


def matched() -> str:
    """Beyond the edge of the mismatch, every arm at both learning rates."""
    groups, lines = by_settings(), []
    for arm, rate in itertools.product(ARMS, RATES[:2]):
        sigma = DEFAULT_SIGMA if arm in WITHOUT_NOISE else 0
        by_seed = groups.get(("mismatch_beyond", arm, choices()[arm][0], rate, sigma), {})
        if rows := [row for seed, row in by_seed.items() if seed in SEEDS]:
            line = [arm, choices()[arm][0], f"{rate:g}", accuracies(rows), accuracies(rows, sampled)]
            line += [f"{sum(map(collapsed, rows))} of {len(rows)}", averaged(rows, peak_of("grad_norm"))]
            lines.append([*line, "" if arm == "alp_tis" else averaged(rows, off("kl/k3"))])
    head = ["arm", "clip", "rate", "as trained [95 %]", "rollouts [95 %]", "collapsed", "peak grad norm", "k3"]
    return markdown(head, lines)


def ablation() -> str:
    groups = ablation_groups()
    plain, lines = next(iter(groups.values())), []
    for label, by_seed in groups.items():
        rows = list(by_seed.values())
        if not rows:
            continue
        sigma = [name for name in rows[0]["curves"] if name.startswith("alp/sigma")]
        ends = ", ".join(number(statistics.fmean(curve(row, name)[-1] for row in rows)) for name in sigma)
        measured = [row for row in rows if curve(row, "alp/noise/kl/k3")]  # the seeds that were run last
        noise = averaged(measured, mean_of("alp/noise/kl/k3")) if measured else ""
        gains = ["" if by_seed is plain else gain(by_seed, plain, measure) for measure in (final, sampled)]
        line = [label, accuracies(rows), accuracies(rows, sampled), *gains]
        lines.append([*line, f"{sum(map(collapsed, rows))} of {len(rows)}", noise, ends])
    head = ["change", "as trained [95 %]", "rollouts [95 %]", "as trained, minus no noise", "rollouts, minus no noise"]
    return markdown([*head, "collapsed", "k3 of the noise", "sigma at the end, by layer"], lines)


def survival() -> str:
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


def engine() -> str:
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in finished("engine").values():
        groups.setdefault((row["settings"]["numerics"], row["settings"]["arm"]), []).append(row)
    lines = []
    order = ["vllm-fp32", "vllm-bf16", "vllm-bf16-fp8kv", *ARMS]
    for (numerics, arm), rows in sorted(groups.items(), key=lambda group: [order.index(name) for name in group[0]]):
        line = [
            numerics,
            arm,
            f"{rows[0]['settings']['learning_rate']:g}",
            accuracies(rows),
            accuracies(rows, sampled),
        ]
        measures = (peak_of("grad_norm"), mean_of("alp/kl/k3"), mean_of("alp/sequence/ess"))
        lines.append([*line, *(averaged(rows, measure) for measure in measures)])
    head = ["behaviour", "arm", "rate", "as trained", "rollouts", "peak grad norm", "mean k3", "sequence ESS"]
    return markdown(head, lines)


def gpu() -> str:
    lines = []
    for arm, runs in by_label("gpu").items():
        rows = [runs[seed] for seed in sorted(runs)]
        line = [
            arm,
            f"{rows[0]['settings']['learning_rate']:g}",
            f"{statistics.fmean(r['accuracy'][0][1] for r in rows):.3f}",
        ]
        measures = (peak_of("grad_norm"), mean_of("alp/kl/k3"), mean_of("alp/sequence/ess"))
        lines.append([*line, accuracies(rows), accuracies(rows, sampled), *(averaged(rows, m) for m in measures)])
    head = ["arm", "rate", "start", "as trained", "rollouts", "peak grad norm", "mean k3", "sequence ESS"]
    return markdown(head, lines)


# ---- Stages with the served policy, on the held-out problems ----


def noise() -> str:
    """Noise of the mismatch's size against none and against what ships, seed by seed, on both yardsticks."""
    lines = []
    for (point, arm), by in by_noise().items():
        for size, runs in by.items():
            rows = list(runs.values())
            gains = [
                "" if size in ("none", other) else gain(runs, by.get(other, {}), measure)
                for other, measure in (("none", final), ("none", served), ("0.01", served))
            ]
            sigma = averaged(rows, sigma_at_the_end)
            means = [f"{statistics.fmean(map(measure, rows)):.3f}" for measure in YARDSTICKS.values()]
            lines.append([f"{point}, {level_of(arm)}", size, sigma, *means, *gains])
    head = [
        "point, level",
        "noise",
        "sigma at the end",
        *YARDSTICKS,
        "as trained, minus none",
        "as served, minus none",
    ]
    return markdown([*head, "as served, minus 0.01"], lines)


def matrix(groups: dict[str, Runs], digits: int = 3) -> str:
    """Final policies in every number format, less what the start has in it."""
    if not groups:
        return NOT_YET
    start = started(digits)
    lines = [["start", *(f"{value:.3f}" for value in start.values())]]
    for label, runs in groups.items():
        gains = [
            statistics.fmean(row["formats"][name] for row in runs.values()) - value for name, value in start.items()
        ]
        lines.append([label, *(f"{value:+.3f}" for value in gains)])
    return markdown(["trained with", *start], lines)


def noise_formats() -> str:
    groups = by_noise()
    return matrix(
        {f"{point}, {level_of(arm)}, {size}": runs for (point, arm), by in groups.items() for size, runs in by.items()}
    )


def arms_formats() -> str:
    return matrix(at_three_bits())


def arms() -> str:
    """Every arm at 3 bits and one rate, on both yardsticks."""
    lines = [["start", "", *(f"{started()[name]:.3f}" for name in ("exact", "int3")), "", "", "", ""]]
    for label, runs in sorted(
        at_three_bits().items(), key=lambda item: -statistics.fmean(map(served, item[1].values()))
    ):
        rows = [runs[seed] for seed in sorted(runs)]
        line = [label, str(len(rows)), *(accuracies(rows, measure) for measure in YARDSTICKS.values())]
        measures = (sampled, sigma_at_the_end, peak_of("grad_norm"), mean_of("alp/kl/k3"))
        lines.append([*line, *(averaged(rows, measure) for measure in measures)])
    head = ["arm and clip range, or noise", "seeds", *(f"{name} [95 %]" for name in YARDSTICKS), "rollouts"]
    return markdown([*head, "sigma at the end", "peak grad norm", "mean k3"], lines)


def length() -> str:
    """Answers of about 110 tokens, 4 bits, and what fitted noise changes."""
    groups = by_label("length")
    plain = {"alp_sequence": "bypass_sequence", "alp_mask": "bypass_mask"}
    lines = []
    for label, runs in groups.items():
        rows = [runs[seed] for seed in sorted(runs)]
        other = groups.get(plain.get(label.partition("-")[0], ""), {})
        gains = [gain(runs, other, measure) if other else "" for measure in YARDSTICKS.values()]
        line = [label, str(len(rows)), *(accuracies(rows, measure) for measure in YARDSTICKS.values()), *gains]
        lines.append([*line, averaged(rows, sigma_at_the_end), averaged(rows, peak_of("grad_norm"))])
    if not lines:
        return NOT_YET
    head = ["arm", "seeds", *YARDSTICKS, "as trained, minus no noise", "as served, minus no noise"]
    return markdown([*head, "sigma at the end", "peak grad norm"], lines)


def length_formats() -> str:
    return matrix(by_label("length"), digits=12)


def sharpness(groups: dict[str, Runs]) -> str:
    """How far the same noise and rounding move the final policies: k3 in nats a token, standard error over seeds."""
    lines = []
    for label, runs in groups.items():
        rows = [row["flatness"] for row in runs.values() if "flatness" in row]
        if len(rows) < 2:
            continue
        cells = []
        for disturbance in rows[0]:
            values = [row[disturbance][0] for row in rows]
            cells.append(
                f"{number(statistics.fmean(values))} ± {number(statistics.stdev(values) / len(values) ** 0.5)}"
            )
        lines.append([label, str(len(rows)), *cells])
    if not lines:
        return NOT_YET
    head = ["trained with", "seeds", "noise 0.03", "noise 0.1", "noise 0.3", "rounded to int4", "rounded to int3"]
    return markdown(head, lines)


def flatness() -> str:
    return sharpness(at_three_bits())


def length_flatness() -> str:
    return sharpness(by_label("length"))


TABLES = (
    disease, tune, grid, paired, matched, ablation, survival, engine, gpu, noise, noise_formats, arms, arms_formats,
    length, length_formats, flatness, length_flatness,
)  # fmt: skip
