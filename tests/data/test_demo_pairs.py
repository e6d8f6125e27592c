"""The pairs that come with the project."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from pyfast_dpo.data import demo_pairs, load_rows


def test_shipped_pairs_are_those_of_the_generator():
    train, heldout = demo_pairs.pairs()
    assert load_rows(demo_pairs.TRAIN_FILE) == train
    assert load_rows(demo_pairs.HELDOUT_FILE) == heldout


def test_shipped_preference_holds_for_every_pair():
    train, heldout = demo_pairs.pairs()
    for row in train + heldout:
        assert demo_pairs.follows_preference(row["chosen"][0]["content"])
        assert not demo_pairs.follows_preference(row["rejected"][0]["content"])


def test_no_heldout_question_is_trained_on():
    train, heldout = ([row["prompt"][0]["content"] for row in rows] for rows in demo_pairs.pairs())
    assert len(set(train)) == len(train) >= 250
    assert len(set(heldout)) == len(heldout) >= 40
    assert not set(train) & set(heldout)


def test_shipped_responses_do_not_differ_in_length():
    """Neither form can be told by its length, which log-probs of sequences prefer short."""
    for rows in demo_pairs.pairs():
        chosen, rejected = (
            [len(row[side][0]["content"].split()) for row in rows]
            for side in ("chosen", "rejected")
        )
        assert abs(sum(chosen) - sum(rejected)) < 0.15 * sum(rejected)
