"""The console script `pyfast-dpo`: train, demo, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyfast_dpo import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status; `argv` defaults to `sys.argv[1:]`."""
    from pyfast_dpo.cli import demo, doctor, options, train
    from pyfast_dpo.cli.console import friendly_errors

    parser = argparse.ArgumentParser(
        prog="pyfast-dpo", description="Preference optimization (DPO, IPO, KTO) with fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"pyfast-dpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train a model on preference data")
    options.add_train_options(train_parser)
    demo_parser = commands.add_parser(
        "demo", help="align a small model in a few minutes, on the CPU"
    )
    demo.add_options(demo_parser)
    commands.add_parser("doctor", help="what was built and what is used, for a bug report")

    arguments = sys.argv[1:] if argv is None else list(argv)
    with friendly_errors():
        if arguments[:1] == ["train"]:
            arguments = ["train", *options.with_config_file(train_parser, arguments[1:])]
    options_given = parser.parse_args(options.with_underscores(arguments))
    if options_given.command == "train":
        return train.run(options_given)
    if options_given.command == "demo":
        return demo.run(options_given)
    return doctor.run()
