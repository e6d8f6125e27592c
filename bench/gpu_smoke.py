"""The shortest check on a GPU that means something: both kernel families against float64, on real vocabularies.

python bench/gpu_smoke.py [--device cpu]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

import pyfast_dpo
from pyfast_dpo import CompletionRows

VOCAB, WIDTH = 128256, 256


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device == "cuda":
        subprocess.run(["nvidia-smi"], check=False)
        print(torch.cuda.get_device_properties(0))
    print(pyfast_dpo.build_info(), flush=True)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 3, VOCAB, generator=generator)
    hidden = torch.randn(4, 3, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) / WIDTH**0.5
    labels = torch.randint(VOCAB, (4, 3), generator=generator)
    inputs = [t.to(device, torch.bfloat16).requires_grad_() for t in (logits, hidden, weight)]
    truths = [t.detach().cpu().double().requires_grad_() for t in inputs]
    ours = pyfast_dpo.sequence_logps(inputs[0], labels.to(device), impl="fused")
    true = pyfast_dpo.sequence_logps(truths[0], labels, impl="torch")
    rows = CompletionRows.from_labels(labels)
    loss = pyfast_dpo.fused_linear_dpo_loss(
        *inputs[1:], rows=rows.to(device), impl="fused", beta=1.0
    ).loss
    true_loss = pyfast_dpo.fused_linear_dpo_loss(
        *truths[1:], rows=rows, impl="torch", beta=1.0
    ).loss
    pairs = [(ours, true), (loss, true_loss)]
    gradients = torch.autograd.grad(ours.sum() + loss, inputs)
    pairs += zip(gradients, torch.autograd.grad(true.sum() + true_loss, truths), strict=True)
    good = True
    for (mine, truth), name in zip(
        pairs, ("log-probs", "loss", "d logits", "d hidden", "d weight"), strict=True
    ):
        difference = (mine.detach().cpu().double() - truth.detach()).norm() / truth.detach().norm()
        tolerance = 1e-5 if mine.dtype == torch.float32 else 1e-2
        print(f"{name}: error {difference:.1e} of the norm, at most {tolerance:.0e}")
        good &= bool(difference <= tolerance)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
