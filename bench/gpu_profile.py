"""Where the time goes: the kernels on logits, once each, for a profiler around it; or every kernel of the head.

ncu ... python bench/gpu_profile.py [--rehearse]
python bench/gpu_profile.py --head [--rehearse]
"""

from __future__ import annotations

import argparse

import torch
from gpu_contenders import both, ours_logps
from gpu_heads import linear_batch, ours
from gpu_measure import Bench, Cpu, Cuda

SHAPES = [(4, 512, 128256), (64, 1, 151936)]  # many rows, and few long ones
HEADS = [(16, 512, 4096, 128256), (4, 50, 4096, 128256)]


def profile_head(bench: Bench, shape: tuple[int, int, int, int], frozen: bool) -> None:
    """Device time of every kernel of one step with the trainers' statistics."""
    step = ours(statistics=True)
    batch = linear_batch(bench, shape, frozen)
    for _ in range(3):
        step(batch)
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA] if bench.device.name == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step(batch)
        bench.device.synchronize()
    print(f"\n{shape}, {'frozen' if frozen else 'trainable'}")
    sums: dict[str, list[float]] = {}
    for event in profiler.events():
        entry = sums.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += event.device_time_total / 1e3
    for name, (count, ms) in sorted(sums.items(), key=lambda item: -item[1][1])[:25]:
        print(f"{ms:9.3f} ms {count:6.0f} x  {name[:150]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument(
        "--head", action="store_true", help="the head's kernels, by torch's profiler"
    )
    options = parser.parse_args()
    rehearse = options.rehearse
    device = "cpu" if rehearse else "cuda"
    if options.head:
        bench = Bench(Cpu() if rehearse else Cuda(), 1)
        for shape in [(4, 5, 16, 515)] if rehearse else HEADS:
            for frozen in (False, True):
                profile_head(bench, shape, frozen)
        return
    for batch, length, vocab in [(2, 3, 515)] if rehearse else SHAPES:
        logits = torch.randn(batch, length, vocab, dtype=torch.bfloat16, device=device)
        labels = torch.randint(0, vocab, (batch, length), device=device)
        both(ours_logps, inplace=True)(logits, labels, torch.ones(batch, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    print("profiled")


if __name__ == "__main__":
    main()
