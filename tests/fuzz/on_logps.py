"""Public functions on log-probs, scores and labels: losses with gradients, weights, estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuzz.case import Case, check, public
from fuzz.draw import FLOATS, Draw
from fuzz.losses import drawn_logps, loss_tolerance, pair_options
from fuzz.on_logits import with_gradient
from torch import Tensor

import pyfast_dpo
from pyfast_dpo.losses.table import PAIR_LOSSES, UNPAIRED_LOSSES

IMPLS = ("auto", "fused", "fused", "torch")


def widened(given: dict[str, Any]) -> dict[str, Any]:
    """The same call by plain torch in float64."""
    wide = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in given.items()
    }
    return {**wide, "impl": "torch"}


def preference_loss(draw: Draw) -> Case:
    count, dtype = draw.size(1030), draw.pick(FLOATS)
    options = pair_options(draw, count, dtype)
    kind = options["loss_type"]
    names = [kind] if isinstance(kind, str) else kind
    logps = drawn_logps(
        draw, "orpo" if "orpo" in names or "alphapo" in names else names[0], count, torch.float64
    )
    logps = [None if t is None else draw.layout(t.to(dtype)) for t in logps]
    lengths = [draw.integers((count,), 0, 40) if draw.chance(0.4) else None] * 2
    tensors = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
    )
    arguments = dict(
        zip(tensors, logps, strict=True), beta=draw.pick([0.01, 0.1, 1.0]), chosen_lengths=lengths[0],
        rejected_lengths=lengths[1], impl=draw.pick(IMPLS), **options,
    )  # fmt: skip
    wanted = list(tensors[: draw.integer(0, 2)])
    upstream = draw.normal((count,), torch.float64)

    def run(**given: Any) -> Sequence[Tensor]:
        return with_gradient(pyfast_dpo.preference_loss, wanted, upstream, given)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        loss = given["loss_type"]
        losses = [loss] if isinstance(loss, str) else list(loss)
        if given["beta"] > 100:
            return
        every = with_gradient(pyfast_dpo.preference_loss, tensors[:2], None, widened(given))
        truth = with_gradient(pyfast_dpo.preference_loss, wanted, upstream, widened(given))
        inputs = [given[n] for n in tensors] + [None, None, given.get("margins"), None]
        inputs = [t if t is None else t.to(results[0].dtype) for t in inputs]
        tolerance, ordinary = loss_tolerance(losses[0], inputs, every[0], every[3:], given["beta"])
        tolerance = tolerance * 4 * len(losses) * (1 + abs(given.get("bco_shift") or 0.0))
        if any(PAIR_LOSSES[n].sorts for n in losses):  # a pair's loss depends on the others
            ordinary = ordinary & ordinary.all()
        check("losses", results[0][ordinary], truth[0][ordinary], tolerance[ordinary])
        for ours, true in zip(results[1:3], truth[1:3], strict=True):
            eps = 8 * torch.finfo(ours.dtype).eps
            size = given["beta"] * sum(t.double().abs() for t in inputs[:4] if t is not None)
            check("rewards", ours[ordinary], true[ordinary], (eps * size + 1e-37)[ordinary])
        if given["impl"] == "torch" and given.get("f_divergence_type") in (
            "forward_kl",
            "alpha_divergence",
        ):
            return  # where an exponential leaves the dtype, autograd may give NaN: docstring of the oracle
        for name, ours, true in zip(wanted, results[3:], truth[3:], strict=True):
            assert ours.dtype == given[name].dtype
            near = tolerance * (1 + given["beta"]) * (1 + upstream.abs())
            near = (
                near
                + 1.02 * torch.finfo(ours.dtype).eps * true.abs()
                + torch.finfo(ours.dtype).tiny
            )
            check(f"gradient of {name}", ours[ordinary], true[ordinary], near[ordinary])

    return public(pyfast_dpo.preference_loss, arguments, judge, run)


def unpaired_loss(draw: Draw) -> Case:
    count, dtype = draw.size(1030), draw.pick(FLOATS)
    kto = draw.chance(0.5)
    function = pyfast_dpo.kto_loss if kto else pyfast_dpo.unpaired_loss
    policy, reference = drawn_logps(draw, "sigmoid", count, torch.float64)[:2]
    arguments: dict[str, Any] = {
        "policy_logps": draw.layout(policy.to(dtype)), "is_desirable": draw.layout(draw.bools((count,))),
        "reference_logps": draw.layout(reference.to(dtype)) if draw.chance(0.6) else None,
        "beta": draw.pick([0.01, 0.1, 1.0]), "desirable_weight": draw.pick([0.0, 1.0, 1.3]),
        "undesirable_weight": draw.pick([0.0, 1.0, 0.7]), "impl": draw.pick(IMPLS),
    }  # fmt: skip
    loss = "kto" if kto else draw.pick(list(UNPAIRED_LOSSES))
    if not kto:
        arguments["loss_type"] = loss
    constant = UNPAIRED_LOSSES[loss].constant
    if constant is not None and (constant == "kl" or draw.chance(0.6)):
        arguments[constant] = draw.pick(
            [0.0, 0.4, torch.tensor(0.7), torch.tensor([1.5], dtype=torch.float64)]
        )
    wanted = ["policy_logps"] if draw.chance(0.6) else []
    upstream = draw.normal((count,), torch.float64)

    def run(**given: Any) -> Sequence[Tensor]:
        return with_gradient(function, wanted, upstream, given)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        truth = with_gradient(function, ["policy_logps"], None, widened(given))
        p, c, beta = given["policy_logps"], given["reference_logps"], given["beta"]
        if max(beta, given["desirable_weight"], given["undesirable_weight"]) > 100:
            return
        center = max(abs(float(given.get(n) or 0.0)) for n in ("kl", "bco_shift"))
        size = p.double().abs() + (0 if c is None else c.double().abs()) + center * (1 + 1 / beta)
        eps, slope = torch.finfo(results[0].dtype).eps, truth[2].abs()
        weight = 1 + max(given["desirable_weight"], given["undesirable_weight"])
        ordinary = size.isfinite() & (size < 1e6)
        near = 32 * eps * (truth[0].abs() + (1 + beta * size) * (slope * (1 + size) + eps)) * weight
        check("losses", results[0][ordinary], truth[0][ordinary], near[ordinary])
        check(
            "rewards",
            results[1][ordinary],
            truth[1][ordinary],
            (8 * eps * beta * size + 1e-37)[ordinary],
        )
        for ours in results[2:]:
            assert ours.dtype == p.dtype
            near = (
                32 * eps * (1 + beta * size) * (slope + beta * eps) * (1 + upstream.abs()) * weight
            )
            near = (
                near
                + (1e-15 + (4 * eps * beta if given["impl"] == "torch" else 0))
                * weight
                * upstream.abs()
            )
            near = (
                near
                + 1.02 * torch.finfo(ours.dtype).eps * (slope * upstream).abs()
                + torch.finfo(ours.dtype).tiny
            )
            check("gradient", ours[ordinary], (truth[2] * upstream)[ordinary], near[ordinary])

    return public(function, arguments, judge, run)


def reward_loss(draw: Draw) -> Case:
    count, dtype = draw.size(257), draw.pick(FLOATS)
    names = ["chosen_rewards", "rejected_rewards"]
    arguments = {
        "chosen_rewards": draw.layout(draw.logits((count,), dtype)), "rejected_rewards": draw.layout(draw.logits((count,), dtype)),
        "margins": draw.normal((count,), dtype).abs() if draw.chance(0.4) else None,
        "center_rewards_coefficient": draw.pick([0.0, 0.01]), "impl": draw.pick(IMPLS),
    }  # fmt: skip
    wanted = names if draw.chance(0.6) else []

    def run(**given: Any) -> Sequence[Tensor]:
        return with_gradient(pyfast_dpo.reward_loss, wanted, None, given)

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        truth = with_gradient(pyfast_dpo.reward_loss, names, None, widened(given))
        size = sum(
            t.double().abs() for t in (given[n] for n in (*names, "margins")) if t is not None
        )
        ordinary = size < 1e6
        eps, pull = (
            torch.finfo(results[0].dtype).eps,
            1 + given["center_rewards_coefficient"] * size,
        )
        near = (
            32
            * eps
            * (truth[0].abs() + (truth[1].abs() + truth[2].abs() + eps) * (1 + size) * pull)
        )
        check("losses", results[0][ordinary], truth[0][ordinary], near[ordinary])
        for ours, true in zip(results[1:], truth[1:], strict=False):
            near = (
                32 * eps * (1 + size) * (true.abs() + eps + pull - 1)
                + 1.02 * torch.finfo(ours.dtype).eps * true.abs()
            )
            near = near + torch.finfo(ours.dtype).tiny
            check("gradient", ours[ordinary], true[ordinary], near[ordinary])

    return public(pyfast_dpo.reward_loss, arguments, judge, run)


def kto_kl(draw: Draw) -> Case:
    count, dtype = draw.size(257), draw.pick(FLOATS)
    arguments = {
        "policy_kl_logps": draw.layout(draw.normal((count,), dtype)), "reference_kl_logps": draw.layout(draw.normal((count,), dtype)),
        "clamp": draw.chance(0.5),
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        difference = given["policy_kl_logps"].double() - given["reference_kl_logps"].double()
        mean = difference.mean() if difference.numel() else torch.zeros((), dtype=torch.float64)
        truth = mean.clamp(min=0) if given["clamp"] else mean
        check(
            "kto_kl",
            results[0],
            truth,
            1e-5 * float(difference.abs().nan_to_num(0, 0, 0).sum() + 1e-3),
        )

    return public(pyfast_dpo.kto_kl, arguments, judge)


def ld_weights(draw: Draw) -> Case:
    pairs, length = draw.size(5), draw.size(17)
    labels = draw.integers((2 * pairs, length), 0, 5).masked_fill(
        draw.bools((2 * pairs, length)), -100
    )
    rows = draw.chance(0.4)
    lengths = (labels != -100).sum(1).tolist()
    arguments: dict[str, Any] = (
        {"lengths": lengths} if rows else {"labels": draw.layout(labels), "shift": draw.chance(0.4)}
    )
    arguments["ld_alpha"] = draw.pick([0.0, 0.5, 1.0])
    if not rows:
        arguments["ignore_index"] = -100

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        alpha = float(given["ld_alpha"])
        if rows:
            counts = list(given["lengths"])
            scored = [torch.ones(n, dtype=torch.bool) for n in counts]
        else:
            ignore, labels = given["ignore_index"], given["labels"]
            if given["shift"] and labels.shape[1]:
                labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore)], 1)
            scored = list(labels != ignore)
            counts = [int(row.sum()) for row in scored]
        half, parts = len(counts) // 2, []
        for i, row in enumerate(scored):
            shared = min(counts[i], counts[(i + half) % len(counts)])
            parts.append(torch.where(row.cumsum(0) <= shared, 1.0, alpha) * row)
        assert results[0].shape[0] == (sum(counts) if rows else len(scored))
        expected = torch.cat([torch.zeros(0), *parts])
        assert torch.equal(results[0].flatten(), expected.float()), "weights"

    return public(
        pyfast_dpo.ld_row_weights if rows else pyfast_dpo.ld_token_weights, arguments, judge
    )


def wpo_weights(draw: Draw) -> Case:
    sequences, length = draw.size(5), draw.size(17)
    masked = draw.chance(0.5)
    mask = draw.bools((sequences, length))
    counts = mask.sum(1)
    shape = (sequences, length) if masked else (int(counts.sum()),)
    arguments: dict[str, Any] = {
        "token_logps": draw.layout(-draw.normal(shape).abs()), "log_sum_sq_probs": draw.layout(-draw.normal(shape).abs()),
        "mask": mask if masked else None, "counts": None if masked else counts,
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        gaps = given["token_logps"].double() - given["log_sum_sq_probs"].double()
        if given["mask"] is not None:
            parts = [g[m.bool()] for g, m in zip(gaps, given["mask"], strict=True)]
        else:
            assert sum(given["counts"].tolist()) == len(gaps) and all(
                n >= 0 for n in given["counts"].tolist()
            )
            parts = list(gaps.split(given["counts"].tolist()))
        truth = torch.stack(
            [
                torch.zeros((), dtype=torch.float64),
                *(p.mean() if len(p) else p.sum() for p in parts),
            ]
        )
        truth = truth[1:].exp()
        assert results[0].shape == truth.shape
        moderate = truth < 1e10
        near = 1e-5 if results[0].dtype in (torch.float32, torch.float64) else 0.2
        check("weights", results[0][moderate], truth[moderate], near * (1 + truth[moderate]))

    return public(pyfast_dpo.wpo_weights, arguments, judge)


SUBJECTS = (
    preference_loss,
    preference_loss,
    unpaired_loss,
    reward_loss,
    kto_kl,
    ld_weights,
    wpo_weights,
)
