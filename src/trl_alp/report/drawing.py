# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Figures of curves, envelopes and layers, legible on a light and on a dark page."""

import colorsys
import html
import math
import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .answer import WINDOW
from .reading import PERCENTILES, Run


# Okabe and Ito's, without those below a contrast of 3:1 on a white or on the dark page, and two of our own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C7A00", "#8A6FB8")
STYLES = ("-", "--", ":", "-.")
FOREGROUND = "#20242a"  # becomes the page's text colour, light or dark
MOST_FACETS = 12  # settings drawn in a panel each
MOST_IN_LEGEND = 12
SMOOTHED = 25  # lines are running means over this part of the log; staleness alone makes a saw of most
MOST_POINTS = 400  # of a curve
FEWEST_TOKENS = 50  # in a bin; of fewer the 2nd percentile is the minimum


def mean_and_range(series: list[pd.Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """
    Steps; mean, lowest and highest over the seeds of their running means, interpolated between their steps. Of one
    seed, lowest and highest of its values in the running window.

    Zeros are values: they are averaged like any other, and it is for the axis to draw what it cannot show.
    """
    windows = [max(1, len(one) // SMOOTHED) for one in series]
    smooth = [one.rolling(n, 1, center=True).mean() for one, n in zip(series, windows, strict=True)]
    steps = np.unique(np.concatenate([one.index for one in smooth]))
    if len(steps) > MOST_POINTS:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))]

    def at(values: pd.Series) -> np.ndarray:
        return np.interp(steps, values.index, values, left=np.nan, right=np.nan)

    values = [at(one) for one in smooth]
    if len(series) == 1:
        raw = series[0].rolling(windows[0], 1, center=True)
        return steps, values[0], at(raw.min()), at(raw.max())
    return steps, np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)


def style(settings: dict[str, list[Run]], name: str) -> dict[str, object]:
    """Colour and dashes of a setting, and a width: of two that coincide the earlier is seen beside the later."""
    index = list(settings).index(name)
    row, column = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[column],
        "linestyle": STYLES[(row + column) % len(STYLES)],
        "linewidth": 1.4 + 1.3 * max(0, min(len(settings), 4) - 1 - index),
    }


def _short(name: str) -> str:
    """For matplotlib, where a dollar begins mathematics."""
    return (name if len(name) <= 34 else f"{name[:16]}…{name[-17:]}").replace("$", r"\$")


def lines(
    settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...], scale: str = "linear"
) -> Figure | None:
    """A line for each setting: the mean of its seeds, and their range as a shade."""
    curves = {}
    for name, runs in settings.items():
        series = [values for run in runs if (values := run.series(*keys)) is not None]
        if series:
            curves[name] = mean_and_range(series)
    if not curves or (scale == "log" and not any((mean > 0).any() for _, mean, *_ in curves.values())):
        return None
    # What a log axis cannot show is drawn at its floor.
    floor = -np.inf
    if scale == "log":
        floor = min(
            values[values > 0].min() for _, *drawn in curves.values() for values in drawn if (values > 0).any()
        )
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axis = figure.subplots()
    handles = {}
    for name, (steps, mean, low, high) in curves.items():
        drawn = style(settings, name)
        marker = "o" if len(steps) <= 20 else None
        (handles[name],) = axis.plot(steps, np.maximum(mean, floor), marker=marker, markersize=4, **drawn)
        if not np.array_equal(low, high):
            shade = {"color": drawn["color"], "alpha": 0.2, "linewidth": 0}
            axis.fill_between(steps, np.maximum(low, floor), np.maximum(high, floor), **shade)
    if scale == "log":
        axis.set_yscale("log")
    elif scale == "symlog":
        _symlog([axis], [mean for _, mean, *_ in curves.values()])
    elif scale == "share":
        axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axis.set_ylim(0, max(0.01, 1.05 * max(np.nanmax(high) for *_, high in curves.values())))
    axis.set(title=title, xlabel="optimiser step", ylabel=unit)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
    if 1 < len(settings) <= MOST_IN_LEGEND:
        names = [f" {_short(name)}" for name in handles]  # the space: a name may begin with an underscore
        columns = 2 if max(map(len, names)) < 26 else 1
        figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, fontsize="small")
    return figure


def flat(settings: dict[str, list[Run]], keys: tuple[str, ...]) -> bool:
    """Whether nothing happens in a figure of lines: the same value all along in every run."""
    series = [values for runs in settings.values() for run in runs if (values := run.series(*keys)) is not None]
    return bool(series) and len({value for values in series for value in (values.min(), values.max())}) == 1


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
            axis.axhline(level, color=FOREGROUND, linewidth=0.7, linestyle=style)


def _facets(
    names: list[str], title: str, unit: str, x: str = "optimiser step", sharey: bool = True
) -> tuple[Figure, dict]:
    """A panel for each setting, at most `MOST_FACETS`."""
    names = names[:MOST_FACETS]
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
    for p in PERCENTILES:
        series = [(run.series(f"{prefix}/{p}"), run.series(at)) for run in runs]
        series = [
            values[values.index.isin(where.index)]
            for values, where in series
            if values is not None and where is not None
        ]
        if not series:
            return {}
        curves[p] = mean_and_range(series)[:2]
    return curves


