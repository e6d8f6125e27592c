"""The reference's log-probs of a dataset, computed once before training and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_dpo.data.cache import cache_folder
from pyfast_dpo.layout.padded_collators import MASK_SUFFIX
from pyfast_dpo.ops.extras import require
from pyfast_dpo.trainers.adapters import is_adapted


def reference_key(
    model: nn.Module, adapter: str | None, examples: Iterable[dict[str, Any]], settings: str
) -> str:
    """A name for the log-probs that a model gives to examples: changes with any of them.

    Args:
        model: its weights count, and its configuration, which holds what no weight does, such as the capping of
            logits. Of a PEFT model only what stays as it is: the base, and the adapter that is kept.
        adapter: that is kept as the reference.
        examples: their token ids count.
        settings: whatever else the values depend on.
    """
    adapted = is_adapted(model)
    if adapted:
        in_use: Any = model.base_model.active_adapters  # type: ignore[union-attr]
        settings += f" {in_use} {getattr(model, '_adapters_disabled', False)}"
    trained = {name for name, p in model.named_parameters() if adapted and p.requires_grad}
    digest = hashlib.sha256(settings.encode())
    configurations = [model.config] if hasattr(model, "config") else []
    if adapter is not None:
        configurations.append(model.peft_config[adapter])  # type: ignore[index]
    for configuration in configurations:
        digest.update(_configuration_text(configuration).encode())
    for name, value in model.state_dict().items():
        if name not in trained:
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for example in examples:
        for name, value in example.items():
            if name.endswith(("_ids", MASK_SUFFIX)):
                digest.update(np.asarray(value, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:32]


def _configuration_text(configuration: Any) -> str:
    """Without names, places and versions, which change no value."""
    values = {
        name: value
        for name, value in configuration.to_dict().items()
        if not name.startswith("_") and "name_or_path" not in name and "version" not in name
    }
    return json.dumps(values, sort_keys=True, default=str)


def computed_once(
    key: str,
    examples: Sequence[dict[str, Any]],
    columns: tuple[str, ...],
    batch_size: int,
    compute: Callable[[list[dict[str, Any]]], Tensor],
    *,
    name: str,
    rank: int = 0,
    world: int = 1,
) -> np.ndarray:
    """Fills and returns `[N, columns]` float32 from the cache, computing what is not there yet.

    The file grows batch by batch, so that a run that was killed goes on where it was, with the same batches
    and so with the same bits. Each process computes and keeps its own share, the examples rank, rank + world,
    ...; those of others stay 0, so that a sum over the processes is the whole.

    Args:
        key: from `reference_key`.
        compute: log-probs `[n, columns]` of n examples.
        name: of the dataset, for the progress bar.

    Raises:
        OSError: the cache cannot be written; what it holds already stays.

    Warns:
        UserWarning: entries of the cache were damaged, and are computed again.
    """
    mine = range(rank, len(examples), world)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    tqdm = require("tqdm", "the progress bar").tqdm
    path = cache_folder() / "reference_logps" / f"{key}-{rank}of{world}.logps"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table, known = _read(path, len(examples), len(columns))
        missing = [batch for batch in batches if not known[batch].all()]
        with path.open("ab") as file:
            for batch in tqdm(missing, f"reference log-probs of {name}", disable=rank > 0):
                table[batch] = compute([examples[i] for i in batch]).cpu().numpy()
                file.write(_records(batch, table).tobytes())
                file.flush()
    except OSError as error:
        raise OSError(
            f"precompute_ref_log_probs: the cache {path} could not be read or written ({error}). What it holds "
            "already stays; the environment variable XDG_CACHE_HOME names another folder"
        ) from error
    return table


# A file is records one after the other: which example, its log-probs, and a checksum of both.


def _record_type(columns: int) -> np.dtype:
    return np.dtype([("example", "<i8"), ("logps", "<f4", (columns,)), ("checksum", "<u4")])


def _records(batch: Sequence[int], table: np.ndarray) -> np.ndarray:
    records = np.zeros(len(batch), _record_type(table.shape[1]))
    records["example"], records["logps"] = batch, table[batch]
    records["checksum"] = _checksums(records)
    return records


def _checksums(records: np.ndarray) -> np.ndarray:
    size, content = records.itemsize, records.tobytes()
    return np.array(
        [zlib.crc32(content[at : at + size - 4]) for at in range(0, len(content), size)], np.uint32
    )


def _read(path: Path, count: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(table `[count, columns]`, which examples it holds); the file then holds nothing else."""
    table, known = np.zeros((count, columns), np.float32), np.zeros(count, bool)
    content = path.read_bytes() if path.exists() else b""
    size = _record_type(columns).itemsize
    whole = len(content) // size * size
    records = np.frombuffer(content[:whole], _record_type(columns))
    good = (_checksums(records) == records["checksum"]) & (records["example"] < count)
    table[records["example"][good]], known[records["example"][good]] = records["logps"][good], True
    if not good.all():
        warnings.warn(
            f"precompute_ref_log_probs: {(~good).sum()} of {len(good)} entries of {path} are damaged and are "
            "computed again",
            stacklevel=2,
        )
    if not good.all() or whole < len(content):  # the last one may have been cut off with its run
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(records[good].tobytes())
        partial.replace(path)
    return table, known
