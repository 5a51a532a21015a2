# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What tables and figures of the study are made of: numbers of one run, groups of runs, intervals over seeds."""

import json
import math
import statistics
from collections.abc import Callable, Iterable

from results import RESULTS, final, finished, start_file
from stages import DEFAULT_SIGMA, PAIRS, POINTS, RATES, STRONG_SIGMA, WIDE, ablation, fitted


WITHOUT_NOISE = dict(PAIRS) | {"alp_tis": "tis", "alp_mask": "bypass_mask"}
Runs = dict[int, dict]  # by seed


# ---- Numbers of one run ----


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


def served(row: dict) -> float:
    """Final accuracy of the policy in the numerics that sampled its rollouts: the mean of its last three."""
    return statistics.fmean(value for _, value in row["served"][-3:])


def sampled(row: dict) -> float:
    """The reward of the rollouts of the last 48 updates: accuracy as served, on the problems that are trained on."""
    windows = [mean for mean, _ in row["curves"]["reward"][-48 // row["window"] :] if mean is not None]
    return statistics.fmean(windows)


YARDSTICKS = {"as trained": final, "as served": served}


def sigma_at_the_end(row: dict) -> float:
    """Geometric mean over layers; NaN of a run without noise."""
    layers = [name for name in row["curves"] if name.startswith("alp/sigma/layer")]
    if row["settings"]["arm"] not in WITHOUT_NOISE or not layers:
        return math.nan
    return statistics.geometric_mean(curve(row, layer)[-1] for layer in layers)


def clip_of(settings: dict) -> str:
    return "wide" if settings["overrides"]["epsilon"] == WIDE["epsilon"] else "narrow"


def level_of(arm: str) -> str:
    return "sequence" if arm in ("alp_sequence", "alp_mask") else "token"


# ---- Intervals ----


# Student's t at 97.5 %, by number of runs. A bootstrap of so few is too narrow: of five normal values its 95 %
# interval holds the mean 84 times in 100 (`tests/test_lab.py`).
T = {5: 2.776, 10: 2.262}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean over runs, of which there have to be as many as `T` knows."""
    values = list(values)
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def differences(noisy: Runs, plain: Runs, measure: Callable[[dict], float]) -> list[float]:
    """Of a measure, over the seeds that both have."""
    return [measure(noisy[seed]) - measure(plain[seed]) for seed in sorted(noisy.keys() & plain.keys())]


def log_factors(noisy: Runs, plain: Runs, measure: Callable[[dict], float]) -> list[float]:
    return [math.log(measure(noisy[seed]) / measure(plain[seed])) for seed in noisy]


# ---- Groups of runs ----


def started(digits: int = 3) -> dict[str, float]:
    """Accuracy of the model that all runs start from, in every number format."""
    return json.loads((RESULTS / start_file(digits)).read_text())


def by_label(stage: str) -> dict[str, Runs]:
    """The runs of a stage by what their name says before the seed, and by seed."""
    groups: dict[str, Runs] = {}
    for name, row in finished(stage).items():
        groups.setdefault(name.rpartition("-")[0], {})[row["settings"]["seed"]] = row
    return groups


def by_point_and_arm() -> dict[tuple[str, str], list[dict]]:
    groups: dict[tuple[str, str], list[dict]] = {}
    for name, row in finished("grid").items():
        point, arm, _ = name.split("-")
        groups.setdefault((point, arm), []).append(row)
    return groups


def by_settings() -> dict[tuple, Runs]:
    """The runs of the stages that compare arms: by point, arm, clip range, learning rate and sigma, and by seed."""
    groups: dict[tuple, Runs] = {}
    for stage in ("grid", "matched", "strong"):
        for name, row in finished(stage).items():
            settings = row["settings"]
            noisy = settings["arm"] in WITHOUT_NOISE
            sigma = settings["overrides"].get("alp_sigma_init", DEFAULT_SIGMA) if noisy else 0
            key = (name.split("-")[0], settings["arm"], clip_of(settings), settings["learning_rate"], sigma)
            groups.setdefault(key, {})[settings["seed"]] = row
    return groups


def pairs() -> Iterable[tuple[tuple, Runs, Runs]]:
    """The runs with noise, and those without it that are equal in all else (point, clip range, rate), by seed."""
    groups = by_settings()
    order = {name: place for place, name in enumerate((*POINTS, *WITHOUT_NOISE))}
    for key in sorted(groups, key=lambda key: (order[key[0]], order.get(key[1], 0), *key[2:])):
        point, arm, clip, rate, _ = key
        noisy, plain = groups[key], groups.get((point, WITHOUT_NOISE.get(arm), clip, rate, 0), {})
        if seeds := sorted(noisy.keys() & plain.keys()):
            yield key, {seed: noisy[seed] for seed in seeds}, {seed: plain[seed] for seed in seeds}


def ablation_groups() -> dict[str, Runs]:
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


def by_noise() -> dict[tuple[str, str], dict[str, Runs]]:
    """The runs of the stage `fitted`: by point and arm, by noise, and by seed."""
    groups: dict[tuple[str, str], dict[str, Runs]] = {}
    done = finished("fitted")
    for name, settings in fitted():  # in this order
        if name in done:
            point, arm, noise, _ = name.split("-")
            groups.setdefault((point, arm), {}).setdefault(noise, {})[settings["seed"]] = done[name]
    return groups


def at_three_bits() -> dict[str, Runs]:
    """Every arm at 3 bits, 2.5e-5 and the seeds that nobody had looked at before, from four stages."""
    groups = {f"{label}": runs for label, runs in by_label("front").items()}
    for arm, noises in (("token", "alp_token"), ("sequence", "alp_sequence")):
        by = by_noise().get(("mismatch_beyond", noises), {})
        if "none" in by:
            groups[f"bypass_{arm}-wide"] = by["none"]
        groups |= {f"{noises}-{noise}": by[noise] for noise in ("0.01", "fitted") if noise in by}
    return groups | by_label("confirm") | by_label("sceptic")
