"""The functions on NumPy arrays, and the entry points of the compiled module that they call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fuzz.case import Case, check, public
from fuzz.draw import Draw
from fuzz.losses import drawn_logps, loss_tolerance, pair_options
from fuzz.operators_rows import rows_and_labels
from fuzz.truth import of_rows, tolerance_of_sums
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import numpy as functions
from pyfast_dpo.losses.table import UNPAIRED_LOSSES
from pyfast_dpo.ops import _C


def tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    dtype = np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def sequence_logprob(draw: Draw) -> Case:
    z, labels, _, _ = rows_and_labels(draw, (torch.float32, torch.float64, torch.float16))
    labels = labels.clamp(0, z.shape[-1] - 1)
    mask = draw.bools(labels.shape)
    if draw.chance(0.2) and z.shape[0]:
        z, labels, mask = z[0], labels[0], mask[0]
    tokens = labels.numpy().astype(draw.pick(["i8", "i4", "i8", "u2"]))
    arguments = {
        "logits": draw.array_layout(z.numpy()), "tokens": draw.array_layout(tokens),
        "mask": draw.array_layout(mask.numpy().astype(draw.pick(["?", "?", "i8", "f4"]))),
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        z, tokens = tensor(given["logits"]), tensor(given["tokens"])
        scored = np.ones(tokens.shape) if given["mask"] is None else np.asarray(given["mask"])
        mask = tensor(scored.astype(np.bool_))
        targets = tokens.long().masked_fill(~mask.bool(), -1)
        assert not ((targets >= z.shape[-1]) | (targets < -1)).any(), "accepted tokens out of range"
        truth, _ = of_rows(z, targets)
        near = tolerance_of_sums(z, targets, truth)
        assert results[0].dtype == (np.float64 if z.dtype == torch.float64 else np.float32)
        check(
            "log-probs",
            torch.from_numpy(np.atleast_1d(results[0])),
            truth.sum(-1).reshape(-1),
            near.reshape(-1),
        )

    return public(functions.compute_sequence_logprob, arguments, judge)


def arrays_of(draw: Draw, loss: str, count: int) -> list[Any]:
    dtype = draw.pick([torch.float32, torch.float64, torch.float16])
    logps = [
        None if t is None else t.to(dtype).numpy()
        for t in drawn_logps(draw, loss, count, torch.float64)
    ]
    return [None if t is None else draw.array_layout(t) for t in logps]


def pairs(draw: Draw) -> Case:
    count = draw.size(257)
    function = draw.pick([functions.preference_loss, functions.dpo_loss, functions.ipo_loss])
    options: dict[str, Any] = {}
    if function is functions.preference_loss:
        options = pair_options(draw, count, torch.float64)
        if isinstance(options.get("margins"), Tensor):
            options["margins"] = options["margins"].numpy()
        if draw.chance(0.4):
            options |= {
                n: draw.integers((count,), 0, 40).numpy()
                for n in ("chosen_lengths", "rejected_lengths")
            }
    elif function is functions.dpo_loss:
        options = {"label_smoothing": draw.pick([0.0, 0.1])}
    kind = options.get("loss_type", "ipo" if function is functions.ipo_loss else "sigmoid")
    losses = [kind] if isinstance(kind, str) else kind
    special = [n for n in ("orpo", "alphapo") if n in losses]
    logps = arrays_of(draw, "orpo" if special else losses[0], count)
    if function is not functions.preference_loss and logps[2] is None:
        logps[2:] = [np.zeros(count, t.dtype) for t in logps[:2]]
    names = ("policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    arguments = dict(zip(names, logps, strict=True), beta=draw.pick([0.01, 0.1, 1.0]), **options)

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        if given["beta"] > 100:
            return
        inputs = [None if given[n] is None else tensor(given[n]).double() for n in names]
        leaves = [t.requires_grad_() for t in inputs[:2] if t is not None]
        rest = {n: v for n, v in given.items() if n not in names}
        loss = rest.pop("loss_type", "ipo" if function is functions.ipo_loss else "sigmoid")
        rest = {
            n: tensor(v) if isinstance(v, (np.ndarray, list)) and n != "loss_weights" else v
            for n, v in rest.items()
        }
        if rest.get("margins") is not None:
            rest["margins"] = rest["margins"].double()
        truth = pyfast_dpo.preference_loss(
            *leaves, *inputs[2:], loss_type=loss, impl="torch", **rest
        )
        slopes = torch.autograd.grad(truth.losses.sum(), leaves, materialize_grads=True)
        like = [t if t is None else t.to(torch.float32) for t in inputs] + [
            None,
            None,
            rest.get("margins"),
            None,
        ]
        names_of_losses = [loss] if isinstance(loss, str) else list(loss)
        near, ordinary = loss_tolerance(
            names_of_losses[0], like, truth.losses.detach(), slopes, rest["beta"]
        )
        near = near * 4 * len(names_of_losses) * (1 + abs(rest.get("bco_shift") or 0.0))
        if not ordinary.all():
            return
        count = max(len(near), 1)
        mean = truth.losses.detach().sum() / count
        assert isinstance(results[0], float)
        check(
            "loss",
            torch.tensor(results[0], dtype=torch.float64),
            mean,
            float(near.sum() / count) + 1e-6 * abs(float(mean)),
        )
        for ours, slope in zip(results[-2:], slopes, strict=True):
            check(
                "gradient", torch.from_numpy(ours), slope / count, near * (1 + rest["beta"]) / count
            )

    return public(function, arguments, judge)


def unpaired(draw: Draw) -> Case:
    count = draw.size(257)
    kto = draw.chance(0.5)
    function = functions.kto_loss if kto else functions.unpaired_loss
    policy, _, reference, _ = arrays_of(draw, "sigmoid", count)
    if kto and reference is None:
        reference = np.zeros(count, policy.dtype)
    loss = "kto" if kto else draw.pick(list(UNPAIRED_LOSSES))
    arguments: dict[str, Any] = {
        "policy_logp": policy, "is_desirable": draw.array_layout(draw.bools((count,)).numpy()), "ref_logp": reference,
        "beta": draw.pick([0.01, 0.1, 1.0]), "desirable_weight": draw.pick([0.0, 1.0, 1.3]),
        "undesirable_weight": draw.pick([0.0, 1.0, 0.7]),
    }  # fmt: skip
    if not kto:
        arguments["loss_type"] = loss
    constant = UNPAIRED_LOSSES[loss].constant
    if constant is not None and (constant == "kl" or draw.chance(0.6)):
        arguments[constant] = draw.pick([0.0, 0.4, 1])

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        if max(given[n] for n in ("beta", "desirable_weight", "undesirable_weight")) > 100:
            return
        if abs(given.get("kl") or 0.0) > 1e30:
            return
        p = tensor(given["policy_logp"]).double().requires_grad_()
        c = None if given["ref_logp"] is None else tensor(given["ref_logp"]).double()
        options = {
            n: given[n]
            for n in ("beta", "desirable_weight", "undesirable_weight", "kl", "bco_shift")
            if n in given
        }
        truth = pyfast_dpo.unpaired_loss(
            p,
            tensor(given["is_desirable"]),
            c,
            loss_type=given.get("loss_type", "kto"),
            impl="torch",
            **options,
        )
        (slope,) = torch.autograd.grad(truth.losses.sum(), p)
        beta = given["beta"]
        center = max(abs(float(given.get(n) or 0.0)) for n in ("kl", "bco_shift"))
        size = p.detach().abs() + (0 if c is None else c.abs()) + center * (1 + 1 / beta)
        if not bool((size < 1e6).all()):
            return
        eps, weight = 2.0**-23, 1 + max(given["desirable_weight"], given["undesirable_weight"])
        near = (
            32
            * eps
            * weight
            * (truth.losses.detach().abs() + (1 + beta * size) * (slope.abs() * (1 + size) + eps))
        )
        count = max(len(size), 1)
        mean = truth.losses.detach().sum() / count
        check(
            "loss", torch.tensor(results[0], dtype=torch.float64), mean, float(near.sum() / count)
        )
        near = 32 * eps * (1 + beta * size) * (slope.abs() + beta * eps) * weight + 1e-15 * weight
        check("gradient", torch.from_numpy(results[-1]), slope / count, near / count)

    return public(function, arguments, judge)


def rewards(draw: Draw) -> Case:
    count = draw.size(65)
    chosen, rejected, *_ = arrays_of(draw, "sigmoid", count)
    arguments = {
        "chosen": chosen, "rejected": rejected,
        "margins": draw.normal((count,), torch.float64).abs().numpy() if draw.chance(0.4) else None,
        "center_rewards_coefficient": draw.pick([0.0, 0.01]),
    }  # fmt: skip

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        leaves = [tensor(given[n]).double().requires_grad_() for n in ("chosen", "rejected")]
        margins = None if given["margins"] is None else tensor(given["margins"]).double()
        pull = given["center_rewards_coefficient"]
        if pull > 100:
            return
        truth = pyfast_dpo.reward_loss(
            *leaves, margins=margins, center_rewards_coefficient=pull, impl="torch"
        )
        slopes = torch.autograd.grad(truth.sum(), leaves, materialize_grads=True)
        size = sum(t.detach().abs() for t in leaves) + (0 if margins is None else margins.abs())
        if not bool((size < 1e5).all()):
            return
        count, eps = max(len(size), 1), 2.0**-23
        near = (
            32
            * eps
            * (
                truth.detach().abs()
                + (1 + size) * (1 + pull * size) * (slopes[0].abs() + slopes[1].abs() + eps)
            )
        )
        check(
            "loss",
            torch.tensor(results[0], dtype=torch.float64),
            truth.detach().sum() / count,
            float(near.sum() / count),
        )
        for ours, slope in zip(results[-2:], slopes, strict=True):
            near = 32 * eps * (1 + size) * (slope.abs() + eps + pull * size)
            check("gradient", torch.from_numpy(ours), slope / count, near / count)

    return public(functions.reward_loss, arguments, judge)


def module_logps(draw: Draw) -> Case:
    """The compiled function itself: labels are not checked there, and give NaN."""
    z, labels, _, _ = rows_and_labels(draw, (torch.float32, torch.float64, torch.float16))
    labels = labels.masked_fill(draw.bools(labels.shape) & draw.bools(labels.shape), -100)
    arguments = {"logits": z.numpy(), "labels": labels.numpy()}

    def judge(given: dict[str, Any], results: Sequence[Any]) -> None:
        z, labels = tensor(given["logits"]), tensor(given["labels"]).long()
        assert labels.shape == z.shape[:2] and z.dim() == 3
        outside = ((labels < 0) | (labels >= z.shape[-1])) & (labels != -100)
        targets = labels.masked_fill((labels == -100) | outside, -1)
        truth, _ = of_rows(z, targets)
        ours = torch.from_numpy(results[0])
        assert ours[outside.any(-1)].isnan().all(), "a number of a label out of range"
        kept = ~outside.any(-1)
        check(
            "log-probs", ours[kept], truth.sum(-1)[kept], tolerance_of_sums(z, targets, truth)[kept]
        )

    case = Case("sequence_logps", arguments, lambda **a: [_C.sequence_logps(a["logits"], a["labels"])], judge,
                ("logits", "labels", "incompatible function arguments"))  # fmt: skip
    return case


SUBJECTS = (sequence_logprob, sequence_logprob, pairs, pairs, unpaired, rewards, module_logps)
