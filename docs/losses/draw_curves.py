"""Draws the curves of this folder's pages from pyfast_dpo.numpy: `python docs/losses/draw_curves.py`.

Each picture has the loss on the left and its derivative on the right, both as the kernels return them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

import pyfast_dpo.numpy as losses

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent


class Curve(NamedTuple):
    label: str
    loss_type: str
    options: dict[str, Any]
    moves: str = "chosen"  # the response on the x axis; the other one stays at `rest`
    style: str = "-"


def of_pair(curve: Curve, x: np.ndarray, rest: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """(losses, derivatives by x), a pair at a time because the functions return means."""
    values, slopes = [], []
    for at in x:
        pair = (at, rest) if curve.moves == "chosen" else (rest, at)
        given = [np.array([value]) for value in pair]
        result = losses.preference_loss(
            *given, beta=beta, loss_type=curve.loss_type, **curve.options
        )
        values.append(result.loss)
        slopes.append(float((result[2] if curve.moves == "chosen" else result[3])[0]))
    return np.array(values), np.array(slopes)


def of_response(
    curve: Curve, x: np.ndarray, rest: float, beta: float
) -> tuple[np.ndarray, np.ndarray]:
    desirable = np.array([curve.moves == "chosen"])
    results = [
        losses.unpaired_loss(
            np.array([at]), desirable, None, beta, loss_type=curve.loss_type, **curve.options
        )
        for at in x
    ]
    return np.array([r.loss for r in results]), np.array([float(r.grad_policy[0]) for r in results])


PICTURES: dict[str, dict[str, Any]] = {
    "margin": {
        "of": of_pair, "x": np.linspace(-6, 6, 241), "rest": 0.0, "beta": 1.0, "top": 6.0,
        "axis": "log-ratio of chosen less that of rejected, beta = 1",
        "curves": [
            Curve("sigmoid", "sigmoid", {}),
            Curve("sigmoid, label_smoothing 0.1", "sigmoid", {"label_smoothing": 0.1}),
            Curve("robust, label_smoothing 0.1", "robust", {"label_smoothing": 0.1}),
            Curve("hinge", "hinge", {}),
            Curve("ipo", "ipo", {}),
            Curve("exo_pair, label_smoothing 0.01", "exo_pair", {"label_smoothing": 0.01}),
            Curve("discopop", "discopop", {}),
        ],
    },
    "both": {
        "of": of_pair, "x": np.linspace(-6, 6, 241), "rest": 0.0, "beta": 1.0, "top": 6.0,
        "axis": "log-ratio of chosen (solid) or rejected (dashed), the other at 0, beta = 1",
        "curves": [
            Curve(name if style == "-" else "", name, {}, moves, style)
            for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
            for moves, style in (("chosen", "-"), ("rejected", "--"))
        ],
    },
    "policy": {
        "of": of_pair, "x": np.linspace(-6, -0.02, 240), "rest": -2.0, "beta": 1.0, "top": 8.0,
        "axis": "average log-prob of chosen, rejected at -2, beta = 1",
        "curves": [
            Curve("sft", "sft", {}),
            Curve("cpo, cpo_alpha 1", "cpo", {}),
            Curve("simpo", "simpo", {}),
            Curve("alphapo", "alphapo", {}),
            Curve("orpo", "orpo", {}),
        ],
    },
    "unpaired": {
        "of": of_response, "x": np.linspace(-6, 6, 241), "rest": 0.0, "beta": 1.0, "top": 6.0,
        "axis": "log-ratio of a desirable (solid) or undesirable (dashed) response, beta = 1",
        "curves": [
            Curve(label if style == "-" else "", name, options, moves, style)
            for label, name, options in (
                ("kto, kl 1", "kto", {"kl": 1.0}),
                ("apo_zero_unpaired", "apo_zero_unpaired", {}),
                ("bco, bco_shift 0", "bco", {}),
            )
            for moves, style in (("chosen", "-"), ("rejected", "--"))
        ],
    },
    "divergences": {
        "of": of_pair, "x": np.linspace(-6, 6, 241), "rest": 0.0, "beta": 1.0, "top": 6.0,
        "axis": "log-ratio of chosen, rejected at 0, beta = 1, loss_type sigmoid",
        "curves": [
            Curve("reverse_kl", "sigmoid", {}),
            Curve("forward_kl", "sigmoid", {"f_divergence_type": "forward_kl"}),
            Curve("js_divergence", "sigmoid", {"f_divergence_type": "js_divergence"}),
            Curve("alpha_divergence, 0.5", "sigmoid", {"f_divergence_type": "alpha_divergence"}),
        ],
    },
}  # fmt: skip


def draw(name: str, of: Any, x: np.ndarray, rest: float, beta: float, top: float, axis: str, curves: list[Curve]) -> None:  # fmt: skip
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colors: dict[str, Any] = {}
    lowest = 0.0
    for curve in curves:
        values, slopes = of(curve, x, rest, beta)
        color = None if curve.label else colors[curve.loss_type]
        (line,) = left.plot(x, values, curve.style, color=color, label=curve.label or None, lw=1.6)
        right.plot(x, slopes, curve.style, color=line.get_color(), lw=1.6)
        colors[curve.loss_type] = line.get_color()
        lowest = min(lowest, values.min())
    left.set_ylim(1.1 * lowest - 0.2, top)
    right.set_ylim(max(right.get_ylim()[0], -3), min(right.get_ylim()[1], 3))
    for panel, title in ((left, "loss"), (right, "derivative")):
        panel.set_title(title, fontsize=10)
        panel.grid(color="0.92")
        panel.axhline(0, color="0.6", lw=0.8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.supxlabel(axis, fontsize=9)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(FOLDER / f"{name}.png", dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    for picture, options in PICTURES.items():
        draw(picture, **options)
