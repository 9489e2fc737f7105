"""The command line: `python -m fastpg`, or `fastpg` where it is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .crosscheck import command as check
from .demo import command as demo
from .tools import compile_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastpg", description="Policy-gradient losses that never build the logits.")
    commands = parser.add_subparsers(title="commands", metavar="command")
    demo.add_command(commands)
    compile_report.add_command(commands)
    check.add_command(commands)
    args = parser.parse_args(argv)
    if hasattr(args, "run"):
        args.run(args)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
