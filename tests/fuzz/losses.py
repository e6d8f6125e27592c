"""Log-probs for the losses, and how far a loss may be from its formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fuzz.draw import Draw
from torch import Tensor

from pyfast_dpo.losses.table import DIVERGENCES, PAIR_LOSS_NAMES, PAIR_LOSSES

VALUES: dict[str, Sequence[float]] = {
    "label_smoothing": (0.0, 0.1, 0.4), "discopop_tau": (0.05, 0.3, 2.0), "simpo_gamma": (0.5, 0.7),
    "alphapo_alpha": (0.25, 0.0, 0.4), "cpo_alpha": (1.0, 0.6), "bco_shift": (0.35, -1.0),
}  # fmt: skip


def drawn_logps(draw: Draw, loss: str, count: int, dtype: torch.dtype) -> list[Any]:
    """Policy's and, or None, reference's log-probs of both responses."""
    scale = draw.pick([1.0, 30.0, 300.0] if loss != "orpo" else [0.5, 3.0])
    logps: list[Any] = [-scale * draw.normal((count,), dtype).abs() - 1e-3 for _ in range(4)]
    if draw.chance(0.2):  # policy == reference
        logps[2:] = [t.clone() for t in logps[:2]]
    if loss == "orpo" or draw.chance(0.3):
        logps[2:] = [None, None]
    if draw.chance(0.1):
        logps[0] = draw.with_special(logps[0])
    return logps


def loss_tolerance(
    loss: str, inputs: Sequence[Any], truth: Tensor, slopes: Sequence[Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """(tolerance [P], where it holds): roundings of the inputs' differences, carried into the loss by its slopes.
    It holds where everything is a number of moderate size: tests/losses has the values far from there."""
    logps = [t.detach().double().abs() for t in inputs[:4] if t is not None]
    margins = inputs[6]
    size = sum(logps[1:], logps[0]) + 1 / beta
    if margins is not None:
        size = size + margins.double().abs() / beta
    if inputs[7] is not None:
        size = size + inputs[7].double().abs() / beta
    slope = sum((s.detach().abs() for s in slopes), torch.zeros_like(size))
    eps = torch.finfo(inputs[0].dtype).eps
    # ... of curved losses also into their slopes.
    tolerance = 64 * eps * (truth.abs() + (slope + beta) * (1 + size) * (1 + beta * size))
    ordinary = (
        size.isfinite()
        & (size < 1e5)
        & truth.isfinite()
        & (truth.abs() < 1e10)
        & slope.isfinite()
        & (slope < 1e8)
    )
    return tolerance, ordinary


def pair_options(draw: Draw, pairs: int, dtype: torch.dtype) -> dict[str, Any]:
    """Loss, and options that go with it."""
    names = (
        draw.random.sample(PAIR_LOSS_NAMES, 2)
        if draw.chance(0.15)
        else [draw.pick(PAIR_LOSS_NAMES)]
    )
    allowed = frozenset.union(*(PAIR_LOSSES[n].options for n in names))
    options: dict[str, Any] = {"loss_type": names if len(names) > 1 else names[0]}
    if len(names) > 1 and draw.chance(0.5):
        options["loss_weights"] = [0.7, -0.3]
    for name, values in VALUES.items():
        if name in allowed and draw.chance(0.4):
            options[name] = draw.pick(values)
    if "exo_pair" in names:
        options["label_smoothing"] = 0.1
    if "margins" in allowed and draw.chance(0.3):
        options["margins"] = draw.normal((pairs,), dtype).abs()
    if all("f_divergence_type" in PAIR_LOSSES[n].options for n in names) and draw.chance(0.4):
        options["f_divergence_type"] = draw.pick(DIVERGENCES)
        if options["f_divergence_type"] == "alpha_divergence":
            options["f_alpha_divergence_coef"] = draw.pick([0.5, 1.7])
    if draw.chance(0.2):
        options["rpo_alpha"] = 0.3
    return options


def unpaired_options(draw: Draw, count: int) -> dict[str, Any]:
    return {
        "is_desirable": draw.layout(draw.bools((count,))), "desirable_weight": draw.pick([0.0, 1.0, 1.3]),
        "undesirable_weight": draw.pick([0.0, 1.0, 0.7]),
    }  # fmt: skip
