# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""From the logs of one or several runs to one HTML page and PNG figures:

    python -m trl_alp.report RUN_DIR [RUN_DIR ...] [--output DIR] [--label NAME ...]

Runs are read from `alp/metrics.jsonl`, else `trainer_state.json`, else tensorboard events, so any run of TRL will do.
Seeds of one setting are drawn as their mean and range: runs whose paths are equal up to a trailing `seed` and a number
(`runs/alp_seed1` and `runs/alp_seed2`, `runs/alp/seed-1` and `runs/alp/seed-2`), or that are given the same label.
"""

import argparse
import html
import json
import math
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
from tqdm import tqdm


try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The report needs matplotlib: `pip install matplotlib`.") from error

_SEED = re.compile(r"[-_./ ]+seed[-_=]?\d+$", re.IGNORECASE)
# Okabe and Ito's palette without its yellow and black, which vanish on a white and on a dark page.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_STYLES = ("-", "--", ":", "-.")
_FOREGROUND = "#20242a"  # becomes the page's text colour, light or dark
_MOST_FACETS = 12  # settings drawn in a panel each
_MOST_IN_LEGEND = 12
_SMOOTHED = 25  # lines are running means over this part of the log; staleness alone makes a saw of most
_ENOUGH = 20  # logged rewards, for a verdict
_FEWEST_TOKENS = 50  # in a bin; of fewer the 2nd percentile is the minimum
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as `metrics.jsonl` has them
_PERCENTILES = ("p02", "p25", "p50", "p75", "p98")
_WINDOW = 0.1  # "final" is the mean over this last share of the logged values, "best" the best such window


@dataclass
class Run:
    """One run. Those of one `setting` are its seeds."""

    path: Path
    setting: str
    source: str  # which log was read
    log: pd.DataFrame  # a row for each step, a column for each key
    envelope: pd.DataFrame  # all windows' percentiles by bin of token probability
    notes: list[str]  # what was odd about the log
    diverged: list[str]  # what ended in values that are not finite

    def series(self, *keys: str) -> pd.Series | None:
        """The finite values, by step, of the first of `keys` that has any."""
        for key in keys:
            if key in self.log and len(values := self.log[key][np.isfinite(self.log[key])]):
                return values
        return None

    def has(self, *keys: str) -> bool:
        """Whether one of `keys` was logged, or is a policy of the envelope files."""
        return self.series(*keys) is not None or not set(keys).isdisjoint(self.envelope["policy"])


def report(run_dirs: Iterable[str | Path], output: str | Path | None = None, labels: list[str] | None = None) -> Path:
    """
    Write the report on one or several runs: `index.html`, one self-contained page, and each figure as a PNG file.

    Args:
        run_dirs (`Iterable[str | Path]`):
            Output directories of runs, of [`ALPGRPOTrainer`] or of any trainer of TRL.
        output (`str | Path`, *optional*):
            Where to write. Default: `report` in the run's directory if there is one run, else in the current one.
        labels (`list[str]`, *optional*):
            One name for each run; runs with the same one are seeds of one setting. Default: from the paths.

    Returns:
        `Path`: The page.

    Raises:
        `ValueError`: If the number of labels is not that of the runs, or if none of the directories holds a log. One
            that holds none beside others that do is left out, with a note on the page.
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    if not paths or (labels is not None and len(labels) != len(paths)):
        raise ValueError(
            f"{len(labels or [])} labels for {len(paths)} runs. Give at least one run, and one label for each or none."
        )
    by_path = dict(zip(paths, labels or _settings(paths), strict=True))
    output = Path(output) if output else (paths[0] if len(by_path) == 1 else Path()) / "report"
    runs, failures = [], []
    for path, setting in tqdm(by_path.items(), desc="reading", unit="run", disable=None):
        try:
            runs.append(_read(path, setting))
        except ValueError as error:
            failures.append(str(error))
    if not runs:
        raise ValueError("\n".join(failures))
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "trl_alp",
            "axes.grid": True,
            "grid.color": "#80808055",
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "lines.linewidth": 1.6,
            "legend.frameon": False,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _FOREGROUND),
            "axes.edgecolor": "#808080",
        }
    ):
        page = _page(settings, failures, output)
    (output / "index.html").write_text(page, encoding="utf-8")
    return output / "index.html"


