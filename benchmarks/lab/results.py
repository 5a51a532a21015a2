# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Finished runs of the study: summed up, one file a stage in `benchmarks/results/lab`, and read again."""

import functools
import gzip
import json
import statistics
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lab"
MONITOR_EVERY = 5  # not a divisor of the updates per batch: rollouts of all ages are looked at


def final(row: dict) -> float:
    """Final accuracy of a run: the mean of its last three evaluations."""
    return statistics.mean(value for _, value in row["accuracy"][-3:])


def summed_up(result: dict, window: int = 8) -> dict:
    """A run with its log in windows of updates: mean, and where the tail matters the largest.

    `monitored` has the means over the updates in which ALP looks at the ratio without noise, for every arm: what is
    compared with noise-off figures has to be of rollouts as old.
    """
    log, curves = result["log"], {}
    names = sorted({name for row in log for name in row} & set(CURVES))
    for name in names:
        windows = []
        for start in range(0, len(log), window):
            values = [row[name] for row in log[start : start + window] if row.get(name) is not None]
            windows.append([f"{statistics.mean(values):.4g}", f"{max(values):.4g}"] if values else [None, None])
        curves[name] = [[None if v is None else float(v) for v in pair] for pair in windows]
    looked_at = [row for row in log if (row["step"] - 1) % MONITOR_EVERY == 0]
    monitored = {}
    for name in sorted({name for row in looked_at for name in row} & {*MONITORED, "entropy"}):
        values = [row[name] for row in looked_at if row.get(name) is not None]
        monitored[name] = float(f"{statistics.mean(values):.5g}")
    return {k: v for k, v in result.items() if k != "log"} | {
        "window": window,
        "curves": curves,
        "monitored": monitored,
    }


# Of every arm, without noise.
MONITORED = tuple(
    f"alp/{off}{name}" for off in ("", "noise_off/")
    for name in ("kl/k3", "fresh/kl/k3", "entropy", "token/log_ratio/p02", "token/log_ratio/p98",
                 "sequence/log_ratio/p02", "sequence/log_ratio/p98")
)  # fmt: skip
# Mean and largest of each are kept.
CURVES = (
    "reward", "grad_norm", "entropy", "alp/kl/k1", "alp/kl/k3", "alp/token/ess", "alp/sequence/ess",
    "alp/token/log_ratio/p02", "alp/token/log_ratio/p98", "alp/sequence/log_ratio/p02", "alp/sequence/log_ratio/p98",
    "alp/token/log_ratio/min", "alp/token/log_ratio/max", "alp/clip/low", "alp/clip/high", "alp/clip/dual",
    "alp/noise_off/kl/k3", "alp/noise_off/token/log_ratio/p02", "alp/noise_off/token/log_ratio/p98",
    "alp/noise_off/sequence/log_ratio/p02", "alp/noise_off/sequence/log_ratio/p98", "alp/noise_off/token/ess",
    "alp/noise/kl/k3", "alp/old/kl/k3", "alp/old/token/log_ratio/p02", "alp/old/token/log_ratio/p98",
    *(f"alp/sigma/layer_{layer:02d}" for layer in range(8)),
)  # fmt: skip


def finished(stage: str) -> dict[str, dict]:
    """What has been summed up of a stage, by name of the run."""
    path = RESULTS / f"{stage}.json.gz"
    return dict(_read(path, path.stat().st_mtime_ns)) if path.exists() else {}


@functools.cache
def _read(path: Path, written: int) -> dict[str, dict]:
    return json.loads(gzip.decompress(path.read_bytes()))


def sum_up(stage: str, folder: Path, results: Path) -> None:
    """Add the finished runs in `folder` to what was summed up before, and write it to `results`."""
    rows = finished(stage)
    for path in sorted((folder / stage).glob("*.json")):
        if path.stem not in rows:
            rows[path.stem] = summed_up(json.loads(path.read_text()))
    if rows:
        results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(sorted(rows.items())))
        (results / f"{stage}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def start_file(digits: int) -> str:
    return "start.json" if digits == 3 else f"start-{digits}digits.json"


def start(folder: Path, results: Path, digits: int = 3) -> None:
    """Accuracy of the warm-started model in every number format, to a file in `results`."""
    sys.path.insert(0, str(Path(__file__).parent))
    import task
    from run import DEFAULTS, Evaluation

    settings = DEFAULTS | {"digits": digits}
    policy, tokenizer, _, problems = task.start(settings, folder)
    evaluation = Evaluation(policy, tokenizer, problems[: settings["eval_problems"]], settings)
    formats = {name: evaluation.in_format(name) for name in task.SERVED_IN}
    (results / start_file(digits)).write_text(json.dumps(formats) + "\n")
