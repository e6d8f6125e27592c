"""How the GPU benchmarks measure: contestants take turns with a floor in one process; a row is one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import ratios, spread
from torch import Tensor

MIB = 1 << 20
AHEAD_CYCLES = 20_000_000  # the device sleeps about 10 ms while the host queues the timed work
FLOOR = "floor"
FEWEST_ROUNDS = 5


@dataclass
class Row:
    workload: str
    contestant: str
    needed_bytes: int = 0
    needed_flops: int = 0
    target: float = 0.0  # share of the floor to reach; 0: none
    rounds: int = 0
    median_ms: float = math.nan
    low_ms: float = math.nan  # quartiles
    high_ms: float = math.nan
    of_floor: float = math.nan  # median and quartiles of the shares in one round each
    of_floor_low: float = math.nan
    of_floor_high: float = math.nan
    times_ours: float = math.nan
    extra_mib: float = math.nan
    note: str = ""

    def fill(self, milliseconds: list[float]) -> None:
        self.rounds = len(milliseconds)
        self.median_ms, self.low_ms, self.high_ms = spread(milliseconds)


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

    def synchronize(self) -> None:
        torch.cuda.synchronize()

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

    def synchronize(self) -> None:
        pass

    def clear(self) -> None:
        pass


class Bench:
    """Random inputs of one seed, and the measuring of a workload: up to `repeats` rounds, fewer (but five) when
    `seconds` are over."""

    def __init__(self, device: Cuda | Cpu, repeats: int, seconds: float = math.inf) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
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
        ours: str,
        share: Callable[[float, float], float] = lambda own, floor: floor / own,
        before: Callable[[], None] = lambda: None,
    ) -> list[Row]:
        """Fills the rows. share(contestant's ms, floor's ms) is `of_floor`. A contestant that fails is a row
        with the reason; a floor that fails ends the workload."""
        times: dict[str, list[float]] = {}
        for name, work in runs.items():
            before()
            try:
                rows[name].extra_mib = self.device.extra_mib(work)
            except Exception as error:
                if name == FLOOR:
                    raise
                rows[name].note = reason(error)
                self.device.clear()
            else:
                times[name] = []
        end = time.monotonic() + self.seconds
        for done in range(self.repeats):
            if done >= FEWEST_ROUNDS and time.monotonic() > end:
                break
            for name in times:
                before()
                times[name].append(self.device.milliseconds(runs[name]))
        for name, samples in times.items():
            row = rows[name]
            row.fill(samples)
            if FLOOR in times:
                shares = [share(*pair) for pair in zip(samples, times[FLOOR], strict=True)]
                shares = [1.0] * len(samples) if name == FLOOR else shares
                row.of_floor, row.of_floor_low, row.of_floor_high = spread(shares)
            if ours in times:
                row.times_ours = ratios(samples, times[ours]).median
        return list(rows.values())


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120] if lines else ''}"


def table(rows: list[Row]) -> str:
    lines: list[str] = []
    group = ""
    for row in rows:
        if row.workload != group:
            group = row.workload
            floor = ""
            if row.needed_flops:
                floor = f": floor {row.needed_flops / 1e12:.2f} TFLOP in bare products"
            elif row.needed_bytes:
                floor = f": floor {row.needed_bytes / 1e9:.3f} GB copied"
            lines.append(f"\n{group}{floor}")
            lines.append(
                f"{'':30}{'ms':>9}{'25%':>9}{'75%':>9}{'of floor':>10}{'25%':>7}{'75%':>7}{'target':>8}"
                f"{'x ours':>8}{'+MiB':>8}"
            )
        if row.note:
            lines.append(f"{row.contestant:30}{row.note}")
            continue
        target = f"{row.target:8.2f}" if row.target else f"{'':8}"
        lines.append(
            f"{row.contestant:30}{row.median_ms:9.3f}{row.low_ms:9.3f}{row.high_ms:9.3f}"
            f"{row.of_floor:10.3f}{row.of_floor_low:7.3f}{row.of_floor_high:7.3f}{target}"
            f"{row.times_ours:8.2f}{row.extra_mib:8.0f}"
        )
    return "\n".join(lines)
