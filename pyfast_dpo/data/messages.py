"""Chat messages as chat templates take them: content as text, tools, options of the template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, Any]]

TEXT_ALONE = "which these trainers do not take; TRL's do, also with the kernels of pyfast_dpo.integrations.trl"
# Of a message without content, what may stand in its place.
_OTHER_CONTENT = ("tool_calls", "reasoning_content", "thinking")


class UnusableRow(Exception):
    """A row that cannot be trained on; the message is the reason as the report shows it."""


def messages_of(value: list[Any], column: str) -> Messages:
    """The messages of a column, each with `role`, `content` as a string, and whatever else it has.

    Content in parts (`[{"type": "text", "text": "..."}]`) is joined, content that is None beside tool calls is
    empty. Fields that are None count as not given: so `datasets` fills what other rows have.

    Raises:
        UnusableRow: anything that is not such a message; an image.
    """
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise UnusableRow(
                f"{column!r} is neither a string nor a list of messages with role and content "
                f"(got a list of {found})"
            )
        fields = {name: field for name, field in message.items() if field is not None}
        content = fields.get("content")
        if content is None and any(fields.get(name) for name in _OTHER_CONTENT):
            content = ""
        messages.append({**fields, "content": _text_of(content, column)})
    return messages


def has_content(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip()) or any(message.get(name) for name in _OTHER_CONTENT)


def refuse_images(row: Mapping[str, Any]) -> None:
    """Raises UnusableRow for a row with something in `image` or `images`."""
    for column in ("image", "images"):
        value = row.get(column)
        if isinstance(value, list | tuple):
            value = next((each for each in value if each is not None), None)
        if value is not None and not (isinstance(value, str) and not value):
            raise UnusableRow(f"column {column!r} holds an image, {TEXT_ALONE}")


def template_options(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's columns `tools` and `chat_template_kwargs` add to the options given for all rows.

    Raises:
        UnusableRow: a column that is neither of that kind nor JSON of it.
    """
    options = dict(given)
    own = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs", Mapping, "an object")
    options.update((name, value) for name, value in (own or {}).items() if value is not None)
    tools = _decoded(row.get("tools"), "tools", list, "a list")
    if tools:
        options["tools"] = [_decoded(tool, "tools", object, "JSON") for tool in tools]
    return options


def without_none(value: Any) -> Any:
    """The same without fields that are None, at any depth."""
    if isinstance(value, Mapping):
        return {name: without_none(field) for name, field in value.items() if field is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _text_of(content: Any, column: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableRow(
            f"{column!r} has a message whose content is neither a string nor a list of parts, "
            f"but {'None' if content is None else type(content).__name__}"
        )
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableRow(
                f"{column!r} has a message with a part of the type {kind!r}, {TEXT_ALONE}"
            )
        texts.append(part)
    return "".join(texts)


def _decoded(value: Any, column: str, kind: Any, name: str) -> Any:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UnusableRow(f"column {column!r} is a string that is not JSON: {error}") from error
    if value is None or value == "":
        return None
    if not isinstance(value, kind):
        raise UnusableRow(f"column {column!r} is not {name}, but {type(value).__name__}")
    return value
