"""Rows and tokenizers of the tests of data."""

from __future__ import annotations

from typing import Any

from tiny_models import CHAT_TEMPLATE, make_tokenizer

GOOD = {"prompt": "a b c", "chosen": " d e", "rejected": " f"}
GOOD_UNPAIRED = {"prompt": "a b", "completion": " c", "label": True}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, **fields: Any) -> dict[str, Any]:
    """A turn that calls a tool and says nothing."""
    function = {"name": name, "arguments": {"x": 1}}
    return {
        "role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}],
        **fields,
    }  # fmt: skip


GOOD_CHAT = {"prompt": [user("a b")], "chosen": [assistant("c")], "rejected": [assistant("d e")]}

# Tools and options of the template can be seen; a turn of the assistant may call tools; the word "j" is an error of
# the template.
TOOL_TEMPLATE = (
    "{% if tools %}<tools> {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<quiet> {% endif %}"
    "{% for message in messages %}{% if message.content == 'j' %}{{ raise_exception('no j') }}{% endif %}"
    "<{{ message.role }}> {% if message.content %}{{ message.content }} {% endif %}"
    "{% if 'tool_calls' in message %}{% for c in message.tool_calls %}<call> {{ c.function.name }} "
    "{% endfor %}{% endif %}<end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<tools>", "<quiet>", "<call>", "<tool>", "<system>"]


def make_tool_tokenizer(chat_template: str = TOOL_TEMPLATE):
    tokenizer = make_tokenizer(chat_template=chat_template)
    tokenizer.add_tokens(WORDS)
    return tokenizer


def make_chat_tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)
