"""Whole datasets: unpaired rows and their mismatched completions, several processes, the prepared dataset."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("transformers")

from data_rows import GOOD, GOOD_CHAT, GOOD_UNPAIRED, make_chat_tokenizer
from tiny_models import make_pairs, make_tokenizer

from pyfast_dpo.data import PreparedDataset, prepare, prepare_pairs, prepare_unpaired
from pyfast_dpo.data.report import DataReport


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_pairs_become_unpaired_rows(tokenizer):
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": "x y"}]
    dataset = prepare_unpaired(rows, tokenizer)
    assert [example["label"] for example in dataset] == [True, False, True, False]
    assert dataset.report.dropped == {"empty response": [2]}


def test_mismatched_completion_is_that_of_the_next_other_prompt(tokenizer):
    rows = [
        {"prompt": "a", "completion": " d", "label": True},
        {"prompt": "a", "completion": " e", "label": False},
        {"prompt": "b", "completion": " f", "label": True},
        {"prompt": "c", "completion": " g", "label": True},
        {"prompt": "a", "completion": " h", "label": False},  # wraps around past two equal prompts
    ]
    dataset = prepare_unpaired(rows, tokenizer)
    words = [tokenizer.decode(example["KL_completion_ids"][:1]) for example in dataset]
    assert words == ["f", "f", "g", "h", "f"]


def test_kto_needs_two_prompts(tokenizer):
    with pytest.raises(ValueError, match="at least two different prompts, got 1"):
        prepare_unpaired([GOOD_UNPAIRED] * 3, tokenizer)


@pytest.mark.parametrize("prepared", [prepare_pairs, prepare_unpaired])
def test_several_processes_prepare_the_same(monkeypatch, prepared):
    monkeypatch.setattr(prepare, "ROWS_OF_A_TASK", 3)
    rows = make_pairs(16)
    rows[4] = {**rows[4], "chosen": ""}
    rows[9] = {**GOOD_CHAT, "prompt": []}
    rows[15] = {**GOOD, "prompt": "\ud800"}
    one, two = (prepared(rows, make_chat_tokenizer(), num_proc=n) for n in (None, 2))
    assert list(one) == list(two)
    assert one.report == two.report
    assert list(two.report.dropped.values()) == [[5], [10], [16]]


def test_number_of_processes_is_positive(tokenizer):
    with pytest.raises(ValueError, match="num_proc must be None or positive, got 0"):
        prepare_pairs([GOOD], tokenizer, num_proc=0)


# The prepared dataset ------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tokenizer):
    rows = make_pairs(6)
    rows[1] = {**rows[1], "chosen": ""}
    return prepare_pairs([{**row, "source": f"s{i}"} for i, row in enumerate(rows)], tokenizer)


def test_it_reads_as_a_dataset_of_the_datasets_library(dataset):
    """Each expression gives what `datasets.Dataset` gives of the same examples."""
    datasets = pytest.importorskip("datasets")
    twin = datasets.Dataset.from_list(list(dataset))
    reads = {
        "len": len, "num_rows": lambda d: d.num_rows, "list": list, "first": lambda d: d[0],
        "last": lambda d: d[-1], "slice": lambda d: d[1:4:2], "indices": lambda d: d[[3, 0]],
        "empty slice": lambda d: d[4:2], "column": lambda d: list(d["prompt"]),
        "ids": lambda d: list(d["chosen_ids"]), "columns": lambda d: sorted(d.column_names),
        "selection": lambda d: list(d.select(range(1, 3))),
        "selection of one": lambda d: list(d.select([4, 1]).select([1])),
        "selected column": lambda d: list(d.select([3, 1])["source"]),
        "more columns": lambda d: list(d.select([3, 1]).add_column("n", [7, 8])),
    }  # fmt: skip
    for name, read in reads.items():
        assert read(dataset) == read(twin), name


def test_columns_of_rows_are_those_of_the_rows_that_were_kept(dataset):
    assert dataset["source"] == ["s0", "s2", "s3", "s4", "s5"]
    assert [dataset.row_number(i) for i in range(5)] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "read, error, message",
    [
        (lambda d: d[5], IndexError, "index 5 is out of range for 5 rows"),
        (lambda d: d.select([-6]), IndexError, "out of range for 5 rows"),
        (lambda d: d["none"], KeyError, "no column 'none' among"),
        (lambda d: d.add_column("x", [1]), ValueError, "'x' must have 5 values, got 1"),
    ],
)
def test_what_is_not_there_is_an_error(dataset, read, error, message):
    with pytest.raises(error, match=message):
        read(dataset)


def test_a_column_takes_the_place_of_one_of_that_name(dataset):
    again = dataset.add_column("x", [1] * 5).select([2, 0]).add_column("x", [2, 3])
    assert again["x"] == [2, 3]
    assert "x" not in dataset.column_names


def test_examples_are_those_of_the_columns_alone(dataset):
    assert set(dataset.examples[0]) == {"prompt_ids", "chosen_ids", "rejected_ids"}
    assert dataset.examples[1:3] == [dataset.examples[1], dataset.examples[2]]
    assert dataset.tokens() == [sum(map(len, example.values())) for example in dataset.examples]


def test_it_can_be_sent_to_another_process(dataset):
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)


def test_examples_of_different_columns_are_refused():
    with pytest.raises(ValueError, match="1 of 2 examples have no 'rejected_ids'"):
        PreparedDataset([{"rejected_ids": [1]}, {"chosen_ids": [1]}], DataReport("train"))


def test_masks_may_be_left_out_of_some_examples():
    examples = [
        {"chosen_ids": [1, 2], "chosen_assistant_mask": [1, 0]},
        {"chosen_ids": [3, 4, 5]},
        {"chosen_ids": []},
    ]
    dataset = PreparedDataset(examples, DataReport("train"))
    assert dataset["chosen_assistant_mask"] == [[1, 0], [1, 1, 1], []]


@pytest.mark.parametrize("prepared, times", [(prepare_pairs, 1), (prepare_unpaired, 2)])
def test_a_prompt_found_in_the_responses_is_a_column_too(prepared, times):
    pairs = [
        {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
        for row in (GOOD_CHAT, {**GOOD_CHAT, "prompt": [{"role": "user", "content": "x"}]})
    ]
    dataset = prepared(pairs, make_chat_tokenizer())
    assert dataset["prompt"][::times] == [row["chosen"][:1] for row in pairs]
    assert dataset[0]["prompt"] == GOOD_CHAT["prompt"]
    assert "prompt" in dataset.column_names
