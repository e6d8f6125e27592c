"""Rows from files, from folders, or from the `datasets` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyfast_dpo.data.files import is_readable, known_suffixes, read_file
from pyfast_dpo.ops.extras import require

Row = dict[str, Any]

_SAVED = ("dataset_info.json", "dataset_dict.json")  # of Dataset.save_to_disk
_NOT_ROWS = (*_SAVED, "dataset_infos.json", "state.json", "config.json")


def load_rows(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
) -> Sequence[Row]:
    """Reads a dataset.

    Args:
        source: one or several files or folders, whose rows are joined in the given order: JSON (one object a
            line, or an array of them), CSV, TSV, Parquet, each also compressed by gzip (`.jsonl.gz`); or one
            folder written by `Dataset.save_to_disk`; or one name for `datasets.load_dataset`. Cells of CSV and TSV
            that hold chat messages, tools or a label are read as such.
        split: which split of a `datasets` name to take; of a folder whose files are named by splits
            (`train.jsonl`, `test-00000.parquet`), the files of that split.
        config, streaming: of a `datasets` name: its configuration, and whether rows are read as they are needed.

    Returns:
        The rows, a list of dicts or a `datasets.Dataset`; with `streaming` an `IterableDataset`.

    Raises:
        FileNotFoundError: a file or folder that does not exist.
        ValueError: a file of another kind; content that is not rows (with file and line number); no rows; a split
            that is not there.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError("load_rows: source must name at least one file or dataset, got none")
    named = len(sources) == 1 and not _is_path(sources[0])
    if (config is not None or streaming) and not named:
        raise ValueError(
            f"load_rows: config and streaming are for a dataset by name, got {config!r} and {streaming} with "
            f"{[str(item) for item in sources]}"
        )
    if named:
        datasets = require("datasets", f"loading the dataset {sources[0]!r}")
        rows = datasets.load_dataset(str(sources[0]), config, split=split, streaming=streaming)
        if streaming:  # of unknown length
            return rows
    elif len(sources) == 1 and any((Path(sources[0]) / name).exists() for name in _SAVED):
        rows = _saved(str(sources[0]), split)
    else:
        files = [file for item in sources for file in _files_of(Path(item), split)]
        rows = [row for file in files for row in read_file(file)]
    if len(rows) == 0:
        raise ValueError(f"load_rows: no rows in {', '.join(str(item) for item in sources)}")
    return rows


def _is_path(item: str | Path) -> bool:
    """Anything else is a name of a dataset, such as "trl-lib/ultrafeedback_binarized"."""
    path = Path(item)
    return (
        isinstance(item, Path)
        or path.exists()
        or is_readable(path)
        or str(item).startswith((".", "/", "~"))
    )


def _files_of(path: Path, split: str) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"load_rows: No such file or directory: {str(path)!r}")
    if not path.is_dir():
        if not is_readable(path):
            raise ValueError(
                f"load_rows: {path} must be one of {known_suffixes()}, also with .gz, by its name"
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if is_readable(file) and file.name not in _NOT_ROWS and file.is_file()
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise ValueError(f"load_rows: no file of {known_suffixes()} in the folder {path}")
    splits = [_split_of(file) for file in files]
    if not any(splits):
        return files
    if not all(splits):
        other = files[splits.index(None)]
        raise ValueError(
            f"load_rows: of the files in {path} some are named by a split and {other.name} is not; name the files "
            "that are meant"
        )
    chosen = [
        file for file, name in zip(files, splits, strict=True) if name == _SPLITS.get(split, split)
    ]
    if not chosen:
        raise ValueError(
            f"load_rows: split must be one of {sorted({str(name) for name in splits})}, by which the files of "
            f"{path} are named, got {split!r}"
        )
    return chosen


# Under which names splits go, as `datasets` knows them too.
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
    "evaluation": "test", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation",
}  # fmt: skip


def _split_of(file: Path) -> str | None:
    """The split that a file is named by: its name begins with it, and no letter follows."""
    name = file.name.lower()
    letters = next((i for i, letter in enumerate(name) if not letter.isalpha()), len(name))
    return _SPLITS.get(name[:letters])


def _saved(folder: str, split: str) -> Sequence[Row]:
    datasets = require("datasets", f"loading the dataset {folder!r}")
    loaded = datasets.load_from_disk(folder)
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise ValueError(
            f"load_rows: split must be one of {list(loaded)} of {folder}, got {split!r}"
        )
    return loaded[split]
