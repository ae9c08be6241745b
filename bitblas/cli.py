"""The command line: `python -m bitblas bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status, 0 where all went well."""
    parser = argparse.ArgumentParser(prog="python -m bitblas", description="bitblas's commands.")
    parser.add_argument("--version", action="version", version=f"bitblas {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    from .bench import command  # after the library itself; nothing imports it but this line

    command.add_parser(commands)
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return int(options.run(options))
