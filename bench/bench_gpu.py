"""Times the losses on a GPU against floors measured in the same rounds, and against the peers that are installed.

    python bench/bench_gpu.py [--json FILE] [--repeats N]     on a GPU
    python bench/bench_gpu.py --predict [--json FILE]         counted bytes, FLOPs and instructions; needs no GPU
    python bench/bench_gpu.py --rehearse                      tiny shapes on the CPU: does the script work?

Contestants take turns in one process. `of floor` is the share of the floor that a contestant reaches. From
logits the floor is a device-to-device copy, and the share that of its bandwidth on the bytes that the work
needs: 2 an element for a bf16 forward pass (read), 6 for forward + in-place backward (read, read, write). From
hidden states it is the bare products: three of them, two with a frozen head.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_contenders import (
    LinearBatch,
    captured,
    linear_contestants,
    logits_contestants,
    ours_step,
    torch_step,
)
from torch import Tensor

from pyfast_dpo import CompletionRows

MIB = 1 << 20
CACHE_BYTES = 256 * MIB  # more than any L2 cache holds
AHEAD_CYCLES = 6_000_000  # the device sleeps about 3 ms while the host queues the timed work
FLOOR = "floor"


@dataclass(frozen=True)
class Plan:
    """What is measured: shapes, and the share of the floor to reach."""

    logits: list[tuple[tuple[int, int, int], float, float]]  # [B, T, V]; forward, with backward
    step: tuple[int, int, int]
    linear: tuple[int, int, int, int]  # sequences, positions, hidden, vocabulary
    chunks: list[int]


PLAN = Plan(
    logits=[
        ((16, 512, 128256), 0.90, 0.85),  # 8192 rows, Llama 3
        ((16, 512, 151936), 0.90, 0.85),  # the same, Qwen
        ((64, 1, 151936), 0.70, 0.70),  # few long rows
        ((16, 512, 50257), 0.0, 0.0),  # odd: most rows are misaligned; no target
    ],
    step=(32, 512, 128256),  # 16 pairs
    linear=(16, 512, 4096, 128256),  # 8192 completion rows
    chunks=[256 * MIB, 512 * MIB, 1024 * MIB],
)
REHEARSAL = Plan([((4, 3, 515), 0.9, 0.85)], (4, 3, 515), (4, 5, 16, 515), [1 * MIB])


@dataclass
class Row:
    workload: str
    contestant: str
    needed_bytes: int
    needed_flops: int = 0
    target: float = 0.0  # share of the floor to reach; 0: none
    median_ms: float = math.nan
    low_ms: float = math.nan  # 10th and 90th percentile
    high_ms: float = math.nan
    of_floor: float = math.nan
    times_ours: float = math.nan
    extra_mib: float = math.nan
    note: str = ""


class Cuda:
    name = "cuda"

    def description(self) -> str:
        return torch.cuda.get_device_name()

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """Device time of `work`, without the host's: it is queued before the device starts on it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def extra_mib(self, work: Callable[[], Any]) -> float:
        """Peak of memory beside what was there before; the first call warms up."""
        work()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def clear(self) -> None:
        torch.cuda.empty_cache()


