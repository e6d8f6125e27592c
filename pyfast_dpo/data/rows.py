"""From a raw row to a pair or an unpaired example, or to the reason why it cannot be used.

A text is a plain string or a list of chat messages (`{"role": ..., "content": ...}`). Pairs have the
columns `chosen` and `rejected`, and either `prompt` or whole conversations whose common beginning is the
prompt. Unpaired rows have `prompt`, `completion` and `label`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Text = str | list[dict[str, Any]]

PAIR_COLUMNS = ("chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")

# Turns of the Anthropic HH transcripts, the best-known pairs that come as two whole conversations in text.
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class UnusableRow(Exception):
    """A row that cannot be trained on; the message is the reason as the report shows it."""


@dataclass(frozen=True)
class Pair:
    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Unpaired:
    prompt: Text
    completion: Text
    label: bool


def check_columns(
    rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...], *, first: int = 1
) -> None:
    """Raises ValueError for the first row (numbered from `first`) that lacks one of the columns."""
    for number, row in enumerate(rows, start=first):
        if not isinstance(row, Mapping):
            raise TypeError(f"dataset: row {number} must be a mapping, got {type(row).__name__}")
        for column in columns:
            if column not in row:
                raise ValueError(
                    f"dataset: row {number} has no column {column!r}; expected the columns "
                    f"{list(columns)}, got {list(row)}"
                )


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """A `Pair` from a row with the columns `chosen`, `rejected` and, unless implicit, `prompt`.

    Raises:
        UnusableRow: wrong types, identical or empty responses, differing prompts.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise UnusableRow("identical responses")
    if "prompt" in row:
        prompt = _text(row, "prompt")
        if len({isinstance(text, str) for text in (prompt, chosen, rejected)}) > 1:
            raise UnusableRow("prompt and responses of different kinds (string and messages)")
    else:
        prompt, chosen, rejected = split_conversations(chosen, rejected)
    _check_response(chosen)
    _check_response(rejected)
    return Pair(prompt, chosen, rejected)


def parse_unpaired(row: Mapping[str, Any]) -> Unpaired:
    """An `Unpaired` example from a row with the columns `prompt`, `completion` and `label`.

    Raises:
        UnusableRow: wrong types, an empty completion.
    """
    prompt, completion, label = _text(row, "prompt"), _text(row, "completion"), row["label"]
    if label not in (True, False):  # also 1 and 0
        raise UnusableRow("'label' is not true or false")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise UnusableRow("prompt and responses of different kinds (string and messages)")
    _check_response(completion)
    return Unpaired(prompt, completion, bool(label))


def split_conversations(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits two whole conversations into (common prompt, chosen response, rejected response).

    Message lists are split where they begin to differ, HH transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...")
    after the last "Assistant:", other strings before the word in which they begin to differ.

    Raises:
        UnusableRow: the conversations have no common beginning, or differ before the response.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        split = _common_length(chosen, rejected)
        prompt: Text = chosen[:split]
        responses: tuple[Text, Text] = (chosen[split:], rejected[split:])
        if any(message["role"] == "user" for message in chosen[split:][:1] + rejected[split:][:1]):
            raise UnusableRow("differing prompts")
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if chosen.startswith(_HUMAN) and rejected.startswith(_HUMAN):
            prompt, chosen_response = _split_transcript(chosen)
            rejected_prompt, rejected_response = _split_transcript(rejected)
            if prompt != rejected_prompt:
                raise UnusableRow("differing prompts")
            if _HUMAN in chosen_response + rejected_response:
                raise UnusableRow("a user turn inside a response")
            return prompt, chosen_response, rejected_response
        split = _common_length(chosen, rejected)
        while split > 0 and not chosen[split - 1].isspace():
            split -= 1
        prompt = chosen[:split].rstrip()
        responses = (chosen[len(prompt) :], rejected[len(prompt) :])
    else:
        raise UnusableRow("chosen and rejected of different kinds (string and messages)")
    if not prompt:
        raise UnusableRow("differing prompts")
    return prompt, *responses


def _split_transcript(text: str) -> tuple[str, str]:
    start = text.rfind(_ASSISTANT)
    if start < 0:
        raise UnusableRow("empty response")
    start += len(_ASSISTANT)
    return text[:start], text[start:]


def _text(row: Mapping[str, Any], column: str) -> Text:
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        return value
    raise UnusableRow(
        f"{column!r} is neither a string nor a list of messages with role and content"
    )


def _check_response(response: Text) -> None:
    if isinstance(response, str):
        if not response.strip():
            raise UnusableRow("empty response")
        return
    if not response or not response[-1]["content"].strip():
        raise UnusableRow("empty response")
    if response[0]["role"] != "assistant":
        raise UnusableRow("response that does not begin with an assistant turn")
    if any(message["role"] == "user" for message in response):
        raise UnusableRow("a user turn inside a response")


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
