# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves in `output_dir/alp/`: its settings, and its log and envelope, one JSON object a line.

Nothing here ends a run: what cannot be written is warned of once, and training goes on.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger


logger = get_logger(__name__)

FOLDER = "alp"  # in the trainer's output_dir
LOG = "metrics.jsonl"
ENVELOPE = "envelope.jsonl"
CONFIG = "config.json"


class RunFiles:
    """
    The files of one run; to be used on the main process alone.

    Args:
        output_dir (`str`):
            The trainer's.
        enabled (`bool`, *optional*, defaults to `True`):
            Whether to write any.
    """

    def __init__(self, output_dir: str, enabled: bool = True) -> None:
        self.folder = os.path.join(output_dir, FOLDER)
        self.enabled = enabled
        self._begun = self._failed = False

    def begin(self, step: int, history: Iterable[dict[str, Any]] = (), config: dict[str, Any] | None = None) -> None:
        """
        Make room for a run, or take up the files of the one that is resumed.

        Args:
            step (`int`):
                0, or that of the checkpoint a run is resumed from.
            history (`Iterable[dict]`, *optional*):
                The trainer's log up to there, which begins a log that is not there yet.
            config (`dict`, *optional*):
                The settings of the run, for the report to tell runs apart.
        """
        # A log of another run that cannot be moved away is not written into.
        self._begun = step > 0
        if not self.enabled:
            return
        with self._survived():
            if step > 0:
                self._cut_back(step)
                if not os.path.exists(self._path(LOG)):
                    self._write(LOG, history)
            elif os.path.isdir(self.folder):  # another run's
                numbers = (n for n in itertools.count(1) if not os.path.exists(f"{self.folder}.previous-{n}"))
                kept = f"{self.folder}.previous-{next(numbers)}"
                os.rename(self.folder, kept)
                logger.warning(f"{self.folder} held the log of another run, which is now {kept}; delete what is old.")
            self._begun = True
            if config is not None:
                os.makedirs(self.folder, exist_ok=True)
                with open(self._path(CONFIG), "w") as file:
                    json.dump(config, file, indent=1, default=str)

    def append(self, name: str, entries: Iterable[dict[str, Any]]) -> None:
        """Add entries to the file `name` ([`LOG`] or [`ENVELOPE`])."""
        # An evaluation before or after a run writes nothing; the log beside it may be another's.
        if self.enabled and self._begun:
            with self._survived():
                self._write(name, entries)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _write(self, name: str, entries: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps({key: _plain(value) for key, value in entry.items()}) + "\n" for entry in entries]
        if lines:
            os.makedirs(self.folder, exist_ok=True)
            with open(self._path(name), "a") as file:
                file.write("".join(lines))

    def _cut_back(self, step: int) -> None:
        """What is done again is logged again."""
        for name in (LOG, ENVELOPE):
            if os.path.isfile(self._path(name)):
                with open(self._path(name), errors="replace") as file:
                    lines = [line for line in file if _step_of(line) <= step]
                with open(self._path(f"{name}.tmp"), "w") as file:
                    file.writelines(lines)
                os.replace(self._path(f"{name}.tmp"), self._path(name))
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            # Earlier versions wrote one file for each logging step.
            if (match := re.fullmatch(r"envelope_(\d+)\.parquet", name)) and int(match[1]) > step:
                os.remove(self._path(name))

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                logger.warning(
                    f"The instruments cannot write to {self.folder} ({error}). Training goes on, and what cannot be "
                    "written is left out. Free the disk or mend the folder; `alp_log_files=False` writes nothing."
                )
            self._failed = True


def _step_of(line: str) -> float:
    """Step of a line; infinite where it cannot be read, as the last one of a run that was killed."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, LookupError, TypeError):
        return math.inf


def _plain(value: Any) -> Any:
    """For JSON: the log may hold tensors and numpy's numbers; those that are not finite, which JSON lacks, become the
    strings NaN, Infinity and -Infinity."""
    if value is None or isinstance(value, bool | int | str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
