"""What was written in a rollout, for people to read: a table on the terminal, and all of it in files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = 10  # responses of a table, unless told otherwise
WIDTH = 50  # characters of a text in it


class CompletionLog:
    """Keeps responses until the next log step."""

    def __init__(self, shown: int | None, unique_prompts: bool) -> None:
        self._shown, self._unique = SHOWN if shown is None else shown, unique_prompts
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
    ) -> None:
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {"step": step, "prompt": text_of(prompt), "completion": text_of(completion)}
            self._rows.append({**row, **{name: values[i] for name, values in columns.items()}})

    def write(self, folder: Path, step: int) -> None:
        """Prints a table, writes `completions_STEP.parquet`, and begins anew."""
        if not self._rows:
            return
        from datasets import Dataset

        print(self.table())
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(self._rows).to_parquet(str(folder / f"completions_{step:05d}.parquet"))
        self._rows = []

    def table(self) -> str:
        rows, seen = [], set()
        for row in self._rows:
            if not (self._unique and row["prompt"] in seen):
                rows.append(row)
            seen.add(row["prompt"])
        rows = rows[: self._shown]
        names = list(rows[0])
        cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        return "\n".join(
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )


def text_of(value: Any) -> str:
    """A string, or messages one a line."""
    if isinstance(value, str):
        return value
    return "\n".join(f"{each['role']}: {each['content']}" for each in value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return textwrap.shorten(str(value), WIDTH, placeholder="…")
