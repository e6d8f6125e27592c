"""What rules read of a response: its text, its words, its final answer."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ANSWER = re.compile(r"answer\s*:(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?|\.\d+)")


def text_of(completion: Any) -> str:
    """A completion as text: a string, or the content of its messages, a line each."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits; "don't" and "well-known" are one word each."""
    return _WORD.findall(text)


def is_sentence(text: str, least: int, most: int) -> bool:
    """Whether a text is one sentence of so many words.

    A capital or a digit first, one full stop, exclamation or question mark, at the end (not counting points within
    numbers), no line break. "U.S." makes it more than one; what was cut off is none.
    """
    text = text.strip()
    marks = re.findall(r"[.!?]", re.sub(r"(?<=\d)\.(?=\d)", "", text))
    return (
        re.fullmatch(r"[\"'“‘(]*[^\W_a-z].*[.!?][\"'”’)]*", text) is not None
        and len(marks) == 1
        and least <= len(words_of(text)) <= most
    )


def bullets_of(text: str) -> list[str] | None:
    """The items of a text of nothing but bullet points ("-", "*" or "•", a line each); None for anything else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [re.fullmatch(r"[-*•]\s+(.*\w.*)", line) for line in lines]
    return [str(match[1]) for match in found if match] if found and all(found) else None


def final_answer(text: str) -> str | None:
    """The whole line after the last "Answer:", without emphasis and a full stop; None where there is none.

    One answer counts: neither several of them nor several in one line are right because one of them is.
    """
    lines = _ANSWER.findall(text)
    if not lines:
        return None
    return str(lines[-1]).strip("*_` \t\r").rstrip("*_`. \t\r")


def same_answer(given: str | None, right: str) -> bool:
    """Whether both are the same number (7, 7.0, +7; 1,000; 1/2, 0.5), else the same words in small or capital letters."""
    if given is None:
        return False
    number = _number(right)
    if number is not None:
        return _number(given) == number
    return given.casefold().split() == right.casefold().split()


def _number(text: str) -> Fraction | None:
    parts = [part.strip() for part in text.replace("−", "-").split("/")]
    if len(parts) > 2 or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    above, below = (Fraction(part.replace(",", "")) for part in (*parts, "1")[:2])
    return above / below if below else None
