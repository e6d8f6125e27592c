"""The reference's log-probs of a dataset, computed once before training and kept in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyfast_dpo.data.cache import cache_folder
from pyfast_dpo.layout.padded_collators import MASK_SUFFIX
from pyfast_dpo.ops.extras import require


def reference_key(model: nn.Module, examples: Iterable[dict[str, Any]], settings: str) -> str:
    """A name for the log-probs that this model gives to these examples: changes with any of them. Of a PEFT
    model only what stays as it is counts: the base, and an adapter that is kept as the reference."""
    adapted = hasattr(model, "peft_config")
    trained = {name for name, p in model.named_parameters() if adapted and p.requires_grad}
    digest = hashlib.sha256(settings.encode())
    for name, value in model.state_dict().items():
        if name not in trained:
            digest.update(name.encode())
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    for example in examples:
        for name, value in example.items():
            if name.endswith(("_ids", MASK_SUFFIX)):
                digest.update(np.asarray(value, dtype=np.int32).tobytes() + b"|")
    return digest.hexdigest()[:32]


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

    The file is written as it goes, so that a run that was killed goes on where it was. Each process
    computes and keeps its own share, the examples rank, rank + world, ...; those of others stay NaN.

    Args:
        key: from `reference_key`.
        compute: log-probs `[n, columns]` of n examples.
        name: of the dataset, for the progress bar.
    """
    folder = cache_folder() / "reference_logps"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}-{rank}of{world}.npy"
    table = _open_table(path, (len(examples), len(columns)))
    mine = range(rank, len(examples), world)
    missing = [i for i in mine if np.isnan(table[i]).any()]
    tqdm = require("tqdm", "the progress bar").tqdm
    bar = tqdm(total=len(missing), desc=f"reference log-probs of {name}", disable=rank > 0)
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        table[part] = compute([examples[i] for i in part]).cpu().numpy()
        table.flush()
        bar.update(len(part))
    bar.close()
    return np.array(table)


def _open_table(path: Path, shape: tuple[int, int]) -> np.memmap:
    if path.exists():
        try:
            table = np.lib.format.open_memmap(path, mode="r+")
            if table.shape == shape and table.dtype == np.float32:
                return table
        except ValueError:
            pass  # cut off while it was created
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    table[:] = np.nan
    return table
