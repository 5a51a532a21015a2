# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Which setting is better: what differs between settings, and their rewards with intervals over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .reading import Run


ENOUGH = 20  # logged rewards, for a verdict
WINDOW = 0.1  # "final" is the mean over this last share of the logged values, "best" the best such window
# Of the trainer's arguments: where a run writes, and what makes it a seed of its setting.
_NOT_SETTINGS = re.compile(
    r"(^|_)(dir|seed|name|path|report_to|local_rank|token|project|space_id|checkpoint)$|^hub_|^trackio|^log"
)
# Student's t at 97.5 %, for 1 to 10 degrees of freedom (any table).
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class Summary:
    """What is said of a run; NaN where it was not logged."""

    verdict: str
    last_step: float
    final: float
    best: float
    evaluation: float  # the last reward in evaluation
    grad_norm: float  # the largest
    kl: float  # the largest k3
    ess: float  # the smallest, of tokens
    hours: float

    @property
    def bad(self) -> bool:
        return self.verdict.startswith(("collapsed", "diverged"))


def summarise(run: Run) -> Summary:
    """Final and best reward of a run, and whether it collapsed. The page states the rule."""
    reward = run.series("reward")

    def extreme(key: str, how: str) -> float:
        return float(getattr(values, how)()) if (values := run.series(key)) is not None else math.nan

    evaluation, runtime, steps = run.series("eval_reward"), run.series("train_runtime"), run.series("step_time")
    seconds = runtime.iloc[-1] if runtime is not None else steps.sum() if steps is not None else math.nan
    final = best = math.nan
    verdict = "no reward logged"
    if reward is not None:
        window = max(1, round(WINDOW * len(reward)))
        smooth = reward.rolling(window).mean().dropna()
        first, final, best = float(smooth.iloc[0]), float(smooth.iloc[-1]), float(smooth.max())
        # From the median difference of neighbours, which neither a trend nor one fall changes; 1.48 makes it that of a
        # Gaussian.
        standard_error = 1.48 * reward.diff().abs().median() / math.sqrt(2 * window)
        collapsed = best - final > max((best - first) / 2, 0.1 * abs(best), 4 * standard_error)
        verdict = "collapsed" if collapsed else "no collapse"
        if len(reward) < ENOUGH:
            verdict = "too short to tell"
    if run.diverged and reward is not None:
        verdict = f"diverged ({', '.join(run.diverged)})"
    return Summary(
        verdict,
        float(run.log.index[-1]),
        final,
        best,
        float(evaluation.iloc[-1]) if evaluation is not None else math.nan,
        extreme("grad_norm", "max"),
        extreme("alp/kl/k3", "max"),
        extreme("alp/token/ess", "min"),
        float(seconds) / 3600,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval by Student's t; NaN of one seed."""
    values = np.asarray([value for value in values if math.isfinite(value)])
    if not len(values):
        return math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), math.nan
    return float(values.mean()), _t(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))


def difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of `values` minus that of `base`, and half of its 95 % interval by Welch's t; NaN of single seeds."""
    values, base = (np.asarray([v for v in side if math.isfinite(v)]) for side in (values, base))
    if not len(values) or not len(base):
        return math.nan, math.nan
    mean = float(values.mean() - base.mean())
    if min(len(values), len(base)) < 2:
        return mean, math.nan
    squares = [float(side.var(ddof=1)) / len(side) for side in (values, base)]
    total = sum(squares)
    if total == 0:
        return mean, 0.0
    freedom = total**2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, (values, base), strict=True))
    return mean, _t(freedom) * math.sqrt(total)


def _t(freedom: float) -> float:
    """Student's t at 97.5 %; above 10 degrees of freedom by its first-order expansion, right to 1 %."""
    return _T[max(1, int(freedom)) - 1] if freedom < 11 else 1.96 + 2.4 / freedom


def _value(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def differing_settings(settings: dict[str, list[Run]]) -> dict[str, dict[str, object]]:
    """
    The trainer's arguments in which settings differ, by setting; of an argument that differs between the seeds of one
    setting, all its values.
    """
    names = {key for runs in settings.values() for run in runs for key in run.config if not _NOT_SETTINGS.search(key)}
    out: dict[str, dict[str, object]] = {name: {} for name in settings}
    for key in sorted(names):
        # What another kind of trainer does not have is no difference: that the trainers differ is.
        values = {
            name: sorted({_value(run.config[key]) for run in runs if key in run.config})
            for name, runs in settings.items()
        }
        if len({tuple(found) for found in values.values() if found}) > 1:
            for name, found in values.items():
                if found:
                    out[name][key] = ", ".join(found)
    return out
