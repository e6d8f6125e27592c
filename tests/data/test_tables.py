"""Ids and lengths against the model's tables."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from data_rows import GOOD
from tiny_models import Stream, make_tokenizer

from pyfast_dpo.data import prepare_pairs, prepare_unpaired
from pyfast_dpo.data.tables import Tables, check_tables

LONG = {
    **GOOD,
    "rejected": " f g h i",
}  # 3 tokens, and 5 with the end; the largest id is that of "i", 13


@pytest.mark.parametrize(
    "tables, message",
    [
        (Tables(13), r"row 3 has the token id 13, but the embeddings of the model have 13 rows \(ids 0 to 12\)"),
        (Tables(14, 12), "row 3 has the token id 13, but the embeddings of the reference model have 12 rows"),
        (Tables(14, None, 7), "row 3 has 8 tokens, but the model has a table of 7 positions; set max_length to 7"),
    ],
)  # fmt: skip
def test_what_a_table_does_not_hold_is_an_error_with_both_numbers(tables, message):
    rows = [GOOD, {**GOOD, "chosen": ""}, LONG]
    with pytest.raises(ValueError, match=f"train dataset: {message}"):
        check_tables(prepare_pairs(rows, make_tokenizer()), tables)
    stream = prepare_pairs(Stream(rows), make_tokenizer())
    stream.tables = tables
    examples = iter(stream)
    with pytest.warns(UserWarning, match="row 2 is left out"):
        next(examples)  # the first row fits
        with pytest.raises(ValueError, match=message):
            next(examples)


def test_tables_that_are_just_large_enough_hold_everything():
    dataset = prepare_pairs([GOOD, LONG], make_tokenizer())
    check_tables(dataset, Tables(14, 14, 8))
    check_tables(dataset, Tables(14))


def test_mismatched_completions_count_as_far_as_they_are_not_cut():
    rows = [
        {"prompt": "a b c d e", "completion": " f", "label": True},
        {"prompt": "a", "completion": " f g h i", "label": True},
    ]
    dataset = prepare_unpaired(rows, make_tokenizer())  # 5 + 5 tokens under the other's prompt
    check_tables(dataset, Tables(14, None, 10))
    check_tables(dataset, Tables(14, None, 7, max_length=7))
    with pytest.raises(ValueError, match="row 1 has 10 tokens, but the model has a table of 9"):
        check_tables(dataset, Tables(14, None, 9))
