"""Data without a length, tokenized as it is read: every row once, whoever reads, and a report all the same."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pyfast_dpo.data.prepared import Example
from pyfast_dpo.data.report import DataReport
from pyfast_dpo.data.tables import Tables, check_example

Row = Mapping[str, Any]
Examples = Callable[[Iterable[tuple[int, Row]], DataReport], Iterator[tuple[int, Example]]]

ROWS_OF_A_NOTE = 100  # of a worker to its main process; the first ones are told one by one


class StreamedDataset(IterableDataset[Example]):
    """Tokenizes rows as they are read.

    Workers of a data loader share a plain iterable among them row by row. A stream that is itself an
    `IterableDataset` of torch or `datasets` divides itself, as torch asks of it; row numbers are then those of
    the worker's part. `set_epoch` goes to the stream, which shuffles anew if it shuffles.

    Args:
        rows: can be iterated again and again.
        examples: makes (row number, example) of (row number, row) and fills a report.
        name: of the dataset, for the report.
    """

    def __init__(self, rows: Iterable[Row], examples: Examples, name: str) -> None:
        self.tables: Tables | None = None  # that every example is checked against
        self._rows, self._examples = rows, examples
        self._report = DataReport(name)
        self._notes = Path(tempfile.mkdtemp(prefix="pyfast_dpo-"))
        self._epoch = 0
        weakref.finalize(self, _remove, self._notes, os.getpid())

    @property
    def report(self) -> DataReport:
        """Of the rows of the last pass, as far as it went; from workers the last few may be missing."""
        notes = sorted(self._notes.glob("*.pickle"))
        if not notes:
            return self._report
        report = DataReport(self._report.name)
        for path in notes:
            for part in _read_notes(path):
                report.add(part)
        return report

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        if worker is None:
            for path in self._notes.glob("*.pickle"):
                path.unlink(missing_ok=True)
            self._report.clear()
            yield from self._read(enumerate(self._rows, start=1), self._report)
            if self._report.total and not self._report.kept:
                raise ValueError(f"dataset: no usable row; {self._report}")
            return
        rows: Iterator[tuple[int, Row]] = enumerate(self._rows, start=1)
        if not isinstance(self._rows, IterableDataset) and not is_of_datasets(self._rows):
            rows = islice(rows, worker.id, None, worker.num_workers)
        report = DataReport(self._report.name)
        told = 0
        with (self._notes / f"{worker.id}.pickle").open("wb") as notes:
            for example in self._read(rows, report):
                if told < ROWS_OF_A_NOTE or report.total >= ROWS_OF_A_NOTE:
                    told += report.total
                    _write_note(notes, report)
                yield example
            _write_note(notes, report)

    def _read(self, rows: Iterable[tuple[int, Row]], report: DataReport) -> Iterator[Example]:
        told: set[str] = set()
        for number, example in self._examples(rows, report):
            self._tell_drops(report, told)
            if self.tables is not None:
                check_example(example, self.tables, report.name, number)
            yield {
                name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in example.items()
            }
        self._tell_drops(report, told)

    def _tell_drops(self, report: DataReport, told: set[str]) -> None:
        """The first row of every reason; in later epochs they are the same."""
        for reason in report.dropped.keys() - told if self._epoch == 0 else ():
            told.add(reason)
            warnings.warn(
                f"{report.name} dataset: row {report.dropped[reason][0]} is left out ({reason}); the report counts "
                "all such rows",
                stacklevel=2,
            )


def is_of_datasets(rows: Any) -> bool:
    return type(rows).__module__.split(".")[0] == "datasets"


def _write_note(notes: Any, report: DataReport) -> None:
    pickle.dump(report, notes)
    notes.flush()
    report.clear()


def _read_notes(path: Path) -> Iterator[DataReport]:
    with path.open("rb") as notes:
        while True:
            try:
                yield pickle.load(notes)
            except (EOFError, pickle.UnpicklingError):  # the end, or a note that is being written
                return


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a worker has a copy of the dataset
        shutil.rmtree(folder, ignore_errors=True)
