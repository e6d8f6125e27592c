"""What every benchmark shows: progress, entries for JSON, tables and bars of the same entries."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import Spread, spread


class Progress:
    """One line on stderr that says what runs; lines below each other where there is no terminal."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step, self.text = steps, 0, ""
        self.start = time.perf_counter()

    def next(self, text: str) -> None:
        self.step, self.text = self.step + 1, text
        self._write(text, end="" if sys.stderr.isatty() else "\n")

    def detail(self, text: str) -> None:
        if sys.stderr.isatty():
            self._write(f"{self.text}: {text}", end="")

    def done(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _write(self, text: str, end: str) -> None:
        seconds = time.perf_counter() - self.start
        line = f"[{self.step}/{self.steps}, {seconds:.0f} s] {text}"
        erase = "\r\033[K" if sys.stderr.isatty() else ""
        print(erase + line, end=end, file=sys.stderr, flush=True)


QUIET = 0.05  # share of the CPUs that others may use before a table says so


def noise(load: float | None) -> list[str]:
    """What a table must say of what others did meanwhile, as lines."""
    if load is None or load <= QUIET:
        return []
    return [f"Others used {load:.0%} of the CPUs meanwhile: these times are no claim."]


# --- entries --------------------------------------------------------------------------------------


def timing(name: str, seconds: list[float], size: int) -> dict[str, Any]:
    times = spread(seconds)
    return {
        "contender": name,
        "bytes": size,
        "seconds": times._asdict(),
        "gigabytes_per_second": size / times.median / 1e9,
    }


def figure(ratio: Spread, target: float | None = None) -> dict[str, Any]:
    reached = None if target is None else ratio.median >= target
    return {"ratio": ratio._asdict(), "target": target, "reached": reached}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# --- tables -------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text table: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first, *others = (cell.ljust if i == 0 else cell.rjust for i, cell in enumerate(row))
        lines.append(
            "  ".join([first(widths[0])] + [f(w) for f, w in zip(others, widths[1:], strict=True)])
        )
    return "\n".join(line.rstrip() for line in lines)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def timing_table(title: str, number: str, entries: list[dict[str, Any]]) -> str:
    """Rows of `timing` and `figure`; with a column for the ceilings where there are some."""
    header = [title, "bytes", "median ms (quartiles)", "GB/s", "ratio (quartiles)", "target", ""]
    ceilings = any("ceiling" in entry for entry in entries)
    header += ["at the floor"] * ceilings
    rows = []
    for entry in entries:
        milliseconds = {key: 1e3 * value for key, value in entry["seconds"].items()}
        ratio, target = entry.get("ratio"), entry.get("target")
        rows.append(
            [
                entry["contender"],
                megabytes(entry["bytes"]),
                with_quartiles(milliseconds, "{:.2f}"),
                f"{entry['gigabytes_per_second']:.1f}",
                with_quartiles(ratio, number) if ratio else "",
                ">= " + number.format(target) if target else "",
                verdict(entry.get("reached")),
            ]
        )
        if ceilings:
            rows[-1].append(number.format(entry["ceiling"]) if "ceiling" in entry else "")
    return table(header, rows)


def with_quartiles(values: dict[str, float], number: str) -> str:
    median, low, high = (number.format(values[key]) for key in ("median", "low", "high"))
    return f"{median} ({low}..{high})"


def verdict(reached: bool | None) -> str:
    return "" if reached is None else "pass" if reached else "MISS"


# --- plots --------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One horizontal bar: a measurement, the target it is held against, the most that is possible."""

    group: str
    label: str
    value: Spread
    color: str
    target: float | None
    ceiling: float | None = None


def load_pyplot() -> Any | None:
    """matplotlib without a display, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def draw_bars(axes: Any, bars: Sequence[Bar], *, number: str) -> None:
    """Horizontal bars, a heading above each group, quartiles as whiskers.

    Targets are black strokes, ceilings hollow diamonds.

    Args:
        number: format of the value beside a bar, such as "{:.1f}x".
    """
    position, positions, labels, group = 0.0, [], [], None
    room = 1.02 * max(max(bar.value.high, bar.target or 0, bar.ceiling or 0) for bar in bars)
    for bar in bars:
        if bar.group != group:
            group = bar.group
            position += 1.15
            axes.text(0, position - 0.15, group, fontsize=9, fontweight="bold", va="center")
            position += 0.85
        axes.barh(position, bar.value.median, height=0.72, color=bar.color)
        axes.hlines(position, bar.value.low, bar.value.high, color="0.25", linewidth=1)
        if bar.target is not None:
            axes.vlines(bar.target, position - 0.44, position + 0.44, color="black", linewidth=2.2)
        if bar.ceiling is not None:
            axes.plot(bar.ceiling, position, "D", markersize=5, color="white", mec="0.25")
        end = bar.value.high
        for mark in sorted(x for x in (bar.target, bar.ceiling) if x is not None):
            if 0 <= mark - end < 0.1 * room:
                end = mark + 0.005 * room  # the number would stand on the mark
        text = number.format(bar.value.median)
        axes.text(end + 0.015 * room, position, text, fontsize=8, va="center")
        positions.append(position)
        labels.append(bar.label)
        position += 1
    axes.set_yticks(positions, labels, fontsize=8)
    axes.set_ylim(position - 0.2, 0.4)
    axes.set_xlim(0, 1.12 * room)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
