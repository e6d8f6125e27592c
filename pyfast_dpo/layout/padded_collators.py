"""Padded batches of pairs and of unpaired examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Example = dict[str, Any]

IGNORE_INDEX = -100
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps")


@dataclass
class DataCollatorForPreference:
    """Stacks P pairs to 2P right-padded rows, chosen rows first.

    Args:
        pad_token_id: fills the padding. It may equal the end-of-sequence token: masks come from lengths.
        pad_to_multiple_of: round the padded length up to a multiple of this.

    Returns (from a call with a list of P examples `{"prompt_ids", "chosen_ids", "rejected_ids"}`):
        `input_ids`, `attention_mask`, `labels`, each int64 `[2P, L]`; labels are -100 on prompt and padding.

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
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        responses = [example["chosen_ids"] for example in examples]
        responses += [example["rejected_ids"] for example in examples]
        batch = pad_rows(prompts + prompts, responses, self.pad_token_id, self.pad_to_multiple_of)
        return batch | reference_values(examples)


@dataclass
class DataCollatorForUnpairedPreference:
    """Stacks N examples to N right-padded rows, and N more of mismatched prompt and completion.

    Args:
        pad_token_id, pad_to_multiple_of: as in `DataCollatorForPreference`.
        max_length: cuts the mismatched rows, whose two parts were cut to it with other partners.
        mismatched: False leaves them out, for losses that need no KL estimate.

    Returns (from a call with a list of N examples of `prepare_unpaired`):
        `input_ids`, `attention_mask`, `labels`, int64 `[N, L]`; the same with the prefix `KL_`, int64
        `[N, L_KL]`, for this row's prompt with a completion of another prompt; `label`, bool `[N]`.

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

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [example["prompt_ids"] for example in examples]
        completions = [example["completion_ids"] for example in examples]
        batch = pad_rows(prompts, completions, self.pad_token_id, self.pad_to_multiple_of)
        if self.mismatched:
            others = mismatched_completions(examples, self.max_length)
            kl_rows = pad_rows(prompts, others, self.pad_token_id, self.pad_to_multiple_of)
            batch.update({f"KL_{name}": rows for name, rows in kl_rows.items()})
        batch["label"] = torch.tensor([example["label"] for example in examples], dtype=torch.bool)
        return batch | reference_values(examples)


def reference_values(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The reference's log-probs that were computed before, `[N]` float32 each, if the examples have them."""
    return {
        name: torch.tensor([example[name] for example in examples], dtype=torch.float32)
        for name in REFERENCE_COLUMNS
        if name in examples[0]
    }


def mismatched_completions(examples: Sequence[Example], max_length: int | None) -> list[Any]:
    """The `KL_completion_ids`, cut so that they fit under the prompt that they do not belong to."""
    if max_length is None:
        return [example["KL_completion_ids"] for example in examples]
    return [
        example["KL_completion_ids"][: max_length - len(example["prompt_ids"])]
        for example in examples
    ]


def pad_rows(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """Right-padded rows `prompt + response`: `input_ids`, `attention_mask`, `labels`, int64 `[rows, L]`."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(lengths)
    if pad_to_multiple_of is not None:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(lengths), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(lengths), width), IGNORE_INDEX, dtype=torch.int64)
    for row, (prompt, response, length) in enumerate(zip(prompts, responses, lengths, strict=True)):
        border = len(prompt)
        input_ids[row, :border] = torch.as_tensor(prompt, dtype=torch.int64)
        input_ids[row, border:length] = torch.as_tensor(response, dtype=torch.int64)
        labels[row, border:length] = input_ids[row, border:length]
    attention_mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
