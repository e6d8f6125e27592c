"""Draws docs/how_it_works.png:  python docs/draw_how_it_works.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DATA, MODEL, VOCABULARY, PAIR = "#e8e8e8", "#cfdceb", "#7d6ba0", "#d9a441"
GRADIENT = "#a03a2f"


def box(
    axes: Any, x: float, y: float, width: float, text: str, color: str, dark: bool = False
) -> None:
    shape = FancyBboxPatch(
        (x, y - 0.42), width, 0.84, boxstyle="round,pad=0.02,rounding_size=0.1", facecolor=color, edgecolor="0.35", linewidth=0.8
    )  # fmt: skip
    axes.add_patch(shape)
    ink = "white" if dark else "black"
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5, color=ink)


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = "0.2"
) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3)
    )


def layout(axes: Any) -> None:
    """The row of a pair, prompt once; and the padded rows that it replaces."""
    axes.text(0, 6.35, "a pair as one row: the prompt once, no padding", fontsize=8.5)
    parts = [(3.0, "prompt", "#c9c9c9"), (1.5, "chosen", "#9cc5a1"), (1.0, "rejected", "#e3a59b")]
    x = 0.0
    for width, name, color in parts:
        axes.add_patch(Rectangle((x, 5.65), width, 0.5, facecolor=color, edgecolor="0.35"))
        axes.text(x + width / 2, 5.9, name, ha="center", va="center", fontsize=8.5)
        x += width
    axes.text(
        0,
        5.3,
        "rejected sees the prompt, not chosen; both begin at the same position",
        fontsize=7.5,
        color="0.3",
    )
    axes.text(7.6, 6.35, "as two padded rows", fontsize=8.5)
    for y, width, name, color in (
        (5.9, 1.5, "chosen", "#9cc5a1"),
        (5.3, 1.0, "rejected", "#e3a59b"),
    ):
        axes.add_patch(Rectangle((7.6, y), 3.0, 0.4, facecolor="#c9c9c9", edgecolor="0.35"))
        axes.text(9.1, y + 0.2, "prompt", ha="center", va="center", fontsize=8)
        axes.add_patch(Rectangle((10.6, y), width, 0.4, facecolor=color, edgecolor="0.35"))
        axes.text(10.6 + width / 2, y + 0.2, name, ha="center", va="center", fontsize=8)
        rest = 1.5 - width
        if rest:
            axes.add_patch(
                Rectangle(
                    (10.6 + width, y), rest, 0.4, facecolor="white", edgecolor="0.35", hatch="////"
                )
            )


def main() -> None:
    page, axes = pyplot.subplots(figsize=(11, 5.6))
    layout(axes)
    y = 3.6
    box(axes, 0.0, y, 1.5, "data\nprompt, chosen\nand rejected", DATA)
    box(axes, 2.0, y, 1.4, "batch\n+ which rows\nare scored", DATA)
    box(axes, 3.9, y, 1.4, "model body\nhidden [.., H]", MODEL)
    box(
        axes,
        5.9,
        y,
        2.6,
        "vocabulary kernels\nlog-probs of R scored rows\nlogits: one chunk, float32",
        VOCABULARY,
        dark=True,
    )
    box(axes, 9.2, y, 1.5, "log-probs\none number\na sequence", DATA)
    box(axes, 11.3, y, 1.7, "pair kernels\nthe loss and its\nderivatives", PAIR)
    for start, end in ((1.55, 1.95), (3.45, 3.85), (5.35, 5.85), (8.55, 9.15), (10.75, 11.25)):
        arrow(axes, (start, y), (end, y))
    box(axes, 11.3, 1.9, 1.7, "metrics\nrewards, accuracy", DATA)
    arrow(axes, (12.15, 3.1), (12.15, 2.38))
    # the way back
    axes.plot([11.6, 11.6], [3.12, 2.65], color=GRADIENT, linewidth=1.3)
    axes.plot([11.6, 7.2], [2.65, 2.65], color=GRADIENT, linewidth=1.3)
    arrow(axes, (7.2, 2.65), (7.2, 3.12), GRADIENT)
    axes.text(
        9.35,
        2.72,
        "dL / d log-prob: one coefficient a sequence",
        ha="center",
        fontsize=8,
        color=GRADIENT,
    )
    axes.text(
        5.9, 1.75,
        "matrix products of R x H x V\n"
        "reference 1    frozen head (LoRA) 2    trainable head 3",
        fontsize=8.5, va="center",
    )  # fmt: skip
    axes.text(
        5.9, 1.05,
        "R counts completion tokens only: prompt and padding never meet the vocabulary",
        fontsize=8, color="0.3", va="center",
    )  # fmt: skip
    axes.set_xlim(-0.15, 13.2)
    axes.set_ylim(0.7, 6.7)
    axes.axis("off")
    page.savefig(Path(__file__).with_name("how_it_works.png"), dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
