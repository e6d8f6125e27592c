"""DPO from hidden states and the lm_head's weight: who takes part in bench_gpu.py. Imports of peers are inside
their functions, so that one that is missing is a row with a reason."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from gpu_contenders import BETA, Contestant, dpo_loss, torch_logps
from gpu_measure import Bench
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import CompletionRows


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


def linear_batch(bench: Bench, shape: tuple[int, int, int, int], frozen: bool) -> LinearBatch:
    """Of sequences, positions, hidden, vocabulary."""
    sequences, length, width, vocab = shape
    labels = bench.tokens(vocab, sequences, length)
    return LinearBatch(
        bench.normal(sequences, length, width).requires_grad_(),
        bench.normal(vocab, width, scale=width**-0.5).requires_grad_(not frozen),
        labels,
        CompletionRows.from_labels(labels),
        bench.normal(sequences).float(),
    )


def ours(statistics: bool, chunk_bytes: int | None = None) -> Contestant:
    """By the function that the trainers call, which can take the statistics that they log."""

    def run(batch: LinearBatch) -> None:
        pairs = len(batch.rows.lengths) // 2

        def losses(logps: Tensor, units: slice) -> Tensor:
            chosen, rejected = logps
            references = batch.reference.view(2, -1)[:, units]
            return (
                pyfast_dpo.preference_loss(chosen, rejected, *references, beta=BETA).losses.sum()
                / pairs
            )

        out = pyfast_dpo.fused_linear_loss(
            batch.hidden,
            batch.weight,
            None,
            losses,
            rows=batch.rows,
            statistics=statistics,
            max_chunk_bytes=chunk_bytes,
            impl="fused",
        )
        torch.autograd.grad(out.loss, batch.wanted)

    return run


def torch_linear(batch: LinearBatch) -> None:
    logits = batch.hidden @ batch.weight.T
    loss = dpo_loss(torch_logps(logits, batch.labels), batch.reference)
    torch.autograd.grad(loss, batch.wanted)


def trl_linear(statistics: bool) -> Contestant:
    def run(batch: LinearBatch) -> None:
        function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        wanted = ("entropy", "mean_logits", "is_top1") if statistics else ()
        tokens, *_ = function.apply(
            batch.hidden.flatten(0, 1), batch.weight, None, batch.labels.flatten(),
            1.0, 32768, None, 1.0, wanted,
        )  # fmt: skip
        loss = dpo_loss(tokens.view(batch.labels.shape).sum(-1), batch.reference)
        torch.autograd.grad(loss, batch.wanted)

    return run


def liger_linear() -> Contestant:
    functions: list[Any] = []  # made once: it compiles

    def run(batch: LinearBatch) -> None:
        if not functions:
            made = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
            functions.append(made(beta=BETA, compiled=True, use_ref_model=False))
        loss, *_ = functions[0](batch.weight, batch.hidden, batch.labels)
        torch.autograd.grad(loss, batch.wanted)

    return run


def cce_linear(filter_eps: str | None) -> Contestant:
    """filter_eps: below which gradients of the logits it leaves blocks out; None: exact."""

    def run(batch: LinearBatch) -> None:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        # Flat, since its backward pass takes no expanded gradient.
        losses = function(
            batch.hidden.flatten(0, 1), batch.weight, batch.labels.flatten(), reduction="none",
            filter_eps=filter_eps,
        )  # fmt: skip
        loss = dpo_loss(-losses.float().view(batch.labels.shape).sum(-1), batch.reference)
        torch.autograd.grad(loss, batch.wanted)

    return run


def linear_contestants(chunks: list[int]) -> dict[str, Contestant]:
    """name -> a function of a LinearBatch; `chunks` are budgets of ours beside the default one."""
    return {
        "pyfast_dpo": ours(False),
        "pyfast_dpo, statistics": ours(True),
        **{f"pyfast_dpo, {size >> 20} MiB": ours(False, size) for size in chunks},
        **{f"pyfast_dpo, statistics, {size >> 20} MiB": ours(True, size) for size in chunks},
        "TRL ChunkedLogProb": trl_linear(False),
        "TRL, statistics": trl_linear(True),
        "CCE": cce_linear("high"),
        "CCE, exact": cce_linear(None),
        "torch eager": torch_linear,
        "Liger DPO": liger_linear(),
    }