# ---- Reading ----


def _settings(paths: list[Path]) -> list[str]:
    """A name for the setting of each run: the end of its path without the seed, as long as it takes to be unique."""
    stems = [Path(_SEED.sub("", str(path.resolve()))).parts for path in paths]
    length = 1
    while len({stem[-length:] for stem in stems}) < len(set(stems)):
        length += 1
    return ["/".join(stem[-length:]) for stem in stems]


def _read(path: Path, setting: str) -> Run:
    rows, source, notes = _rows(path)
    steps: dict[float, dict[str, float]] = {}
    newest, replaced = -math.inf, 0
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int | float) or not math.isfinite(step):
            continue
        if step < newest:  # a resumed run: what its earlier life logged from here on never happened to this one
            stale = [earlier for earlier in steps if earlier >= step]
            replaced += len(stale)
            for earlier in stale:
                del steps[earlier]
        newest = step
        numbers = {
            k: float(v) for k, v in row.items() if k != "step" and (isinstance(v, int | float) or v in _NOT_FINITE)
        }
        steps.setdefault(step, {}).update(numbers)
    if not steps:
        raise ValueError(f"{path}: {source} has no row with a `step`. Did the run reach its first log call?")
    log = pd.DataFrame.from_dict(steps, orient="index").sort_index()
    if replaced:
        notes.append(f"the log goes back (a resumed run): {replaced} steps of the earlier attempt are left out")
    odd = {key: sum(not math.isfinite(row.get(key, 0)) for row in steps.values()) for key in log}
    notes += [f"`{key}`: {count} of {len(log)} values are not finite" for key, count in odd.items() if count]
    last = {key: [row[key] for row in steps.values() if key in row][-3:] for key in ("reward", "loss", "grad_norm")}
    diverged = [key for key, values in last.items() if values and not np.isfinite(values).any()]
    return Run(path, setting, source, log, _read_envelope(path, notes), notes, diverged)


def _rows(path: Path) -> tuple[list[dict], str, list[str]]:
    """The rows of the log in the order of writing, the file they are from, and what could not be read."""
    notes = []
    metrics = path / "alp" / "metrics.jsonl"
    if metrics.is_file():
        rows = _json_lines(metrics, notes)
        if rows:
            return rows, "alp/metrics.jsonl", notes
    states = sorted(
        path.glob("checkpoint-*/trainer_state.json"), key=lambda s: int("0" + re.sub(r"\D", "", s.parts[-2]))
    )
    found = []
    for state in [path / "trainer_state.json", *reversed(states)]:
        if any(source.startswith("checkpoint") for *_, source in found):
            break  # the newest checkpoint that can be read is there
        try:
            rows = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            found.append((rows[-1]["step"], rows, str(state.relative_to(path))))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError):
            notes.append(f"{state.relative_to(path)} holds no readable log")
    if found:
        _, rows, source = max(found, key=lambda one: one[0])
        return rows, source, notes
    events = sorted(path.rglob("events.out.tfevents.*"), key=lambda file: file.name)  # the name begins with the time
    if events:
        return _tensorboard_rows(events), "tensorboard events", notes
    raise ValueError(
        f"{path} holds no log: no alp/metrics.jsonl, no trainer_state.json (in it or in a checkpoint) and no "
        "tensorboard events. Give the `output_dir` of a run; `trainer.save_state()` at the end of a script, or "
        '`report_to="tensorboard"`, leaves a log in it.'
    )


