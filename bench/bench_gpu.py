"""Times logits -> sequence log-probs on a GPU, forward and forward + backward, against the copy bandwidth.

    python bench/bench_gpu.py [--json FILE] [--repeats N]

Everything is measured in one process, contestants taking turns. The floor is a device-to-device copy of as
many bytes as the logits have, in the same rounds. `of copy` is the share of the copy's bandwidth that a
contestant reaches on the bytes that the work needs: 2 an element for bf16 forward (read), 6 for forward +
in-place backward (read, read, write), whatever else a contestant moves.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORKLOADS = [  # sequences, positions, vocabulary
    (16, 512, 128256),  # 8 pairs of 512 tokens, Llama 3
    (16, 512, 151936),  # the same, Qwen
    (64, 1, 151936),  # few long rows
]
DEVICE = "cuda"
CACHE_BYTES = 256 << 20  # buffers rotate over more memory than any L2 cache holds
AHEAD_CYCLES = 2_000_000  # the device sleeps about 1 ms while the host queues the timed work


@dataclass
class Row:
    workload: str
    pass_: str
    contestant: str
    needed_bytes: int
    median_ms: float = math.nan
    low_ms: float = math.nan  # 10th and 90th percentile
    high_ms: float = math.nan
    gb_per_s: float = math.nan
    of_copy: float = math.nan
    times_ours: float = math.nan
    extra_mib: float = math.nan
    note: str = ""


Contestant = Callable[[Tensor, Tensor, Tensor], Any]  # (logits, labels, upstream gradient)


def torch_logps(logits: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logps.gather(-1, labels[..., None])[..., 0].sum(-1)


def contestants(backward: bool) -> dict[str, Contestant]:
    import pyfast_dpo

    compiled = torch.compile(torch_logps, dynamic=False)

    def ours(logits: Tensor, labels: Tensor, inplace: bool = False) -> Tensor:
        return pyfast_dpo.sequence_logps(logits, labels, inplace_backward=inplace, impl="fused")

    def with_backward(function: Callable[..., Tensor], **options: bool) -> Contestant:
        def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> None:
            leaf = logits.detach().requires_grad_()
            torch.autograd.grad(function(leaf, labels, **options), leaf, upstream)

        return run

    def forward(function: Callable[..., Tensor]) -> Contestant:
        def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> None:
            with torch.no_grad():
                function(logits, labels)

        return run

    if not backward:
        return {
            "pyfast_dpo": forward(ours),
            "torch.compile": forward(compiled),
            "torch eager": forward(torch_logps),
        }
    return {
        "pyfast_dpo in place": with_backward(ours, inplace=True),
        "pyfast_dpo": with_backward(ours),
        "torch.compile": with_backward(compiled),
        "torch eager": with_backward(torch_logps),
    }


def timed_ms(work: Callable[[], Any]) -> float:
    """Device time of `work`, without the host's: all of it is queued before the device starts on it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD_CYCLES)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def first_run(work: Callable[[], Any]) -> tuple[float, str]:
    """Warms up; returns the peak of extra memory in MiB, or why this contestant cannot run."""
    try:
        work()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20, ""
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.nan, "out of memory"
    except Exception as error:  # a peer that cannot run here is a row with a reason, not a failure
        return math.nan, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def measure(shape: tuple[int, int, int], backward: bool, repeats: int) -> list[Row]:
    batch, length, vocab = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    source = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    logits_bytes = source.numel() * source.element_size()
    buffers = [source.clone() for _ in range(max(1, -(-CACHE_BYTES // logits_bytes)))]
    labels = torch.randint(0, vocab, (batch, length), device=DEVICE, generator=generator)
    upstream = torch.randn(batch, device=DEVICE, generator=generator)

    needed = logits_bytes * (3 if backward else 1)
    workload = f"[{batch * length}, {vocab}] bf16"
    kind = "forward + backward" if backward else "forward"
    spare = torch.empty_like(source)
    runs: dict[str, Contestant] = {"copy (floor)": lambda logits, *_: spare.copy_(logits)}
    rows = {"copy (floor)": Row(workload, kind, "copy (floor)", 2 * logits_bytes)}
    for name, function in contestants(backward).items():
        row = rows[name] = Row(workload, kind, name, needed)
        row.extra_mib, row.note = first_run(partial(function, buffers[0], labels, upstream))
        if not row.note:
            runs[name] = function
        elif name.startswith("pyfast_dpo"):
            raise RuntimeError(f"{name} on {workload}: {row.note}")

    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, function in runs.items():
            buffer = buffers[turn % len(buffers)]
            buffer.copy_(source)  # in-place backward has written over it
            for other in buffers:  # what is small enough to be cached leaves the cache again
                if other is not buffer:
                    spare.copy_(other)
            times[name].append(timed_ms(partial(function, buffer, labels, upstream)))
    ours = "pyfast_dpo in place" if backward else "pyfast_dpo"
    copy_rate = 2 * logits_bytes / statistics.median(times["copy (floor)"])
    for name, samples in times.items():
        row = rows[name]
        row.median_ms = statistics.median(samples)
        deciles = statistics.quantiles(samples, n=10)
        row.low_ms, row.high_ms = deciles[0], deciles[-1]
        row.gb_per_s = row.needed_bytes / row.median_ms / 1e6
        row.of_copy = row.needed_bytes / row.median_ms / copy_rate
        row.times_ours = row.median_ms / statistics.median(times[ours])
    return list(rows.values())


def table(rows: list[Row]) -> str:
    lines: list[str] = []
    group = ("", "")
    for row in rows:
        if (row.workload, row.pass_) != group:
            group = (row.workload, row.pass_)
            lines.append(f"\n{row.workload}, {row.pass_}, {row.needed_bytes / 1e9:.3f} GB copied")
            lines.append(
                f"{'':22}{'ms':>9}{'10%':>9}{'90%':>9}{'GB/s':>8}{'of copy':>9}{'x ours':>8}{'+MiB':>8}"
            )
        if row.note:
            lines.append(f"{row.contestant:22}{row.note}")
            continue
        lines.append(
            f"{row.contestant:22}{row.median_ms:9.3f}{row.low_ms:9.3f}{row.high_ms:9.3f}{row.gb_per_s:8.0f}"
            f"{row.of_copy:9.2f}{row.times_ours:8.2f}{row.extra_mib:8.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu.py needs a CUDA device; torch sees none", file=sys.stderr)
        return 2
    import pyfast_dpo

    build = pyfast_dpo.build_info()
    if not build["cuda"]:
        print("bench_gpu.py: this build of pyfast_dpo has no CUDA kernels", file=sys.stderr)
        return 2
    rows = []
    for shape in WORKLOADS:
        for backward in (False, True):
            rows += measure(shape, backward, options.repeats)
            torch.cuda.empty_cache()
    print(table(rows))
    if options.json:
        device = torch.cuda.get_device_name()
        figures: dict[str, Any] = {"device": device, "torch": torch.__version__, "build": build}
        figures["rows"] = [asdict(row) for row in rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
