"""The command line: `python -m fastpg`, or `fastpg` where it is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import compile_report, crosscheck, demo


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastpg", description="Policy-gradient losses that never build the logits.")
    commands = parser.add_subparsers(title="commands", metavar="command")
    demo.add_command(commands)
    compile_report.add_command(commands)
    crosscheck.add_command(commands)
    args = parser.parse_args(argv)
    if hasattr(args, "run"):
        args.run(args)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
