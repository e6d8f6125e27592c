"""What every benchmark shares: alternating timing, statistics, peak memory, environment.

A figure is a ratio of two times measured in the same round of the same process: what else runs on the
machine slows both, and largely cancels.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import multiprocessing
import multiprocessing.forkserver
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import pyfast_dpo

Result = TypeVar("Result")
Work = Callable[[], object]
Prepare = Callable[
    [], Work
]  # makes fresh inputs, outside the timed region, and returns what is timed

# --- statistics ---------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Spread of the quotients of measurements that belong together (same round)."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


# --- timing -------------------------------------------------------------------------------------


def wall_seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    contenders: Mapping[str, Prepare],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[Work], float] = wall_seconds,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds of every contender, one measurement a round, each round starting with the next one.

    Args:
        contenders: name -> `Prepare`.
        rounds, warmup: measured rounds, and rounds before them that are thrown away.
        clock: seconds of one call; a GPU benchmark passes one that waits for the device.
        progress: called with a line of text before every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for index in range(-warmup, rounds):
        progress(f"round {index + 1}/{rounds}" if index >= 0 else "warm-up")
        first = index % len(names)
        for name in names[first:] + names[:first]:
            work = contenders[name]()
            elapsed = clock(work)
            del work  # its memory must be free again when the next contender runs
            if index >= 0:
                seconds[name].append(elapsed)
    return seconds


class OtherLoad:
    """What the machine's CPUs did for others since this object was made: what a reader must know of noise."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float | None:
        """Share of the CPU time that other processes, or the host of a virtual machine, took."""
        now = self._now()
        if self.start is None or now is None or now[0] == self.start[0]:
            return None
        total, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, busy - own) / total

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            ticks = [int(text) for text in Path("/proc/stat").read_text().split()[1:9]]
        except OSError:
            return None
        total, idle = sum(ticks), ticks[3] + ticks[4]
        own = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        return total, total - idle, own


def alternate_with_floor(
    make: Callable[[], Mapping[str, Prepare]], floor: str, repeats: int, rounds: int, **options: Any
) -> tuple[dict[str, list[float]], float | None]:
    """(seconds of every contender, load of others), where one of them spends its operations in registers alone
    (`peak.load_peak`).

    Args:
        make: the contenders; it may start a compiler, which is not counted as others' load.
        floor: that one's name; it spends them `repeats` times at once, since its threads begin beside those
            of torch, which spin for milliseconds after their work.
        rounds, options: of `alternate`.
    """
    contenders = make()
    others = OtherLoad()
    seconds = alternate(contenders, rounds, warmup=3, **options)
    seconds[floor] = [value / repeats for value in seconds[floor]]
    return seconds, others.share()


# --- memory -------------------------------------------------------------------------------------


class PeakMemory(NamedTuple):
    """Bytes above what was there before the call, at the worst moment of it."""

    allocated: int  # of tensors, exact
    resident: int | None  # of the whole process, in pages; None where Linux' /proc is missing


def peak_memory(prepare: Prepare) -> PeakMemory:
    """Peak memory of one call on the CPU. Call it in a fresh process, after a small warm-up."""
    resident = _peak_resident(
        prepare()
    )  # first: memory freed by an earlier call would hide some of it
    return PeakMemory(_peak_allocated(prepare()), resident)


def in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)` in a process of its own: no memory that an earlier contender left behind.

    Not a plain fork: the OpenMP threads of a process that has computed do not survive it.
    """
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def start_fork_server(modules: Sequence[str]) -> None:
    """Starts importing `modules` once for all later `in_fresh_process`, in the background."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()


def _peak_allocated(work: Work) -> int:
    with (
        _silent_stderr(),
        torch.autograd.profiler.profile(profile_memory=True) as profile,
    ):
        work()
    current = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def _peak_resident(work: Work) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
        before = _resident_high_water_mark()
        work()
        return _resident_high_water_mark() - before
    except OSError:
        return None


def _resident_high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """torch's profiler announces its start and stop there, whatever its log level."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# --- environment --------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a figure depends on. No host names, no paths."""
    info = pyfast_dpo.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "pyfast_dpo": pyfast_dpo.__version__,
        "compiler": info["compiler"],
        "cpu_kernels_used": info["cpu_used"],
        "cuda_kernels": info["cuda"],
        "torch": torch.__version__,
        "trl": _version("trl"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
