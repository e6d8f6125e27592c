"""Rows from one file: JSON, CSV, TSV, Parquet, as they are or compressed by gzip."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pyfast_dpo.data.messages import without_none
from pyfast_dpo.ops.extras import require

Row = dict[str, Any]

LONGEST_CELL = 2**31 - 1  # characters; Python's csv stops at 131072 unless told otherwise


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file, by its name.

    Raises:
        ValueError: content that is not rows, with file and line.
    """
    reader = _READERS[_kind(path)]
    try:
        yield from reader(path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"load_rows: {path} cannot be read: {error}") from error


def is_readable(path: Path) -> bool:
    return _kind(path) in _READERS


def known_suffixes() -> str:
    return ", ".join(_READERS)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(path: Path, newline: str | None = None) -> TextIO:
    """As UTF-8; the mark that some programs begin such a file with is no part of it."""
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[Row]:
    """One object a line, or an array of objects."""
    with _text(path) as text:
        start = text.read(1)
        while start.isspace():
            start = text.read(1)
        text.seek(0)
        yield from _read_array(text, path) if start == "[" else _read_lines(text, path)


def _read_array(text: TextIO, path: Path) -> Iterator[Row]:
    try:
        rows = json.load(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"load_rows: {path} is not JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"load_rows: {path}, item {number} must be a JSON object, got {type(row).__name__}"
            )
        yield row


def _read_lines(text: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"load_rows: {path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"load_rows: {path}, line {number} must be a JSON object, got {type(row).__name__}"
            )
        yield row


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        with _text(path, newline="") as text:
            cells = csv.DictReader(text, delimiter=delimiter, strict=True)
            for row in cells:
                if None in row:
                    raise ValueError(
                        f"load_rows: {path}, line {cells.line_num} has more cells than the {len(row) - 1} columns"
                    )
                yield {str(column): _value(column, cell) for column, cell in row.items()}
    except csv.Error as error:
        raise ValueError(f"load_rows: {path}, after line {cells.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, delimiter="\t")


def _value(column: str, cell: str | None) -> Any:
    """Cells are text: messages are told by their roles, a label by its name; anything else stays text."""
    if cell is None:  # a line with fewer cells than columns
        return None
    if column == "label":
        return _LABELS.get(cell.strip().lower(), cell)
    if cell.lstrip().startswith("["):
        try:
            value = json.loads(cell)
        except json.JSONDecodeError:
            return cell
        if value and all(isinstance(message, dict) and "role" in message for message in value):
            return value
    return cell


_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet", f"reading {path}")
    pyarrow = require("pyarrow", f"reading {path}")
    source: Any = path
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as file:
            source = pyarrow.BufferReader(file.read())
    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches():
                # Its columns have None for every field that only other rows have.
                for row in batch.to_pylist():
                    yield {column: without_none(value) for column, value in row.items()}
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"load_rows: {path} is not Parquet: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}  # fmt: skip
