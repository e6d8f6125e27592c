"""Times the losses on a GPU against floors measured in the same rounds, and against the peers that are installed.

    python bench/bench_gpu.py [--only GROUP ...] [--json FILE] [--repeats N]     on a GPU
    python bench/bench_gpu.py --predict [--json FILE]     counted bytes and instructions; needs no GPU
    python bench/bench_gpu.py --rehearse                  tiny shapes on the CPU: does the script work?

Groups: logits, head, attention, training, compiled. Contestants take turns in one process. The file is written after
every workload, and keeps the rows of workloads that are not measured anew. `of floor` is the share of the floor
that a contestant reaches. From logits the floor is a device-to-device copy, and the share that of its bandwidth on the
bytes that the work needs: 2 an element for a bf16 forward pass (read), 6 for forward + in-place backward (read, read,
write). From hidden states it is the bare products: three of them, two with a frozen head. Attention and training
have none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_attention import Heads, attention
from gpu_contenders import captured, compiled_contestants, logits_contestants, ours_step, torch_step
from gpu_heads import linear_batch, linear_contestants
from gpu_measure import FLOOR, MIB, Bench, Cpu, Cuda, Row, reason, table
from gpu_training import ModelShape, training_step

import pyfast_dpo

CACHE_BYTES = 256 * MIB  # more than any L2 cache holds
GROUPS = ("logits", "head", "training", "attention", "compiled")
Job = tuple[str, Callable[[], list[Row]]]


@dataclass(frozen=True)
class Plan:
    """What is measured: shapes, and the share of the floor to reach."""

    logits: list[tuple[tuple[int, int, int], float, float]]  # [B, T, V]; forward, with backward
    step: tuple[int, int, int]
    linear: list[tuple[int, int, int, int]]  # sequences, positions, hidden, vocabulary
    chunks: list[int]  # bytes, beside the default, of the first of these
    attention: Heads
    model: ModelShape


PLAN = Plan(
    logits=[
        ((16, 512, 128256), 0.90, 0.85),  # 8192 rows, Llama 3
        ((64, 1, 151936), 0.75, 0.75),  # few long rows
        ((16, 512, 151936), 0.90, 0.85),  # Qwen
        ((16, 512, 50257), 0.0, 0.0),  # odd: most rows are misaligned; no target
    ],
    step=(32, 512, 128256),  # 16 pairs
    linear=[
        (16, 512, 4096, 128256),
        (4, 50, 4096, 128256),
        (4, 256, 4096, 128256),
        (4, 256, 4096, 128257),  # a token was added: the bare products are several times slower too
    ],
    chunks=[256 * MIB, 1024 * MIB],
    attention=Heads(32, 8, 64, pairs=8),
    model=ModelShape(2048, 8192, 16, 32, 8, 128256, pairs=16, steps=10, skipped=4),
)
REHEARSAL = Plan(
    logits=[((4, 3, 515), 0.9, 0.85)],
    step=(4, 3, 515),
    linear=[(4, 5, 16, 515)],
    chunks=[1 * MIB],
    attention=Heads(2, 1, 8, pairs=2),
    model=ModelShape(16, 32, 2, 2, 1, 515, pairs=2, steps=3, skipped=1),
)


def from_logits(
    bench: Bench,
    shape: tuple[int, int, int],
    backward: bool,
    target: float,
    functions: dict[str, Callable[..., Any]],
    name: str = "logits",
) -> list[Row]:
    batch, length, vocab = shape
    source = bench.normal(*shape)
    logits, spare = source.clone(), torch.empty_like(source)
    labels, upstream = bench.tokens(vocab, batch, length), bench.normal(batch).float()
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=bench.device.name)
    size = source.numel() * source.element_size()

    def before() -> None:
        logits.copy_(source)  # an in-place backward pass has written over it
        flush.zero_()  # what is small enough to be cached leaves the cache

    needed = size * (3 if backward else 1)
    kind = "forward + backward" if backward else "forward"
    workload = f"{name} [{batch * length}, {vocab}] bf16, {kind}"
    runs: dict[str, Callable[[], Any]] = {FLOOR: partial(spare.copy_, logits)}
    runs |= {name: partial(f, logits, labels, upstream) for name, f in functions.items()}
    rows = {name: Row(workload, name, needed, target=target) for name in runs}
    rows[FLOOR].needed_bytes = 2 * size
    ours = next(name for name in runs if name.startswith("pyfast_dpo"))
    return bench.measure(
        rows, runs, ours, lambda own, copy: (needed / own) / (2 * size / copy), before
    )


def dpo_step(bench: Bench, shape: tuple[int, int, int]) -> list[Row]:
    batch, length, vocab = shape
    source = bench.normal(*shape)
    logits, spare = source.clone(), torch.empty_like(source)
    inputs = (logits, bench.tokens(vocab, batch, length), bench.normal(batch).float())
    size = source.numel() * source.element_size()
    runs: dict[str, Callable[[], Any]] = {FLOOR: partial(spare.copy_, logits)}
    runs["pyfast_dpo"] = partial(ours_step, *inputs)
    if bench.device.name == "cuda":
        runs["pyfast_dpo, CUDA graph"] = captured(ours_step, *inputs)
    runs["torch eager"] = partial(torch_step, *inputs)
    workload = f"DPO step from logits [{batch} x {length}, {vocab}] bf16"
    rows = {name: Row(workload, name, 3 * size, target=0.85) for name in runs}
    rows[FLOOR].needed_bytes = 2 * size

    def before() -> None:
        logits.copy_(source)

    share = lambda own, copy: (3 * size / own) / (2 * size / copy)  # noqa: E731
    return bench.measure(rows, runs, "pyfast_dpo", share, before)


def from_hidden(
    bench: Bench, shape: tuple[int, int, int, int], frozen: bool, chunks: list[int]
) -> list[Row]:
    sequences, length, width, vocab = shape
    count = sequences * length
    batch = linear_batch(bench, shape, frozen)
    states, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
    logits = bench.normal(count, vocab)
    outputs = torch.empty_like(states), torch.empty_like(weight)

    def products() -> None:
        torch.mm(states, weight.T, out=logits)
        torch.mm(logits, weight, out=outputs[0])
        if not frozen:
            torch.mm(logits.T, states, out=outputs[1])

    number = 2 if frozen else 3
    head = "frozen head" if frozen else "trainable head"
    workload = f"hidden [{count}, {width}], V = {vocab} bf16, {head}"
    runs: dict[str, Callable[[], Any]] = {FLOOR: products}
    runs |= {name: partial(f, batch) for name, f in linear_contestants(chunks).items()}
    flops = number * 2 * count * width * vocab
    needed = 2 * (2 * count * width + (1 if frozen else 2) * vocab * width)
    rows = {name: Row(workload, name, needed, flops, 1 / 1.12) for name in runs}
    return bench.measure(rows, runs, "pyfast_dpo")


def jobs_of(group: str, bench: Bench, plan: Plan) -> Iterator[Job]:
    if group == "logits":
        for shape, forward, both in plan.logits:
            for backward, target in ((False, forward), (True, both)):
                functions = logits_contestants(backward)
                work = partial(from_logits, bench, shape, backward, target, functions)
                yield f"logits {shape}, {backward=}", work
        yield "DPO step from logits", partial(dpo_step, bench, plan.step)
    elif group == "head":
        for shape in plan.linear:
            for frozen in (False, True):
                chunks = plan.chunks if shape == plan.linear[0] and not frozen else []
                work = partial(from_hidden, bench, shape, frozen, chunks)
                yield f"head {shape}, {frozen=}", work
    elif group == "attention":
        yield "attention", partial(attention, bench, plan.attention)
    elif group == "training":
        for checkpointing in (None, False):
            work = partial(training_step, bench.device, plan.model, checkpointing)
            yield f"training, {checkpointing=}", work
    else:  # every shape compiles anew, for tens of seconds: one only
        shape, forward, both = plan.logits[0]
        for backward, target in ((False, forward), (True, both)):
            functions = compiled_contestants(backward)
            work = partial(
                from_logits, bench, shape, backward, target, functions, "compiled, logits"
            )
            yield f"compiled {shape}, {backward=}", work


def run(
    bench: Bench, plan: Plan, groups: list[str], budget_s: float, keep: Callable[[list[Row]], None]
) -> str:
    """Hands `keep` the rows of every workload as they come; returns what was left out or failed."""
    start, left = time.monotonic(), []
    for name, job in (job for group in groups for job in jobs_of(group, bench, plan)):
        if time.monotonic() - start > budget_s:
            left.append(name)
            continue
        print(f"{name} ...", flush=True)
        try:
            rows = job()
        except Exception as error:  # one workload that fails does not lose the others
            left.append(f"{name} ({reason(error)})")
        else:
            keep(rows)
            failed = [r for r in rows if r.note and r.contestant.startswith("pyfast_dpo")]
            left += [f"{name}, {row.contestant} ({row.note})" for row in failed]
        bench.device.clear()
    return "; ".join(left)


class Figures:
    """The JSON file: facts, and rows, those of an older file too where they are not measured anew."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.rows: list[dict[str, Any]] = old.get("rows", [])
        self.left: list[str] = old.get("left_out", [])

    def add(self, rows: list[Row]) -> None:
        print(table(rows), flush=True)
        new = {row.workload for row in rows}
        self.rows = [row for row in self.rows if row["workload"] not in new]
        self.rows += [asdict(row) for row in rows]
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.facts, "left_out": self.left, "rows": self.rows}, indent=1)
        self.path.write_text(text + "\n")


def predict(path: Path | None) -> int:
    from gpu_predict import predict as count

    try:
        figures = count(PLAN)
    except FileNotFoundError as error:  # nvdisasm: pip install nvidia-cuda-nvdisasm
        print(f"bench_gpu.py --predict: {error}", file=sys.stderr)
        return 2
    print(figures.pop("table"))
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4, help="of a workload's rounds")
    parser.add_argument("--budget", type=float, default=240, help="seconds; then no new workload")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--predict", action="store_true", help="count, on any machine")
    mode.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    if options.predict:
        return predict(options.json)
    build = pyfast_dpo.build_info()
    if not options.rehearse and not build["cuda_usable"]:
        print("bench_gpu.py needs a CUDA device and a build with CUDA kernels", file=sys.stderr)
        return 2
    device = Cpu() if options.rehearse else Cuda()
    facts = {"device": device.description(), "torch": torch.__version__, "build": build}
    figures = Figures(options.json, facts)
    left = run(
        Bench(device, options.repeats, options.seconds),
        REHEARSAL if options.rehearse else PLAN,
        options.only,
        options.budget,
        figures.add,
    )
    if left:
        print(f"\nleft out or failed: {left}")
        figures.left.append(left)
        figures.write()
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
