"""Pairs of texts as padded arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a preferred and another response."""

    prompt: str
    chosen: str
    rejected: str


def create_preference_batch(
    pairs: Sequence[PreferencePair], tokenizer: Callable[[str], Any]
) -> dict[str, NDArray[Any]]:
    """Token ids of P pairs, padded on the right, with masks that are true on tokens.

    Args:
        pairs: at least one.
        tokenizer: from a text to its token ids: a tokenizer of transformers, or any function that returns a
            sequence of integers. One of transformers begins a prompt as it begins texts and never a response,
            and its end-of-sequence token ends every response once.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`, int64 `[P, L]` each with its own L >= 1; `prompt_mask`,
        `chosen_mask`, `rejected_mask`, bool of the same shapes. Padding is the tokenizer's `pad_token_id`, or 0.

    Raises:
        TypeError, ValueError: no pairs, other things than pairs, token ids that are no integers.

    Example:
        >>> pair = PreferencePair("ab", "c", "de")
        >>> batch = create_preference_batch([pair], lambda text: [ord(letter) for letter in text])
        >>> batch["prompt_ids"], batch["chosen_ids"], batch["rejected_ids"]
        (array([[97, 98]]), array([[99]]), array([[100, 101]]))
    """
    name = "create_preference_batch"
    if not pairs:
        raise ValueError(f"{name}: pairs must hold at least one pair, got none")
    for pair in pairs:
        if not isinstance(pair, PreferencePair):
            raise TypeError(f"{name}: pairs must hold PreferencePair, got {type(pair).__name__}")
    pad = getattr(tokenizer, "pad_token_id", None)
    batch: dict[str, NDArray[Any]] = {}
    for part in ("prompt", "chosen", "rejected"):
        rows = [_token_ids(tokenizer, getattr(pair, part), part == "prompt") for pair in pairs]
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(max(1, lengths.max())) < lengths[:, None]
        ids = np.full(mask.shape, 0 if pad is None else pad, dtype=np.int64)
        ids[mask] = np.concatenate(rows)
        batch |= {f"{part}_ids": ids, f"{part}_mask": mask}
    return batch


def _token_ids(tokenizer: Any, text: str, is_prompt: bool) -> NDArray[np.int64]:
    if hasattr(tokenizer, "eos_token_id"):  # of transformers: it knows special tokens
        ids = list(tokenizer(text, add_special_tokens=is_prompt)["input_ids"])
        end = tokenizer.eos_token_id
        while ids and end is not None and ids[-1] == end:
            ids.pop()
        if not is_prompt and end is not None:
            ids.append(end)
    else:
        ids = list(tokenizer(text))
    array = np.asarray(ids) if ids else np.empty(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"create_preference_batch: tokenizer must return a sequence of integers, got {ids!r:.80}"
        )
    return array.astype(np.int64)
