"""The console script `pyfast-dpo`: train, grpo, rloo, ppo, demo, doctor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyfast_dpo import __version__

__all__ = ["main"]

ONLINE = ("grpo", "rloo", "ppo")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status; `argv` defaults to `sys.argv[1:]`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["train"]:
        return _train(arguments[1:])
    if arguments and arguments[0] in ONLINE:
        return _learn(arguments[0], arguments[1:])
    from pyfast_dpo.cli import demo, doctor

    parser = argparse.ArgumentParser(
        prog="pyfast-dpo",
        description="Preference optimization (DPO, KTO, GRPO and kin) with fused kernels.",
    )
    parser.add_argument("--version", action="version", version=f"pyfast-dpo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a model on preference data")
    for method in ONLINE:
        commands.add_parser(
            method, help=f"train a model on rewards of its own responses ({method.upper()})"
        )
    demo_parser = commands.add_parser(
        "demo", help="align a small model in a few minutes, on the CPU"
    )
    demo.add_options(demo_parser)
    commands.add_parser("doctor", help="what was built and what is used, for a bug report")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor.run()
    if options.method == "grpo":
        from pyfast_dpo.cli import demo_grpo

        return demo_grpo.run(options)
    return demo.run(options)


def _train(arguments: Sequence[str]) -> int:
    """Apart, since its options are those of the trainers, which need `transformers`."""
    from pyfast_dpo.cli.console import friendly_errors, quiet_transformers

    with friendly_errors():
        quiet_transformers("pyfast-dpo train")
        from pyfast_dpo.cli import options, train

        command, config = options.parse(arguments)
    return train.run(command, config)


def _learn(method: str, arguments: Sequence[str]) -> int:
    from pyfast_dpo.cli.console import friendly_errors, quiet_transformers

    with friendly_errors():
        quiet_transformers(f"pyfast-dpo {method}")
        from pyfast_dpo.cli import online
    return online.run(method, arguments)
