"""Public functions from logits: log-probs and the fused losses, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _helpers import targets_of
from fuzz.case import Case, check, public
from fuzz.draw import Draw
from fuzz.losses import pair_options, unpaired_options
from fuzz.operators_rows import rows_and_labels
from fuzz.truth import (
    check_gradient_of_logits,
    check_tokens,
    of_rows,
    targets_in_range,
    tolerance_of_sums,
)
from torch import Tensor

import pyfast_dpo
from pyfast_dpo.ops.dtypes import statistics_dtype


def options_of(draw: Draw, shift: bool, ignore_index: int) -> dict[str, Any]:
    return {
        "shift": shift, "ignore_index": ignore_index, "inplace_backward": False,
        "validate": draw.pick([None, None, True, False]), "impl": draw.pick(["auto", "fused", "fused", "torch"]),
    }  # fmt: skip


def with_gradient(
    function: Any, names: Sequence[str], upstream: Any, given: dict[str, Any]
) -> list[Any]:
    """The results, then the gradients of the named arguments, for whichever of the results have one."""
    leaves = []
    for name in names:
        value = given.get(name)
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.layout == torch.strided
            and not value.is_meta
        ):
            given[name] = value.detach().requires_grad_()
            leaves.append(given[name])
    returned = function(**given)
    results = (
        [returned]
        if isinstance(returned, Tensor)
        else [r for r in returned if isinstance(r, Tensor)]
    )
    output = results[0]
    if leaves and output.requires_grad:
        factor = torch.ones_like(output)
        if upstream is not None:
            factor = factor * (upstream.to(output.dtype) if output.dim() else upstream.sum())
        results = [*results, *torch.autograd.grad(output, leaves, factor, materialize_grads=True)]
    return [r.detach() for r in results]


def logps(draw: Draw) -> Case:
    """token_logps and sequence_logps; the gradient of one kind in a new tensor or over the logits."""
    z, labels, ignore_index, shift = rows_and_labels(draw)
    tokens, inplace = draw.chance(0.5), draw.chance(0.3)
    if tokens and draw.chance(0.2):
        z, labels = (z[:1].squeeze(0), labels[:1].squeeze(0)) if z.shape[0] else (z, labels)
    z = draw.layout(z, last_contiguous=inplace)
    arguments = dict(logits=z, labels=draw.layout(labels), **options_of(draw, shift, ignore_index))
    arguments["inplace_backward"] = inplace
    if inplace:
        arguments["impl"] = "fused"
    if not tokens:
        arguments["average"] = draw.chance(0.4)
    function = pyfast_dpo.token_logps if tokens else pyfast_dpo.sequence_logps
    upstream = draw.normal(labels.shape if tokens else labels.shape[:1], torch.float64)
    wanted = draw.chance(0.6)

    def run(**given: Any) -> Sequence[Tensor]:
        if not wanted:
            return [function(**given).detach()]
        return with_gradient(function, ["logits"], upstream, given)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        z, shift, ignore = given["logits"], given["shift"], given["ignore_index"]
        targets = targets_in_range(z, given["labels"], shift, ignore)
        truth, slopes = of_rows(z, targets)
        stat = statistics_dtype(z.dtype)
        if tokens:
            check_tokens("token_logps", results[0], z, targets, truth)
            coefficient = upstream
        else:
            counts = (targets >= 0).sum(-1).double().clamp(min=1)
            divisor = counts if given["average"] else torch.ones_like(counts)
            assert results[0].dtype == stat
            near = tolerance_of_sums(z, targets, truth) / divisor
            check("sequence_logps", results[0], truth.sum(-1) / divisor, near)
            coefficient = (upstream / divisor)[:, None].expand(targets.shape)
        if len(results) > 1:
            # Rounded to the statistics' dtype on its way, once or (of a mean) twice.
            given_coefficient = coefficient.to(stat).double()
            check_gradient_of_logits(
                "gradient", results[1], z, targets, given_coefficient.to(stat), slopes
            )

    case = public(function, arguments, judge, run)
    case.written = ("logits",) if inplace else ()
    return case


def fused_loss(draw: Draw) -> Case:
    """The fused losses of pairs and of unpaired responses against the losses of true log-probs."""
    z, labels, ignore_index, shift = rows_and_labels(draw)
    kind = draw.pick(
        [pyfast_dpo.fused_dpo_loss, pyfast_dpo.fused_ipo_loss, pyfast_dpo.fused_kto_loss]
    )
    if kind is not pyfast_dpo.fused_kto_loss and z.shape[0] % 2:
        z, labels = z[1:], labels[1:]
    reference = draw.pick(["none", "logps", "logits"])
    arguments: dict[str, Any] = dict(
        policy_logits=draw.layout(z), labels=labels, beta=draw.pick([0.01, 0.1, 0.5]),
        reference_logps=-5 * draw.normal(labels.shape[:1]).abs() if reference == "logps" else None,
        reference_logits=draw.logits(z.shape, z.dtype) if reference == "logits" else None,
        **options_of(draw, shift, ignore_index),
    )  # fmt: skip
    if kind is pyfast_dpo.fused_dpo_loss:
        pairs = z.shape[0] // 2
        arguments.update(
            pair_options(draw, pairs, torch.float32), average=draw.pick([None, None, True, False])
        )
    elif kind is pyfast_dpo.fused_ipo_loss:
        arguments["average"] = draw.chance(0.5)
    else:
        arguments.update(
            unpaired_options(draw, z.shape[0]), kl=draw.pick([0.0, 0.3, torch.tensor(0.7)])
        )
    wanted = draw.chance(0.6)

    def run(**given: Any) -> Sequence[Tensor]:
        return with_gradient(kind, ["policy_logits"] if wanted else [], None, given)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        """Of the same function on float64, which is the formulas of the oracle on true log-probs."""
        z = given["policy_logits"]
        targets_in_range(z, given["labels"], given["shift"], given["ignore_index"])
        wide = {
            n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in given.items()
        }
        wide.update(impl="torch", inplace_backward=False)
        truth = with_gradient(
            kind,
            ["policy_logits"] if len(results) > 6 - (kind is pyfast_dpo.fused_kto_loss) * 2 else [],
            None,
            wide,
        )
        if "orpo" in given.get("loss_type", "") and any((t == 0).any() for t in truth[1:3]):
            return  # of a certain response it depends on the smallest number of the dtype
        targets = targets_of(given["labels"], given["shift"], given["ignore_index"])
        compare_losses(results, truth, z, int((targets >= 0).sum()), given["beta"])

    return public(kind, arguments, judge, run)


def compare_losses(
    results: Sequence[Tensor], truth: Sequence[Tensor], like: Tensor, rows: int, beta: float
) -> None:
    """Losses of sums of log-probs, where those are moderate: a rounding of a sum is one of the loss's argument."""
    assert len(results) == len(truth), f"{len(results)} results, not {len(truth)}"
    numbers = [t for t in truth if t.dim() <= 1]
    size = max([1.0, *(float(t.abs().max()) for t in numbers if t.numel())])
    if not all(t.isfinite().all() for t in truth) or size > 1e4:
        for ours, true in zip(results[1:3], truth[1:3], strict=True):
            assert torch.equal(ours.isnan(), true.isnan()), (
                "NaN where there is none, or none where there is"
            )
        return
    eps = torch.finfo(statistics_dtype(like.dtype)).eps
    logit = like.double().abs().nan_to_num(0, 0, 0).max() if like.numel() else 0.0
    relative = 32 * eps * (1 + size + float(logit)) * (1 + beta) * (1 + rows**0.5)
    for number, (ours, true) in enumerate(zip(results, truth, strict=True)):
        largest = float(true.abs().max()) if true.numel() else 0.0
        tolerance = relative * (largest + 1)
        if true.dim() > 1:
            tolerance = relative * largest + 1.02 * torch.finfo(ours.dtype).eps * true.abs() + 1e-15
            if ours.dtype == torch.float16:
                tolerance = tolerance + 6e-8
        check(f"result {number}", ours, true, tolerance)


SUBJECTS = (logps, logps, fused_loss)
