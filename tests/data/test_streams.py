"""Streams: every row once whoever reads, epochs that shuffle, a report that is filled, drops that are told."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

pytest.importorskip("transformers")

from data_rows import GOOD
from tiny_models import Stream, make_tokenizer

from pyfast_dpo.data import prepare, prepare_pairs, prepare_unpaired

LETTERS = "abcdefghijklmnopqrstuvwx"  # 24 rows, whose prompts tell them apart
ROWS = [{"prompt": letter, "chosen": " y", "rejected": " z"} for letter in LETTERS]


class Divided(IterableDataset):
    """Divides itself among the workers, as torch asks of an IterableDataset."""

    def __iter__(self):
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return iter(ROWS[start::step])


def of_datasets(shards):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=shards)


STREAMS = {
    "plain": lambda: Stream(ROWS),
    "torch": Divided,
    "datasets, one shard": lambda: of_datasets(1),
    "datasets, four shards": lambda: of_datasets(4),
}


def read(dataset, workers, column="prompt_ids"):
    return [ids for example in DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=dict)
            for ids in [example[column][0]]]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("prepared", [prepare_pairs, prepare_unpaired])
def test_every_row_arrives_once(tokenizer, make, workers, prepared):
    dataset = prepared(make(), tokenizer)
    times = 1 if prepared is prepare_pairs else 2
    for _ in range(2):  # epochs
        seen = sorted(tokenizer.decode(read(dataset, workers)).split())
        assert seen == sorted(list(LETTERS) * times)
        assert (dataset.report.total, dataset.report.kept) == (24, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_a_shuffled_stream_have_their_own_order(tokenizer, workers):
    rows = of_datasets(1).shuffle(seed=0, buffer_size=24)
    dataset = prepare_pairs(rows, tokenizer)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(read(dataset, workers))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_report_counts_the_rows_of_the_last_pass(tokenizer, workers):
    rows = [*ROWS[:4], {**GOOD, "chosen": ""}, *ROWS[4:], {**GOOD, "rejected": " d e"}]
    rows[7] = {**rows[7], "chosen": " a b c d e"}
    dataset = prepare_pairs(Stream(rows), tokenizer, max_length=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            read(dataset, workers)
            report = dataset.report
            assert (report.total, report.kept, report.truncated) == (26, 24, [8])
            assert report.dropped == {"empty response": [5], "identical responses": [26]}


def test_the_report_of_an_unfinished_pass_says_how_far_it_went(tokenizer):
    dataset = prepare_pairs(Stream(ROWS), tokenizer)
    examples = iter(dataset)
    for _ in range(3):
        next(examples)
    assert dataset.report.total == 3


def test_the_first_row_of_every_reason_is_told(tokenizer):
    bad = {**GOOD, "chosen": ""}
    dataset = prepare_pairs(Stream([GOOD, bad, bad]), tokenizer)
    with pytest.warns(
        UserWarning, match=r"train dataset: row 2 is left out \(empty response\)"
    ) as told:
        list(dataset)
    assert len(told) == 1
    dataset.set_epoch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they are the same rows
        list(dataset)


def test_a_stream_without_a_usable_row_is_an_error(monkeypatch, tokenizer):
    monkeypatch.setattr(prepare, "USELESS_ROWS", 3)

    class Endless:
        def __iter__(self):
            while True:
                yield {**GOOD, "chosen": ""}

    with pytest.raises(
        ValueError, match="no usable row among the first 3; train: kept 0 of 3 rows"
    ):
        next(iter(prepare_pairs(Endless(), tokenizer)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"no usable row; .* 2 empty response \(rows 1, 2\)"):
            list(prepare_pairs(Stream([{**GOOD, "chosen": ""}] * 2), tokenizer))


def test_a_first_row_without_columns_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="row 1 has no column 'chosen'"):
        next(iter(prepare_pairs(Stream([{"text": "a"}, GOOD]), tokenizer)))


def test_workers_that_are_started_anew_read_too(tokenizer):
    """As on other systems than Linux, where a dataset is sent to its workers."""
    dataset = prepare_unpaired(Stream(ROWS), tokenizer)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, collate_fn=dict, multiprocessing_context="spawn"
    )
    assert len(list(loader)) == 48
    assert dataset.report.total == 24


def test_notes_of_workers_go_with_the_dataset(tokenizer):
    dataset = prepare_pairs(Stream(ROWS), tokenizer)
    read(dataset, 2)
    folder = dataset._notes
    copy = pickle.loads(pickle.dumps(dataset))
    del copy
    assert len(list(folder.glob("*.pickle"))) == 2
    del dataset
    assert not folder.exists()


def test_a_note_cut_short_is_left_out(tokenizer):
    dataset = prepare_pairs(Stream(ROWS), tokenizer)
    read(dataset, 2)
    path = sorted(dataset._notes.glob("*.pickle"))[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 12 <= dataset.report.total < 24


def test_ids_of_a_stream_are_lists(tokenizer):
    example = next(iter(prepare_pairs(Stream(ROWS), tokenizer)))
    assert {type(value) for value in example.values()} == {list}
    assert torch.tensor(example["prompt_ids"]).dtype == torch.int64
