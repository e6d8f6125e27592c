"""Log-probs from logits: who takes part in bench_gpu.py. Imports of peers are inside their functions, so that one
that is missing is a row with a reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast_dpo

BETA = 0.1
Logps = Callable[[Tensor, Tensor], Tensor]  # logits [B, T, V], labels [B, T] -> [B] or [B, T]
Contestant = Callable[..., Any]


def dpo_loss(logps: Tensor, reference: Tensor) -> Tensor:
    """The sigmoid loss in plain torch, from log-probs `[2P]`."""
    chosen, rejected = (logps - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


# --- log-probs from logits ----------------------------------------------------------------------


def torch_logps(logits: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logps.gather(-1, labels[..., None])[..., 0].sum(-1)


def trl_logps(logits: Tensor, labels: Tensor) -> Tensor:
    selective_log_softmax = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return selective_log_softmax(logits, labels).float().sum(-1)


def liger_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Its cross-entropy over rows; computes its gradient in the forward pass, over the logits."""
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    losses = function(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return -losses.view(labels.shape).float().sum(-1)


def quack_logps(logits: Tensor, labels: Tensor) -> Tensor:
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    losses = function(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return -losses.view(labels.shape).float().sum(-1)


def ours_logps(logits: Tensor, labels: Tensor, inplace: bool = False) -> Tensor:
    return pyfast_dpo.sequence_logps(logits, labels, inplace_backward=inplace, impl="fused")


def forward(function: Logps) -> Contestant:
    def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> None:
        with torch.no_grad():
            function(logits, labels)

    return run


def both(function: Callable[..., Tensor], **options: bool) -> Contestant:
    def run(logits: Tensor, labels: Tensor, upstream: Tensor) -> None:
        leaf = logits.detach().requires_grad_()
        torch.autograd.grad(function(leaf, labels, **options), leaf, upstream)

    return run


def logits_contestants(backward: bool) -> dict[str, Contestant]:
    """name -> (logits, labels, upstream gradient [B]) -> anything."""
    peers: dict[str, Logps] = {
        "torch eager": torch_logps,
        "TRL": trl_logps,
        "Liger": liger_logps,
        "QuACK": quack_logps,
    }
    if not backward:
        return {
            name: forward(function)
            for name, function in {"pyfast_dpo": ours_logps, **peers}.items()
        }
    return {
        "pyfast_dpo in place": both(ours_logps, inplace=True),
        "pyfast_dpo": both(ours_logps),
        **{name: both(function) for name, function in peers.items()},
    }


def compiled_contestants(backward: bool) -> dict[str, Contestant]:
    """torch.compile against ours: apart from the others, since it takes its time to compile."""
    compiled = torch.compile(torch_logps, dynamic=False)
    if backward:
        return {
            "pyfast_dpo in place": both(ours_logps, inplace=True),
            "torch.compile": both(compiled),
        }
    return {"pyfast_dpo": forward(ours_logps), "torch.compile": forward(compiled)}


# --- a DPO loss step from logits ----------------------------------------------------------------


def ours_step(logits: Tensor, labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    out = pyfast_dpo.fused_dpo_loss(
        leaf, labels, reference_logps=reference, beta=BETA, inplace_backward=True, impl="fused"
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), gradient


def torch_step(logits: Tensor, labels: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = dpo_loss(torch_logps(leaf, labels), reference)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def captured(step: Contestant, logits: Tensor, labels: Tensor, reference: Tensor) -> Contestant:
    """The step as a CUDA graph over these very tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(logits, labels, reference)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(logits, labels, reference)
    return lambda *_: graph.replay()
