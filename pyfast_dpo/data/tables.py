"""Ids and lengths against the tables of a model: its embeddings and its positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pyfast_dpo.data.prepared import PreparedDataset


class Tables(NamedTuple):
    """How large the tables are that ids and positions are looked up in."""

    vocabulary: int  # of the policy
    reference_vocabulary: int | None = None  # of a reference model of its own
    positions: int | None = None  # of a model with a table of positions
    max_length: int | None = None  # to which mismatched completions are cut under other prompts


def check_tables(dataset: PreparedDataset, tables: Tables) -> None:
    """Raises ValueError for the first example with an id or a length beyond a table, with both numbers."""
    smallest = min(tables.vocabulary, tables.reference_vocabulary or tables.vocabulary)
    fits = dataset.largest_id() < smallest
    if fits and tables.positions is not None:
        fits = max(_lengths(dataset, tables), default=0) <= tables.positions
    if fits:
        return
    for i, example in enumerate(dataset.examples):
        check_example(example, tables, dataset.report.name, dataset.row_number(i))


def check_example(example: Mapping[str, Any], tables: Tables, name: str, row: int) -> None:
    """The same for one example, of the row with this number of the dataset of this name."""
    largest = max(
        (int(max(ids)) for column, ids in example.items() if column.endswith("_ids") and len(ids)),
        default=-1,
    )
    for owner, size in (
        ("model", tables.vocabulary),
        ("reference model", tables.reference_vocabulary),
    ):
        if size is not None and largest >= size:
            raise ValueError(
                f"{name} dataset: row {row} has the token id {largest}, but the embeddings of the {owner} have "
                f"{size} rows (ids 0 to {size - 1}); is the tokenizer another model's, or has it tokens that were "
                "added without model.resize_token_embeddings(len(tokenizer))?"
            )
    longest = _longest(example, tables.max_length)
    if tables.positions is not None and longest > tables.positions:
        raise ValueError(
            f"{name} dataset: row {row} has {longest} tokens, but the model has a table of {tables.positions} "
            f"positions; set max_length to {tables.positions} or less"
        )


def _lengths(dataset: PreparedDataset, tables: Tables) -> Iterator[int]:
    """The most tokens of a sequence, one number for each response."""
    prompts = dataset.lengths("prompt_ids")
    for column in dataset.examples[0] if len(dataset) else ():
        if column.endswith("_ids") and column != "prompt_ids":
            longest = int((prompts + dataset.lengths(column)).max(initial=0))
            yield longest if tables.max_length is None else min(longest, tables.max_length)


def _longest(example: Mapping[str, Any], max_length: int | None = None) -> int:
    """Tokens of the longest sequence of an example."""
    prompt = len(example["prompt_ids"])
    return max(
        prompt + len(ids) if max_length is None else min(prompt + len(ids), max_length)
        for column, ids in example.items()
        if column.endswith("_ids") and column != "prompt_ids"
    )
