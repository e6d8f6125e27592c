"""Batches: shapes, masks, which tokens are scored, TRL's names."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from pyfast_dpo.data import (
    DataCollatorForPreference,
    DataCollatorForUnpairedPreference,
    SharedPromptCollatorForPreference,
    SharedPromptCollatorForUnpairedPreference,
)
from pyfast_dpo.layout import padded_collators
from pyfast_dpo.layout.batches import completion_rows


@pytest.mark.parametrize("collator", [DataCollatorForPreference, DataCollatorForUnpairedPreference])
def test_example_of_the_docstring(collator):
    import doctest

    globs = {**vars(padded_collators)}
    tests = doctest.DocTestFinder(recurse=False).find(collator, collator.__name__, globs=globs)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) >= 3
    assert not any(result.failed for result in results)


def test_mask_comes_from_lengths_where_padding_equals_eos():
    batch = DataCollatorForPreference(pad_token_id=7)(
        [
            {"prompt_ids": [1], "chosen_ids": [7], "rejected_ids": [2, 7]},
            {"prompt_ids": [1, 7, 2], "chosen_ids": [3, 7, 7], "rejected_ids": [7]},
        ]
    )
    assert batch["attention_mask"].sum(1).tolist() == [2, 6, 3, 4]
    assert (batch["labels"] == 7).sum(1).tolist() == [1, 2, 1, 1]


def test_padding_to_a_multiple():
    examples = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6]}]
    batch = DataCollatorForPreference(0, pad_to_multiple_of=8)(examples)
    assert {name: tuple(rows.shape) for name, rows in batch.items()} == {
        "input_ids": (2, 8),
        "attention_mask": (2, 8),
        "labels": (2, 8),
        "completion_mask": (2, 8),
    }


def test_mismatched_rows_are_cut():
    examples = [
        {
            "prompt_ids": [1, 2, 3],
            "completion_ids": [4],
            "label": True,
            "KL_completion_ids": [5, 6, 7],
        },
    ]
    batch = DataCollatorForUnpairedPreference(0, max_length=4)(examples)
    assert batch["KL_input_ids"].tolist() == [[1, 2, 3, 5]]
    assert batch["label"].dtype == torch.bool


# Turns that are not the assistant's ------------------------------------------------------------------------

PAIRS = [
    {
        "prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [7, 8],
        "chosen_assistant_mask": [1, 0, 0, 1],
    },
    {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11, 12], "rejected_assistant_mask": [1, 0]},
    # no prompt: nothing scores the first token
    {"prompt_ids": [], "chosen_ids": [13, 14, 15], "rejected_ids": [16], "chosen_assistant_mask": [1, 0, 1]},
    # the same response scored in part and in full
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5, 6], "rejected_ids": [3, 4]},
]  # fmt: skip
UNPAIRED = [
    {
        "prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "completion_assistant_mask": [1, 0, 1],
        "KL_completion_ids": [6, 7, 8], "KL_completion_assistant_mask": [0, 1, 1], "label": True,
    },
    {
        "prompt_ids": [6], "completion_ids": [6, 7, 8], "KL_completion_ids": [3, 4, 5],
        "KL_completion_assistant_mask": [1, 0, 1], "label": False,
    },
]  # fmt: skip


@pytest.mark.parametrize(
    "collators, examples, prefix, targets",
    [
        (
            (DataCollatorForPreference(0), SharedPromptCollatorForPreference()), PAIRS, "",
            [[3, 6], [10], [15], [3, 4, 5, 6], [7, 8], [11], [], [3, 4]],
        ),
        (
            (DataCollatorForUnpairedPreference(0), SharedPromptCollatorForUnpairedPreference()),
            UNPAIRED, "", [[3, 5], [6, 7, 8]],
        ),
        (
            (DataCollatorForUnpairedPreference(0), SharedPromptCollatorForUnpairedPreference()),
            UNPAIRED, "KL_", [[7, 8], [3, 5]],
        ),
        (
            (
                DataCollatorForUnpairedPreference(0, max_length=4),
                SharedPromptCollatorForUnpairedPreference(4),
            ),
            [{**UNPAIRED[0], "completion_ids": [3, 4], "completion_assistant_mask": [1, 0]}],
            "KL_", [[7]],
        ),
    ],
    ids=["pairs", "unpaired", "mismatched", "mismatched and cut"],
)  # fmt: skip
def test_both_layouts_score_the_assistant_s_tokens_alone(collators, examples, prefix, targets):
    for collator in collators:
        batch = collator(examples)
        if "labels" in batch:
            batch = {
                name.removeprefix(prefix): rows for name, rows in batch.items() if prefix in name
            }
            rows = completion_rows(batch)
        else:
            rows = completion_rows(batch, prefix)
        assert [list(t) for t in rows.targets.split(rows.lengths)] == targets, collator
        assert rows.counts.tolist() == [len(t) for t in targets]


# TRL's names -----------------------------------------------------------------------------------------------


def test_rows_above_max_length_are_cut_at_the_end_that_was_asked_for():
    examples = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}]
    start = DataCollatorForPreference(0, max_length=4)(examples)
    end = DataCollatorForPreference(0, max_length=4, truncation_mode="keep_end")(examples)
    assert start["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 3, 6]]
    assert end["input_ids"].tolist() == [[2, 3, 4, 5], [1, 2, 3, 6]]
    assert end["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


@pytest.mark.parametrize("collator", [DataCollatorForPreference, DataCollatorForUnpairedPreference])
def test_unknown_options_are_refused(collator):
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        collator(0, return_tensors="np")
    with pytest.raises(ValueError, match="truncation_mode must be 'keep_start' or 'keep_end'"):
        DataCollatorForPreference(0, truncation_mode="middle")


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_the_batches_are_those_of_trl_s_collators(kind):
    trl = pytest.importorskip("trl")
    from trl.trainer import dpo_trainer, kto_trainer

    assert trl.__version__
    if kind == "preference":
        ours, theirs = DataCollatorForPreference, dpo_trainer.DataCollatorForPreference
        examples = [
            {**PAIRS[0], "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5},
            {**PAIRS[1], "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.5},
        ]
    else:
        ours, theirs = (
            DataCollatorForUnpairedPreference,
            kto_trainer.DataCollatorForUnpairedPreference,
        )
        examples = [{**e, "ref_logps": -1.5, "ref_KL_logps": -2.5} for e in UNPAIRED]
    examples = [
        {name: value for name, value in e.items() if not name.endswith("_mask")} for e in examples
    ]
    for options in ({}, {"max_length": 4}, {"pad_to_multiple_of": 8}):
        batch, expected = ours(0, **options)(examples), theirs(0, **options)(examples)
        assert set(expected) <= set(batch)
        for name, rows in expected.items():
            assert torch.equal(batch[name], rows), name


def test_scored_tokens_are_those_of_a_completion_mask_where_there_are_no_labels():
    batch = DataCollatorForPreference(0)(PAIRS)
    from_labels = completion_rows(batch)
    labels = batch.pop("labels")
    from_mask = completion_rows(batch)
    assert torch.equal(from_mask.index, from_labels.index)
    assert torch.equal(from_mask.targets, from_labels.targets)
    assert torch.equal(labels == -100, batch["completion_mask"] == 0)
    with pytest.raises(ValueError, match=r"must have `labels` .* or `completion_mask`"):
        completion_rows({"input_ids": batch["input_ids"]})
