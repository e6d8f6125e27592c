"""Rows from JSONL files or from the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyfast_dpo.ops.extras import require

Row = dict[str, Any]


def load_rows(source: str | Path | Sequence[str | Path], *, split: str = "train") -> Sequence[Row]:
    """Reads a dataset.

    Args:
        source: one or several JSONL files (`.jsonl` or `.json`, one object a line), whose rows are joined
            in the given order; or one directory written by `Dataset.save_to_disk`; or one name for
            `datasets.load_dataset`.
        split: which split of a `datasets` name to take.

    Returns:
        The rows, a list of dicts or a `datasets.Dataset`.

    Raises:
        FileNotFoundError: a JSONL file that does not exist.
        ValueError: a line that is not a JSON object (with file and line number); no rows.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError("load_rows: source must name at least one file or dataset, got none")
    if all(Path(item).suffix in (".jsonl", ".json") for item in sources):
        rows: Sequence[Row] = [row for item in sources for row in _read_jsonl(Path(item))]
    elif len(sources) == 1:
        rows = _load_with_datasets(str(sources[0]), split)
    else:
        raise ValueError(
            f"load_rows: several sources must all be .jsonl files, got {[str(s) for s in sources]}"
        )
    if len(rows) == 0:
        raise ValueError(f"load_rows: no rows in {', '.join(str(item) for item in sources)}")
    return rows


def _read_jsonl(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"load_rows: {path}, line {number} is not JSON: {error}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"load_rows: {path}, line {number} must be a JSON object, got {type(row).__name__}"
                )
            yield row


def _load_with_datasets(name: str, split: str) -> Sequence[Row]:
    datasets = require("datasets", f"loading the dataset {name!r}")
    if Path(name).is_dir() and any(
        (Path(name) / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")
    ):
        loaded = datasets.load_from_disk(name)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split not in loaded:
            raise ValueError(
                f"load_rows: split must be one of {list(loaded)} of {name}, got {split!r}"
            )
        return loaded[split]
    return datasets.load_dataset(name, split=split)
