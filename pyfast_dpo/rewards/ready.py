"""Rewards that are ready to use, and how a reward is found by its name. All are rules: the same text has the same reward."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from pyfast_dpo.rewards.texts import final_answer, is_sentence, same_answer, text_of, words_of

Rewards = list[float | None]

MOST_WORDS = 10  # of a short sentence


def short_sentence(completions: Sequence[Any], **others: Any) -> Rewards:
    """0.5 for one whole sentence: 3 words or more, a capital first, one full stop, exclamation or question mark,
    at its end. 1 if it has at most 10 words, each written once or twice."""
    rewards: Rewards = []
    for text in map(text_of, completions):
        words = words_of(text)
        repeats = max(Counter(word.lower() for word in words).values(), default=0)
        whole = is_sentence(text, 3, len(words)) and not any(word.isdigit() for word in words[:1])
        short = whole and len(words) <= MOST_WORDS and repeats <= 2
        rewards.append(0.5 * whole + 0.5 * short)
    return rewards


def think_format(completions: Sequence[Any], **others: Any) -> Rewards:
    """1 for `<think>` reasoning `</think>` and an answer after it, each tag once and the first at the beginning."""
    pattern = re.compile(
        r"<think>(?:(?!</?think>).)*\S(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\S(?:(?!</?think>).)*",
        re.S,
    )
    return [float(pattern.fullmatch(text_of(each).strip()) is not None) for each in completions]


def exact_answer(completions: Sequence[Any], answer: Sequence[Any], **others: Any) -> Rewards:
    """1 if what stands after the last "Answer:" is the column `answer`: the same number, or the same words. One answer
    counts, the whole line, so that a list of all of them is wrong."""
    return [
        float(same_answer(final_answer(text_of(each)), str(right)))
        for each, right in zip(completions, answer, strict=True)
    ]


def distinct_words(completions: Sequence[Any], **others: Any) -> Rewards:
    """The share of words that were not written before in the response: against repetition. 0 for no words."""
    rewards: Rewards = []
    for text in map(text_of, completions):
        words = text.lower().split()
        rewards.append(len(set(words)) / len(words) if words else 0.0)
    return rewards


READY: dict[str, Callable[..., Rewards]] = {
    function.__name__: function
    for function in (short_sentence, think_format, exact_answer, distinct_words)
}


def reward_by_name(name: str) -> Callable[..., Any]:
    """One of the ready rewards, or `module:function` of one's own, which must be importable.

    Raises:
        ValueError: no such name, module or function.
    """
    if name in READY:
        return READY[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(
            f"reward {name!r}: there are {', '.join(READY)}, or module:function of your own"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {name!r}: must be a function, got {type(found).__name__}")
    return found
