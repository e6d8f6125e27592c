"""Padded batches of pairs and of unpaired examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Example = Mapping[str, Any]

IGNORE_INDEX = -100
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")
# An example may have, beside the ids of a response such as `chosen_ids`, a `chosen_assistant_mask`: 1 for a token
# of the assistant, 0 for one of a tool's or a user's turn inside the response, which is context and not scored.
MASK_SUFFIX = "_assistant_mask"


@dataclass
class DataCollatorForPreference:
    """Stacks P pairs to 2P right-padded rows, chosen rows first.

    Args:
        pad_token_id: fills the padding. It may equal the end-of-sequence token: masks come from lengths.
        max_length: the most tokens of a row, or None; longer rows are cut before they are padded.
        truncation_mode: "keep_start" or "keep_end", which end of a longer row stays.
        pad_to_multiple_of: round the padded length up to a multiple of this.
        return_tensors: "pt", the only kind there is.

    Returns (from a call with a list of P examples `{"prompt_ids", "chosen_ids", "rejected_ids"}`, and where
        not all tokens of a response are scored `"chosen_assistant_mask"`, `"rejected_assistant_mask"`):
        `input_ids`, `attention_mask`, `labels`, `completion_mask`, each int64 `[2P, L]`; labels are -100 and the
        completion mask 0 where nothing is scored: on prompt, padding, and turns that are not the assistant's.
        `ref_chosen_logps`, `ref_rejected_logps`: float32 `[P]`, if the examples have them.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> collator = DataCollatorForPreference(pad_token_id=0)
        >>> batch = collator([
        ...     {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        ...     {"prompt_ids": [7, 8], "chosen_ids": [9, 0], "rejected_ids": [10, 11, 12]},
        ... ])
        >>> batch["input_ids"]
        tensor([[ 1,  2,  3,  4,  5],
                [ 7,  8,  9,  0,  0],
                [ 1,  2,  3,  6,  0],
                [ 7,  8, 10, 11, 12]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]])
        >>> batch["labels"]
        tensor([[-100, -100, -100,    4,    5],
                [-100, -100,    9,    0, -100],
                [-100, -100, -100,    6, -100],
                [-100, -100,   10,   11,   12]])
        >>> batch["completion_mask"]
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 1, 1, 0],
                [0, 0, 0, 1, 0],
                [0, 0, 1, 1, 1]])
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(
                f"DataCollatorForPreference: truncation_mode must be 'keep_start' or 'keep_end', "
                f"got {self.truncation_mode!r}"
            )
        _check_return_tensors(self)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        responses = [example["chosen_ids"] for example in examples]
        responses += [example["rejected_ids"] for example in examples]
        batch = pad_rows(
            prompts + prompts,
            responses,
            masks_of(examples, "chosen") + masks_of(examples, "rejected"),
            self.pad_token_id,
            self.pad_to_multiple_of,
            max_length=self.max_length,
            keep_end=self.truncation_mode == "keep_end",
        )
        return batch | reference_values(examples)


@dataclass
class DataCollatorForUnpairedPreference:
    """Stacks N examples to N right-padded rows, and N more of mismatched prompt and completion.

    Args:
        pad_token_id, max_length, pad_to_multiple_of, return_tensors: as in `DataCollatorForPreference`. The
            mismatched rows, whose two parts were cut to `max_length` with other partners, need it.
        mismatched: False leaves them out, for losses that need no KL estimate; examples without
            `KL_completion_ids` have none.

    Returns (from a call with a list of N examples of `prepare_unpaired`):
        `input_ids`, `attention_mask`, `labels`, `completion_mask`, int64 `[N, L]`; the same with the prefix `KL_`,
        int64 `[N, L_KL]`, for this row's prompt with a completion of another prompt; `label`, bool `[N]`.
        `ref_logps`, `ref_KL_logps`: float32 `[N]`, if the examples have them.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> collator = DataCollatorForUnpairedPreference(pad_token_id=0)
        >>> batch = collator([
        ...     {"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "KL_completion_ids": [5, 6]},
        ...     {"prompt_ids": [4], "completion_ids": [5, 6], "label": False, "KL_completion_ids": [3]},
        ... ])
        >>> batch["labels"]
        tensor([[-100, -100,    3],
                [-100,    5,    6]])
        >>> batch["KL_labels"]
        tensor([[-100, -100,    5,    6],
                [-100,    3, -100, -100]])
        >>> batch["label"]
        tensor([ True, False])
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    mismatched: bool = True
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _check_return_tensors(self)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        completions = [example["completion_ids"] for example in examples]
        padding = self.pad_token_id, self.pad_to_multiple_of
        masks = masks_of(examples, "completion")
        batch = pad_rows(prompts, completions, masks, *padding, max_length=self.max_length)
        if self.mismatched and "KL_completion_ids" in examples[0]:
            kl_rows = pad_rows(
                prompts, *mismatched_completions(examples, self.max_length), *padding
            )
            batch.update({f"KL_{name}": rows for name, rows in kl_rows.items()})
        batch["label"] = torch.tensor([example["label"] for example in examples], dtype=torch.bool)
        return batch | reference_values(examples)


def _check_return_tensors(collator: Any) -> None:
    if collator.return_tensors != "pt":
        raise ValueError(
            f"{type(collator).__name__}: return_tensors must be 'pt', got {collator.return_tensors!r}"
        )


def masks_of(examples: Sequence[Example], response: str) -> list[Any]:
    """Which tokens of the response of that name are scored in every example; None for all of them."""
    return [example.get(response + MASK_SUFFIX) for example in examples]


def reference_values(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The reference's log-probs that were computed before, `[N]` float32 each, if the examples have them."""
    return {
        name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
        for name in REFERENCE_COLUMNS
        if name in examples[0]
    }


def mismatched_completions(
    examples: Sequence[Example], max_length: int | None
) -> tuple[list[Any], list[Any]]:
    """The `KL_completion_ids` and their masks, cut so that they fit under the prompt that they do not belong to."""
    rooms = [
        None if max_length is None else max(max_length - len(example["prompt_ids"]), 0)
        for example in examples
    ]
    ids = [
        example["KL_completion_ids"][:room] for example, room in zip(examples, rooms, strict=True)
    ]
    masks = [
        None if mask is None else mask[:room]
        for mask, room in zip(masks_of(examples, "KL_completion"), rooms, strict=True)
    ]
    return ids, masks


def pad_rows(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    masks: Sequence[Any],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    *,
    max_length: int | None = None,
    keep_end: bool = False,
) -> dict[str, Tensor]:
    """Right-padded rows `prompt + response`: `input_ids`, `attention_mask`, `labels`, `completion_mask`, int64
    `[rows, L]`. Of rows above `max_length` that many tokens of the start stay, or of the end."""
    rows, scored = [], []
    cut = slice(None, max_length)
    if keep_end and max_length is not None:
        cut = slice(-max_length, None)
    for prompt, response, mask in zip(prompts, responses, masks, strict=True):
        ids = [torch.as_tensor(part, dtype=torch.int64) for part in (prompt, response)]
        mask = torch.ones_like(ids[1]) if mask is None else torch.as_tensor(mask).long()
        rows.append(torch.cat(ids)[cut])
        scored.append(torch.cat([torch.zeros_like(ids[0]), mask])[cut])
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    if pad_to_multiple_of is not None:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    completion_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        completion_mask[i, : len(row)] = scored[i]
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long(),
        "labels": input_ids.masked_fill(completion_mask == 0, IGNORE_INDEX),
        "completion_mask": completion_mask,
    }