def envelope(
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
        band, colour = bands[name], style(settings, name)["color"]
        marker = "o" if len(band["p50"][0]) == 1 else None
        for low, high, alpha in (("p02", "p98", 0.25), ("p25", "p75", 0.4)):
            # All are there at the same steps, but for values that are not finite.
            axis.fill_between(*band[low], np.interp(band[low][0], *band[high]), color=colour, alpha=alpha, linewidth=0)
        dashed = _percentiles(settings[name], prefix, at=f"{base}/p50") if base else {}
        if dashed:
            for p in ("p02", "p98"):
                axis.plot(*dashed[p], color=FOREGROUND, linestyle="--", linewidth=1.1, marker=marker)
        else:
            axis.plot(*band["p50"], color=colour, marker=marker)
        drawn += [band["p02"][1], band["p98"][1]]
    _symlog(axes.values(), drawn, unless=30)
    return figure


def by_probability(settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...]) -> Figure | None:
    """Percentiles by bin of token probability: bars for the end of the run, dashed lines for its beginning."""
    late, early = {}, {}
    for name, runs in settings.items():
        parts = {"late": [], "early": []}
        for run in runs:
            table = run.envelope[run.envelope["policy"].isin(keys) & np.isfinite(run.envelope["p50"].astype(float))]
            steps = np.unique(table["step"])
            window = max(1, round(WINDOW * len(steps)))
            parts["late"].append(table[table["step"].isin(steps[-window:])])
            parts["early"].append(table[table["step"].isin(steps[: window if len(steps) > 1 else 0])])
        for part, ends in (("late", late), ("early", early)):
            bins = pd.concat(parts[part]).groupby(["probability_low", "probability_high"])
            pooled = bins[list(PERCENTILES)].median()[bins["tokens"].sum() >= FEWEST_TOKENS]
            if len(pooled):
                ends[name] = pooled
    if not late:
        return None
    bins = sorted(set().union(*(table.index for table in [*late.values(), *early.values()])))
    figure, axes = _facets(list(late), title, unit, "probability of the token under the behaviour policy")
    for name, axis in axes.items():
        table, colour = late[name], style(settings, name)["color"]
        axis.use_sticky_edges = False  # bars would otherwise end at the frame
        at = [bins.index(one) for one in table.index]
        for low, high, alpha in (("p02", "p98", 0.3), ("p25", "p75", 0.5)):
            axis.bar(at, table[high] - table[low], bottom=table[low], width=0.8, color=colour, alpha=alpha)
        axis.plot(at, table["p50"], color=FOREGROUND, marker="_", markersize=8, linestyle="none")
        for p in ("p02", "p98") if name in early else ():
            at = [bins.index(one) for one in early[name].index]
            axis.plot(at, early[name][p], color=FOREGROUND, linestyle="--", linewidth=1.1, marker=".")
        edges = [low for low, _ in bins] + [bins[-1][1]]
        ticks = range(len(edges) - 1, -1, -1 if len(edges) <= 14 else -2)
        axis.set_xticks([i - 0.5 for i in ticks], [f"{edges[i]:.3g}" for i in ticks], rotation=60, fontsize="small")
    _symlog(axes.values(), [table[p] for table in late.values() for p in ("p02", "p98")], unless=30)
    return figure


def _of_luminance(hue: float, luminance: float = 0.2) -> tuple[float, float, float]:
    """A colour of this hue that is as far from white as from the dark page: 4 to 1."""
    for lightness in np.linspace(0.2, 0.8, 61):
        colour = colorsys.hls_to_rgb(hue, lightness, 0.75)
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        if np.dot(linear, (0.2126, 0.7152, 0.0722)) >= luminance:
            break
    return colour


def sigma(settings: dict[str, list[Run]], title: str, unit: str, keys: tuple[str, ...]) -> Figure | None:
    layers = {
        name: {int(key[17:]): key for run in runs for key in run.log if re.fullmatch(r"alp/sigma/layer_\d+", key)}
        for name, runs in settings.items()
    }
    names = [name for name in settings if layers[name]]
    if not names:
        return None
    figure, axes = _facets(names, title, unit, sharey=False)
    count = 1 + max(layer for found in layers.values() for layer in found)
    colours = matplotlib.colors.ListedColormap([_of_luminance(hue) for hue in np.linspace(0.7, 0.0, count)])
    for name, axis in axes.items():
        for layer, key in layers[name].items():
            series = [values for run in settings[name] if (values := run.series(key)) is not None]
            if series:
                steps, mean, low, high = mean_and_range(series)
                axis.plot(steps, mean, color=colours(layer), marker="o" if len(steps) == 1 else None)
                axis.fill_between(steps, low, high, color=colours(layer), alpha=0.12, linewidth=0)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-0.5, count - 0.5), colours)
    ticks = matplotlib.ticker.MaxNLocator(nbins=8, integer=True)
    figure.colorbar(scale, ax=list(axes.values()), label="layer", ticks=ticks)
    return figure


def save(figure: Figure, path: Path, title: str) -> str:
    """Save as PNG; return as SVG to stand in the page, its text in the page's colour."""
    figure.savefig(path, dpi=160)
    drawing = StringIO()
    figure.savefig(
        drawing, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    drawing = drawing.getvalue()
    # Without the header; groups' names repeat from figure to figure, where an id may not.
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing[drawing.index("<svg") :])
    label = html.escape(title, quote=True)
    return drawing.replace(FOREGROUND, "currentColor").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
