# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""The report as a command."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


DESCRIPTION = (
    "Draw the logs of one or several runs, of any trainer of TRL, on one HTML page that says which is better."
)
EPILOG = """\
examples:
  trl-alp report runs/alp_seed1 runs/alp_seed2 runs/bypass_seed1 runs/bypass_seed2 --output report
  trl-alp report runs/a runs/b --label "lr 1e-6" "lr 1e-5"

Runs are read from alp/metrics.jsonl, else trainer_state.json, else tensorboard events. Runs whose paths are equal up
to a trailing seed and a number, or that are given the same label, are seeds of one setting.

exit status: 0 all runs are on the page, 1 the page lacks some that have no readable log, 2 no page was written
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="output directory of a run")
    parser.add_argument(
        "--output", type=Path, help="where to write (default: RUN_DIR/report for one run, else report)"
    )
    parser.add_argument(
        "--label", nargs="+", metavar="NAME", help="a name for each run (default: from the paths, without the seed)"
    )


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{parser.prog}: the report needs matplotlib: `pip install matplotlib`.", file=sys.stderr)
        return 2
    from .page import make_report

    try:
        page, failures = make_report(args.run_dirs, args.output, args.label)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"{parser.prog}: left out: {failure}", file=sys.stderr)
    print(page)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command by itself, `trl-alp-report`."""
    parser = argparse.ArgumentParser(
        "trl-alp-report", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    return run(parser, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