def _json_lines(file: Path, notes: list[str]) -> list[dict]:
    rows, broken = [], 0
    for line in filter(str.strip, file.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            row = json.loads(line)
            rows.append(row) if isinstance(row, dict) else None
        except ValueError:
            broken += 1
    if broken:
        notes.append(f"{broken} line(s) of alp/{file.name} are not JSON (half written?) and are left out")
    return rows


def _tensorboard_rows(events: list[Path]) -> list[dict]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ValueError(
            f"The only log in {events[0].parent} are tensorboard events. To read them: `pip install tensorboard`."
        ) from error
    rows = []
    for file in events:
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        steps: dict[int, dict[str, float]] = {}
        for tag in accumulator.Tags()["scalars"]:  # as the Trainer names them: train/reward, eval/reward
            key = tag.removeprefix("train/") if tag.startswith("train/") else tag.replace("eval/", "eval_", 1)
            for event in accumulator.Scalars(tag):
                steps.setdefault(event.step, {"step": event.step})[key] = event.value
        rows += [steps[step] for step in sorted(steps)]
    return rows


def _read_envelope(path: Path, notes: list[str]) -> pd.DataFrame:
    lines = path / "alp" / "envelope.jsonl"
    tables, unreadable = [pd.DataFrame(_json_lines(lines, notes) if lines.is_file() else [])], 0
    for file in sorted((path / "alp").glob("envelope_*.parquet")):  # of earlier versions, one for each logging step
        try:
            tables.append(pyarrow.parquet.ParquetFile(file).read().to_pandas())
        except (OSError, pyarrow.ArrowException):
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable} envelope file(s) cannot be read and are left out")
    tables = [table for table in tables if len(table)] or tables[:1]
    needed = ["step", "policy", "probability_low", "probability_high", "tokens", "p02", "p25", "p50", "p75", "p98"]
    return pd.concat(tables, ignore_index=True).reindex(columns=needed)


# ---- Numbers ----


def _summary(run: Run) -> dict[str, float | str]:
    """What the table says of a run; NaN where it was not logged. The page states the rule of the verdict."""
    reward, last = run.series("reward"), run.log.index[-1]
    numbers = {
        name: getattr(values, how)() if (values := run.series(key)) is not None else math.nan
        for name, key, how in (
            ("max grad norm", "grad_norm", "max"),
            ("max KL k3", "alp/kl/k3", "max"),
            ("min token ESS", "alp/token/ess", "min"),
        )
    }
    if reward is None:
        return {"verdict": "no reward logged", "last step": last, "final": math.nan, "best": math.nan, **numbers}
    window = max(1, round(_WINDOW * len(reward)))
    smooth = reward.rolling(window).mean().dropna()
    first, final, best = smooth.iloc[0], smooth.iloc[-1], smooth.max()
    # From the median difference of neighbours, which neither a trend nor one fall changes; 1.48 as for a Gaussian.
    standard_error = 1.48 * reward.diff().abs().median() / math.sqrt(2 * window)
    if run.diverged:
        verdict = f"diverged ({', '.join(run.diverged)})"
    elif len(reward) < _ENOUGH:
        verdict = "too short to tell"
    else:
        collapsed = best - final > max((best - first) / 2, 0.1 * abs(best), 4 * standard_error)
        verdict = "collapsed" if collapsed else "no collapse"
    return {"verdict": verdict, "last step": last, "final": final, "best": best, **numbers}


