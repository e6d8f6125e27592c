"""Batches in either layout: what a model takes of them, and which tokens are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.layout.attention import no_mask
from pyfast_dpo.layout.padded_collators import IGNORE_INDEX
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.scores import sums_of_sequences

Batch = Mapping[str, Any]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What a model's body needs of a batch, in either layout."""
    if "shared_prompt_layout" not in batch:
        return {name: batch[name] for name in ("input_ids", "attention_mask")} | {
            "use_cache": False
        }
    names = ("input_ids", "position_ids", "shared_prompt_layout")
    return {name: batch[name] for name in names} | {
        "attention_mask": no_mask(batch["input_ids"].device),
        "use_cache": False,
    }


def completion_rows(batch: Batch, prefix: str = "") -> CompletionRows:
    """The scored tokens of a batch; those of a padded batch are found by its `labels` or, as TRL's collators name
    them, its `completion_mask` (1 where a token is scored), which waits for the device.

    Raises:
        ValueError: a padded batch that has neither.
    """
    rows = batch.get(prefix + "completion_rows")
    if rows is not None:
        # The Trainer moves tensors, but not what holds them.
        return rows.to(batch["input_ids"].device)
    labels = batch.get("labels")
    if labels is None:
        if "completion_mask" not in batch:
            raise ValueError(
                "data_collator: a padded batch must have `labels` (-100 where a token is not scored) or "
                f"`completion_mask` (1 where it is), got {sorted(batch)}"
            )
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    return CompletionRows.from_labels(labels, shift=True, ignore_index=IGNORE_INDEX)


def token_counts(batch: Batch) -> tuple[Tensor, int]:
    """(tokens of all sequences of a batch, a prompt counted in each and padding in none; those computed)"""
    names = [name for name in ("input_ids", "KL_input_ids") if name in batch]
    computed = sum(batch[name].numel() for name in names)
    counts = [batch[name] for name in ("sequence_tokens", "KL_sequence_tokens") if name in batch]
    if counts:
        return torch.stack([count.sum() for count in counts]).sum(), computed
    masks = [batch[name.replace("input_ids", "attention_mask")] for name in names]
    return torch.stack([mask.sum() for mask in masks]).sum(), computed


def sums(values: Tensor, rows: CompletionRows) -> Tensor:
    """`[R]` -> `[S]` float32: sums of what was measured over the rows of every sequence."""
    return sums_of_sequences(values.float(), rows.counts, None, average=False)
