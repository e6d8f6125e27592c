"""Ready rewards by hand, and what does not earn them."""

from __future__ import annotations

import pytest

from pyfast_dpo.rewards import READY, reward_by_name


@pytest.mark.parametrize(
    "text, reward",
    [
        ("A whale is a mammal.", 1.0),
        ("Yes, it's well-made.", 1.0),
        ("No, since a whale is warm and breathes air as all of the mammals do.", 0.5),  # 15 words
        ("A whale is a mammal", 0.0),  # does not end
        ("A whale is a mammal. It breathes air.", 0.0),  # two sentences
        ("Yes.", 0.0),  # no sentence
        ("whale is a mammal.", 0.0),
        ("A. B. C.", 0.0),
        ("The the the the whale.", 0.5),  # fills words
        ("12 34 56 78.", 0.0),
        ("", 0.0),
    ],
)
def test_a_short_sentence(text, reward) -> None:
    assert READY["short_sentence"]([text]) == [reward]
    assert READY["short_sentence"]([[{"role": "assistant", "content": text}]]) == [reward]


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think>\nit is even\n</think>\nyes", 1.0),
        ("<think></think>yes", 0.0),  # no thought
        ("<think>it is</think>", 0.0),  # no answer
        ("yes <think>it is</think> yes", 0.0),
        ("<think>a</think><think>b</think>c", 0.0),
    ],
)
def test_the_form_of_thinking(text, reward) -> None:
    assert READY["think_format"]([text]) == [reward]


@pytest.mark.parametrize(
    "text, answer, reward",
    [
        ("Answer: 42", 42, 1.0),
        ("I think.\nanswer: 1,000.", "1000", 1.0),
        ("Answer: 41\nAnswer: 42", 42, 1.0),  # the last word counts
        ("Answer: 42\nAnswer: 41", 42, 0.0),
        ("Answer: 41 42 43", 42, 0.0),  # all of them
        ("42", 42, 0.0),
        ("Answer: Blue", "blue", 1.0),
        ("Answer: 4", "42", 0.0),
    ],
)
def test_an_exact_answer(text, answer, reward) -> None:
    assert READY["exact_answer"]([text], answer=[answer]) == [reward]


def test_distinct_words() -> None:
    assert READY["distinct_words"](["a b c d", "a a a a", ""]) == [1.0, 0.25, 0.0]


def test_rewards_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def long(completions, **others):\n    return [1.0]\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert reward_by_name("my_rewards:long")(["x"]) == [1.0]
    for name, words in (
        ("shrt", "there are short_sentence, think_format"),
        ("no_module:f", "No module named 'no_module'"),
        ("my_rewards:absent", "has no attribute 'absent'"),
        ("my_rewards:number", "must be a function, got int"),
    ):
        with pytest.raises(ValueError, match=words):
            reward_by_name(name)