def _mean_and_range(series: list[pd.Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps; over the seeds the mean, lowest and highest of their running means, interpolated between their steps."""
    series = [one.rolling(max(1, len(one) // _SMOOTHED), 1, center=True).mean() for one in series]
    steps = np.unique(np.concatenate([one.index for one in series]))
    values = [np.interp(steps, one.index, one, left=np.nan, right=np.nan) for one in series]
    return steps, np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)


# ---- Figures: each is None where there is nothing to draw ----


def _style(settings: dict[str, list[Run]], name: str) -> dict[str, str]:
    row, column = divmod(list(settings).index(name), len(_COLOURS))
    return {"color": _COLOURS[column], "linestyle": _STYLES[row % len(_STYLES)]}


def _short(name: str) -> str:
    """For matplotlib, where a dollar begins mathematics."""
    return (name if len(name) <= 34 else f"{name[:16]}…{name[-17:]}").replace("$", r"\$")


def _lines(
    settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...], scale: str = "linear"
) -> Figure | None:
    """A line for each setting: the mean of its seeds, and their range as a shade."""
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axis = figure.subplots()
    handles, drawn = {}, []
    few = sum(map(len, settings.values())) <= _MOST_IN_LEGEND  # of more, raw values would cover the means
    for name, runs in settings.items():
        series = [values for run in runs if (values := run.series(*keys)) is not None]
        if scale == "log":
            series = [values[values > 0] for values in series if (values > 0).any()]
        if not series:
            continue
        drawn += series
        style = _style(settings, name)
        for values in series if few and len(series[0]) >= 2 * _SMOOTHED else ():
            axis.plot(values, color=style["color"], alpha=0.25, linewidth=0.6)
        steps, mean, low, high = _mean_and_range(series)
        (handles[name],) = axis.plot(steps, mean, marker="o" if len(steps) <= 20 else None, markersize=3, **style)
        if len(series) > 1:
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
    if not handles:
        return None
    if scale == "log":
        axis.set_yscale("log")
    elif scale == "symlog":
        _symlog([axis], drawn)
    elif scale == "share":
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axis.set_ylim(0, max(0.01, 1.05 * max(values.max() for values in drawn)))
    axis.set(title=title, xlabel="optimiser step", ylabel=unit)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    if 1 < len(settings) <= _MOST_IN_LEGEND:
        names = [f" {_short(name)}" for name in handles]  # the space: a name may begin with an underscore
        columns = 2 if max(map(len, names)) < 26 else 1
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def _symlog(axes: Iterable, values: list, unless: float = 0) -> None:
    """A log axis both ways, linear where the smallest fifth of values is; not if all are below `unless` medians."""
    sizes = np.abs(np.concatenate([np.ravel(one) for one in values]))
    if not sizes.any() or sizes.max() < unless * np.median(sizes):
        return
    sizes = sizes[sizes > 0]
    threshold = 10.0 ** math.floor(math.log10(max(np.quantile(sizes, 0.2), sizes.max() / 1e4)))
    for axis in axes:
        axis.set_yscale("symlog", linthresh=threshold)
        for level, style in ((0, "-"), (-threshold, ":"), (threshold, ":")):
            axis.axhline(level, color=_FOREGROUND, linewidth=0.7, linestyle=style)


def _facets(
    names: list[str], title: str, unit: str, x: str = "optimiser step", sharey: bool = True
) -> tuple[Figure, dict]:
    """A panel for each setting, at most `_MOST_FACETS`."""
    names = names[:_MOST_FACETS]
    columns = 2 if len(names) == 4 else min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5.6 if columns == 1 else 11.2, 0.8 + 2.7 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=sharey, squeeze=False).flat)
    for axis in grid[len(names) :]:
        axis.remove()
    axes = dict(zip(names, grid, strict=False))
    for name, axis in axes.items():
        axis.tick_params(labelbottom=True)
        axis.set_title(_short(name) if len(names) > 1 else "", fontsize="medium")
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(x, fontsize="medium")
    figure.supylabel(unit, fontsize="medium")
    return figure, axes


def _percentiles(runs: list[Run], prefix: str, at: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and mean over seeds of each percentile, at the steps with a value of the key `at`; empty if not logged."""
    curves = {}
    for p in _PERCENTILES:
        series = [(run.series(f"{prefix}/{p}"), run.series(at)) for run in runs]
        series = [
            values[values.index.isin(where.index)]
            for values, where in series
            if values is not None and where is not None
        ]
        if not series:
            return {}
        curves[p] = _mean_and_range(series)[:2]
    return curves


def _envelope(
    settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...], base: str = "", unlike: str = ""
) -> Figure | None:
    """Percentiles over time, but for settings where they are those of `unlike`.

    With `base`, those are the band, and P2 and P98 of `keys` dashed lines over it. The monitor does not look at every
    step, so both are drawn where both were logged.
    """
    prefix = keys[0].removesuffix("/p50")
    bands = {name: _percentiles(runs, base or prefix, at=keys[0]) for name, runs in settings.items()}
    drawn_before = {name: _percentiles(runs, unlike, at=keys[0]) for name, runs in settings.items()}
    names = [
        name
        for name, band in bands.items()
        if band and not (drawn_before[name] and np.array_equal(band["p98"][1], drawn_before[name]["p98"][1]))
    ]
    if not names:
        return None
    figure, axes = _facets(names, title, unit)
    drawn = []
    for name, axis in axes.items():
        band, colour = bands[name], _style(settings, name)["color"]
        marker = "o" if len(band["p50"][0]) == 1 else None
        for low, high, alpha in (("p02", "p98", 0.25), ("p25", "p75", 0.4)):
            # All are there at the same steps, but for values that are not finite.
            axis.fill_between(*band[low], np.interp(band[low][0], *band[high]), color=colour, alpha=alpha, linewidth=0)
        dashed = _percentiles(settings[name], prefix, at=f"{base}/p50") if base else {}
        if dashed:
            for p in ("p02", "p98"):
                axis.plot(*dashed[p], color=_FOREGROUND, linestyle="--", linewidth=1.1, marker=marker)
        else:
            axis.plot(*band["p50"], color=colour, marker=marker)
        drawn += [band["p02"][1], band["p98"][1]]
    _symlog(axes.values(), drawn, unless=30)
    return figure


def _by_probability(settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...]) -> Figure | None:
    """Percentiles by bin of token probability: bars for the end of the run, dashed lines for its beginning."""
    late, early = {}, {}
    for name, runs in settings.items():
        parts = {"late": [], "early": []}
        for run in runs:
            table = run.envelope[run.envelope["policy"].isin(keys) & np.isfinite(run.envelope["p50"].astype(float))]
            steps = np.unique(table["step"])
            window = max(1, round(_WINDOW * len(steps)))
            parts["late"].append(table[table["step"].isin(steps[-window:])])
            parts["early"].append(table[table["step"].isin(steps[: window if len(steps) > 1 else 0])])
        for part, ends in (("late", late), ("early", early)):
            bins = pd.concat(parts[part]).groupby(["probability_low", "probability_high"])
            pooled = bins[list(_PERCENTILES)].median()[bins["tokens"].sum() >= _FEWEST_TOKENS]
            if len(pooled):
                ends[name] = pooled
    if not late:
        return None
    bins = sorted(set().union(*(table.index for table in [*late.values(), *early.values()])))
    figure, axes = _facets(list(late), title, unit, "probability of the token under the behaviour policy")
    for name, axis in axes.items():
        table, colour = late[name], _style(settings, name)["color"]
        axis.use_sticky_edges = False  # bars would otherwise end at the frame
        at = [bins.index(one) for one in table.index]
        for low, high, alpha in (("p02", "p98", 0.3), ("p25", "p75", 0.5)):
            axis.bar(at, table[high] - table[low], bottom=table[low], width=0.8, color=colour, alpha=alpha)
        axis.plot(at, table["p50"], color=_FOREGROUND, marker="_", markersize=8, linestyle="none")
        for p in ("p02", "p98") if name in early else ():
            at = [bins.index(one) for one in early[name].index]
            axis.plot(at, early[name][p], color=_FOREGROUND, linestyle="--", linewidth=1.1, marker=".")
        edges = [low for low, _ in bins] + [bins[-1][1]]
        ticks = range(len(edges) - 1, -1, -1 if len(edges) <= 14 else -2)
        axis.set_xticks([i - 0.5 for i in ticks], [f"{edges[i]:.3g}" for i in ticks], rotation=60, fontsize="small")
    _symlog(axes.values(), [table[p] for table in late.values() for p in ("p02", "p98")], unless=30)
    return figure


