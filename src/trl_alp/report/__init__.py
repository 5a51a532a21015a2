# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""From the logs of one or several runs to one HTML page and PNG figures. See docs/report.md.

`reading.py` reads the logs, `answer.py` says which setting is better, `drawing.py` and `figures.py` draw, `page.py`
puts all of it on a page, `__main__.py` is the command. No torch is imported.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .page import report as report

__all__ = ["report"]


def __getattr__(name: str):
    """PEP 562: the command's help answers at once."""
    if name != "report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .page import report

    return report
