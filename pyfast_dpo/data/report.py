"""The account of every row: what was kept, what was dropped and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

ROWS_SHOWN = 10
REASONS_SHOWN = 10


@dataclass
class DataReport:
    """What became of the rows of a dataset; `str()` gives a one-line summary.

    Rows are numbered from 1, so that for a JSONL file without blank lines they are its line numbers.
    """

    name: str  # "train", "eval", ...
    total: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> row numbers
    truncated: list[int] = field(default_factory=list)  # rows with a response cut at max_length
    # Rows whose prompt, tokenized alone, is not a prefix of prompt + response: the tokens where they
    # diverge count as response.
    shifted_boundary: list[int] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.total - sum(len(rows) for rows in self.dropped.values())

    def drop(self, row: int, reason: str) -> None:
        self.dropped.setdefault(reason, []).append(row)

    def add(self, other: DataReport) -> None:
        """Counts the rows of another part of the same dataset too."""
        self.total += other.total
        for reason, rows in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(rows)
        self.truncated += other.truncated
        self.shifted_boundary += other.shifted_boundary

    def clear(self) -> None:
        self.total = 0
        for kept in (self.dropped, self.truncated, self.shifted_boundary):
            kept.clear()

    def __str__(self) -> str:
        parts = [f"{self.name}: kept {self.kept} of {self.total} rows"]
        if self.dropped:
            reasons = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
            shown = [
                f"{len(rows)} {reason} ({_rows(rows)})" for reason, rows in reasons[:REASONS_SHOWN]
            ]
            more = sum(len(rows) for _, rows in reasons[REASONS_SHOWN:])
            if more:
                shown.append(f"{more} for {len(reasons) - REASONS_SHOWN} other reasons")
            parts.append("dropped: " + ", ".join(shown))
        if self.truncated:
            parts.append(f"responses cut at max_length: {len(self.truncated)}")
        if self.shifted_boundary:
            parts.append(
                f"prompt and response share a token or the chat template renders the prompt alone "
                f"differently: {len(self.shifted_boundary)}"
            )
        return "; ".join(parts)


def _rows(rows: Iterable[int]) -> str:
    numbers = list(rows)
    shown = ", ".join(str(number) for number in numbers[:ROWS_SHOWN])
    more = len(numbers) - ROWS_SHOWN
    return (
        ("row " if len(numbers) == 1 else "rows ")
        + shown
        + (f" and {more} more" if more > 0 else "")
    )
