# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""Reading runs: their logs, envelopes and configurations, whatever state these are in."""

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet


_SEED = re.compile(r"[-_./ ]+seed[-_=]?\d+$", re.IGNORECASE)
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as `metrics.jsonl` has them
PERCENTILES = ("p02", "p25", "p50", "p75", "p98")


@dataclass
class Run:
    """One run. Those of one `setting` are its seeds."""

    path: Path
    setting: str
    source: str  # which log was read
    log: pd.DataFrame  # a row for each step, a column for each key
    envelope: pd.DataFrame  # all windows' percentiles by bin of token probability
    config: dict[str, object]  # the trainer's arguments, of `alp/config.json`; empty if there is none
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


def name_settings(paths: list[Path]) -> list[str]:
    """A name for the setting of each run: the end of its path without the seed, as long as it takes to be unique."""
    stems = [Path(_SEED.sub("", str(path.resolve()))).parts for path in paths]
    length = 1
    while len({stem[-length:] for stem in stems}) < len(set(stems)):
        length += 1
    return ["/".join(stem[-length:]) for stem in stems]


def read(path: Path, setting: str, drawn: Callable[[str], bool] = lambda key: True) -> Run:
    """
    Read a run.

    Args:
        path (`Path`):
            Its output directory.
        setting (`str`):
            The name of its setting.
        drawn (`Callable[[str], bool]`, *optional*):
            Which keys of the log are kept; by default all.

    Returns:
        [`Run`].

    Raises:
        `ValueError`: If there is no log that can be read.
    """
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
            sys.intern(k): _number(v)
            for k, v in row.items()
            if k != "step" and drawn(k) and (isinstance(v, int | float) or v in _NOT_FINITE)
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
    return Run(path, setting, source, log, _read_envelope(path, notes), _read_config(path, notes), notes, diverged)


def _number(value: object) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _read_config(path: Path, notes: list[str]) -> dict[str, object]:
    try:
        config = json.loads((path / "alp" / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        notes.append("alp/config.json cannot be read, so what its settings were is not known")
        return {}


def _rows(path: Path) -> tuple[Iterable[dict], str, list[str]]:
    """The rows of the log in the order of writing, the file they are from, and what could not be read."""
    notes = []
    metrics = path / "alp" / "metrics.jsonl"
    if metrics.is_file():
        rows = _json_lines(metrics, notes)
        if (first := next(rows, None)) is not None:
            return itertools.chain([first], rows), "alp/metrics.jsonl", notes
        notes.append("alp/metrics.jsonl " + ("holds no line of JSON" if metrics.stat().st_size else "is empty"))
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
    raise ValueError(_no_log(path, notes))


def _no_log(path: Path, notes: list[str]) -> str:
    """Why there is nothing to read, and what to do."""
    if not path.exists():
        return f"{path} does not exist."
    if notes:
        return f"{path} holds no log that can be read: {'; '.join(notes)}."
    logs = ("alp/metrics.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json")
    below = (
        sorted({str(file.relative_to(path)).split("/")[0] for log in logs for file in path.glob(f"*/{log}")})
        if path.is_dir()
        else []
    )
    if below:
        return f"{path} holds no log, but runs lie below it: {' '.join(str(path / name) for name in below)}"
    return (
        f"{path} holds no log: no alp/metrics.jsonl, no trainer_state.json (in it or in a checkpoint) and no "
        "tensorboard events. Give the `output_dir` of a run; `trainer.save_state()` at the end of a script, or "
        '`report_to="tensorboard"`, leaves a log in it.'
    )


def _json_lines(file: Path, notes: list[str]) -> Iterator[dict]:
    """The objects of a file of JSON lines, one at a time; at its end the others are noted."""
    broken = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                broken += 1
    if broken:
        notes.append(f"{broken} line(s) of alp/{file.name} are not JSON objects (half written?) and are left out")


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
    tables, unreadable = [_envelope_table(pd.DataFrame(_json_lines(lines, notes) if lines.is_file() else []))], 0
    for file in sorted((path / "alp").glob("envelope_*.parquet")):  # of earlier versions, one for each logging step
        try:
            tables.append(_envelope_table(pyarrow.parquet.ParquetFile(file).read().to_pandas()))
        except (OSError, ValueError, TypeError, pyarrow.ArrowException):
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable} envelope file(s) cannot be read and are left out")
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def _envelope_table(table: pd.DataFrame) -> pd.DataFrame:
    numbers = ["step", "probability_low", "probability_high", "tokens", *PERCENTILES]
    table = table.reindex(columns=[*numbers, "policy"])
    return table.astype(dict.fromkeys(numbers, float) | {"policy": "category"})