def _sigma(settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...]) -> Figure | None:
    layers = {
        name: {int(key[17:]): key for run in runs for key in run.log if re.fullmatch(r"alp/sigma/layer_\d+", key)}
        for name, runs in settings.items()
    }
    names = [name for name in settings if layers[name]]
    if not names:
        return None
    figure, axes = _facets(names, title, unit, sharey=False)
    count = 1 + max(layer for found in layers.values() for layer in found)
    # The ends of the map are left out: one vanishes on a dark page, the other on a white one.
    colours = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.9, count)))
    for name, axis in axes.items():
        for layer, key in layers[name].items():
            series = [values for run in settings[name] if (values := run.series(key)) is not None]
            if series:
                steps, mean, low, high = _mean_and_range(series)
                axis.plot(steps, mean, color=colours(layer), marker="o" if len(steps) == 1 else None)
                axis.fill_between(steps, low, high, color=colours(layer), alpha=0.12, linewidth=0)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-0.5, count - 0.5), colours)
    ticks = matplotlib.ticker.MaxNLocator(nbins=8, integer=True)
    figure.colorbar(scale, ax=list(axes.values()), label="layer", ticks=ticks)
    return figure


_BAND = (
    "Band: 2nd to 98th percentile before any clip, darker: 25th to 75th, line: median (seeds: mean of each); 0 is "
    "equal probability, 0.7 twice and -0.7 half of it. Healthy: "
)
_BINS = (
    "Bars: 2nd to 98th percentile over the last tenth of the log, darker: 25th to 75th, tick: median; dashed: 2nd and "
    f"98th over its first tenth (bins of {_FEWEST_TOKENS} tokens or more). Healthy: narrow bars around 0 that did not "
    "grow; improbable tokens are always wider. "
)
# By section: file, title, unit, keys (the first that a run logged is drawn), who logs them, caption, how to draw.
_FIGURES = {
    "Learning": [
        ("reward", "Reward", "mean reward", ("reward",), "GRPO",
         "Mean reward of the sampled completions. Healthy: it rises and stays.", _lines),
        ("eval_reward", "Reward in evaluation", "mean reward", ("eval_reward",), "an `eval_dataset`",
         "Mean reward on the evaluation data. Healthy: it follows the training reward.", _lines),
        ("entropy", "Entropy", "nats per token", ("entropy",), "GRPO",
         "Entropy of the policy in the update (with ALP, of the perturbed one). Healthy: it falls slowly or levels "
         "off, and neither drops to 0 nor shoots up.", _lines),
        ("grad_norm", "Gradient norm", "norm before clipping", ("grad_norm",), "the Trainer",
         "Norm of the policy's gradient before it is clipped. Healthy: no spikes by an order of magnitude.",
         partial(_lines, scale="log")),
        ("length", "Completion length", "tokens", ("completions/mean_length",), "GRPO",
         "Mean length of the completions. Healthy: no jumps, and no creeping towards the limit.", _lines),
        ("kl_reference", "KL to the reference policy", "nats per token", ("kl",), "GRPO with `beta > 0`",
         "TRL's `kl`, of the policy from the reference policy. Healthy: it grows slowly and levels off.",
         partial(_lines, scale="log")),
    ],
    "Policy against behaviour policy": [
        ("kl_k3", "KL to the behaviour policy, k3", "nats per token", ("alp/kl/k3",), "trl_alp",
         "The steadier estimate, never negative. Healthy: small, and no spikes by an order of magnitude; it rises and "
         "falls with staleness.", partial(_lines, scale="log")),
        ("kl_k1", "KL to the behaviour policy, k1", "nats per token", ("alp/kl/k1",), "trl_alp",
         "The unbiased estimate of the same, on a log axis both ways (linear between the dotted lines), since it can "
         "fall below 0 by chance. Healthy: positive on average; where it stays below 0, the tokens were probably not "
         "sampled from the log-probs that were reported.", partial(_lines, scale="symlog")),
        ("ratio_token", "Log ratio of tokens", "log ratio (nats)", ("alp/token/log_ratio/p50",), "trl_alp",
         _BAND + "a narrow band around 0 that does not widen over the run.", _envelope),
        ("ratio_sequence", "Log ratio of sequences", "log ratio (nats)", ("alp/sequence/log_ratio/p50",), "trl_alp",
         _BAND + "as for tokens, but wider, since it sums over a sequence's tokens.", _envelope),
        ("ratio_loss", "Log ratio in the loss", "log ratio (nats)", ("alp/log_ratio/p50",), "trl_alp",
         _BAND + "a narrow band around 0 that does not widen over the run. (`alp_ratio_level` says of what.)",
         partial(_envelope, unlike="alp/token/log_ratio")),
        ("probability", "Log ratio by token probability", "log ratio (nats)", ("update",), "trl_alp's envelope files",
         _BINS, _by_probability),
        ("old", "Update (band) and old policy (dashed)", "log ratio of tokens (nats)",
         ("alp/old/token/log_ratio/p50",), "`instrument` where the old policy is scored",
         "Band: 2nd to 98th and 25th to 75th percentile of the updated policy; dashed: 2nd and 98th of the old one, "
         "where no update lies between. Healthy: narrow dashed lines; a band that goes beyond them is due to updates.",
         partial(_envelope, base="alp/token/log_ratio")),
        ("probability_old", "Old policy by token probability", "log ratio (nats)", ("old",),
         "`instrument` where the old policy is scored", _BINS, _by_probability),
        ("ess", "Effective sample size", "share of the samples", ("alp/ess",), "trl_alp",
         "Of the ratio in the loss before any clip, at its own level: that of sequences falls with their length, so "
         "runs of different levels do not compare. Healthy: near 100 %; when low, few samples would carry the "
         "update.", partial(_lines, scale="share")),
        ("clip_low", "Clipped from below", "share of tokens", ("alp/clip/low", "clip_ratio/low_mean"),
         "losses that clip", "Tokens with a negative advantage and a ratio below the clip range: they give no "
         "gradient. Healthy: a few per cent at most.", partial(_lines, scale="share")),
        ("clip_high", "Clipped from above", "share of tokens", ("alp/clip/high", "clip_ratio/high_mean"),
         "losses that clip", "Tokens with a positive advantage and a ratio above the clip range: they give no "
         "gradient. Healthy: a few per cent at most.", partial(_lines, scale="share")),
        ("clip_dual", "Dual clip", "share of tokens", ("alp/clip/dual",), "`alp_dual_clip`",
         "Tokens with a negative advantage and a ratio above the dual clip. Healthy: almost none.",
         partial(_lines, scale="share")),
        ("staleness", "Staleness", "optimiser steps", ("alp/staleness",), "trl_alp",
         "Updates since the rollouts in use were generated. Healthy: what the settings ask for (below "
         "`steps_per_generation` times `num_iterations`), without growing.", _lines),
        ("engine", "Engine against trainer, by TRL", "nats per token", ("sampling/sampling_logp_difference/mean",),
         "TRL with vLLM", "Mean absolute difference of their log-probs. Healthy: small and flat.",
         partial(_lines, scale="log")),
    ],
    "Noise": [
        ("noise_off", "Noise on (band) and off (dashed)", "log ratio (nats)", ("alp/noise_off/log_ratio/p50",),
         "ALP with `alp_monitor_every`", "Band: 2nd to 98th and 25th to 75th percentile of the perturbed policy; "
         "dashed: 2nd and 98th of the same policy without noise, where the monitor ran. Healthy: narrow dashed lines, "
         "which show staleness and mismatch; how far the band goes beyond them is due to the noise.",
         partial(_envelope, base="alp/log_ratio")),
        ("probability_noise_off", "Noise off, by token probability", "log ratio (nats)", ("noise_off",),
         "ALP with `alp_monitor_every`", _BINS, _by_probability),
        ("sigma", "Sigma by layer", "sigma", ("alp/sigma/mean",), "ALP with noise",
         "Size of the noise at the input of each layer, as a share of the hidden state's RMS (or absolute, with "
         "`alp_noise_scale=\"absolute\"`). Healthy: it moves slowly and does not sit at `alp_sigma_min` or "
         "`alp_sigma_max`.", _sigma),
        ("noise_effective", "Noise that survives rounding", "realised / asked", ("alp/noise/effective/min",),
         "ALP with noise", "Standard deviation of the noise that reaches the layer where most is lost, over what was "
         "asked for. Healthy: near 100 %; below 10 % the layer is as good as unperturbed.",
         partial(_lines, scale="share")),
    ],
}  # fmt: skip


