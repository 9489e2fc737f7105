"""The command line: `python -m fastpg`, or `fastpg` where it is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .crosscheck import command as check
from .demo import command as demo
from .tools import compile_report
from .tools.about import about


def main(argv: Sequence[str] | None = None) -> None:
    """The command `fastpg`. `argv` takes the place of the command line's arguments."""
    parser = argparse.ArgumentParser(prog="fastpg", description="Policy-gradient losses that never build the logits.")
    parser.add_argument(
        "--version", action="store_true", help="versions of fastpg, torch and triton, and the device and backend here"
    )
    commands = parser.add_subparsers(title="commands", metavar="command")
    demo.add_command(commands)
    compile_report.add_command(commands)
    check.add_command(commands)
    args = parser.parse_args(argv)
    if args.version:
        print(about())  # noqa: T201
    elif hasattr(args, "run"):
        args.run(args)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
