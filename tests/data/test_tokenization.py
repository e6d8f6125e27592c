"""From texts to ids: special tokens once each, the chat template and its options, which turns are scored."""

from __future__ import annotations

import importlib.util
import re
import warnings
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
    make_tool_tokenizer,
    tool,
    user,
)
from tiny_models import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pyfast_dpo.data import prepare_pairs, prepare_unpaired


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_chat_tokenizer()


def whole(tokenizer, example, response="chosen_ids"):
    return tokenizer.decode(example["prompt_ids"] + example[response])


# Plain texts ---------------------------------------------------------------------------------------------


def test_plain_text_ends_with_eos_and_prompt_is_shared(tokenizer):
    (example,) = prepare_pairs([GOOD], tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(example["prompt_ids"]) == "a b c"
    assert tokenizer.decode(example["chosen_ids"]) == f"d e {end}"
    assert tokenizer.decode(example["rejected_ids"]) == f"f {end}"


def special_tokenizer(before: str, after: str):
    """A tokenizer that writes special tokens of its own around every text, and those into it that a text has."""
    tokenizer = make_tokenizer(chat_template="<bos> " + CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize("before", ["", "<bos>"], ids=["writes no BOS", "writes BOS"])
@pytest.mark.parametrize("after", ["", "<eos>"], ids=["writes no EOS", "writes EOS"])
@pytest.mark.parametrize("start", ["", "<bos> "], ids=["text without BOS", "text with BOS"])
@pytest.mark.parametrize("end", ["", " <eos>"], ids=["text without EOS", "text with EOS"])
def test_special_tokens_stand_once_whoever_writes_them(before, after, start, end):
    tokenizer = special_tokenizer(before, after)
    row = {"prompt": f"{start}a b", "chosen": f" c{end}", "rejected": f" d e{end}"}
    begin = "<bos> " if before or start else ""
    (example,) = prepare_pairs([row], tokenizer)
    assert whole(tokenizer, example) == f"{begin}a b c <eos>"
    assert whole(tokenizer, example, "rejected_ids") == f"{begin}a b d e <eos>"
    assert (
        tokenizer.decode(example["prompt_ids"]) == f"{begin}a b"
    )  # no EOS between prompt and response


def test_a_rendered_prompt_gets_no_second_bos():
    tokenizer = special_tokenizer("<bos>", "")
    rendered = tokenizer.apply_chat_template(
        [user("a b")], tokenize=False, add_generation_prompt=True
    )
    unpaired = {"completion": " c", "label": True}
    rows = [{"prompt": rendered, **unpaired}, {"prompt": "a", **unpaired}]
    texts = [whole(tokenizer, e, "completion_ids") for e in prepare_unpaired(rows, tokenizer)]
    assert texts == ["<bos> <user> a b <end> <assistant> c <eos>", "<bos> a c <eos>"]


def test_a_tokenizer_without_eos_ends_nothing():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    (example,) = prepare_pairs([GOOD], tokenizer)
    assert whole(tokenizer, example) == "a b c d e"


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


# Chat templates ------------------------------------------------------------------------------------------


def test_chat_messages_go_through_the_template(chat_tokenizer):
    (example,) = prepare_pairs([GOOD_CHAT], chat_tokenizer)
    assert chat_tokenizer.decode(example["prompt_ids"]) == "<user> a b <end> <assistant>"
    assert chat_tokenizer.decode(example["chosen_ids"]) == "c <end>"


def test_content_in_parts_is_the_same_as_text(chat_tokenizer):
    parts = {
        column: [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for column, messages in GOOD_CHAT.items()
    }
    first, second = prepare_pairs([GOOD_CHAT, parts], chat_tokenizer).examples
    assert first == second


TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]

OPTIONS = {
    # name: (columns of the row, options for all rows, what the template wrote first)
    "tools": ({"tools": TOOLS}, {}, "<tools> f "),
    "tools as JSON": ({"tools": '[{"function": {"name": "g"}}]'}, {}, "<tools> g "),
    "no tools": ({"tools": None}, {}, ""),
    "an option of the row": ({"chat_template_kwargs": {"enable_thinking": False}}, {}, "<quiet> "),
    "an option of all": ({}, {"enable_thinking": False}, "<quiet> "),
    "the row's comes first": (
        {"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": False}, "",
    ),
    "an option not given by the row": (
        {"chat_template_kwargs": {"enable_thinking": None}}, {"enable_thinking": False}, "<quiet> ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("columns, options, begin", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("unpaired", [False, True], ids=["pairs", "unpaired"])
def test_tools_and_options_reach_the_template(columns, options, begin, unpaired):
    tokenizer = make_tool_tokenizer()
    if unpaired:
        row = {"prompt": [user("a b")], "completion": [assistant("c")], "label": True, **columns}
        rows = [row, {**row, "prompt": [user("x")]}]
        example = prepare_unpaired(rows, tokenizer, chat_template_kwargs=options)[0]
    else:
        rows = [{**GOOD_CHAT, **columns}]
        (example,) = prepare_pairs(rows, tokenizer, chat_template_kwargs=options)
    assert tokenizer.decode(example["prompt_ids"]) == f"{begin}<user> a b <end> <assistant>"


def test_fields_that_datasets_fills_with_none_are_not_given():
    """A message with tool calls gives a field to all messages, one with an argument y to all calls."""
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tool_tokenizer(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if 'tool_calls' in m %}"
        "{% for c in m.tool_calls %}<call> {{ c.function.arguments | list | join(' ') }} {% endfor %}{% endif %}"
        "<end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    other = call("f")
    other["tool_calls"][0]["function"]["arguments"] = {"y": 2}
    row = {"prompt": [user("a b")], "chosen": [call("f")], "rejected": [assistant("d")]}
    mixed = {**row, "chosen": [other], "rejected": [call("g")]}
    rows = datasets.Dataset.from_list([row, mixed])
    arguments = rows[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]
    assert (rows[0]["rejected"][0]["tool_calls"], arguments) == (None, {"x": 1, "y": None})
    texts = [tokenizer.decode(e["chosen_ids"]) for e in prepare_pairs(rows, tokenizer)]
    assert texts == ["<call> x <end>", "<call> y <end>"]
    assert tokenizer.decode(prepare_pairs(rows, tokenizer)[0]["rejected_ids"]) == "d <end>"


def test_an_error_of_the_template_is_that_of_its_row():
    tokenizer = make_tool_tokenizer()
    rows = [GOOD_CHAT] * 5 + [{**GOOD_CHAT, "chosen": [assistant("j")]}] + [GOOD_CHAT]
    dataset = prepare_pairs(rows, tokenizer)
    assert (len(dataset), dataset.report.dropped) == (6, {"TemplateError: no j": [6]})


# Turns of others inside a response -----------------------------------------------------------------------

# As reasoning models have it: the last turn begins with thoughts, earlier ones do not; "<end>" is special.
THINKING = (
    "{% for m in messages %}<{{ m.role }}> {% if loop.last and m.role == 'assistant' %}<quiet> {% endif %}"
    "{{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = [assistant("c d"), tool("e"), tool("f"), assistant("g"), user("h"), assistant("i")]


def scored(tokenizer, example, response="chosen"):
    """What is scored of a response; other tokens are shown as a dot."""
    mask = example.get(f"{response}_assistant_mask") or [1] * len(example[f"{response}_ids"])
    tokens = tokenizer.convert_ids_to_tokens(example[f"{response}_ids"])
    return " ".join(t if m else "." for t, m in zip(tokens, mask, strict=True))


def thinking_tokenizer():
    tokenizer = make_tool_tokenizer(THINKING)
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    "make, expected",
    [
        (make_tool_tokenizer, "c d <end> . . . . . . . g <end> . . . . i <end>"),
        # The turns before the last one are written differently alone: their end is found by its token.
        (thinking_tokenizer, "c d <end> . . . . . . . g <end> . . . . <quiet> i <end>"),
    ],
    ids=["turns are always the same", "the last turn is another"],
)
def test_only_the_assistant_s_turns_of_a_response_are_scored(make, expected):
    tokenizer = make()
    row = {"prompt": [user("a b")], "chosen": LONG, "rejected": [assistant("z")]}
    (example,) = prepare_pairs([row], tokenizer)
    assert scored(tokenizer, example) == expected
    assert "." not in scored(tokenizer, example, "rejected")


def test_a_token_at_the_end_of_a_conversation_alone_is_no_part_of_the_turns_before():
    """As Phi-3 has it: the end-of-sequence token instead of the generation prompt."""
    tokenizer = make_tool_tokenizer(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
    )
    row = {"prompt": [user("a b")], "chosen": LONG, "rejected": [assistant("z")]}
    (example,) = prepare_pairs([row], tokenizer)
    assert scored(tokenizer, example) == "c d <end> . . . . . . . g <end> . . . . i <end> <eos>"


_TRL = importlib.util.find_spec("trl")
TEMPLATES_OF_TRL = sorted(
    path
    for place in (_TRL.submodule_search_locations or [] if _TRL else [])
    for path in (Path(place) / "chat_templates").glob("*.jinja")
)
# What a template itself refuses, with an error of its own: turns of tools or systems, arguments that are no string.
REFUSED = re.compile(r"TemplateError: |TypeError: can only concatenate")


@pytest.mark.skipif(not TEMPLATES_OF_TRL, reason="trl is not installed, or has no chat templates")
@pytest.mark.parametrize("calls", [False, True], ids=["users", "tools"])
@pytest.mark.parametrize("path", TEMPLATES_OF_TRL, ids=lambda path: path.stem)
def test_with_published_templates_the_assistant_alone_is_scored(path, calls):
    tokenizer = byte_tokenizer(path.read_text())
    other = {**tool("other"), "name": "f", "tool_call_id": "abcdefghi"} if calls else user("other")
    first = call("f") if calls else assistant("first")
    if calls:
        first["tool_calls"][0]["id"] = "abcdefghi"
    row = {
        "prompt": [user("question")], "chosen": [first, other, assistant("answer")],
        "rejected": [assistant("bad")], "tools": TOOLS,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some write no tools
            (example,) = prepare_pairs([row], tokenizer, max_length=None).examples
    except ValueError as error:
        assert calls and REFUSED.search(str(error)), error
        return
    mask = example["chosen_assistant_mask"]
    parts = [
        tokenizer.decode([t for t, m in zip(example["chosen_ids"], mask, strict=True) if m == kind])
        for kind in (1, 0)
    ]
    assert "answer" in parts[0] and "other" not in parts[0]
    assert calls or "first" in parts[0]
    assert "answer" not in parts[1] and "first" not in parts[1]
    assert "question" in tokenizer.decode(example["prompt_ids"])


def byte_tokenizer(chat_template):
    """Every byte is a token, and so are the ends of turns of the usual templates."""
    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    ends = [
        "<|eot_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|return|>",
        "<|call|>",
        "<turn|>",
        "<|start|>",
    ]
    fast.add_special_tokens({"additional_special_tokens": ends})
    fast.chat_template = chat_template
    return fast


def test_what_a_template_leaves_out_is_told_once():
    tokenizer = make_chat_tokenizer()
    row = {"prompt": [user("a")], "chosen": [call("f", content="b")], "rejected": [assistant("c")]}
    with pytest.warns(UserWarning) as told:
        prepare_pairs([{**row, "tools": TOOLS}] * 2, tokenizer)
    texts = sorted(str(each.message) for each in told)
    assert len(texts) == 2
    assert "the chat template leaves out the tool_calls of the rows" in texts[0]
    assert "the chat template leaves out the tools of the rows" in texts[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_pairs([{**row, "tools": TOOLS}], make_tool_tokenizer())


PARTS_ALONE = {
    "raises": "{% for m in messages %}<{{ m.role }}> {{ m.content[0].text }} <end> {% endfor %}",
    "leaves strings out": "{% for m in messages %}<{{ m.role }}> {% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }} {% endif %}{% endfor %}<end> {% endfor %}",
}


@pytest.mark.parametrize("template", PARTS_ALONE.values(), ids=PARTS_ALONE)
def test_a_template_that_takes_content_in_parts_gets_parts(template):
    ending = "{% if add_generation_prompt %}<assistant>{% endif %}"
    parts, plain = make_tokenizer(chat_template=template + ending), make_chat_tokenizer()
    assert (
        prepare_pairs([GOOD_CHAT], parts).examples[0]
        == prepare_pairs([GOOD_CHAT], plain).examples[0]
    )


def test_masks_are_cut_with_their_responses_and_go_with_mismatched_ones():
    tokenizer = make_tool_tokenizer()
    row = {"prompt": [user("a")], "completion": LONG, "label": True}
    rows = [row, {**row, "prompt": [user("b")], "completion": [assistant("z")]}]
    first, second = prepare_unpaired(rows, tokenizer, max_length=10).examples
    assert scored(tokenizer, first, "completion") == "c d <end> . . ."
    assert scored(tokenizer, second, "KL_completion") == "c d <end> . . ."
    assert scored(tokenizer, first, "KL_completion") == "z <end>"


def test_turns_that_cannot_be_told_apart_are_the_reason_of_the_row():
    # This template drops all but the last turn as soon as others follow.
    tokenizer = make_tool_tokenizer(
        "{% for m in messages[-2:] %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    row = {"prompt": [user("a b")], "chosen": LONG, "rejected": [assistant("z")]}
    dataset = prepare_pairs([GOOD_CHAT, row], tokenizer)
    ((reason, rows),) = dataset.report.dropped.items()
    assert (rows, "the assistant's cannot be found" in reason) == ([2], True)


# Processors ----------------------------------------------------------------------------------------------


def test_of_a_processor_the_tokenizer_serves(tokenizer):
    class Processor:
        def __init__(self, tokenizer, chat_template=None):
            self.tokenizer, self.chat_template = tokenizer, chat_template

        def __call__(self, *args, **kwargs):
            raise AssertionError("a processor makes batches of images and text")

        apply_chat_template = __call__

    plain = prepare_pairs([GOOD], Processor(tokenizer))
    assert plain.examples[0] == prepare_pairs([GOOD], tokenizer).examples[0]
    chat = prepare_pairs([GOOD_CHAT], Processor(tokenizer, CHAT_TEMPLATE))
    assert chat.examples[0] == prepare_pairs([GOOD_CHAT], make_chat_tokenizer()).examples[0]


def test_ids_are_lists_that_compare_and_concatenate(tokenizer):
    for dataset in (
        prepare_pairs([GOOD], tokenizer),
        prepare_unpaired([GOOD_UNPAIRED, {**GOOD_UNPAIRED, "prompt": "x"}], tokenizer),
    ):
        example = dataset[0]
        ids = [name for name in example if name.endswith("_ids")]
        assert all(type(example[name]) is list for name in ids)
        prompt, response = example[ids[0]], example[ids[1]]
        assert prompt + response == [*prompt, *response]