# ---- The page ----


def _page(settings: dict[str, list[Run]], notes: list[str], output: Path) -> str:
    """Draw each figure, save it as PNG, and put all of them on a page."""
    runs = [run for group in settings.values() for run in group]
    notes = notes + [f"{run.path}: {note}." for run in runs for note in run.notes]
    if len(settings) > _MOST_FACETS:
        notes.append(f"Figures with a panel for each setting show {_MOST_FACETS} of the {len(settings)}.")
    if len(settings) > _MOST_IN_LEGEND:
        notes.append("For the colours of the lines see the table.")
    missing, sections = [], {}
    plan = [(section, *figure) for section, figures in _FIGURES.items() for figure in figures]
    for section, name, title, unit, keys, source, caption, draw in tqdm(plan, desc="drawing", disable=None):
        without = [run.path for run in runs if not run.has(*keys)]
        figure = draw(settings, title, unit, keys) if len(without) < len(runs) else None
        (output / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        if without or figure is None:
            which = ", ".join(map(str, without[:3])) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            where = (
                f"not in {which}"
                if figure
                else "no run has it"
                if without
                else "nothing to draw (no value is positive, or another figure shows it)"
            )
            missing.append(f"{title}: {where} ({' or '.join(f'`{key}`' for key in keys)}, from {source}).")
        if figure:
            wide = ' class="wide"' if figure.get_figwidth() > 6 else ""
            drawing = _save(figure, output / f"{name}.png")
            text = f"<strong>{html.escape(title)}.</strong> {_text(caption)}"
            sections.setdefault(section, []).append(
                f'<figure id="{name}"{wide}><div>{drawing}</div><figcaption>{text}</figcaption></figure>'
            )
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(settings)} setting{'s' * (len(settings) > 1)}",
        table="\n".join(_table(settings)),
        window=f"{100 * _WINDOW:g} %",
        enough=_ENOUGH,
        smoothed=f"{_SMOOTHED}th",
        notes="".join(f"<li>{_text(note)}</li>" for note in notes) or "<li>None.</li>",
        missing="".join(f"<li>{_text(note)}</li>" for note in missing) or "<li>Nothing.</li>",
        figures="\n".join(
            f'<h2>{section}</h2>\n<div class="grid">\n{"".join(figures)}\n</div>'
            for section, figures in sections.items()
        ),
    )


