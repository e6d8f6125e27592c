"""Prompts alone, for responses that are not there yet."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from pyfast_dpo.data.messages import refuse_images, template_options
from pyfast_dpo.data.prepare import Outcome, Row, prepare_rows
from pyfast_dpo.data.prepared import PreparedDataset
from pyfast_dpo.data.rows import text_of
from pyfast_dpo.data.streams import StreamedDataset
from pyfast_dpo.data.templates import tokenizer_of
from pyfast_dpo.data.tokenization import TextTokenizer


def prepare_prompts(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    name: str = "train",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreparedDataset:
    """Prompts as token ids.

    Args:
        rows: dicts or a `datasets.Dataset`, with the column `prompt`: a string or messages; `tools` and
            `chat_template_kwargs` as in preference data. All other columns stay as they are.
        tokenizer: as in `prepare_pairs`. Messages are rendered ready for the assistant's turn.
        max_length: prompts of so many tokens or more are left out and reported.
        name: of the dataset, for the report.
        chat_template_kwargs: options of the chat template for all rows.

    Returns:
        Examples `{"prompt_ids"}` beside the columns of their rows; `.report` accounts for every row.

    Raises:
        ValueError: a first row without `prompt`; no usable row, with the reasons; a stream, which has no length.
        TypeError: a first row that is not a mapping.

    Warns:
        UserWarning: plain strings for a tokenizer with a chat template.
    """
    prompt_of = functools.partial(
        _prompt,
        tokenize=TextTokenizer(tokenizer, max_length),
        given=dict(chat_template_kwargs or {}),
    )
    prepared = prepare_rows(rows, prompt_of, _columns_of_prompts, iter, name, None)
    if isinstance(prepared, StreamedDataset):
        raise ValueError(
            f"dataset: prompts must be a list or a datasets.Dataset, got {type(rows).__name__}, a stream without a "
            "length; list(...) or datasets.Dataset.from_generator makes one of it"
        )
    if getattr(tokenizer_of(tokenizer), "chat_template", None) and isinstance(
        prepared[0]["prompt"], str
    ):
        warnings.warn(
            f"{name} dataset: the prompts are plain strings, which get no chat template: a model that was tuned on "
            'chats rarely ends its responses then. Messages do: [{"role": "user", "content": ...}]',
            stacklevel=3,
        )
    return prepared


def _columns_of_prompts(row: Row) -> tuple[str, ...]:
    return ("prompt",)


def _prompt(row: Row, tokenize: TextTokenizer, given: Mapping[str, Any]) -> Outcome:
    refuse_images(row)
    return Outcome(
        [{"prompt_ids": tokenize.prompt(text_of(row, "prompt"), template_options(row, given))}]
    )