class Cpu:
    """For the rehearsal: the times mean nothing."""

    name = "cpu"

    def description(self) -> str:
        return "rehearsal on the CPU: the times mean nothing"

    def milliseconds(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    def extra_mib(self, work: Callable[[], Any]) -> float:
        work()
        return math.nan

    def clear(self) -> None:
        pass


class Bench:
    def __init__(self, device: Cuda | Cpu, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.random = torch.Generator(device.name).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        like = {"dtype": torch.bfloat16, "device": self.device.name, "generator": self.random}
        return torch.randn(shape, **like).mul_(scale)

    def tokens(self, vocab: int, *shape: int) -> Tensor:
        return torch.randint(0, vocab, shape, device=self.device.name, generator=self.random)

    def measure(
        self,
        rows: dict[str, Row],
        runs: dict[str, Callable[[], Any]],
        before: Callable[[], None],
        ours: str,
        share: Callable[[float, float], float],
    ) -> list[Row]:
        """Fills the rows: `runs` take turns; share(contestant's ms, floor's ms) is `of_floor`."""
        times: dict[str, list[float]] = {}
        for name, work in runs.items():
            before()
            try:
                rows[name].extra_mib = self.device.extra_mib(work)
                times[name] = []
            except Exception as error:  # a peer that cannot run is a row with a reason
                if name.startswith(("pyfast_dpo", FLOOR)):
                    raise
                text = str(error).strip().splitlines()
                rows[name].note = f"{type(error).__name__}: {text[0][:90] if text else ''}"
                self.device.clear()
        for _ in range(self.repeats):
            for name in times:
                before()
                times[name].append(self.device.milliseconds(runs[name]))
        floor, own = (statistics.median(times[name]) for name in (FLOOR, ours))
        for name, samples in times.items():
            row = rows[name]
            row.median_ms = statistics.median(samples)
            deciles = statistics.quantiles(samples, n=10, method="inclusive")
            row.low_ms, row.high_ms = deciles[0], deciles[-1]
            row.of_floor = 1.0 if name == FLOOR else share(row.median_ms, floor)
            row.times_ours = row.median_ms / own
        return list(rows.values())

    def from_logits(self, shape: tuple[int, int, int], backward: bool, target: float) -> list[Row]:
        batch, length, vocab = shape
        source = self.normal(*shape)
        logits, spare = source.clone(), torch.empty_like(source)
        labels, upstream = self.tokens(vocab, batch, length), self.normal(batch).float()
        flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=self.device.name)
        size = source.numel() * source.element_size()

        def before() -> None:
            logits.copy_(source)  # an in-place backward pass has written over it
            flush.zero_()  # what is small enough to be cached leaves the cache

        needed = size * (3 if backward else 1)
        kind = "forward + backward" if backward else "forward"
        workload = f"logits [{batch * length}, {vocab}] bf16, {kind}"
        # Every shape compiles anew, for tens of seconds: the first one only.
        compiled = self.device.name == "cuda" and shape == PLAN.logits[0][0]
        functions = logits_contestants(backward, compiled)
        runs: dict[str, Callable[[], Any]] = {FLOOR: partial(spare.copy_, logits)}
        runs |= {name: partial(f, logits, labels, upstream) for name, f in functions.items()}
        rows = {name: Row(workload, name, needed, target=target) for name in runs}
        rows[FLOOR].needed_bytes = 2 * size
        return self.measure(
            rows,
            runs,
            before,
            "pyfast_dpo in place" if backward else "pyfast_dpo",
            lambda own, copy: (needed / own) / (2 * size / copy),
        )

    def dpo_step(self, shape: tuple[int, int, int]) -> list[Row]:
        batch, length, vocab = shape
        source = self.normal(*shape)
        logits, spare = source.clone(), torch.empty_like(source)
        labels, reference = self.tokens(vocab, batch, length), self.normal(batch).float()
        inputs = (logits, labels, reference)
        size = source.numel() * source.element_size()
        runs: dict[str, Callable[[], Any]] = {FLOOR: partial(spare.copy_, logits)}
        runs["pyfast_dpo"] = partial(ours_step, *inputs)
        if self.device.name == "cuda":
            runs["pyfast_dpo, CUDA graph"] = captured(ours_step, *inputs)
        runs["torch eager"] = partial(torch_step, *inputs)
        workload = f"DPO step from logits [{batch} x {length}, {vocab}] bf16"
        rows = {name: Row(workload, name, 3 * size, target=0.85) for name in runs}
        rows[FLOOR].needed_bytes = 2 * size

        def before() -> None:
            logits.copy_(source)

        return self.measure(
            rows,
            runs,
            before,
            "pyfast_dpo",
            lambda own, copy: (3 * size / own) / (2 * size / copy),
        )

    def from_hidden(
        self, shape: tuple[int, int, int, int], chunks: list[int], frozen: bool
    ) -> list[Row]:
        sequences, length, width, vocab = shape
        count = sequences * length
        labels = self.tokens(vocab, sequences, length)
        batch = LinearBatch(
            self.normal(sequences, length, width).requires_grad_(),
            self.normal(vocab, width, scale=width**-0.5).requires_grad_(not frozen),
            labels,
            CompletionRows.from_labels(labels),
            self.normal(sequences).float(),
        )
        states, weight = batch.hidden.detach().flatten(0, 1), batch.weight.detach()
        logits = self.normal(count, vocab)
        outputs = torch.empty_like(states), torch.empty_like(weight)

        def products() -> None:
            torch.mm(states, weight.T, out=logits)
            torch.mm(logits, weight, out=outputs[0])
            if not frozen:
                torch.mm(logits.T, states, out=outputs[1])

        number = 2 if frozen else 3
        workload = f"hidden [{count}, {width}], V = {vocab} bf16, " + (
            "frozen head" if frozen else "trainable head"
        )
        runs: dict[str, Callable[[], Any]] = {FLOOR: products}
        runs |= {name: partial(f, batch) for name, f in linear_contestants(chunks).items()}
        flops = number * 2 * count * width * vocab
        needed = 2 * (2 * count * width + (1 if frozen else 2) * vocab * width)
        rows = {name: Row(workload, name, needed, flops, 1 / 1.10) for name in runs}
        ours = [name for name in runs if name.startswith("pyfast_dpo")]
        return self.measure(
            rows, runs, lambda: None, ours[len(ours) // 2], lambda own, bare: bare / own
        )


def table(rows: list[Row]) -> str:
    lines: list[str] = []
    group = ""
    for row in rows:
        if row.workload != group:
            group = row.workload
            floor = f"{row.needed_bytes / 1e9:.3f} GB copied"
            if row.needed_flops:
                floor = f"{row.needed_flops / 1e12:.2f} TFLOP in bare products"
            lines.append(f"\n{group}: floor {floor}")
            lines.append(
                f"{'':26}{'ms':>9}{'10%':>9}{'90%':>9}{'of floor':>10}{'target':>8}{'x ours':>8}{'+MiB':>8}"
            )
        if row.note:
            lines.append(f"{row.contestant:26}{row.note}")
            continue
        target = f"{row.target:8.2f}" if row.target else f"{'':8}"
        lines.append(
            f"{row.contestant:26}{row.median_ms:9.3f}{row.low_ms:9.3f}{row.high_ms:9.3f}"
            f"{row.of_floor:10.2f}{target}{row.times_ours:8.2f}{row.extra_mib:8.0f}"
        )
    return "\n".join(lines)


def run(device: Cuda | Cpu, plan: Plan, repeats: int, budget_s: float) -> tuple[list[Row], str]:
    """All rows, and what was left out when the time was up."""
    bench = Bench(device, repeats)
    jobs: list[tuple[str, Callable[[], list[Row]]]] = []
    for shape, forward, both in plan.logits:
        jobs.append((f"{shape} forward", partial(bench.from_logits, shape, False, forward)))
        jobs.append((f"{shape} backward", partial(bench.from_logits, shape, True, both)))
    for frozen in (False, True):
        work = partial(bench.from_hidden, plan.linear, plan.chunks, frozen)
        jobs.append((f"linear, frozen={frozen}", work))
    jobs.append(("DPO step", partial(bench.dpo_step, plan.step)))
    start, rows, left = time.monotonic(), [], []
    for name, job in jobs:
        if time.monotonic() - start > budget_s:
            left.append(name)
            continue
        print(f"{name} ...", flush=True)
        try:
            rows += job()
        except Exception as error:  # one workload that fails does not lose the others
            left.append(f"{name} ({type(error).__name__}: {error})")
        device.clear()
    return rows, "; ".join(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--budget", type=float, default=240, help="seconds; then no new workload")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--predict", action="store_true", help="count, on any machine")
    mode.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args()
    import pyfast_dpo

    if options.predict:
        from gpu_predict import predict

        try:
            figures = predict(PLAN)
        except FileNotFoundError as error:  # nvdisasm: pip install nvidia-cuda-nvdisasm
            print(f"bench_gpu.py --predict: {error}", file=sys.stderr)
            return 2
        print(figures.pop("table"))
    else:
        build = pyfast_dpo.build_info()
        if not options.rehearse and not build["cuda_usable"]:
            print("bench_gpu.py needs a CUDA device and a build with CUDA kernels", file=sys.stderr)
            return 2
        device = Cpu() if options.rehearse else Cuda()
        plan = REHEARSAL if options.rehearse else PLAN
        rows, left = run(device, plan, options.repeats, options.budget)
        print(table(rows))
        print(f"\nleft out or failed: {left}" if left else "")
        figures = {"device": device.description(), "torch": torch.__version__, "build": build}
        figures |= {"left_out": left, "rows": [asdict(row) for row in rows]}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    return 1 if figures.get("left_out") else 0


if __name__ == "__main__":
    sys.exit(main())
