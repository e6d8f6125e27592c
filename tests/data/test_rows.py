"""From rows to pairs and unpaired examples: what is used, what is left out, and the reason that is told."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from data_rows import (
    GOOD,
    GOOD_CHAT,
    GOOD_UNPAIRED,
    assistant,
    call,
    make_chat_tokenizer,
    system,
    tool,
    user,
)
from tiny_models import make_tokenizer

from pyfast_dpo.data import load_rows, prepare_pairs, prepare_unpaired
from pyfast_dpo.data.messages import UnusableRow, template_options
from pyfast_dpo.data.rows import Pair, Unpaired, parse_pair, parse_unpaired, split_conversations

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_chat_tokenizer()


# Rows that are used --------------------------------------------------------------------------------------

Q, A, B = user("a"), assistant("b"), assistant("c")
PAIR = Pair([Q], [A], [B])

USED_PAIRS = {
    # name: (row, pair)
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PAIR),
    "implicit prompt": ({"chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    # ultrafeedback_binarized: the prompt is told again, as a string
    "string and conversations": ({"prompt": "a", "chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    "string and conversations with a system turn": (
        {"prompt": "a ", "chosen": [system("s"), Q, A], "rejected": [system("s"), Q, B]},
        Pair([system("s"), Q], [A], [B]),
    ),
    "string and conversations of more turns": (
        {"prompt": "a", "chosen": [Q, A, user("d"), A], "rejected": [Q, A, user("d"), B]},
        Pair([Q, A, user("d")], [A], [B]),
    ),
    "string and turns of the assistant": ({"prompt": "a", "chosen": [A], "rejected": [B]}, PAIR),
    "messages and strings": ({"prompt": [Q], "chosen": "b", "rejected": "c"}, PAIR),
    "messages and conversations": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, PAIR),
    "one response tells the prompt again": (
        {"prompt": [Q], "chosen": [Q, A], "rejected": [B]}, PAIR,
    ),
    "responses have more before the prompt": (
        {"prompt": [Q], "chosen": [system("s"), Q, A], "rejected": [system("s"), Q, B]},
        Pair([system("s"), Q], [A], [B]),
    ),
    "the question is in both responses": (
        {"prompt": [system("s")], "chosen": [Q, A], "rejected": [Q, B]},
        Pair([system("s"), Q], [A], [B]),
    ),
    "a user turn inside a response": (
        {"prompt": [Q], "chosen": [A, user("d"), B], "rejected": [B]},
        Pair([Q], [A, user("d"), B], [B]),
    ),
    # what users and tools say after the last answer teaches nothing
    "a user turn after a response": (
        {"prompt": [Q], "chosen": [A, user("d")], "rejected": [B, tool("d")]}, PAIR,
    ),
    "an HH transcript that ends with the user": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"},
        Pair("\n\nHuman: a\n\nAssistant:", " b", " c"),
    ),
    "content in parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "c", "x": None}, "d"]}],
        },
        Pair([Q], [A], [assistant("cd")]),
    ),
    "calls of tools without content": (
        {"prompt": [Q], "chosen": [call("f"), tool("d"), A], "rejected": [call("g")]},
        Pair([Q], [call("f", content=""), tool("d"), A], [call("g", content="")]),
    ),
    # the same call, other results: what the responses share of the assistant belongs to them
    "results of tools differ": (
        {"chosen": [Q, call("f"), tool("d"), A], "rejected": [Q, call("f"), tool("e"), A]},
        Pair([Q], [call("f", content=""), tool("d"), A], [call("f", content=""), tool("e"), A]),
    ),
    "fields that are not given": (
        {"prompt": [{**Q, "name": None}], "chosen": [{**A, "tool_calls": None}], "rejected": [B]}, PAIR,
    ),
    "no image": (
        {"prompt": [Q], "chosen": [A], "rejected": [B], "images": [], "image": None, "question": "x"}, PAIR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("row, pair", USED_PAIRS.values(), ids=USED_PAIRS)
def test_every_form_of_a_pair_gives_prompt_and_responses(row, pair):
    assert parse_pair(row) == pair


USED_UNPAIRED = {
    "messages": ({"prompt": [Q], "completion": [A], "label": False}, ([Q], [A], False)),
    "string and conversation": ({"prompt": "a", "completion": [Q, A], "label": 1}, ([Q], [A], True)),
    "string and conversation of more turns": (
        {"prompt": "a", "completion": [system("s"), Q, A, user("d"), B], "label": 0},
        ([system("s"), Q], [A, user("d"), B], False),
    ),
    "messages and conversation": ({"prompt": [Q], "completion": [Q, A], "label": True}, ([Q], [A], True)),
    "messages and string": ({"prompt": [Q], "completion": "b", "label": True}, ([Q], [A], True)),
}  # fmt: skip


@pytest.mark.parametrize("row, expected", USED_UNPAIRED.values(), ids=USED_UNPAIRED)
def test_every_form_of_an_unpaired_row_gives_prompt_and_completion(row, expected):
    assert parse_unpaired(row) == Unpaired(*expected)


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


# Rows that cannot be used --------------------------------------------------------------------------------

NO_TEXT = "is neither a string nor a list of messages with role and content"
TRL = "which these trainers do not take; TRL's do, also with the kernels of pyfast_dpo.integrations.trl"

BAD_PAIRS = [
    # reason in the report, row
    ("identical responses", {**GOOD, "rejected": " d e"}),
    ("identical responses", {**GOOD_CHAT, "rejected": [assistant("c")]}),
    ("identical responses", {**GOOD_CHAT, "rejected": [assistant("c"), user("d")]}),
    ("empty response", {**GOOD, "rejected": ""}),
    ("empty response", {**GOOD, "chosen": " \n"}),  # nothing but white space
    ("empty response", {**GOOD_CHAT, "chosen": []}),  # no message at all
    ("empty response", {**GOOD_CHAT, "chosen": [assistant(" ")]}),
    ("empty response", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}),
    ("'prompt' has no messages", {**GOOD_CHAT, "prompt": []}),
    # implicit prompt: the conversations have no common beginning
    (
        "no column 'prompt'; expected the columns ['prompt', 'chosen', 'rejected'], got ['chosen', 'rejected']",
        {"chosen": "a b", "rejected": "c d"},
    ),
    (
        "no column 'prompt'; expected the columns ['prompt', 'chosen', 'rejected'], "
        "got ['question', 'chosen', 'rejected']",
        {"question": "a b", "chosen": "the c", "rejected": "the d"},  # "the" is no prompt
    ),
    (
        "no column 'prompt'; expected the columns ['prompt', 'chosen', 'rejected'], "
        "got ['question', 'chosen', 'rejected']",
        {"question": "a b", "chosen": [assistant("c")], "rejected": [assistant("d")]},
    ),
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
    (
        "responses that begin with differing turns of others than the assistant",
        {**GOOD_CHAT, "chosen": [user("c"), assistant("c")]},
    ),
    (
        "prompt and responses begin the conversation differently",
        {
            "prompt": [system("a"), user("b")],
            "chosen": [system("c"), user("b"), assistant("c")],
            "rejected": [system("c"), user("b"), assistant("d")],
        },
    ),
    (
        "'prompt' is none of the turns with which the conversations begin",
        {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
    ),
    (f"'chosen' {NO_TEXT}", {**GOOD, "chosen": 3}),
    (f"'rejected' {NO_TEXT}", {**GOOD, "rejected": None}),
    (f"'prompt' {NO_TEXT} (got a list of str)", {**GOOD, "prompt": ["a"]}),
    # another library's names: they are told
    (
        f"'prompt' {NO_TEXT} (got a list of ['from', 'value'])",
        {**GOOD_CHAT, "prompt": [{"from": "human", "value": "a"}]},
    ),
    (
        "'chosen' has a message whose content is neither a string nor a list of parts, but None",
        {**GOOD_CHAT, "chosen": [{"role": "assistant", "content": None}]},
    ),
    (
        f"'prompt' has a message with a part of the type 'image', {TRL}",
        {**GOOD_CHAT, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    ),
    (f"column 'images' holds an image, {TRL}", {**GOOD_CHAT, "images": [None, object()]}),
    (f"column 'image' holds an image, {TRL}", {**GOOD, "image": "a.png"}),
    ("column 'tools' is a string that is not JSON", {**GOOD_CHAT, "tools": "[f"}),
    ("column 'tools' is not a list, but dict", {**GOOD_CHAT, "tools": '{"f": 1}'}),
    ("column 'chat_template_kwargs' is not an object, but list", {**GOOD_CHAT, "chat_template_kwargs": [1]}),
    ("responses of different kinds (string and messages)", {**GOOD, "chosen": [assistant("b")]}),
    (
        "chosen and rejected of different kinds (string and messages)",
        {"chosen": "a b", "rejected": [user("a")]},
    ),
    (
        "no column 'rejected'; expected the columns ['prompt', 'chosen', 'rejected'], got ['prompt', 'chosen']",
        {"prompt": "a", "chosen": "b"},
    ),
    ("not a mapping, but str", "a b"),
    # max_length is 8 in this test
    ("prompt not shorter than max_length 8", {**GOOD, "prompt": "a b c d e f g h"}),
    (
        "identical responses after tokenization and truncation",
        {"prompt": "a b c d e f g", "chosen": " h i", "rejected": " h j"},
    ),
    # what a tokenizer raises is the reason of the row, not the end of the run
    ("TypeError", {**GOOD, "chosen": "\ud800"}),  # a lone surrogate
    ("TypeError", {**GOOD_CHAT, "rejected": [assistant("\udfff")]}),
]  # fmt: skip


@pytest.mark.parametrize("reason, row", BAD_PAIRS)
def test_unusable_pair_is_dropped_and_reported(chat_tokenizer, reason, row):
    dataset = prepare_pairs([GOOD, row, GOOD_CHAT], chat_tokenizer, max_length=8)
    assert len(dataset) == 2
    ((told, rows),) = dataset.report.dropped.items()
    assert rows == [2]
    assert told.startswith(reason)
    assert str(dataset.report).startswith(f"train: kept 2 of 3 rows; dropped: 1 {reason}")
    assert "(row 2)" in str(dataset.report)


BAD_UNPAIRED = [
    ("empty response", {**GOOD_UNPAIRED, "completion": ""}),
    ("'label' is the string 'true', not true or false", {**GOOD_UNPAIRED, "label": "true"}),
    ("'label' is not true or false", {**GOOD_UNPAIRED, "label": None}),
    ("'label' is not true or false", {**GOOD_UNPAIRED, "label": 2}),
    (f"'prompt' {NO_TEXT}", {**GOOD_UNPAIRED, "prompt": 1.5}),
    ("prompt not shorter than max_length 8", {**GOOD_UNPAIRED, "prompt": "a b c d e f g h"}),
    (
        "no column 'label'; expected the columns ['prompt', 'completion', 'label'], got ['prompt', 'completion']",
        {"prompt": "a", "completion": "b"},
    ),
    (f"column 'image' holds an image, {TRL}", {**GOOD_UNPAIRED, "image": object()}),
    ("TypeError", {**GOOD_UNPAIRED, "completion": "\ud800"}),
]  # fmt: skip


@pytest.mark.parametrize("reason, row", BAD_UNPAIRED)
def test_unusable_unpaired_row_is_dropped_and_reported(tokenizer, reason, row):
    rows = [GOOD_UNPAIRED, row, {**GOOD_UNPAIRED, "prompt": "x"}]
    dataset = prepare_unpaired(rows, tokenizer, max_length=8)
    assert len(dataset) == 2
    ((told, dropped),) = dataset.report.dropped.items()
    assert (told.startswith(reason), dropped) == (True, [2])


def test_report_counts_every_row(tokenizer):
    same, empty = {**GOOD, "rejected": " d e"}, {**GOOD, "chosen": ""}
    rows = [GOOD, empty, same, GOOD, same, *[same] * 12]
    report = prepare_pairs(rows, tokenizer, name="eval").report
    assert report.kept + sum(map(len, report.dropped.values())) == report.total == 17
    assert str(report) == (
        "eval: kept 2 of 17 rows; dropped: 14 identical responses "
        "(rows 3, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 4 more), 1 empty response (row 2)"
    )


def test_report_of_many_reasons_is_one_line_of_some(tokenizer):
    rows = [GOOD, *({**GOOD, "tools": "", f"x{i}": 1, "chosen": i} for i in range(3))]
    rows += [{"prompt": "a", "chosen": "b", f"x{i}": 1} for i in range(15)]
    text = str(prepare_pairs(rows, tokenizer).report)
    assert text.startswith("train: kept 1 of 19 rows; dropped: 3 'chosen' is neither")
    assert text.endswith("6 for 6 other reasons")


def test_no_usable_row_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"no usable row; .* 2 identical responses \(rows 1, 2\)"):
        prepare_pairs([{**GOOD, "rejected": " d e"}] * 2, tokenizer)


@pytest.mark.parametrize(
    "prepare, rows, error, message",
    [
        (
            prepare_pairs, [{"prompt": "a", "chosen": "b"}], ValueError,
            r"row 1 has no column 'rejected'.*got \['prompt', 'chosen'\]",
        ),
        (
            prepare_pairs, [{"text": "a"}], ValueError,
            r"row 1 has no column 'chosen'; expected the columns \['prompt', 'chosen', 'rejected'\], "
            r"got \['text'\]",
        ),
        (prepare_pairs, ["a b"], TypeError, "row 1 must be a mapping, got str"),
        (
            prepare_unpaired, [{"completion": "b", "label": True}], ValueError,
            r"row 1 has no column 'prompt'; expected the columns \['prompt', 'completion', 'label'\]",
        ),
        (
            prepare_pairs, [{"question": "a", "chosen": "so b", "rejected": "so c"}], ValueError,
            r"no usable row.*expected the columns \['prompt'.*got \['question', 'chosen', 'rejected'\]",
        ),
    ],
)  # fmt: skip
def test_a_first_row_of_another_kind_is_an_error_with_its_columns(
    tokenizer, prepare, rows, error, message
):
    with pytest.raises(error, match=message):
        prepare(rows, tokenizer)


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare_pairs([GOOD_CHAT], tokenizer)


def test_tools_and_template_options_come_from_json_or_as_they_are():
    tools = [{"function": {"name": "f"}}]
    row = {"tools": '[{"function": {"name": "f"}}]', "chat_template_kwargs": '{"a": 1}'}
    assert template_options(row, {}) == {"tools": tools, "a": 1}
    row = {"tools": ['{"function": {"name": "f"}}'], "chat_template_kwargs": {"a": 1, "b": None}}
    assert template_options(row, {"a": 2, "b": 3}) == {"tools": tools, "a": 1, "b": 3}
    assert template_options({"tools": "", "chat_template_kwargs": None}, {"a": 2}) == {"a": 2}
    with pytest.raises(UnusableRow, match="not JSON"):
        template_options({"tools": ["f"]}, {})


@pytest.mark.skipif(not (SHARED_DATA / "hh_edge_cases.jsonl").exists(), reason="no shared data")
def test_odd_rows_of_hh_are_all_accounted_for(tokenizer):
    rows = load_rows(SHARED_DATA / "hh_edge_cases.jsonl")
    message = str(prepare_pairs(rows, tokenizer, max_length=None).report)
    # Of two rows one side ends with a user turn, which is left out; without it one has identical responses.
    assert "kept 1 of 66 rows; dropped: 37 identical responses (rows 5, 15, 25, 27, 28, " in message
    assert "11 empty response (rows 1, 6, " in message
    assert "17 differing prompts (rows 2, 3, " in message  # one side has more turns
