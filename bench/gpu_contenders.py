"""Who takes part in bench_gpu.py: ours, torch, and the peers that are installed. Imports of peers are inside
their functions, so that one that is missing is a row with a reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import CompletionRows

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


def logits_contestants(backward: bool, compiled: bool) -> dict[str, Contestant]:
    """name -> (logits, labels, upstream gradient [B]) -> anything."""

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

    peers: dict[str, Logps] = {"torch eager": torch_logps}
    if compiled:
        peers["torch.compile"] = torch.compile(torch_logps, dynamic=False)
    peers |= {"TRL": trl_logps, "Liger": liger_logps, "QuACK": quack_logps}
    if not backward:
        return {
            "pyfast_dpo": forward(ours_logps),
            **{name: forward(function) for name, function in peers.items()},
        }
    return {
        "pyfast_dpo in place": both(ours_logps, inplace=True),
        "pyfast_dpo": both(ours_logps),
        **{name: both(function) for name, function in peers.items()},
    }


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


# --- a DPO loss step from hidden states ---------------------------------------------------------


@dataclass
class LinearBatch:
    hidden: Tensor  # [2P, T, H], every position scored
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T]
    rows: CompletionRows
    reference: Tensor  # [2P]

    @property
    def wanted(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


def ours_linear(chunk_bytes: int) -> Contestant:
    def run(batch: LinearBatch) -> None:
        out = pyfast_dpo.fused_linear_dpo_loss(
            batch.hidden,
            batch.weight,
            rows=batch.rows,
            reference_logps=batch.reference,
            beta=BETA,
            max_chunk_bytes=chunk_bytes,
            impl="fused",
        )
        torch.autograd.grad(out.loss, batch.wanted)

    return run


def torch_linear(batch: LinearBatch) -> None:
    logits = batch.hidden @ batch.weight.T
    loss = dpo_loss(torch_logps(logits, batch.labels), batch.reference)
    torch.autograd.grad(loss, batch.wanted)


def trl_linear(batch: LinearBatch) -> None:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    hidden = batch.hidden.flatten(0, 1)
    tokens, *_ = function.apply(
        hidden, batch.weight, None, batch.labels.flatten(), 1.0, 32768, None, 1.0, ()
    )
    loss = dpo_loss(tokens.view(batch.labels.shape).sum(-1), batch.reference)
    torch.autograd.grad(loss, batch.wanted)


def liger_linear(batch: LinearBatch) -> None:
    module = importlib.import_module("liger_kernel.chunked_loss")
    function = module.LigerFusedLinearDPOLoss(beta=BETA, compiled=True, use_ref_model=False)
    loss, *_ = function(batch.weight, batch.hidden, batch.labels)
    torch.autograd.grad(loss, batch.wanted)


def linear_contestants(chunks: list[int]) -> dict[str, Contestant]:
    ours = {f"pyfast_dpo, {size >> 20} MiB": ours_linear(size) for size in chunks}
    return {
        **ours,
        "torch eager": torch_linear,
        "TRL ChunkedLogProb": trl_linear,
        "Liger DPO": liger_linear,
    }
