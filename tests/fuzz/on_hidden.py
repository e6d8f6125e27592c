"""Public functions from hidden states and the lm_head's weight, with gradients for any subset of the three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _helpers import assert_rule
from fuzz.case import Case, public
from fuzz.draw import FLOATS, Draw
from fuzz.losses import pair_options, unpaired_options
from fuzz.on_logits import with_gradient
from fuzz.truth import targets_in_range
from torch import Tensor

import pyfast_dpo
from pyfast_dpo.ops.dtypes import statistics_dtype

FUNCTIONS = (
    pyfast_dpo.linear_token_logps, pyfast_dpo.linear_sequence_logps, pyfast_dpo.fused_linear_dpo_loss,
    pyfast_dpo.fused_linear_ipo_loss, pyfast_dpo.fused_linear_kto_loss, pyfast_dpo.fused_linear_loss,
)  # fmt: skip


def share_of_loss(logps: Tensor, units: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss of its own for fused_linear_loss, of any group."""
    return (logps.sum(0) * 0.01).tanh().sum(), (logps[0] * 2,)


def problem(draw: Draw) -> dict[str, Any]:
    batch, length = draw.size(5), draw.size(9)
    width, vocab = draw.size(65, 1), draw.size(draw.pick([65, 65, 300, 1030, 9001]), 1)
    if vocab > 1000:
        batch, length, width = min(batch, 2), min(length, 3), min(width, 17)
    dtype = draw.pick(FLOATS)
    scale = draw.pick([0.3, 0.3, 1.0])
    labels = draw.integers((batch, length), 0, vocab)
    ignore = draw.pick([-100, -100, -1, vocab])
    labels = labels.masked_fill(draw.bools(labels.shape) & draw.bools(labels.shape), ignore)
    return {
        "hidden": draw.layout((scale * draw.normal((batch, length, width))).to(dtype)),
        "weight": draw.layout((scale * draw.normal((vocab, width))).to(dtype)), "labels": draw.layout(labels),
        "bias": draw.layout(draw.normal((vocab,), dtype)) if draw.chance(0.3) else None, "shift": draw.chance(0.4),
        "ignore_index": ignore, "logit_scale": draw.pick([1.0, 1.0, 0.3]), "softcap": draw.pick([None, None, 5.0]),
        # one row at a time, a few, all: gradients computed twice, in pieces, or at once
        "max_chunk_bytes": draw.pick([None, 8 * vocab, 8 * vocab * 3, 8 * vocab * 40]),
        "validate": draw.pick([None, None, True]), "impl": draw.pick(["auto", "fused", "fused", "torch"]),
    }  # fmt: skip