def _text(note: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(note))


def _save(figure: Figure, path: Path) -> str:
    """Save as PNG; return as SVG to stand in the page, its text in the page's colour."""
    figure.savefig(path, dpi=160)
    drawing = StringIO()
    figure.savefig(
        drawing, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawing = drawing.getvalue()
    # Without the header; groups' names repeat from figure to figure, where an id may not.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg") :])
    return drawing.replace(_FOREGROUND, "currentColor").replace("<svg", '<svg role="img"', 1)


def _table(settings: dict[str, list[Run]]) -> Iterable[str]:
    """Rows of the summary: one for each run, after one for their setting if it has several."""

    def row(heading: str, verdict: str, numbers: pd.Series, below: pd.Series | None = None) -> str:
        kind = "bad" if re.match("collapsed|diverged|[1-9]", verdict) else "good"
        texts = numbers.map(lambda n: f"{n:.3g}" if abs(n) < 1000 else f"{n:.6g}").replace("nan", "-") + (
            "" if below is None else below
        )
        return f'<tr>{heading}</th><td class="{kind}">{verdict}</td><td>{"</td><td>".join(texts)}</td></tr>'

    for name, runs in settings.items():
        style = _style(settings, name)
        dashes = {"-": "none", "--": "6 3", ":": "2 3", "-.": "7 3 2 3"}[style["linestyle"]]
        line = f'stroke="{style["color"]}" stroke-width="3" stroke-dasharray="{dashes}"'
        swatch = f'<svg width="28" height="8"><line x1="0" x2="28" y1="4" y2="4" {line}/></svg>'
        heading = f"<th>{swatch} {html.escape(name)}"
        summaries = pd.DataFrame([_summary(run) for run in runs])
        verdicts, numbers = summaries.pop("verdict"), summaries
        if len(runs) > 1:
            collapsed = verdicts.str.match("collapsed|diverged").sum()
            verdict = verdicts[0] if verdicts.nunique() == 1 else f"{collapsed} of {len(runs)} collapsed or diverged"
            ranges = [
                f"<small>{low:.3g} to {high:.3g}</small>"
                for low, high in zip(numbers.min(), numbers.max(), strict=True)
            ]
            of_seeds = f"<small>mean of {len(runs)} seeds</small>"
            yield row(heading + of_seeds, verdict, numbers.mean(), pd.Series(ranges, numbers.columns))
            heading = '<th class="seed">'
        for index, run in enumerate(runs):
            where = f"<small>{html.escape(str(run.path))}<br>from {html.escape(run.source)}</small>"
            yield row(heading + where, verdicts[index], numbers.loc[index])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="trl-alp-report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="output directory of a run")
    parser.add_argument(
        "--output", type=Path, help="where to write (default: RUN_DIR/report, for several runs report)"
    )
    parser.add_argument(
        "--label", nargs="+", metavar="NAME", help="a name for each run; runs of one name are seeds of one setting"
    )
    options = parser.parse_args(arguments)
    try:
        page = report(options.run_dirs, options.output, options.label)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    print(page)


if __name__ == "__main__":
    main()
