"""The console script `pyfast-dpo`: train, demo, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyfast_dpo import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status; `argv` defaults to `sys.argv[1:]`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    from pyfast_dpo.cli import demo, doctor

    parser = argparse.ArgumentParser(
        prog="pyfast-dpo", description="Preference optimization (DPO, IPO, KTO) with fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"pyfast-dpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model on preference data")
    demo_parser = commands.add_parser(
        "demo", help="align a small model in a few minutes, on the CPU"
    )
    demo.add_options(demo_parser)
    commands.add_parser("doctor", help="what was built and what is used, for a bug report")
    options = parser.parse_args(arguments)
    return demo.run(options) if options.command == "demo" else doctor.run()


def _train(arguments: Sequence[str]) -> int:
    """Apart, since its options are those of the trainers, which need `transformers`."""
    from pyfast_dpo.cli.console import friendly_errors, quiet_transformers

    with friendly_errors():
        quiet_transformers("pyfast-dpo train")
        from pyfast_dpo.cli import options, train

        command, config = options.parse(arguments)
    return train.run(command, config)
