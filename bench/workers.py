"""Our trainer and TRL's as whole processes in turn: how they are started, and the frame of such a benchmark.

A script gives its cases and what a process does; it is started again with `--worker` for each process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import environment
from report import Progress, write_json

OURS, TRL = "pyfast_dpo", "trl"
RESULT = "RESULT "
Results = list[dict[str, Any]]


def peak_of_process() -> int:
    """Bytes, of the whole life of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def run_worker(script: str, who: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own measured: the same script, told whose turn it is."""
    command = [
        sys.executable, script, "--worker", who, "--case", name, "--steps", str(options.steps),
        "--data", str(options.data), "--model", options.model,
    ]  # fmt: skip
    environment = {
        **os.environ, "BENCH_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads),
        "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise RuntimeError(f"{who}, {name}: no result\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def in_turn(
    script: str, name: str, options: argparse.Namespace, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """What the processes of a case measured, by trainer; every round begins with the other one."""
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], TRL: []}
    for round_number in range(options.rounds):
        order = (OURS, TRL) if round_number % 2 == 0 else (TRL, OURS)
        for who in order:
            progress.next(f"{name}: {who}, round {round_number + 1}/{options.rounds}")
            runs[who].append(run_worker(script, who, name, options))
    return runs


def main(
    description: str,
    cases: Iterable[str],
    steps: tuple[int, str],
    work: Callable[[str, str, int, Path, str], None],
    measure: Callable[[str, argparse.Namespace, Progress], dict[str, Any]],
    report: Callable[[Results], str],
    draw: Callable[[dict[str, Any], Path], bool],
    result: str,
) -> None:
    """Runs the cases that the command line asks for; those measured before stay in `result`.json and its plot.

    Args:
        steps: of each process by default, and a word on them.
        work: of one process: who, case, steps, data, model.
    """
    order = list(cases)
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=order, default=order)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=steps[0], help=steps[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--worker", choices=(OURS, TRL), help=argparse.SUPPRESS)
    options = parser.parse_args()
    from pyfast_dpo.cli.models import resolve_model

    options.model = resolve_model(options.model)
    if options.worker:
        work(options.worker, options.case[0], options.steps, options.data, options.model)
        return
    torch.set_num_threads(options.threads)
    facts = environment()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    progress = Progress(2 * options.rounds * len(options.case))
    path = options.out / f"{result}.json"
    known = json.loads(path.read_text())["cases"] if path.exists() else []
    for name in options.case:
        measured = measure(name, options, progress)
        known = [entry for entry in known if entry["case"] != name] + [measured]
        print(report([measured]), flush=True)
        known.sort(key=lambda entry: order.index(entry["case"]))
        content = {"environment": facts, "cases": known}
        write_json(path, content)
    progress.done()
    print(report(content["cases"]))
    draw(content, options.out / f"{result}.png")