def linear(draw: Draw) -> Case:
    arguments = problem(draw)
    function = draw.pick(FUNCTIONS)
    name = function.__name__
    labels, hidden = arguments["labels"], arguments["hidden"]
    if "dpo" in name or "ipo" in name or function is pyfast_dpo.fused_linear_loss:
        count = labels.shape[0] - labels.shape[0] % 2
        labels = arguments["labels"] = labels[:count]
        hidden = arguments["hidden"] = hidden[:count]
    sequences = labels.shape[0]
    if "loss" in name and function is not pyfast_dpo.fused_linear_loss:
        arguments["reference_logps"] = (
            -5 * draw.normal((sequences,)).abs() if draw.chance(0.5) else None
        )
        arguments["beta"] = draw.pick([0.01, 0.1, 0.5])
    if "dpo" in name:
        arguments.update(pair_options(draw, sequences // 2, torch.float32))
    elif "kto" in name:
        arguments.update(unpaired_options(draw, sequences), kl=draw.pick([0.0, 0.3]))
    elif function is pyfast_dpo.fused_linear_loss:
        arguments.update(
            loss_fn=share_of_loss, group=draw.pick([2, 1, None]), statistics=draw.chance(0.3)
        )
    if "sequence" in name or "ipo" in name or function is pyfast_dpo.fused_linear_loss:
        arguments["average"] = draw.chance(0.4)
    if "loss" not in name and draw.chance(0.3):
        ignore, shift = arguments["ignore_index"], arguments.pop("shift")
        del arguments["ignore_index"], arguments["labels"]
        arguments["rows"] = pyfast_dpo.CompletionRows.from_labels(
            labels, shift=shift, ignore_index=ignore
        )
    wanted = [
        n for n in ("hidden", "weight", "bias") if arguments[n] is not None and draw.chance(0.6)
    ]
    outputs = {"linear_token_logps": 1, "linear_sequence_logps": 1}.get(name)
    upstream = draw.normal((1,), torch.float64)

    def run(**given: Any) -> Sequence[Tensor]:
        return with_gradient(function, wanted, upstream if outputs is None else None, _plain(given))

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        """Of plain torch in float64, which projects every scored row at once."""
        if given.get("labels") is not None:
            vocab = torch.zeros(1, given["weight"].shape[0]).expand(*given["labels"].shape, -1)
            targets_in_range(vocab, given["labels"], given["shift"], given["ignore_index"])
        wide = {
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in given.items()
        }
        wide.update(impl="torch", max_chunk_bytes=None)
        truth = with_gradient(function, wanted, upstream if outputs is None else None, _plain(wide))
        assert len(results) == len(truth), f"{len(results)} results, not {len(truth)}"
        gradients = len([n for n in wanted if len(results) > 1]) if results else 0
        h, w = given["hidden"], given["weight"]
        logit = float((h.double().abs().max() if h.numel() else 0) * w.double().abs().sum(-1).max())
        logit += float(given["bias"].double().abs().max()) if given["bias"] is not None else 0.0
        if not all(t.isfinite().all() for t in truth) or logit > 1e4:
            return
        if "orpo" in given.get("loss_type", "") and any((t == 0).any() for t in truth[1:3]):
            return  # of a certain response it depends on the smallest number of the dtype
        compare(results, truth, gradients, h, logit, given)

    # torch multiplies float64, and its sums depend on the number of threads
    same_bits = hidden.dtype != torch.float64 and arguments["impl"] != "torch"
    return public(function, arguments, judge, run, same_bits=same_bits)


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in given.items() if n != "shift" or "rows" not in given}


def compare(
    results: Sequence[Tensor],
    truth: Sequence[Tensor],
    gradients: int,
    like: Tensor,
    logit: float,
    given: dict[str, Any],
) -> None:
    """Values by float32 sums of exact products; of half types the gradient of the logits is rounded once on its
    way, and the result once."""
    stat, eps = statistics_dtype(like.dtype), torch.finfo(statistics_dtype(like.dtype)).eps
    rows = max(1, like[..., 0].numel()) if like.shape[-1] else 1
    beta = float(given.get("beta", 1.0))
    numbers = [
        float(t.abs().max()) for t in truth if t.dtype != torch.bool and t.dim() <= 2 and t.numel()
    ]
    size = max([1.0, *numbers])
    if size > 1e4:
        return
    relative = 32 * eps * (1 + logit) * (1 + rows**0.5) * (1 + beta * size)
    half = torch.finfo(like.dtype).eps if like.dtype in (torch.bfloat16, torch.float16) else 0.0
    first = len(results) - gradients
    for number, (ours, true) in enumerate(zip(results, truth, strict=True)):
        if true.dtype == torch.bool or true.numel() == 0:
            assert ours.shape == true.shape  # a tie of float64 may be none here
            continue
        largest = float(true.abs().max())
        tolerance: Any = relative * (largest + 1) * (1 + size * beta)
        if number >= first:
            assert ours.dtype == like.dtype or ours.dtype == stat
            # ... of a sum of rows, whose coefficients have the loss's own roundings
            tolerance = (
                (relative * (1 + size * beta) + 2 * half) * (largest + _terms(true, given, rows))
                + half * true.abs()
                + 1e-12
            )
            tolerance = tolerance + (1e-7 * rows if like.dtype == torch.float16 else 0.0)
        assert_rule(f"result {number}", ours, true, true, tolerance)


def _terms(true: Tensor, given: dict[str, Any], rows: int) -> float:
    """What a gradient's sum may cancel from."""
    w = given["weight"].double().abs().max() if given["weight"].numel() else 0.0
    h = given["hidden"].double().abs().max() if given["hidden"].numel() else 0.0
    return float(w + h + 1) * (1 + 0.1 * rows)


def completion_rows(draw: Draw) -> Case:
    labels = draw.integers((draw.size(5), draw.size(17)), 0, 7).masked_fill_(torch.tensor(False), 0)
    labels = labels.masked_fill(draw.bools(labels.shape), -100)
    arguments = {"labels": draw.layout(labels), "shift": draw.chance(0.5), "ignore_index": -100}

    def run(**given: Any) -> Sequence[Any]:
        rows = pyfast_dpo.CompletionRows.from_labels(**given)
        return [rows.index, rows.targets, rows.counts]

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        labels, expected, counts = given["labels"], [], []
        flat = (
            labels.reshape(-1, labels.shape[-1])
            if labels.numel()
            else labels.reshape(results[2].shape[0], 0)
        )
        for b, row in enumerate(flat.tolist()):
            moved = [*row[1:], given["ignore_index"]] if given["shift"] and row else row
            own = [(b * len(row) + t, y) for t, y in enumerate(moved) if y != given["ignore_index"]]
            expected += own
            counts.append(len(own))
        assert results[0].tolist() == [i for i, _ in expected] and results[1].tolist() == [
            y for _, y in expected
        ]
        assert results[2].tolist() == counts

    case = public(pyfast_dpo.CompletionRows.from_labels, arguments, judge, run)
    case.name = "CompletionRows"
    case.names = [*arguments, "index", "targets"]
    return case


SUBJECTS = (linear, linear, completion_rows)
