"""The chat template of a tokenizer or a processor: messages in, text out, and a word on what it does not write."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pyfast_dpo.data.messages import Messages, UnusableRow


class ChatTemplate:
    """Renders conversations.

    Args:
        processing_class: a `transformers` tokenizer, or a processor, whose tokenizer serves.
    """

    def __init__(self, processing_class: Any) -> None:
        self._tokenizer = tokenizer_of(processing_class)
        self._own: dict[str, Any] = {}
        self._exists = bool(getattr(self._tokenizer, "chat_template", None))
        template = getattr(processing_class, "chat_template", None)
        if not self._exists and template:
            self._own, self._exists = {"chat_template": template}, True
        self._wants_parts = self._exists and self._needs_parts()
        self._untried = {"tools", "tool_calls"}  # whether the template writes them

    def render(self, messages: Messages, options: Mapping[str, Any], *, ready: bool = False) -> str:
        """The text of a conversation.

        Args:
            options: for the template, such as `tools`.
            ready: for the next turn of the assistant.

        Raises:
            UnusableRow: there is no template.
            Exception: whatever the template raises.

        Warns:
            UserWarning: once, tools or calls of tools that the template leaves out.
        """
        if not self._exists:
            raise UnusableRow(
                "chat messages, but the tokenizer has no chat template (set tokenizer.chat_template or use rows "
                "of plain strings)"
            )
        text = self._text(messages, options, ready)
        if self._untried:
            self._try(text, messages, options, ready)
        return text

    def _text(self, messages: Messages, options: Mapping[str, Any], ready: bool) -> str:
        if self._wants_parts:
            messages = [
                {**each, "content": [{"type": "text", "text": each["content"]}]}
                for each in messages
            ]
        return self._tokenizer.apply_chat_template(
            messages, **{**self._own, **options}, tokenize=False, add_generation_prompt=ready
        )

    def _needs_parts(self) -> bool:
        """Templates of models that also see images may take content in parts alone; with a string they raise, or
        leave it out."""

        def shows(content: Any) -> bool:
            messages = [{"role": "user", "content": content}]
            try:
                text = self._tokenizer.apply_chat_template(messages, **self._own, tokenize=False)
            except Exception:
                return False
            return "word" in text

        return not shows("word") and shows([{"type": "text", "text": "word"}])

    def _try(self, text: str, messages: Messages, options: Mapping[str, Any], ready: bool) -> None:
        without: dict[str, tuple[Messages, Mapping[str, Any]]] = {}
        if options.get("tools"):
            without["tools"] = messages, {k: v for k, v in options.items() if k != "tools"}
        if any(message.get("tool_calls") for message in messages):
            bare = [{k: v for k, v in each.items() if k != "tool_calls"} for each in messages]
            without["tool_calls"] = bare, options
        for what in self._untried & without.keys():
            self._untried.discard(what)
            if self._text(*without[what], ready) == text:
                warnings.warn(
                    f"dataset: the chat template leaves out the {what} of the rows, so the model does not see them",
                    stacklevel=2,
                )


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, or that of a processor."""
    return getattr(processing_class, "tokenizer", processing_class)
