"""The picture of a GPU's figures: python bench/gpu_plot.py bench/results/gpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def plot(figures: dict[str, Any], path: Path) -> bool:
    """One panel a workload: the share of the floor that everybody reaches. False without matplotlib or floors."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in figures["rows"]:
        if not row["note"] and row["of_floor"] == row["of_floor"]:
            groups.setdefault(row["workload"], []).append(row)
    if not groups:
        return False
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.4 * columns, 3.4 * lines), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        names = [row["contestant"] for row in rows]
        colors = [
            "#888888" if name == "floor" else "#d1495b" if "pyfast" in name else "#30638e"
            for name in names
        ]
        axis.bar(names, [row["of_floor"] for row in rows], color=colors)
        if rows[0]["target"]:
            axis.axhline(rows[0]["target"], color="#333333", linewidth=0.8, linestyle="--")
        axis.set_title(title.replace(", ", "\n"), fontsize=7)
        axis.tick_params(axis="x", rotation=60, labelsize=6)
        axis.grid(axis="y", alpha=0.3)
    for row in axes:
        row[0].set_ylabel("share of the floor")
    figure.suptitle(f"{figures['device']}, torch {figures['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).with_suffix(".png"))
