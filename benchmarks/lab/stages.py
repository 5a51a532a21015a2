# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The stages of the study: the name and the settings of each run (`run.py` has what a run is made of).

Stages depend on each other: `grid` and those after it use the learning rate and clip range that `tune` found best for
each arm.
"""

import itertools
import statistics
from collections.abc import Iterator

from results import MONITOR_EVERY, final, finished


NARROW = {"epsilon": 0.2, "epsilon_high": 0.28}
WIDE = {"epsilon": 0.5, "epsilon_high": 3.0}
CLIPS = {"narrow": NARROW, "wide": WIDE}
RATES = (2.5e-5, 5e-5, 1e-4)
ARMS = ("grpo", "tis", "mis", "bypass_token", "bypass_sequence", "alp_token", "alp_sequence", "alp_tis")
DEFAULT_SIGMA = 0.01  # `ALPGRPOConfig.alp_sigma_init`
STRONG_SIGMA = 0.1
# The same arm with and without noise.
PAIRS = (("alp_token", "bypass_token"), ("alp_sequence", "bypass_sequence"))
# Where the dials stand. An update always has 32 completions; the rollouts of one batch serve as many updates as the
# second dial says, so that no dial changes the number of updates, of samples, or the batch of an update.
POINTS = {
    "healthy": {"numerics": "exact", "updates_per_rollout": 8},
    "mismatch_edge": {"numerics": "int4", "updates_per_rollout": 8},
    "mismatch_beyond": {"numerics": "int3", "updates_per_rollout": 8},
    "stale_edge": {"numerics": "bf16", "updates_per_rollout": 32},
    "stale_beyond": {"numerics": "bf16", "updates_per_rollout": 32, "lag": 1},
}
TUNED_AT = ("mismatch_edge",)
# Where the arms part is run first.
BY_INTEREST = ("mismatch_beyond", "stale_beyond", "mismatch_edge", "healthy", "stale_edge")
TUNING_SEEDS = (100,)
SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = (5, 6, 7, 8, 9)
NEW_SEEDS = (20, 21, 22, 23, 24)  # that nobody had looked at when the pairs of `fitted` were named
MONITOR = {"alp_monitor_every": MONITOR_EVERY}


def arm_settings(arm: str, clip: str, rate: float, **overrides) -> dict:
    monitor = MONITOR if arm.startswith("alp") else {}
    return {"arm": arm, "learning_rate": rate, "overrides": CLIPS[clip] | monitor | overrides}


Runs = Iterator[tuple[str, dict]]


def disease() -> Runs:
    """Each dial alone, uncorrected GRPO and Bypass, at one learning rate."""
    mismatch = [
        {"numerics": n, "updates_per_rollout": 8} for n in ("exact", "bf16", "int8", "int6", "int5", "int4", "int3")
    ]
    mismatch += [{"numerics": f"gauss-{size}", "updates_per_rollout": 8} for size in (0.1, 0.3)]
    stale = [{"numerics": "exact", "updates_per_rollout": u} for u in (1, 4, 16, 32)]
    stale += [{"numerics": "exact", "updates_per_rollout": 8, "lag": lag} for lag in (1, 4)]
    for seed, arm, point in itertools.product(SEEDS[:2], ("bypass_token", "grpo"), mismatch + stale):
        label = f"{point['numerics']}-u{point['updates_per_rollout']}-lag{point.get('lag', 0)}"
        clip = "narrow" if arm == "grpo" else "wide"
        yield f"{label}-{arm}-s{seed}", arm_settings(arm, clip, 5e-5) | point | {"seed": seed}


def tune() -> Runs:
    """The same grid for every arm, at the edge of the mismatch."""
    for point, arm, clip, rate, seed in itertools.product(TUNED_AT, ARMS, CLIPS, RATES, TUNING_SEEDS):
        yield f"{point}-{arm}-{clip}-{rate:g}-s{seed}", arm_settings(arm, clip, rate) | POINTS[point] | {"seed": seed}


def choices() -> dict[str, tuple[str, float]]:
    """Clip range and learning rate of each arm: the best final accuracy at the tuning point, mean of tuning seeds."""
    scores: dict[tuple, list[float]] = {}
    for row in finished("tune").values():
        settings = row["settings"]
        clip = "wide" if settings["overrides"]["epsilon"] == WIDE["epsilon"] else "narrow"
        scores.setdefault((settings["arm"], clip, settings["learning_rate"]), []).append(final(row))
    missing = {name for name, _ in tune()} - set(finished("tune"))
    if missing:
        raise SystemExit(f"{len(missing)} runs of the stage `tune` are missing; run it first.")
    best = {}
    for arm in ARMS:
        tried = [key for key in scores if key[0] == arm]
        best[arm] = max(tried, key=lambda key: statistics.mean(scores[key]))[1:]
    return best


def grid() -> Runs:
    """Every arm at the settings it was tuned to at one point, at every point of the dials, on fresh seeds."""
    best = choices()
    for point, seed, arm in itertools.product(BY_INTEREST, SEEDS, ARMS):
        if point == "healthy" and arm in ("tis", "mis", "alp_tis"):
            continue  # without a mismatch their correction is a factor of 1
        clip, rate = best[arm]
        yield f"{point}-{arm}-s{seed}", arm_settings(arm, clip, rate) | POINTS[point] | {"seed": seed}


def matched() -> Runs:
    """The arms at equal learning rates; `grid` compares each at its best, and a lower rate alone makes one sturdier.

    Beyond the edge of the mismatch every arm at the rate that it was not tuned to, at the other points ALP at the clip
    range and rate of the same arm without noise.
    """
    best = choices()
    for seed, arm, rate in itertools.product(SEEDS, ARMS, RATES[:2]):
        clip, own = best[arm]
        if rate != own:
            point = POINTS["mismatch_beyond"] | {"seed": seed}
            yield f"mismatch_beyond-{arm}-{rate:g}-s{seed}", arm_settings(arm, clip, rate) | point
    for point, seed, (noisy, plain) in itertools.product(BY_INTEREST[1:], SEEDS, PAIRS):
        clip, rate = best[plain]
        if best[noisy] != best[plain]:
            settings = arm_settings(noisy, clip, rate) | POINTS[point] | {"seed": seed}
            yield f"{point}-{noisy}-{rate:g}-s{seed}", settings


def strong() -> Runs:
    """Noise that moves the log-probs as much as weights of 4 bits do (`survival.py`), beside the arms of `matched`."""
    best = choices()
    points = ("mismatch_beyond", "mismatch_edge", "stale_beyond", "healthy")
    for point, seed, (noisy, plain) in itertools.product(points, SEEDS, PAIRS):
        for rate in RATES[:2] if point == "mismatch_beyond" else (best[plain][1],):
            settings = arm_settings(noisy, "wide", rate, alp_sigma_init=STRONG_SIGMA) | POINTS[point] | {"seed": seed}
            yield f"{point}-{noisy}-{rate:g}-s{seed}", settings
    # Where the mismatch hurts most: a sigma between, noise on top of TIS, and five seeds more, since five left it open
    # whether the strong noise changes the accuracy.
    rate, point = RATES[1], POINTS["mismatch_beyond"]
    for seed in SEEDS:
        for noisy, _ in PAIRS:
            settings = arm_settings(noisy, "wide", rate, alp_sigma_init=0.03) | point | {"seed": seed}
            yield f"mismatch_beyond-{noisy}-{rate:g}-0.03-s{seed}", settings
        # Without the dual clip, which TIS has not.
        changes = {"alp_sigma_init": STRONG_SIGMA, "alp_dual_clip": None}
        settings = arm_settings("alp_tis", *best["tis"], **changes) | point | {"seed": seed}
        yield f"mismatch_beyond-alp_tis-s{seed}", settings
    for seed, (noisy, plain) in itertools.product(MORE_SEEDS, PAIRS):
        for arm, change in ((noisy, {"alp_sigma_init": STRONG_SIGMA}), (plain, {})):
            settings = arm_settings(arm, "wide", rate, **change) | point | {"seed": seed}
            yield f"mismatch_beyond-{arm}-{rate:g}-s{seed}", settings


def ablation() -> Runs:
    """What of ALP matters, one change at a time, and other remedies, where the mismatch hurts; all at one rate."""
    rate, point = RATES[0], POINTS["mismatch_beyond"]
    absolute = {"alp_noise_scale": "absolute"}
    large = {"alp_sigma_init": 3e-2}  # what differs between places should be seen
    sigmas = (3e-4, 1e-3, 3e-3, 3e-2, 3e-1)  # 0.01 and 0.1 are in other stages
    alp: dict[str, dict] = {f"sigma-{sigma:g}": {"alp_sigma_init": sigma} for sigma in sigmas}
    alp |= {
        "fixed": {"alp_learn_sigma": False},
        "learned-fast": {"alp_sigma_lr": 1e-2},
        "absolute-0.02": absolute | {"alp_sigma_init": 0.02, "alp_sigma_lr": 1e-2},
        "absolute-1e-6": absolute | {"alp_sigma_init": 1e-6},
        "first": large | {"alp_layers": "first:2"},
        "middle": large | {"alp_layers": "1-2"},
        "last": large | {"alp_layers": "last:2"},
        "embedding": large | {"alp_layers": "first:1"},
        "final": large,
    }
    for label, clip in {"0.03": {"epsilon": 0.03, "epsilon_high": 0.04}, **CLIPS}.items():
        alp[f"geometric-{label}"] = {"alp_ratio_level": "sequence_geometric"} | clip
    alp["geometric-wide-no-noise"] = alp["geometric-wide"] | {"alp_enabled": False}
    for seed in SEEDS:
        for label, change in alp.items():
            settings = arm_settings("alp_token", "wide", rate, **change) | point | {"seed": seed}
            yield f"{label}-s{seed}", settings | ({"place": "final"} if label == "final" else {})
        for scale in (1, 10, 100):
            gspo = arm_settings("gspo", "narrow", rate, epsilon=3e-4 * scale, epsilon_high=4e-4 * scale)
            yield f"gspo-{scale}-s{seed}", gspo | point | {"seed": seed}
        for threshold in (0.15, 0.5):  # the DPPO paper's, and as much wider as `wide` is
            dppo = arm_settings("dppo", "narrow", rate, epsilon=threshold, epsilon_high=threshold)
            yield f"dppo-{threshold:g}-s{seed}", dppo | point | {"seed": seed}
        for sigma in (0.01, 0.03):
            noisy = {"numerics": f"{point['numerics']}+noise-{sigma:g}", "seed": seed}
            yield f"behaviour-noise-{sigma:g}-s{seed}", arm_settings("bypass_token", "wide", rate) | point | noisy


def fitted() -> Runs:
    """Noise of the size of the mismatch, of the size that ships, and none: three arms that share all else.

    Decided before any of these runs was made: the pairs are fitted against none and against 0.01, at each point and
    level, over the new seeds, on both yardsticks; all at one rate and clip range.
    """
    noise = {
        "none": {},
        "0.01": {"alp_sigma_init": DEFAULT_SIGMA, "alp_noise_target": None},
        "fitted": {"alp_noise_target": 1.0},
    }
    points = ("mismatch_beyond", "healthy", "mismatch_edge", "stale_beyond")
    for (noisy, plain), seed, point, (label, change) in itertools.product(
        reversed(PAIRS), NEW_SEEDS, points, noise.items()
    ):
        arm = plain if label == "none" else noisy
        settings = arm_settings(arm, "wide", RATES[0], **change) | POINTS[point] | {"seed": seed}
        yield f"{point}-{noisy}-{label}-s{seed}", settings


def front() -> Runs:
    """Correction and clip range apart, at 3 bits, on both yardsticks; with `fitted`'s arms without noise one table.

    Decided before any of these runs was made: every arm in both ranges, at one rate; the findings are about the effect
    of the range within an arm and of the correction within a range, on both yardsticks, over five seeds.
    """
    point, ranges = POINTS["mismatch_beyond"], CLIPS | {"gspo10": {"epsilon": 3e-3, "epsilon_high": 4e-3}}
    arms = [(arm, clip) for arm in ("grpo", "mis", "tis") for clip in CLIPS]
    arms += [("bypass_token", "narrow"), ("bypass_sequence", "narrow"), ("gspo", "narrow"), ("gspo", "gspo10")]
    arms += [("gspo", "wide"), ("gspo_mis", "narrow"), ("bypass_geometric", "narrow"), ("bypass_geometric", "wide")]
    for (arm, clip), seed in itertools.product(arms, NEW_SEEDS):
        settings = {"arm": arm, "learning_rate": RATES[0], "overrides": ranges[clip]}
        yield f"{arm}-{clip}-s{seed}", settings | point | {"seed": seed}


def confirm() -> Runs:
    """Strong noise at 3 bits on new seeds, beside `fitted`'s arms.

    Decided before any of these runs was made: the claim to be tested is that sigma 0.1 against none raises what is
    served at 3 bits, per token and per sequence, since a look at other seeds said so.
    """
    for (noisy, _), seed in itertools.product(PAIRS, NEW_SEEDS):
        settings = arm_settings(noisy, "wide", RATES[0], alp_sigma_init=STRONG_SIGMA, alp_noise_target=None)
        yield f"{noisy}-0.1-s{seed}", settings | POINTS["mismatch_beyond"] | {"seed": seed}


def sceptic() -> Runs:
    """The arms that a sceptic asks for, at 3 bits, beside `front`'s and `fitted`'s.

    Decided before any of these runs was made: the mask against none within one ratio, with and without fitted noise;
    centring against none, alone and with TIS; the rounded forward against all, as served. All over five seeds.
    """
    arms: dict[str, dict] = {
        "bypass_mask": arm_settings("bypass_mask", "wide", RATES[0]),
        "alp_mask": arm_settings("alp_mask", "wide", RATES[0], alp_noise_target=1.0),
        "rounded_forward": arm_settings("rounded_forward", "narrow", RATES[0]),
        "centred": arm_settings("centred", "narrow", RATES[0]),
        "centred_tis": arm_settings("centred_tis", "narrow", RATES[0]),
    }
    for (label, settings), seed in itertools.product(arms.items(), NEW_SEEDS):
        yield f"{label}-s{seed}", settings | POINTS["mismatch_beyond"] | {"seed": seed}


def length() -> Runs:
    """Twelve digits, four bits: the mismatch that does no harm at three digits, summed over four times the tokens.

    Decided before any of these runs was made: fitted noise against none per sequence, and each against GRPO and MIS,
    on both yardsticks. The rate is where a first look had seen the edge.
    """
    arms: dict[str, dict] = {
        "bypass_sequence": arm_settings("bypass_sequence", "wide", 3e-5),
        "alp_sequence-fitted": arm_settings("alp_sequence", "wide", 3e-5, alp_noise_target=1.0),
        "mis": arm_settings("mis", "narrow", 3e-5),
        "grpo": arm_settings("grpo", "narrow", 3e-5),
        "bypass_mask": arm_settings("bypass_mask", "wide", 3e-5),
        "alp_mask-fitted": arm_settings("alp_mask", "wide", 3e-5, alp_noise_target=1.0),
        "alp_sequence-0.1": arm_settings("alp_sequence", "wide", 3e-5, alp_sigma_init=STRONG_SIGMA),
    }
    for seed, (label, settings) in itertools.product(NEW_SEEDS, arms.items()):
        yield f"{label}-s{seed}", settings | POINTS["mismatch_edge"] | {"seed": seed, "digits": 12, "updates": 240}


def quick() -> Runs:
    """Every arm at a learning rate that is too high for most of them, at the edge of the mismatch dial."""
    for arm in ARMS:
        clip = "narrow" if arm in ("grpo", "tis", "mis") else "wide"
        yield f"{arm}-s0", arm_settings(arm, clip, 1e-4) | POINTS["mismatch_edge"]


def gpu() -> Runs:
    """The edge once more, at 34 million parameters in bf16; a run takes a minute or two, so that pieces of 8 fit."""
    larger = {"size": {"hidden": 512, "layers": 8, "heads": 8}, "device": "cuda"}
    for seed, arm in itertools.product(SEEDS[:3], ARMS):
        clip, rate = choices()[arm]
        yield f"{arm}-s{seed}", arm_settings(arm, clip, rate / 4) | POINTS["mismatch_edge"] | larger | {"seed": seed}


def gpu_matched() -> Runs:
    """`gpu`'s model with all arms at one rate, at 3 bits and, with answers four times as long, at 4 bits.

    Decided before any of these runs was made: the pairs and yardsticks of `fitted`, `front` and `length`.
    """
    larger = {"size": {"hidden": 512, "layers": 8, "heads": 8}, "device": "cuda"}
    points = {
        "3digits": POINTS["mismatch_beyond"],
        "12digits": POINTS["mismatch_edge"] | {"digits": 12, "updates": 240},
    }
    rate = RATES[0] / 4
    arms = {
        "bypass_sequence": arm_settings("bypass_sequence", "wide", rate),
        "alp_sequence-fitted": arm_settings("alp_sequence", "wide", rate, alp_noise_target=1.0),
        "alp_sequence-0.1": arm_settings("alp_sequence", "wide", rate, alp_sigma_init=STRONG_SIGMA),
        "bypass_token": arm_settings("bypass_token", "wide", rate),
        "alp_token-fitted": arm_settings("alp_token", "wide", rate, alp_noise_target=1.0),
        "mis": arm_settings("mis", "narrow", rate),
        "grpo": arm_settings("grpo", "narrow", rate),
    }
    for seed, (where, point), (label, settings) in itertools.product(SEEDS[:3], points.items(), arms.items()):
        yield f"{where}-{label}-s{seed}", settings | point | larger | {"seed": seed}


def real() -> Runs:
    """SmolLM2-135M-Instruct on GSM8K (`gsm8k.py` has the preparation), on one GPU; the first rows come first.

    Decided before any of these runs was made: the pairs are fitted noise against none and against 0.01 at each level
    and engine, and Bypass and ALP against MIS and GRPO, on both yardsticks, at one rate.
    """
    rate = 5e-6
    arms: dict[str, dict] = {
        "bypass_sequence": arm_settings("bypass_sequence", "wide", rate),
        "alp_sequence-fitted": arm_settings("alp_sequence", "wide", rate, alp_noise_target=1.0),
        "mis": arm_settings("mis", "narrow", rate),
        "grpo": arm_settings("grpo", "narrow", rate),
        "alp_sequence-0.01": arm_settings("alp_sequence", "wide", rate, alp_sigma_init=DEFAULT_SIGMA),
        "bypass_token": arm_settings("bypass_token", "wide", rate),
        "alp_token-fitted": arm_settings("alp_token", "wide", rate, alp_noise_target=1.0),
        "alp_token-0.01": arm_settings("alp_token", "wide", rate, alp_sigma_init=DEFAULT_SIGMA),
        "alp_token-0.1": arm_settings("alp_token", "wide", rate, alp_sigma_init=STRONG_SIGMA),
        "gspo": {"arm": "gspo", "learning_rate": rate, "overrides": {"epsilon": 3e-4, "epsilon_high": 4e-4}},
    }
    shared = {"task": "gsm8k", "device": "cuda", "updates_per_rollout": 8, "mini_batch": 64, "updates": 120}
    shared |= {"eval_every": 40, "eval_problems": 512}
    for seed, numerics, (label, settings) in itertools.product(SEEDS[:3], ("int4-32", "bf16", "fp8"), arms.items()):
        yield f"{numerics}-{label}-s{seed}", settings | shared | {"numerics": numerics, "seed": seed}


def engine() -> Runs:
    """vLLM itself as the behaviour policy, in three number formats (needs the environment of `make test-vllm`)."""
    formats, arms = ("vllm-fp32", "vllm-bf16", "vllm-bf16-fp8kv"), ("grpo", "tis", "bypass_token", "alp_token")
    for seed, numerics, arm in itertools.product(SEEDS[:2], formats, arms):
        clip, rate = choices()[arm]
        point = {"numerics": numerics, "updates_per_rollout": 8, "seed": seed}
        yield f"{numerics}-{arm}-s{seed}", arm_settings(arm, clip, rate) | point


STAGES = {
    stage.__name__: stage
    for stage in (disease, tune, grid, matched, strong, ablation, fitted, confirm, front, length, sceptic)
}
# With needs of their own, so to be asked for by name.
FURTHER_STAGES = {"engine": engine, "gpu": gpu, "gpu_matched": gpu_matched, "real": real}
