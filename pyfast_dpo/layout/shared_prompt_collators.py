"""Batches without padding in which each prompt stands once: one row `prompt | chosen | rejected | prompt | ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyfast_dpo.layout.padded_collators import (
    Example,
    masks_of,
    mismatched_completions,
    reference_values,
)
from pyfast_dpo.layout.shared_prompt import SharedPromptRow, pack_row
from pyfast_dpo.logprobs.rows import CompletionRows

Batch = dict[str, Any]


@dataclass
class SharedPromptCollatorForPreference:
    """Packs P pairs into one row; pairs of one batch with the same prompt share it too.

    Returns (from a call with a list of P examples as those of `DataCollatorForPreference`):
        `sequence_tokens`: int64 `[P]`, tokens of the two sequences of an example, prompts counted in both.
        `input_ids`, `position_ids`: int64 `[1, T]`; `shared_prompt_layout`: for the attention function.
        `token_uses`: float32 `[1, T]`, how many sequences every token belongs to.
        `completion_rows`: a `pyfast_dpo.CompletionRows`, where the scored tokens of the 2P sequences are,
        chosen ones first.
        `ref_chosen_logps`, `ref_rejected_logps`: float32 `[P]`, if the examples have them.

    Example:
        >>> batch = SharedPromptCollatorForPreference()([
        ...     {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        ... ])
        >>> batch["input_ids"], batch["position_ids"]
        (tensor([[1, 2, 3, 4, 5, 6]]), tensor([[0, 1, 2, 3, 4, 3]]))
        >>> rows = batch["completion_rows"]
        >>> rows.index, rows.targets, rows.lengths  # the prompt's end scores 4 and 6
        (tensor([2, 3, 2]), tensor([4, 5, 6]), (2, 1))
    """

    def __call__(self, examples: Sequence[Example]) -> Batch:
        prompts = [example["prompt_ids"] for example in examples]
        responses = [example["chosen_ids"] for example in examples]
        responses += [example["rejected_ids"] for example in examples]
        masks = masks_of(examples, "chosen") + masks_of(examples, "rejected")
        row = pack_row(prompts + prompts, responses, masks)
        tokens = [
            2 * len(e["prompt_ids"]) + len(e["chosen_ids"]) + len(e["rejected_ids"])
            for e in examples
        ]
        return {
            "sequence_tokens": torch.tensor(tokens),
            **row_batch(row, len(row.lengths)),
            "completion_rows": scored_rows(row, 0, len(row.lengths)),
            **reference_values(examples),
        }


@dataclass
class SharedPromptCollatorForUnpairedPreference:
    """Packs N examples into one row, each with its mismatched completion under the same prompt.

    Args:
        max_length: cuts the mismatched completions, which were cut to it under other prompts.
        mismatched: False leaves them out, for losses that need no KL estimate.

    Returns (from a call with a list of N examples of `prepare_unpaired`): as
        `SharedPromptCollatorForPreference` for N sequences; `KL_completion_rows` for the N mismatched ones, in
        the same row, which `token_uses` does not count; `label`, bool `[N]`; `ref_logps`, `ref_KL_logps`, if the examples have them.
    """

    max_length: int | None = None
    mismatched: bool = True

    def __call__(self, examples: Sequence[Example]) -> Batch:
        prompts = [example["prompt_ids"] for example in examples]
        completions = [example["completion_ids"] for example in examples]
        masks = masks_of(examples, "completion")
        count = len(examples)
        tokens = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        if self.mismatched:
            others, other_masks = mismatched_completions(examples, self.max_length)
            tokens = [n + len(p) + len(o) for n, p, o in zip(tokens, prompts, others, strict=True)]
            prompts, completions = prompts + prompts, completions + others
            masks += other_masks
        row = pack_row(prompts, completions, masks)
        kl_rows = (
            {"KL_completion_rows": scored_rows(row, count, 2 * count)} if self.mismatched else {}
        )
        return {
            "sequence_tokens": torch.tensor(tokens),
            **row_batch(row, count),
            "completion_rows": scored_rows(row, 0, count),
            **kl_rows,
            "label": torch.tensor([example["label"] for example in examples], dtype=torch.bool),
            **reference_values(examples),
        }


def row_batch(row: SharedPromptRow, count: int) -> Batch:
    """What a model takes of a row; `token_uses` of its first `count` sequences."""
    return {
        "input_ids": row.tokens.unsqueeze(0),
        "position_ids": row.layout.positions().unsqueeze(0),
        "shared_prompt_layout": row.layout,
        "token_uses": row.uses(0, count).unsqueeze(0),
    }


def scored_rows(row: SharedPromptRow, first: int, last: int) -> CompletionRows:
    """The scored tokens of the sequences [first, last)."""
    start, lengths = sum(row.lengths[:first]), row.lengths[first:last]
    stop = start + sum(lengths)
    counts = torch.tensor(lengths, dtype=torch.int64)
    return CompletionRows(row.index[start:stop], row.targets[start:stop], counts, lengths)
