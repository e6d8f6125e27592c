"""What rules read of a response, by hand."""

from __future__ import annotations

import pytest

from pyfast_dpo.rewards.texts import (
    bullets_of,
    final_answer,
    is_sentence,
    same_answer,
    text_of,
    words_of,
)


def test_a_completion_is_a_string_or_messages() -> None:
    messages = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": None}]
    assert text_of("a") == "a" and text_of(messages) == "a\n"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("So it is 7.\nAnswer: 42.", "42"),
        ("**Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("answer : `a b`", "a b"),
        ("Answer: 1\nAnswer: 2", "2"),  # the last one
        ("Answer: 1 2 3", "1 2 3"),  # all of the line
        ("Answer: -0.5", "-0.5"),
        ("Answer:", ""),
        ("The answer is 42", None),
    ],
)
def test_the_final_answer_is_the_line_after_the_last_mark(text, answer) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "given, right, same",
    [
        ("7", "7", True),
        ("+7.0", "7", True),
        ("1,000", "1000", True),
        ("1/2", "0.5", True),
        (".5", "1 / 2", True),
        ("−3", "-3", True),  # the typographic minus
        ("Blue  whale", "blue whale", True),
        ("1,2", "12", False),  # a list
        ("1 2", "12", False),
        ("0.1", "1/10", True),
        ("0.30000000000000004", "0.3", False),
        ("12345678901234567", "12345678901234568", False),  # equal as float64
        ("1/0", "0", False),
        ("1_000", "1000", False),
        ("nan", "nan", True),  # words
        ("7 apples", "7", False),
        ("", "7", False),
        (None, "", False),
    ],
)
def test_answers_are_the_same_by_value_or_by_words(given, right, same) -> None:
    assert same_answer(given, right) is same


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("A whale is a mammal.", True),
        (' "It is 3.5 metres long!" ', True),
        ("Über den Wolken ist es kalt.", True),
        ("12 men are angry?", True),
        ("A whale is a mammal", False),  # cut off
        ("A whale is a mammal. It is", False),
        ("A whale is. A mammal.", False),
        ("A whale is a mammal.It breathes.", False),
        ("A whale is a mammal...", False),
        ("a whale is a mammal.", False),
        ("A whale\nis a mammal.", False),
        ("A whale is.", False),  # 3 words
        ("A whale is a mammal of the sea.", False),  # 8
        ("", False),
    ],
)
def test_a_sentence_of_four_to_seven_words(text, sentence) -> None:
    assert is_sentence(text, 4, 7) is sentence


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words_of("Don't, well-known: 3 Äpfel!") == ["Don't", "well-known", "3", "Äpfel"]


@pytest.mark.parametrize(
    "text, items",
    [
        ("- a\n\n* b c \n  • d", ["a", "b c", "d"]),
        ("Here:\n- a", None),  # something else
        ("- a\n- ", None),
        ("- a\n- !", None),
        ("-a", None),
        ("1. a", None),
        ("", None),
    ],
)
def test_bullets_and_nothing_else(text, items) -> None:
    assert bullets_of(text) == items
