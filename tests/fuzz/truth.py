"""Float64 truths that several subjects share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from _helpers import (
    HALVES,
    forward_tolerance,
    gradient_tolerance,
    statistics_dtype,
    targets_of,
    torch_gradient,
    torch_token_logps,
    truths,
)
from fuzz.case import check
from torch import Tensor


def targets_in_range(logits: Tensor, labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """As `_helpers.targets_of`; what is out of range must have been refused."""
    targets = targets_of(labels, shift, ignore_index)
    raw = labels[..., 1:] if shift else labels
    beyond = ((raw < 0) | (raw >= logits.shape[-1])) & (raw != ignore_index)
    assert not bool(beyond.any()), "accepted labels out of range"
    return targets


def of_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, d log-prob / d logits): NaN in a row with NaN or +inf or with nothing but -inf."""
    logps, gradient = truths(logits, targets)
    wide = logits.double()
    top = wide.amax(-1) if wide.shape[-1] else wide.sum(-1)
    undefined = (targets >= 0) & (wide.isnan().any(-1) | ~top.isfinite())
    return logps.masked_fill(undefined, math.nan), gradient.masked_fill(
        undefined[..., None], math.nan
    )


def check_tokens(what: str, ours: Tensor, logits: Tensor, targets: Tensor, truth: Tensor) -> None:
    peer = torch_token_logps(logits, targets)
    assert ours.dtype == statistics_dtype(logits.dtype), f"{what}: {ours.dtype}"
    check(what, ours, truth, forward_tolerance(logits.dtype, truth), peer)
    assert not (ours > 0).any(), f"{what}: a log-prob above 0"
    assert (ours[targets < 0] == 0).all(), f"{what}: an ignored row has a log-prob"


def tolerance_of_sums(logits: Tensor, targets: Tensor, truth: Tensor) -> Tensor:
    """Of sums over the last dimension: what each token may be off by, and a rounding of the sum."""
    peer = torch_token_logps(logits, targets).double()
    each = (peer - truth).abs().nan_to_num(0.0, 0.0, 0.0) + forward_tolerance(logits.dtype, truth)
    eps = torch.finfo(statistics_dtype(logits.dtype)).eps
    sums = truth.sum(-1).abs().nan_to_num(0.0, 0.0, 0.0)
    return each.nan_to_num(0.0, 0.0, 0.0).sum(-1) + 2 * eps * (sums + 1)


def check_gradient_of_logits(
    what: str, ours: Tensor, logits: Tensor, targets: Tensor, coefficient: Tensor, slopes: Tensor
) -> None:
    """`coefficient` of every row, `slopes` as of_rows; ours in the dtype of the logits or in a half type."""
    truth = slopes * coefficient.double()[..., None]
    truth = torch.where((targets < 0)[..., None], 0.0, truth)
    like = logits.to(ours.dtype)
    tolerance = gradient_tolerance(like, truth, coefficient)
    if (
        ours.dtype != logits.dtype
    ):  # the exponent is of the float32 logits, the rounding a half type's
        tolerance = 0.51 * torch.finfo(ours.dtype).eps * truth.abs() + torch.finfo(ours.dtype).tiny
        tolerance = tolerance + 2.0**-125 * coefficient.double().abs()[..., None]
        peer = truth
    else:
        peer = torch_gradient(logits, targets, coefficient.to(statistics_dtype(logits.dtype)))
    check(what, ours, truth, tolerance, peer.to(ours.dtype))
    assert (ours[targets < 0] == 0).all(), f"{what}: an ignored row has a gradient"


def check_gradient_with_entropy(
    ours: Tensor, logits: Tensor, targets: Tensor, coefficient: Tensor, slopes: Tensor, given: dict[str, Any]
) -> None:  # fmt: skip
    """The same where the rows' entropies, which the operator was given, bring a gradient too."""
    logps = logits.double().log_softmax(-1)
    p = logps.exp()
    distance = logps.masked_fill(p == 0, 0.0) + given["entropy"].double()[..., None]
    incoming = given["grad_entropy"].double()[..., None]
    c = coefficient.double()[..., None]
    truth = slopes * c - incoming * p * distance
    least = p.clamp(min=0.0 if logits.dtype == torch.float64 else 2.0**-100)
    size = c.abs() * (slopes.abs() + least) + incoming.abs() * least * (distance.abs() + 1)
    eps, out = torch.finfo(coefficient.dtype).eps, torch.finfo(ours.dtype)
    largest = logits.double().abs().nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    tolerance = 0.51 * out.eps * truth.abs() + 64 * eps * (1 + largest) * size + out.tiny
    if logits.dtype in HALVES:  # whose exponentials have the precision of the result
        tolerance = tolerance + out.eps / 8 * size
    scored = (targets >= 0)[..., None]
    truth = torch.where(scored, truth, 0.0)
    check("gradient", ours, truth, torch.where(scored, tolerance, 0.0), truth)


def check_product(what: str, ours: Tensor, terms: Sequence[tuple[Tensor, Tensor]], out: torch.dtype,
                  start: Tensor | None = None) -> None:  # fmt: skip
    """ours = start + the sum of left right over the terms, with float32 sums: within a rounding an addition of
    the sum of magnitudes, and one of the dtype of the result. Where an infinity or NaN meets, no number."""
    left, right = terms[0]
    truth = torch.zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    size, depth = truth.clone(), 0
    for left, right in terms:
        left, right = left.double(), right.double()
        truth += left @ right
        size += left.abs() @ right.abs()
        depth += left.shape[1]
    if start is not None:
        truth, size = truth + start.double(), size + start.double().abs()
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    assert ours.dtype == out, f"{what}: {ours.dtype}"
    ordinary = size < 1e37 if out != torch.float16 else size < 6e4
    number = truth.isfinite() & ordinary
    assert not (ours[size.isnan() | truth.isnan()].isfinite()).any(), f"{what}: a number out of NaN"
    # Half types flush products below the normal numbers of float32 in some instruction sets.
    floor = 2.0**-120 * (1 + depth) + (
        torch.finfo(out).tiny if out in (torch.float16, torch.bfloat16) else 0
    )
    tolerance = size * (2 + depth**0.5) * 2.0**-23 + floor
    if out != torch.float32:
        tolerance = tolerance + 0.51 * torch.finfo(out).eps * truth.abs()
    check(what, ours[number], truth[number], tolerance[number])
