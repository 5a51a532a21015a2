# Copyright 2026 The trl_alp authors. Licensed under the Apache License, Version 2.0.
"""`trl-alp`: one front door for the commands."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .doctor import __main__ as doctor
from .report import __main__ as report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    parser = argparse.ArgumentParser("trl-alp", description="How far is the policy from the one that sampled?")
    parser.add_argument("--version", action="version", version=f"trl_alp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in (("doctor", doctor), ("report", report)):
        of_command = commands.add_parser(
            name,
            help=command.DESCRIPTION,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(of_command)
        of_command.set_defaults(command=command, parser=of_command)
    args = parser.parse_args(arguments)
    return args.command.run(args.parser, args)


if __name__ == "__main__":
    sys.exit(main())
