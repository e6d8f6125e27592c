"""From a raw row to a pair or an unpaired example, or to the reason why it cannot be used.

A text is a plain string or a list of chat messages (`{"role": ..., "content": ...}`). Pairs have the
columns `chosen` and `rejected`, and either `prompt` or whole conversations whose common beginning is the
prompt. Unpaired rows have `prompt`, `completion` and `label`. Rows of messages may also have `tools` and
`chat_template_kwargs`.

A response begins with a turn of the assistant and ends with one; tools and users may speak between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyfast_dpo.data.messages import Messages, UnusableRow, has_content, messages_of, refuse_images

Text = str | Messages

PAIR_COLUMNS = ("prompt", "chosen", "rejected")
UNPAIRED_COLUMNS = ("prompt", "completion", "label")
# Where a prompt may stand under another name, so that a prompt found in the responses would be a guess.
_OTHER_NAMES_OF_PROMPT = ("question", "instruction", "query", "input", "problem", "context")

# Turns of the Anthropic HH transcripts, the best-known pairs that come as two whole conversations in text.
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


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


def is_pair(row: Mapping[str, Any]) -> bool:
    return "chosen" in row and "completion" not in row


def check_columns(row: Mapping[str, Any], columns: tuple[str, ...]) -> None:
    """Raises UnusableRow for a row that lacks one of the columns, but for the prompt of a pair."""
    for column in columns:
        implicit = column == "prompt" and columns == PAIR_COLUMNS
        if column not in row and not implicit:
            raise UnusableRow(_missing(row, column, columns))


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """A `Pair` from a row with the columns `chosen`, `rejected` and, unless implicit, `prompt`.

    Raises:
        UnusableRow: wrong types, identical or empty responses, differing prompts, images.
    """
    check_columns(row, PAIR_COLUMNS)
    refuse_images(row)
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    if chosen == rejected:
        raise UnusableRow("identical responses")
    if "prompt" in row:
        prompt, (chosen, rejected) = _after_prompt(text_of(row, "prompt"), [chosen, rejected])
    else:
        _check_implicit(row, chosen, rejected)
        prompt, chosen, rejected = split_conversations(chosen, rejected)
    chosen, rejected = _response(chosen), _response(rejected)
    if chosen == rejected:
        raise UnusableRow("identical responses")
    return Pair(prompt, chosen, rejected)


def parse_unpaired(row: Mapping[str, Any]) -> Unpaired:
    """An `Unpaired` example from a row with the columns `prompt`, `completion` and `label`.

    Raises:
        UnusableRow: wrong types, an empty completion, images.
    """
    check_columns(row, UNPAIRED_COLUMNS)
    refuse_images(row)
    prompt, completion, label = text_of(row, "prompt"), text_of(row, "completion"), row["label"]
    if isinstance(label, str):
        raise UnusableRow(f"'label' is the string {label[:20]!r}, not true or false")
    if label not in (True, False):  # also 1 and 0
        raise UnusableRow("'label' is not true or false")
    prompt, (completion,) = _after_prompt(prompt, [completion])
    return Unpaired(prompt, _response(completion), bool(label))


# Where the prompt ends -----------------------------------------------------------------------------------


def split_conversations(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits two whole conversations into (common prompt, chosen response, rejected response).

    Message lists are split where they begin to differ, HH transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...")
    after the last "Assistant:", other strings before the word in which they begin to differ.

    Raises:
        UnusableRow: the conversations have no common beginning, or differ before the response.
    """
    if isinstance(chosen, list) and isinstance(rejected, list):
        split = _split_messages(chosen, rejected)
        return chosen[:split], chosen[split:], rejected[split:]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UnusableRow("chosen and rejected of different kinds (string and messages)")
    if chosen.startswith(_HUMAN) and rejected.startswith(_HUMAN):
        prompt, chosen_response = _split_transcript(chosen)
        rejected_prompt, rejected_response = _split_transcript(rejected)
        if prompt != rejected_prompt:
            raise UnusableRow("differing prompts")
        return prompt, chosen_response, rejected_response
    split = _common_length(chosen, rejected)
    while split > 0 and not chosen[split - 1].isspace():
        split -= 1
    prompt = chosen[:split].rstrip()
    if not prompt:
        raise UnusableRow("differing prompts")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _split_messages(chosen: Messages, rejected: Messages) -> int:
    """How many messages are the prompt of both."""
    split = _common_length(chosen, rejected)
    # Where the results of tools differ, the calls before them are part of the responses.
    while split > 0 and {_role(each, split) for each in (chosen, rejected)} & {"tool", "function"}:
        split -= 1
    if split == 0 or "user" in (_role(chosen, split), _role(rejected, split)):
        raise UnusableRow("differing prompts")
    return split


