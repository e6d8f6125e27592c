"""Operators on rows of logits and on one number a sequence, called directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _helpers import targets_of
from fuzz.case import Case, check, operator, same_values
from fuzz.draw import FLOATS, HALVES, INT64_MAX, INT64_MIN, Draw
from fuzz.losses import drawn_logps, loss_tolerance
from fuzz.truth import (
    check_gradient_of_logits,
    check_gradient_with_entropy,
    check_tokens,
    of_rows,
    targets_in_range,
    tolerance_of_sums,
)
from torch import Tensor

from pyfast_dpo.logprobs.statistics import torch_row_statistics
from pyfast_dpo.losses import oracle

ops = torch.ops.pyfast_dpo


def rows_and_labels(
    draw: Draw, dtypes: Sequence[torch.dtype] = FLOATS
) -> tuple[Tensor, Tensor, int, bool]:
    """(logits [B, T, V], labels [B, T], ignore_index, shift)"""
    batch, length, vocab = draw.size(5), draw.size(9), draw.size(4099, 1)
    if batch * length * vocab > 30_000:
        batch, length = min(batch, 2), min(length, 3)
    dtype = draw.pick(dtypes)
    logits = draw.logits((batch, length, vocab), dtype)
    labels = draw.integers((batch, length), 0, vocab)
    ignore_index = draw.pick([-100, -100, -100, -1, 0, vocab, INT64_MIN, INT64_MAX])
    labels = labels.masked_fill(draw.bools(labels.shape) & draw.bools(labels.shape), ignore_index)
    return logits, labels, ignore_index, draw.chance(0.4)


def seq_logp(draw: Draw) -> Case:
    logits, labels, ignore_index, shift = rows_and_labels(draw)
    arguments = {
        "logits": draw.layout(logits), "labels": draw.layout(labels), "ignore_index": ignore_index, "shift": shift,
        "average": draw.chance(0.3), "inplace_backward": False,
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        z, average = given["logits"], given["average"]
        targets = targets_in_range(z, given["labels"], given["shift"], int(given["ignore_index"]))
        truth, _ = of_rows(z, targets)
        sequences, tokens, _, _, scale = results
        check_tokens("token_logps", tokens, z, targets, truth)
        counts = (targets >= 0).sum(-1).double()
        divisor = counts.clamp(min=1) if average else torch.ones_like(counts)
        check(
            "sequence_logps",
            sequences,
            truth.sum(-1) / divisor,
            tolerance_of_sums(z, targets, truth) / divisor,
        )
        expected = torch.where(counts > 0, 1 / divisor, 0.0) if average else divisor
        check("sequence_scale", scale, expected, 1e-7)

    return operator("seq_logp", arguments, judge)


def seq_logp_backward(draw: Draw) -> Case:
    """The three operators of the gradient, after an honest forward pass."""
    kind = draw.pick(["", "_", "_out"])
    logits, labels, ignore_index, shift = rows_and_labels(draw)
    logits = draw.layout(logits, last_contiguous=True)
    _, tokens, row_max, row_sum, scale = ops.seq_logp(
        logits, labels, ignore_index, shift, draw.chance(0.3), False
    )
    stat = scale.dtype
    size = 10.0 ** draw.integer(-6, 6)
    sequence = None if draw.chance(0.3) else size * draw.normal(scale.shape, stat)
    token = None if draw.chance(0.4) else size * draw.normal(tokens.shape, stat)
    narrow = logits.dtype == torch.float32 and kind != "_" and draw.chance(0.4)
    to = draw.pick(HALVES) if narrow else logits.dtype
    arguments = {
        "grad_sequence": sequence, "grad_token": None if token is None else draw.layout(token), "logits": logits,
        "labels": draw.layout(labels), "token_logps": tokens, "row_max": draw.layout(row_max), "row_sum": row_sum,
        "sequence_scale": scale, "ignore_index": ignore_index, "shift": shift,
    }  # fmt: skip
    if kind == "":
        arguments["out_dtype"] = to if narrow or draw.chance(0.5) else None
    if kind == "_out":
        arguments["out"] = torch.full(logits.shape, float("nan"), dtype=to)
        if draw.chance(0.4):
            flat = logits.to(stat).flatten(0, 1)
            entropy = ops.row_statistics(flat, torch.zeros(len(flat), dtype=torch.int64))[0]
            arguments["entropy"] = entropy.view(tokens.shape)
            arguments["grad_entropy"] = draw.layout(size * draw.normal(tokens.shape, stat))
    kept_logits = logits.clone()
    saved = [t.clone() for t in (tokens, row_max, row_sum, scale)]
    names = ("token_logps", "row_max", "row_sum", "sequence_scale")

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        z = given["logits"]
        targets = targets_of(given["labels"], given["shift"], int(given["ignore_index"]))
        raw = given["labels"][:, 1:] if given["shift"] else given["labels"]
        beyond = torch.zeros_like(targets, dtype=torch.bool)
        outside = (raw < 0) | (raw >= z.shape[-1])
        beyond[:, : raw.shape[1]] = outside & (raw != int(given["ignore_index"]))
        for name, value in zip(names, saved, strict=True):
            if given[name].shape != value.shape or not torch.equal(
                given[name].nan_to_num(7.0), value.nan_to_num(7.0)
            ):
                assert given[name].shape == value.shape and given[name].dtype == value.dtype
                return  # numbers of another forward pass: any result
        coefficient = torch.zeros(targets.shape, dtype=torch.float64)
        for part in ("grad_sequence", "grad_token"):
            if given[part] is not None:
                assert given[part].dtype == stat
                factor = saved[3].double()[:, None] if part == "grad_sequence" else 1.0
                value = given[part].double()
                coefficient = (
                    coefficient + (value[:, None] if part == "grad_sequence" else value) * factor
                )
        assert results[-1][beyond].isnan().all(), "a number in a row whose label is out of range"
        _, slopes = of_rows(z, targets.masked_fill(beyond, -1))
        honest = (
            same_values(kept_logits, z)
            and torch.equal(labels, given["labels"])
            and ignore_index == given["ignore_index"]
        )
        if not honest or shift != given["shift"]:
            return  # log-probs of other labels
        if given.get("grad_entropy") is not None:
            check_gradient_with_entropy(
                results[-1], z, targets, coefficient.to(stat), slopes, given
            )
            return
        check_gradient_of_logits("gradient", results[-1], z, targets, coefficient.to(stat), slopes)

    written = {"": (), "_": ("logits",), "_out": ("out",)}[kind]
    return operator(f"seq_logp_backward{kind}", arguments, judge, written)


def row_statistics(draw: Draw) -> Case:
    rows, vocab = draw.size(33), draw.size(4099, 1)
    rows = min(rows, 3) if vocab > 1000 else rows
    logits = draw.logits((rows, vocab), draw.pick([torch.float32, torch.float64]))
    targets = draw.integers((rows,), 0, vocab)
    if rows and draw.chance(0.3):
        targets[draw.integer(0, rows - 1)] = draw.pick([-1, vocab, INT64_MIN, INT64_MAX])

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        z, wanted = given["logits"], given["targets"]
        assert wanted.dtype == torch.int64 and z.dtype in (torch.float32, torch.float64)
        truth = torch_row_statistics(z.double(), wanted)
        peer = torch_row_statistics(z, wanted)
        spread = z.double().masked_fill(~z.isfinite(), 0.0)
        reach = spread.abs().amax(-1)
        for name, ours, true, other in zip(truth._fields, results, truth, peer, strict=True):
            if name == "is_top1":
                assert torch.equal(ours, true), name
                continue
            eps = torch.finfo(z.dtype).eps
            distance = (
                8 * (spread.amax(-1) - spread.amin(-1)) if name != "mean_logits" else 4 * reach
            )
            if z.dtype == torch.float64:  # the truth has the same dtype, and its own errors
                distance = distance * 2 + 8 * reach
            far = reach > 1e30  # sums beyond the range of the dtype
            tolerance = eps * (4 * true.abs().nan_to_num(0, 0, 0) + distance + 24)
            check(name, ours[~far], true[~far], tolerance[~far], other[~far])

    return operator(
        "row_statistics", {"logits": draw.layout(logits), "targets": draw.layout(targets)}, judge
    )


# --- losses ---------------------------------------------------------------------------------------------

PAIR_TENSORS = (
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_lengths",
    "rejected_lengths", "margins", "shift",
)  # fmt: skip


def pair_loss(draw: Draw) -> Case:
    backward = draw.chance(0.5)
    loss = draw.pick([*oracle.DIFFERENCE_FORMULAS, *oracle.PAIR_FORMULAS])
    count, dtype = draw.size(1030), draw.pick([torch.float32, torch.float64])
    logps = drawn_logps(draw, loss, count, dtype)
    lengths = (
        [draw.integers((count,), 0, 40).to(dtype) for _ in range(2)]
        if draw.chance(0.4)
        else [None] * 2
    )
    rest = [
        draw.normal((count,), dtype) if draw.chance(0.3) else None,
        draw.normal((1,), dtype) if draw.chance(0.3) else None,
    ]
    difference = loss in oracle.DIFFERENCE_FORMULAS
    options = {
        "loss": loss, "beta": draw.pick([0.01, 0.1, 0.5, 1.0]), "label_smoothing": draw.pick([1e-3, 0.1, 0.3]),
        "discopop_tau": draw.pick([0.05, 0.3, 2.0]), "margin": draw.pick([0.0, 0.5]),
        "divergence": draw.pick(["reverse_kl", "reverse_kl", "js_divergence", "alpha_divergence"])
        if difference else "reverse_kl",
        "divergence_alpha": draw.pick([0.0, 0.5, 1.7]), "average_first": draw.chance(0.3),
    }  # fmt: skip
    tensors = dict(zip(PAIR_TENSORS, [*logps, *lengths, *rest], strict=True))
    tensors = {n: draw.layout(t) if isinstance(t, Tensor) else None for n, t in tensors.items()}
    arguments: dict[str, Any] = {**tensors, **options}
    if backward:
        arguments = {"grad_losses": draw.layout(draw.normal((count,), dtype)), **arguments}

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        inputs = [given[n] for n in PAIR_TENSORS]
        assert all(t is None or t.dtype == inputs[0].dtype for t in inputs)
        assert all(t is None or t.shape == inputs[0].shape for t in inputs[:7])
        if any(not _ordinary_option(n, given[n]) for n in options):
            return  # numbers that the public functions refuse: any result
        wide = [None if t is None else t.detach().double() for t in inputs]
        policy = [t.requires_grad_() for t in wide[:2] if t is not None]
        settings = [
            float(v) if isinstance(v, (int, float)) else v for v in (given[n] for n in options)
        ]
        settings[-1] = bool(given["average_first"])
        truth = oracle.pair_loss(*wide, *settings)
        extra = given["grad_losses"].double() if backward else torch.ones_like(truth)
        slopes = torch.autograd.grad(truth, policy, torch.ones_like(truth), materialize_grads=True)
        tolerance, ordinary = loss_tolerance(
            given["loss"], inputs, truth.detach(), slopes, given["beta"]
        )
        if not backward:
            check("losses", results[0][ordinary], truth[ordinary], tolerance[ordinary])
            for ours, p, c in zip(results[1:], wide[:2], wide[2:4], strict=True):
                ratio = p if c is None else p - c
                size = (p.detach().abs() + (0 if c is None else c.abs())) * given["beta"]
                eps = 4 * torch.finfo(inputs[0].dtype).eps
                check(
                    "rewards",
                    ours[ordinary],
                    (given["beta"] * ratio)[ordinary],
                    (eps * size + 1e-37)[ordinary],
                )
            return
        for ours, slope in zip(results, slopes, strict=True):
            near = tolerance * (1 + given["beta"]) * (1 + extra.abs())
            check("gradient", ours[ordinary], (slope * extra)[ordinary], near[ordinary])

    return operator("pair_loss_backward" if backward else "pair_loss", arguments, judge)


def _ordinary_option(name: str, value: Any) -> bool:
    low, high = {
        "beta": (1e-4, 100), "label_smoothing": (0, 0.4999), "discopop_tau": (0.01, 1e4), "margin": (-1e4, 1e4),
        "divergence_alpha": (-10, 10),
    }.get(name, (None, None))  # fmt: skip
    if name == "label_smoothing" and value == 0:
        return False  # the logarithm of 0 in one of the formulas
    return low is None or (
        isinstance(value, (int, float)) and low <= value <= high and value != 1.0
    )


def unpaired_loss(draw: Draw) -> Case:
    backward = draw.chance(0.5)
    count, dtype = draw.size(1030), draw.pick([torch.float32, torch.float64])
    policy, reference = drawn_logps(draw, "sigmoid", count, dtype)[:2]
    arguments: dict[str, Any] = {
        "policy": draw.layout(policy), "reference": draw.layout(reference) if draw.chance(0.6) else None,
        "is_desirable": draw.layout(draw.bools((count,))), "kl": draw.normal((1,), dtype).abs(),
        "loss": draw.pick(list(oracle.UNPAIRED_FORMULAS)), "beta": draw.pick([0.01, 0.1, 1.0]),
        "desirable_weight": draw.pick([0.0, 1.0, 1.3]), "undesirable_weight": draw.pick([0.0, 1.0, 0.7]),
    }  # fmt: skip
    if backward:
        arguments = {"grad_losses": draw.layout(draw.normal((count,), dtype)), **arguments}

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        p, c = given["policy"], given["reference"]
        assert given["is_desirable"].dtype == torch.bool and given["is_desirable"].shape == p.shape
        numbers = [given[n] for n in ("beta", "desirable_weight", "undesirable_weight")]
        if (
            not all(isinstance(n, (int, float)) and 0 <= n <= 100 for n in numbers)
            or numbers[0] == 0
        ):
            return  # numbers that the public functions refuse: any result
        leaf = p.detach().double().requires_grad_()
        ratio = leaf if c is None else leaf - c.double()
        weights = [float(n) for n in numbers]
        truth = oracle.UNPAIRED_FORMULAS[given["loss"]](
            ratio, given["is_desirable"], given["kl"].double(), *weights
        )
        (slope,) = torch.autograd.grad(truth, leaf, torch.ones_like(truth))
        size = (
            p.double().abs() + (0 if c is None else c.double().abs()) + given["kl"].double().abs()
        )
        eps = torch.finfo(p.dtype).eps
        ordinary = size.isfinite() & (size < 1e30)
        tolerance = (
            16
            * eps
            * (truth.detach().abs() + (1 + weights[0] * size) * (slope.abs() * (1 + size) + eps))
        )
        if not backward:
            check("losses", results[0][ordinary], truth[ordinary], tolerance[ordinary])
            check(
                "rewards",
                results[1][ordinary],
                (weights[0] * ratio)[ordinary],
                (4 * eps * weights[0] * size + 1e-37)[ordinary],
            )
            return
        extra = given["grad_losses"].double()
        # The float64 slope itself is a product of a number and 1 less it.
        own = 4 * torch.finfo(torch.float64).eps * weights[0] * max(weights[1:])
        near = (
            32
            * eps
            * (1 + weights[0] * size)
            * (slope.abs() + weights[0] * eps)
            * (1 + extra.abs())
        )
        near = near + own * extra.abs() + 1e-37
        check("gradient", results[0][ordinary], (slope * extra)[ordinary], near[ordinary])

    return operator("unpaired_loss_backward" if backward else "unpaired_loss", arguments, judge)


SUBJECTS = (seq_logp, seq_logp_backward, row_statistics, pair_loss, unpaired_loss)
