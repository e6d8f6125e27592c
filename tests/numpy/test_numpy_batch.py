"""Pairs of texts as padded arrays: what stands where, and how a real tokenizer is called."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from pyfast_dpo.numpy import (
    PreferencePair,
    batch,
    compute_sequence_logprob,
    create_preference_batch,
)

PAIRS = [PreferencePair("abc", "d", "ef"), PreferencePair("g", "hij", "")]


def letters(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def test_ids_and_masks_of_a_function_that_gives_token_ids() -> None:
    result = create_preference_batch(PAIRS, letters)
    expected = {
        "prompt": [[0, 1, 2], [6, 0, 0]],
        "chosen": [[3, 0, 0], [7, 8, 9]],
        "rejected": [[4, 5], [0, 0]],  # an empty response is all padding
    }
    lengths = {"prompt": [3, 1], "chosen": [1, 3], "rejected": [2, 0]}
    assert sorted(result) == sorted(
        f"{part}_{kind}" for part in expected for kind in ("ids", "mask")
    )
    for part, ids in expected.items():
        assert result[f"{part}_ids"].dtype == np.int64 and result[f"{part}_mask"].dtype == np.bool_
        assert result[f"{part}_ids"].tolist() == ids
        assert result[f"{part}_mask"].sum(1).tolist() == lengths[part]


def test_a_batch_scores_only_its_tokens() -> None:
    result = create_preference_batch(PAIRS, letters)
    ids, mask = result["chosen_ids"], result["chosen_mask"]
    logits = np.random.default_rng(0).normal(size=(*ids.shape, 26))
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = [
        sum(logps[row, t, token] for t, token in enumerate(letters(pair.chosen)))
        for row, pair in enumerate(PAIRS)
    ]
    np.testing.assert_allclose(compute_sequence_logprob(logits, ids, mask), by_hand, rtol=1e-12)


def test_without_a_mask_every_token_is_scored() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    tokens = np.array([[0, 4, 2], [1, 1, 3]])
    every = compute_sequence_logprob(logits, tokens, np.ones((2, 3), bool))
    np.testing.assert_array_equal(compute_sequence_logprob(logits, tokens), every)
    with pytest.raises(ValueError, match="where they are scored, got 5"):
        compute_sequence_logprob(logits, np.array([[0, 5, 2], [1, 1, 3]]))


def test_a_tokenizer_of_transformers_ends_responses_and_begins_prompts_alone() -> None:
    pytest.importorskip("transformers")
    from tiny_models import make_tokenizer

    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    result = create_preference_batch([PreferencePair("a b", "c", "d e")], tokenizer)
    a, b, c, d, e = tokenizer.convert_tokens_to_ids(list("abcde"))
    assert result["prompt_ids"].tolist() == [[a, b]]
    assert result["chosen_ids"].tolist() == [[c, eos]]
    assert result["rejected_ids"].tolist() == [[d, e, eos]]


@pytest.mark.parametrize(
    "pairs, tokenizer, error, words",
    [
        ([], letters, ValueError, "at least one pair"),
        ([("a", "b", "c")], letters, TypeError, "PreferencePair, got tuple"),
        (PAIRS, lambda text: [0.5], TypeError, "integers, got"),
        (PAIRS, lambda text: text, TypeError, "integers, got"),
    ],
    ids=["no pairs", "a tuple", "floats", "text"],
)
def test_mistakes_are_named(pairs, tokenizer, error, words) -> None:
    with pytest.raises(error, match=f"create_preference_batch: .*{words}"):
        create_preference_batch(pairs, tokenizer)


def test_example_of_the_docstring() -> None:
    assert doctest.testmod(batch).attempted >= 3
    assert doctest.testmod(batch).failed == 0