def _split_transcript(text: str) -> tuple[str, str]:
    start = text.rfind(_ASSISTANT)
    if start < 0:
        raise UnusableRow("empty response")
    start += len(_ASSISTANT)
    response, _, _ = text[start:].partition(
        _HUMAN
    )  # a turn after the last one is not the assistant's
    return text[:start], response


def _check_implicit(row: Mapping[str, Any], chosen: Text, rejected: Text) -> None:
    """A prompt can be found in the responses if these are conversations; else it may be the beginning of two
    texts, but not if a column looks like the prompt."""
    texts = (chosen, rejected)
    if all(isinstance(text, list) for text in texts):
        whole = all(_role(text, 0) != "assistant" for text in texts)  # type: ignore[arg-type]
    elif all(isinstance(text, str) for text in texts):
        whole = all(text.startswith(_HUMAN) for text in texts)  # type: ignore[union-attr]
        named = any(name in row for name in _OTHER_NAMES_OF_PROMPT)
        whole = whole or (not named and bool(_common_length(chosen, rejected)))
    else:
        whole = True  # refused for their kinds
    if not whole:
        raise UnusableRow(_missing(row, "prompt", PAIR_COLUMNS))


def _after_prompt(prompt: Text, responses: list[Text]) -> tuple[Text, list[Text]]:
    """(prompt, what of each response comes after it), all strings or all messages."""
    if isinstance(prompt, str) and all(isinstance(response, str) for response in responses):
        return prompt, responses
    if len({isinstance(response, str) for response in responses}) > 1:
        raise UnusableRow("responses of different kinds (string and messages)")
    if prompt == []:
        raise UnusableRow("'prompt' has no messages")
    turns: list[Messages] = [
        [{"role": "assistant", "content": each}] if isinstance(each, str) else each
        for each in responses
    ]
    if isinstance(prompt, str):
        if all(_role(each, 0) == "assistant" for each in turns if each):
            prompt = [{"role": "user", "content": prompt}]
        else:
            return _whole_conversations(prompt, turns)
    turns = [each[_overlap(prompt, each) :] for each in turns]
    leads = [each[: _lead(each)] for each in turns]
    if any(lead != leads[0] for lead in leads):
        raise UnusableRow("responses that begin with differing turns of others than the assistant")
    if prompt[-1] in leads[0]:  # the responses tell it again, with more before it
        if any(message not in leads[0] for message in prompt):
            raise UnusableRow("prompt and responses begin the conversation differently")
        prompt = []
    return prompt + leads[0], [each[len(leads[0]) :] for each in turns]


def _whole_conversations(prompt: str, turns: list[Messages]) -> tuple[Messages, list[Text]]:
    """Of conversations that tell the prompt again: pairs are split where they differ, one alone after the turn
    that is the prompt."""
    pair = len(turns) == 2
    split = _split_messages(*turns) if pair else len(turns[0])
    words = prompt.split()
    said = [i for i in range(split) if turns[0][i]["content"].split() == words]
    if not said:
        raise UnusableRow("'prompt' is none of the turns with which the conversations begin")
    if not pair:
        split = said[-1] + 1
        split += _lead(turns[0][split:])
    return turns[0][:split], [each[split:] for each in turns]


def _overlap(prompt: Messages, response: Messages) -> int:
    """With how many of the prompt's last messages the response begins."""
    longest = min(len(prompt), len(response))
    return next(n for n in range(longest, -1, -1) if prompt[len(prompt) - n :] == response[:n])


def _lead(turns: Messages) -> int:
    """The turns before the first one of the assistant."""
    count = 0
    while count < len(turns) and turns[count]["role"] != "assistant":
        count += 1
    return count


def _role(messages: Messages, index: int) -> str | None:
    return messages[index]["role"] if index < len(messages) else None


# Columns -------------------------------------------------------------------------------------------------


def text_of(row: Mapping[str, Any], column: str) -> Text:
    """A column that is a string or messages; raises UnusableRow for another."""
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return messages_of(value, column)
    raise UnusableRow(
        f"{column!r} is neither a string nor a list of messages with role and content"
    )


def _response(response: Text) -> Text:
    """A response without the turns after the assistant's last one, which nothing is learned from."""
    if isinstance(response, str):
        if not response.strip():
            raise UnusableRow("empty response")
        return response
    end = len(response)
    while end > 0 and response[end - 1]["role"] != "assistant":
        end -= 1
    if end == 0 or not has_content(response[end - 1]):
        raise UnusableRow("empty response")
    return response[:end]


def _missing(row: Mapping[str, Any], column: str, columns: tuple[str, ...]) -> str:
    return f"no column {column!r}; expected the columns {list(columns)}, got {list(row)}"


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
