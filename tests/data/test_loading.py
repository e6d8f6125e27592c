"""Rows from the files that people have."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

pytest.importorskip("transformers")

from data_rows import GOOD, GOOD_CHAT, GOOD_UNPAIRED, assistant, call, user
from tiny_models import make_tokenizer

from pyfast_dpo.data import load_rows, prepare_pairs, prepare_unpaired

TEXT = {
    **GOOD,
    "chosen": ' d, "e"\n and é',
    "rejected": " [1, 2]",
}  # what a table must quote; no messages
ROWS = [TEXT, GOOD]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


# One file ------------------------------------------------------------------------------------------------


def as_lines(rows):
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_array(rows):
    return ("\n " + json.dumps(rows, ensure_ascii=False, indent=1)).encode()


def as_table(delimiter):
    def encode(rows):
        from io import StringIO

        text = StringIO(newline="")
        table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        for row in rows:
            table.writerow(
                {k: json.dumps(v) if isinstance(v, list | bool) else v for k, v in row.items()}
            )
        return text.getvalue().encode()

    return encode


def as_parquet(rows):
    datasets = pytest.importorskip("datasets")
    from io import BytesIO

    file = BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file.getvalue()


FILES = {
    "lines.jsonl": as_lines, "lines.json": as_lines, "array.json": as_array, "array.jsonl": as_array,
    "table.csv": as_table(","), "table.TSV": as_table("\t"), "table.parquet": as_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gzip"])
@pytest.mark.parametrize("mark", [False, True], ids=["", "byte order mark"])
def test_a_file_gives_its_rows(tmp_path, name, zipped, mark):
    if mark and "parquet" in name:
        pytest.skip("a binary format has no byte order mark")
    path = tmp_path / (name + ".gz" * zipped)
    content = b"\xef\xbb\xbf" * mark + FILES[name](ROWS)
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert load_rows(path) == load_rows(str(path)) == ROWS


@pytest.mark.parametrize("name", FILES)
def test_messages_and_labels_come_as_they_are_from_every_kind_of_file(tmp_path, name):
    pairs = [GOOD_CHAT, {**GOOD_CHAT, "prompt": [user("z"), assistant("y"), user("x")]}]
    unpaired = [{**GOOD_UNPAIRED, "label": label} for label in (True, False)]
    for rows in (pairs, unpaired):
        path = tmp_path / name
        path.write_bytes(FILES[name](rows))
        assert load_rows(path) == rows


def test_parquet_gives_no_field_that_only_other_rows_have(tmp_path):
    rows = [GOOD_CHAT, {**GOOD_CHAT, "chosen": [call("f")]}]
    path = tmp_path / "table.parquet"
    path.write_bytes(as_parquet(rows))
    assert load_rows(path)[0] == GOOD_CHAT


def test_a_table_of_a_spreadsheet_trains(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.csv", "prompt,completion,label", "a b, c,TRUE", "d, e,0", "f, g,maybe", "h"
    )
    dataset = prepare_unpaired(load_rows(path), tokenizer)
    assert dataset["label"] == [True, False]
    assert [
        rows for _, rows in sorted(dataset.report.dropped.items(), key=lambda item: item[1])
    ] == [[3], [4]]


def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "prompt,chosen,rejected", f"a,{'b ' * 100_000},c")
    assert len(load_rows(path)[0]["chosen"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"{}\n{\n", r"a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{}\n"a"\n', r"a.jsonl, line 2 must be a JSON object, got str"),
        ("a.json", b"[{}, 3]", r"a.json, item 2 must be a JSON object, got int"),
        ("a.json", b"[{}", r"a.json is not JSON"),
        ("a.jsonl", b"", "no rows in .*a.jsonl"),
        ("a.json", b"[]", "no rows in .*a.json"),
        ("a.csv", b"prompt,chosen\na,b,c\n", r"a.csv, line 2 has more cells than the 2 columns"),
        ("a.csv", b'prompt,chosen\na,"b"c\n', r"a.csv, after line 1: "),
        ("a.csv", b"prompt,chosen\n", "no rows in .*a.csv"),
        ("a.jsonl", b"\xff\xfe", r"a.jsonl cannot be read: 'utf-8' codec"),
        ("a.jsonl.gz", b"{}", r"a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], r"a.jsonl.gz cannot be read: Compressed file ended"),
        ("a.parquet", b"PAR0", r"a.parquet is not Parquet"),
        ("a.txt", b"a", r"a.txt must be one of .jsonl, .json, .csv, .tsv, .parquet, also with .gz"),
    ],
)  # fmt: skip
def test_what_is_not_rows_is_an_error_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none.csv.gz", "none"])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_rows(str(tmp_path / name))


# Several files -------------------------------------------------------------------------------------------


def test_files_are_joined(tmp_path):
    first = write(tmp_path / "a.jsonl", json.dumps(GOOD), "", json.dumps(GOOD))
    second = write(tmp_path / "b.json", json.dumps([GOOD_CHAT]))
    third = tmp_path / "c.csv"
    third.write_bytes(as_table(",")([TEXT]))
    assert load_rows([first, str(second), third]) == [GOOD, GOOD, GOOD_CHAT, TEXT]
    (tmp_path / ".hidden.jsonl").write_text("{")
    (tmp_path / "README.md").write_text("rows")
    assert load_rows(tmp_path) == [GOOD, GOOD, GOOD_CHAT, TEXT]


def test_of_files_named_by_splits_those_of_one_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl"):
        write(tmp_path / "data" / name, json.dumps({**GOOD, "name": name}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert [row["name"][:7] for row in load_rows(tmp_path)] == ["train-0", "train-0"]
    assert [row["name"] for row in load_rows(tmp_path, split="validation")] == ["val.jsonl"]
    with pytest.raises(
        ValueError, match=r"split must be one of \['train', 'validation'\].* got 'test'"
    ):
        load_rows(tmp_path, split="test")
    write(tmp_path / "more.jsonl", json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"some are named by a split and more.jsonl is not"):
        load_rows(tmp_path)


def test_a_folder_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no file of \.jsonl, \.json, .* in the folder"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="at least one file or dataset, got none"):
        load_rows([])


def test_dataset_of_the_datasets_library(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([GOOD, {**GOOD, "rejected": " d e"}]).save_to_disk(
        str(tmp_path / "d")
    )
    rows = load_rows(tmp_path / "d")
    assert len(prepare_pairs(rows, tokenizer)) == 1
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "dict"))
    assert len(load_rows(tmp_path / "dict")) == 2
    with pytest.raises(ValueError, match=r"split must be one of \['train'\] .* got 'test'"):
        load_rows(tmp_path / "dict", split="test")
