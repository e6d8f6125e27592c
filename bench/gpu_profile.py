"""The kernels on logits, once each: for a profiler around it.

ncu ... python bench/gpu_profile.py [--rehearse]
"""

from __future__ import annotations

import argparse

import torch
from gpu_contenders import both, ours_logps

SHAPES = [(4, 512, 128256), (64, 1, 151936)]  # many rows, and few long ones


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    rehearse = parser.parse_args().rehearse
    device = "cpu" if rehearse else "cuda"
    for batch, length, vocab in [(2, 3, 515)] if rehearse else SHAPES:
        logits = torch.randn(batch, length, vocab, dtype=torch.bfloat16, device=device)
        labels = torch.randint(0, vocab, (batch, length), device=device)
        both(ours_logps, inplace=True)(logits, labels, torch.ones(batch, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
    print("profiled")


if __name__ == "__main__":
    main()
