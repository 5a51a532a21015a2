# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The page: the answer first, then what matters, then the rest folded away."""

import html
import math
import re
import string
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import matplotlib
from tqdm import tqdm

from . import drawing
from .answer import ENOUGH, WINDOW, Summary, difference, differing_settings, interval, summarise
from .figures import FIGURES, MAIN, WORDS, drawn
from .reading import Run, name_settings, read


_STYLE = {
    "svg.hashsalt": "trl_alp",
    "axes.grid": True,
    "grid.color": "#80808055",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.edgecolor": "#808080",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), drawing.FOREGROUND),
}


_COLUMNS = (
    "what differs", "final reward", "difference", "best reward", "in evaluation", "verdict", "max KL k3", "time",
)  # fmt: skip


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
        `ValueError`: If the number of labels is not that of the runs, `output` cannot be written to, or none of the
            directories holds a log. One that holds none beside others that do is left out, with a note on the page.
    """
    return make_report(run_dirs, output, labels)[0]


def make_report(run_dirs, output=None, labels=None) -> tuple[Path, list[str]]:
    """As [`report`]; returns also what is said of the runs that could not be read."""
    paths = [Path(run_dir) for run_dir in run_dirs]
    if not paths or (labels is not None and len(labels) != len(paths)):
        raise ValueError(
            f"{len(labels or [])} labels for {len(paths)} runs. Give at least one run, and one label for each or none."
        )
    by_path = dict(zip(paths, labels or name_settings(paths), strict=True))
    output = Path(output) if output else (paths[0] if len(by_path) == 1 else Path()) / "report"
    if len(by_path) == 1 and not paths[0].is_dir():
        raise ValueError(f"{paths[0]} does not exist, or is no folder. Give the `output_dir` of a run.")
    fresh = not output.exists()
    _make_writable(output)
    runs, failures = [], []
    for path, setting in tqdm(by_path.items(), desc="reading", unit="run", disable=None):
        try:
            runs.append(read(path, setting, drawn))
        except ValueError as error:
            failures.append(str(error))
    if not runs:
        if fresh:
            output.rmdir()
        raise ValueError("\n".join(failures))
    settings: dict[str, list[Run]] = {}
    for run in runs:
        settings.setdefault(run.setting, []).append(run)
    with matplotlib.rc_context(_STYLE):
        page = _page(settings, failures, output)
    (output / "index.html").write_text(page, encoding="utf-8")
    return output / "index.html", failures


def _make_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".trl_alp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written to: {error.strerror}.") from error


def _page(settings: dict[str, list[Run]], failures: list[str], output: Path) -> str:
    """Draw each figure, save it as PNG, and put all of them on a page."""
    runs = [run for group in settings.values() for run in group]
    notes = failures + [f"{run.path}: {note}." for run in runs for note in run.notes]
    if len(settings) > drawing.MOST_FACETS:
        notes.append(f"Figures with a panel for each setting show {drawing.MOST_FACETS} of the {len(settings)}.")
    if len(settings) > drawing.MOST_IN_LEGEND:
        notes.append("For the colours of the lines see the table.")
    missing: list[str] = []
    main, flat = [], []
    rest: dict[str, list[str]] = {}
    plan = [(section, *figure) for section, figures in FIGURES.items() for figure in figures]
    for section, name, title, unit, keys, source, caption, draw in tqdm(plan, desc="drawing", disable=None):
        without = [run.path for run in runs if not run.has(*keys)]
        figure = draw(settings, title, unit, keys) if len(without) < len(runs) else None
        (output / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        if without or figure is None:
            missing.append(_missing(title, keys, source, without, drawn=figure is not None))
        if figure is None:
            continue
        wide = ' class="wide"' if figure.get_figwidth() > 6 else ""
        picture = drawing.save(figure, output / f"{name}.png", title)
        text = f"<strong>{html.escape(title)}.</strong> {_text(caption)}"
        block = f'<figure id="{name}"{wide}><div tabindex="0">{picture}</div><figcaption>{text}</figcaption></figure>'
        of_lines = getattr(draw, "func", draw) is drawing.lines
        if of_lines and drawing.flat(settings, keys) and max(len(run.log) for run in runs) > 1:
            flat.append(block)
        elif name in MAIN:
            main.append(block)
        else:
            rest.setdefault(section, []).append(block)
    if flat:
        rest["Flat all along"] = flat
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"{len(runs)} run{'s' * (len(runs) > 1)}, {len(settings)} setting{'s' * (len(settings) > 1)}",
        head="".join(
            f'<th scope="col" class="{"what" if name == "what differs" else ""}">{name}</th>'
            for name in ("Setting", *_columns(settings))
        ),
        answer="\n".join(_answer(settings)),
        runs="\n".join(_runs(settings)),
        window=f"{100 * WINDOW:g} %",
        enough=ENOUGH,
        smoothed=f"{drawing.SMOOTHED}th",
        notes="".join(f"<li>{_text(note)}</li>" for note in notes) or "<li>None.</li>",
        missing="".join(f"<li>{_text(note)}</li>" for note in missing) or "<li>Nothing.</li>",
        words="".join(f"<dt>{_text(word)}</dt><dd>{_text(meaning)}</dd>" for word, meaning in WORDS.items()),
        main="".join(main),
        rest="\n".join(
            f"<details><summary>{section} ({len(figures)})</summary>\n"
            f'<div class="grid">\n{"".join(figures)}\n</div></details>'
            for section, figures in rest.items()
        ),
    )


def _missing(title: str, keys: tuple[str, ...], source: str, without: list[Path], drawn: bool) -> str:
    which = ", ".join(map(str, without[:3])) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    where = "nothing to draw (no value is positive, or another figure shows it)"
    if drawn:
        where = f"not in {which}"
    elif without:
        where = "no run has it"
    return f"{title}: {where} ({' or '.join(f'`{key}`' for key in keys)}, from {source})."


def _text(note: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(note))


# ---- The answer ----


def _columns(settings: dict[str, list[Run]]) -> list[str]:
    """Those that compare are for several settings."""
    return [name for name in _COLUMNS if len(settings) > 1 or name not in ("what differs", "difference")]


def _answer(settings: dict[str, list[Run]]) -> Iterator[str]:
    """A row for each setting."""
    differing = differing_settings(settings)
    base: list[Summary] | None = None
    for name, runs in settings.items():
        summaries = [summarise(run) for run in runs]
        finals = [one.final for one in summaries]
        bad = sum(one.bad for one in summaries)
        words = {one.verdict for one in summaries}
        verdict = words.pop() if len(words) == 1 else f"{bad} of {len(runs)} collapsed or diverged"
        what = "".join(
            f"<div><code>{html.escape(key)}={html.escape(str(value))}</code></div>"
            for key, value in differing[name].items()
        )
        if not what and len(settings) > 1:
            what = "-" if any(run.config for run in runs) else "<small>no <code>alp/config.json</code></small>"
        seeds = f"<small>{len(runs)} seeds</small>" if len(runs) > 1 else ""
        against = "" if base is None else _with_interval(difference(finals, [one.final for one in base]), signed=True)
        mean = partial(_mean, summaries)
        values = {
            "what differs": what,
            "final reward": _with_interval(interval(finals)),
            "difference": against or "-",
            "best reward": _with_interval(interval([one.best for one in summaries])),
            "in evaluation": _with_interval(interval([one.evaluation for one in summaries])),
            "verdict": verdict,
            "max KL k3": _number(max((one.kl for one in summaries if math.isfinite(one.kl)), default=math.nan)),
            "time": _hours(mean("hours")),
        }
        kinds = {"what differs": "what", "verdict": "bad" if bad else "good"}
        # On a phone each value stands in a line of its own, behind its name.
        cells = "".join(
            f'<td class="{kinds.get(column, "number")}" data-name="{column}">{values[column]}</td>'
            for column in _columns(settings)
        )
        yield f"<tr><th>{_swatch(settings, name)} {html.escape(name)}{seeds}</th>{cells}</tr>"
        base = base or summaries


def _runs(settings: dict[str, list[Run]]) -> Iterator[str]:
    """A row for each run."""
    for name, runs in settings.items():
        for run in runs:
            one = summarise(run)
            where = f"<small>{html.escape(str(run.path))}<br>from {html.escape(run.source)}</small>"
            numbers = (one.last_step, one.final, one.best, one.grad_norm, one.kl, one.ess)
            cells = "".join(f"<td>{_number(value)}</td>" for value in numbers)
            kind = "bad" if one.bad else "good"
            yield (
                f"<tr><th>{_swatch(settings, name)} {html.escape(name)}{where}</th>"
                f'<td class="{kind}">{one.verdict}</td>{cells}</tr>'
            )


def _swatch(settings: dict[str, list[Run]], name: str) -> str:
    style = drawing.style(settings, name)
    dashes = {"-": "none", "--": "6 3", ":": "2 3", "-.": "7 3 2 3"}[style["linestyle"]]
    line = f'stroke="{style["color"]}" stroke-width="3" stroke-dasharray="{dashes}"'
    return f'<svg width="28" height="8" aria-hidden="true"><line x1="0" x2="28" y1="4" y2="4" {line}/></svg>'


def _mean(summaries: list[Summary], name: str) -> float:
    return interval([getattr(one, name) for one in summaries])[0]


def _with_interval(pair: tuple[float, float], signed: bool = False) -> str:
    mean, half = pair
    if not math.isfinite(mean):
        return "-"
    text = f"{mean:+.3g}" if signed else _number(mean)
    return text if not math.isfinite(half) else f"{text}<small>± {half:.2g}</small>"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.6g}"


def _hours(hours: float) -> str:
    if not math.isfinite(hours):
        return "-"
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
