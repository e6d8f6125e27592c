"""Reading, checking, tokenizing and batching of preference data: what is kept, and how every loss is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import CHAT_TEMPLATE, make_tokenizer

from pyfast_dpo.data import (
    DataCollatorForPreference,
    DataCollatorForUnpairedPreference,
    demo_pairs,
    load_rows,
    prepare_pairs,
    prepare_unpaired,
)
from pyfast_dpo.data.rows import split_conversations
from pyfast_dpo.layout import padded_collators

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = {"prompt": "a b c", "chosen": " d e", "rejected": " f"}
GOOD_CHAT = {"prompt": [user("a b")], "chosen": [assistant("c")], "rejected": [assistant("d e")]}
GOOD_UNPAIRED = {"prompt": "a b", "completion": " c", "label": True}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(chat_template=CHAT_TEMPLATE)


# Rows that cannot be used ------------------------------------------------------------------------------

BAD_PAIRS = [
    # reason in the report, row
    ("identical responses", {**GOOD, "rejected": " d e"}),
    ("identical responses", {**GOOD_CHAT, "rejected": [assistant("c")]}),
    ("empty response", {**GOOD, "rejected": ""}),
    ("empty response", {**GOOD, "chosen": " \n"}),  # nothing but white space
    ("empty response", {**GOOD_CHAT, "chosen": []}),  # no message at all
    ("empty response", {**GOOD_CHAT, "chosen": [assistant(" ")]}),
    # implicit prompt: the conversations have no common beginning
    ("differing prompts", {"chosen": "a b", "rejected": "c d"}),
    (
        "differing prompts",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]},
    ),
    (
        "differing prompts",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
    ),
    # one conversation is the beginning of the other
    ("empty response", {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}),
    # the policy would be trained to write the user's turns
    (
        "a user turn inside a response",
        {**GOOD_CHAT, "rejected": [assistant("d"), user("e"), assistant("f")]},
    ),
    (
        "a user turn inside a response",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d",
        },
    ),
    (
        "response that does not begin with an assistant turn",
        {**GOOD_CHAT, "chosen": [user("a b"), assistant("c")]},
    ),
    (
        "'chosen' is neither a string nor a list of messages with role and content",
        {**GOOD, "chosen": 3},
    ),
    (
        "'rejected' is neither a string nor a list of messages with role and content",
        {**GOOD, "rejected": None},
    ),
    (
        "'prompt' is neither a string nor a list of messages with role and content",
        {**GOOD, "prompt": ["a"]},
    ),
    (
        "prompt and responses of different kinds (string and messages)",
        {**GOOD_CHAT, "prompt": "a b"},
    ),
    (
        "chosen and rejected of different kinds (string and messages)",
        {"chosen": "a b", "rejected": [user("a")]},
    ),
    # max_length is 8 in this test
    ("prompt not shorter than max_length 8", {**GOOD, "prompt": "a b c d e f g h"}),
    (
        "identical responses after tokenization and truncation",
        {"prompt": "a b c d e f g", "chosen": " h i", "rejected": " h j"},
    ),
]


@pytest.mark.parametrize("reason, row", BAD_PAIRS)
def test_unusable_pair_is_dropped_and_reported(chat_tokenizer, reason, row):
    good = GOOD_CHAT if "prompt" in row and isinstance(row["prompt"], list) else GOOD
    dataset = prepare_pairs([good, row, good], chat_tokenizer, max_length=8)
    assert len(dataset) == 2
    assert dataset.report.dropped == {reason: [2]}
    assert str(dataset.report).startswith(f"train: kept 2 of 3 rows; dropped: 1 {reason} (row 2)")


BAD_UNPAIRED = [
    ("empty response", {**GOOD_UNPAIRED, "completion": ""}),
    ("'label' is not true or false", {**GOOD_UNPAIRED, "label": "yes"}),
    ("'label' is not true or false", {**GOOD_UNPAIRED, "label": None}),
    (
        "'prompt' is neither a string nor a list of messages with role and content",
        {**GOOD_UNPAIRED, "prompt": 1.5},
    ),
    ("prompt not shorter than max_length 8", {**GOOD_UNPAIRED, "prompt": "a b c d e f g h"}),
]


@pytest.mark.parametrize("reason, row", BAD_UNPAIRED)
def test_unusable_unpaired_row_is_dropped_and_reported(tokenizer, reason, row):
    rows = [GOOD_UNPAIRED, row, {**GOOD_UNPAIRED, "prompt": "x"}]
    dataset = prepare_unpaired(rows, tokenizer, max_length=8)
    assert len(dataset) == 2
    assert dataset.report.dropped == {reason: [2]}


def test_report_counts_every_row(tokenizer):
    same, empty = {**GOOD, "rejected": " d e"}, {**GOOD, "chosen": ""}
    rows = [GOOD, empty, same, GOOD, same, *[same] * 12]
    report = prepare_pairs(rows, tokenizer, name="eval").report
    assert report.kept + sum(map(len, report.dropped.values())) == report.total == 17
    assert str(report) == (
        "eval: kept 2 of 17 rows; dropped: 14 identical responses "
        "(rows 3, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 4 more), 1 empty response (row 2)"
    )


def test_no_usable_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"no usable row; .* 2 identical responses \(rows 1, 2\)"):
        prepare_pairs([{**GOOD, "rejected": " d e"}] * 2, tokenizer)


@pytest.mark.parametrize(
    "prepare, rows, message",
    [
        (
            prepare_pairs,
            [GOOD, {"prompt": "a", "chosen": "b"}],
            r"row 2 has no column 'rejected'.*got \['prompt', 'chosen'\]",
        ),
        (prepare_pairs, [{"text": "a"}], "row 1 has no column 'chosen'"),
        (
            prepare_unpaired,
            [GOOD_UNPAIRED, {"prompt": "a", "completion": "b"}],
            "row 2 has no column 'label'",
        ),
        (prepare_unpaired, [{"completion": "b", "label": True}], "row 1 has no column 'prompt'"),
        (prepare_unpaired, [GOOD, GOOD_UNPAIRED], "row 2 has no column 'chosen'"),
    ],
)
def test_missing_column_is_an_error_with_column_and_row(tokenizer, prepare, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows, tokenizer)


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare_pairs([GOOD_CHAT], tokenizer)


@pytest.mark.skipif(not (SHARED_DATA / "hh_edge_cases.jsonl").exists(), reason="no shared data")
def test_odd_rows_of_hh_are_all_accounted_for(tokenizer):
    rows = load_rows(SHARED_DATA / "hh_edge_cases.jsonl")
    with pytest.raises(ValueError, match="no usable row") as error:
        prepare_pairs(rows, tokenizer, max_length=None)
    message = str(error.value)
    assert "kept 0 of 66 rows; dropped: 36 identical responses (rows 5, 15, " in message
    assert "11 empty response (rows 1, 6, " in message
    # One side has more turns: the prompts differ, or the longer one ends with a user turn.
    assert "17 differing prompts (rows 2, 3, " in message
    assert "2 a user turn inside a response (rows 28, 31)" in message


# Splitting, tokenizing, truncating -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Q: a? A: yes it is", "Q: a? A: no", ("Q: a? A:", " yes it is", " no")),
        # the responses begin with the same letters: the border is that of the word
        ("A: this", "A: that", ("A:", " this", " that")),
        # one response is the beginning of the other
        ("A: no thanks", "A: no", ("A:", " no thanks", " no")),
        (
            "\n\nHuman: a\n\nAssistant: so b",
            "\n\nHuman: a\n\nAssistant: so c",
            ("\n\nHuman: a\n\nAssistant:", " so b", " so c"),
        ),
        (
            [user("a"), assistant("b")],
            [user("a"), assistant("c")],
            ([user("a")], [assistant("b")], [assistant("c")]),
        ),
    ],
)
def test_split_conversations(chosen, rejected, expected):
    assert split_conversations(chosen, rejected) == expected


def test_plain_text_ends_with_eos_and_prompt_is_shared(tokenizer):
    (example,) = prepare_pairs([GOOD], tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(example["prompt_ids"]) == "a b c"
    assert tokenizer.decode(example["chosen_ids"]) == f"d e {end}"
    assert tokenizer.decode(example["rejected_ids"]) == f"f {end}"


def test_eos_is_not_doubled(tokenizer):
    (example,) = prepare_pairs([{**GOOD, "chosen": f" d {tokenizer.eos_token}"}], tokenizer)
    assert list(example["chosen_ids"]).count(tokenizer.eos_token_id) == 1


def test_chat_messages_go_through_the_template(chat_tokenizer):
    (example,) = prepare_pairs([GOOD_CHAT], chat_tokenizer)
    assert chat_tokenizer.decode(example["prompt_ids"]) == "<user> a b <end> <assistant>"
    assert chat_tokenizer.decode(example["chosen_ids"]) == "c <end>"


def test_responses_are_cut_and_counted(tokenizer):
    dataset = prepare_pairs([GOOD, {**GOOD, "chosen": " d e f g h"}], tokenizer, max_length=6)
    assert [len(example["chosen_ids"]) for example in dataset] == [3, 3]
    assert dataset.report.truncated == [2]
    assert "responses cut at max_length: 1" in str(dataset.report)


def test_border_inside_a_token_belongs_to_the_response(tokenizer):
    # "c" + "d" is the one word "cd": the prompt alone ends in a token that the whole does not have.
    dataset = prepare_pairs([{"prompt": "a b c", "chosen": "d", "rejected": "e"}], tokenizer)
    assert tokenizer.decode(dataset[0]["prompt_ids"]) == "a b"
    assert dataset.report.shifted_boundary == [1]


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


# Batches -------------------------------------------------------------------------------------------------


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


# Files ---------------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_jsonl_files_are_joined(tmp_path):
    first = write(tmp_path / "a.jsonl", json.dumps(GOOD), "", json.dumps(GOOD))
    second = write(tmp_path / "b.jsonl", json.dumps(GOOD_CHAT))
    assert load_rows([first, str(second)]) == [GOOD, GOOD, GOOD_CHAT]


@pytest.mark.parametrize(
    "lines, message",
    [
        (["{}", "{"], r"a.jsonl, line 2 is not JSON"),
        (["[1]"], r"a.jsonl, line 1 must be a JSON object, got list"),
        ([], "no rows in .*a.jsonl"),
    ],
)
def test_bad_jsonl(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "a.jsonl", *lines))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_rows(tmp_path / "none.jsonl")


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


# The shipped preference set ------------------------------------------------------------------------------


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
