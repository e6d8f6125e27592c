"""Reward functions: what they are given, what they may answer, and what is said of a wrong answer."""

from __future__ import annotations

import asyncio
import math
import time
from functools import partial

import numpy as np
import pytest
import torch

from pyfast_dpo.rewards import RewardFunctions

PROMPTS, COMPLETIONS = ["a", "b", "c"], ["x", "yy", "zzz"]
IDS = [[1], [1, 2], [1, 2, 3]]


def score(functions, *, columns=None, weights=None, **extras):
    rewards = RewardFunctions(functions, weights)
    return rewards, rewards.score(PROMPTS, COMPLETIONS, IDS, columns or {}, **extras)


def lengths(completions, **others):
    return [len(each) for each in completions]


def test_a_function_gets_everything_by_keyword() -> None:
    seen = {}

    def reward(**arguments):
        seen.update(arguments)
        return [0.0] * 3

    score(reward, columns={"answer": [1, 2, 3]}, trainer_state="state")
    assert seen == {
        "prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS, "answer": [1, 2, 3], "trainer_state": "state",
    }  # fmt: skip


def test_none_is_no_reward_and_the_sum_is_of_those_that_there_are() -> None:
    rewards, table = score([lengths, lambda **_: [None, 10, None]], weights=[1.0, 0.5])
    assert rewards.names == ["lengths", "<lambda>"]
    assert table.dtype == torch.float32 and table[:, 1].isnan().tolist() == [True, False, True]
    assert rewards.weighted(table).tolist() == [1.0, 7.0, 3.0]


def test_where_every_function_answers_none_there_is_no_reward_and_one_warning() -> None:
    with pytest.warns(UserWarning, match="1 of 3 responses got no reward"):
        rewards, table = score(lambda **_: [1.0, None, 2.0])
    assert math.isnan(rewards.weighted(table)[1])


def test_coroutines_are_awaited_together_also_within_a_running_loop() -> None:
    async def slow(completions, **others):
        await asyncio.sleep(0.2)
        return [len(each) for each in completions]

    async def notebook():
        return score([slow, lengths, slow])[1]

    start = time.perf_counter()
    tables = [score([slow, lengths, slow])[1], asyncio.run(notebook())]
    assert time.perf_counter() - start < 0.75
    assert all(table.tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3] for table in tables)


@pytest.mark.parametrize(
    "answer, error, words",
    [
        ([1.0, 2.0], ValueError, "must return a list of 3 rewards, one a response, got 2 values"),
        (1.0, ValueError, "must return a list of 3 rewards, one a response, got float 1.0"),
        ("abc", ValueError, "must return a list of 3 rewards, one a response, got str 'abc'"),
        (
            [1.0, float("nan"), 0.0],
            ValueError,
            "for response 1 .None: no reward. must be finite, got nan",
        ),
        ([1.0, 0.0, float("inf")], ValueError, "for response 2 .* must be finite, got inf"),
        (
            [1.0, 0.0, 1e39],
            ValueError,
            "for response 2 .* must be finite, got 1e[+]39",
        ),  # infinite in float32
        ([1.0, 0.0, 10**400], ValueError, "for response 2 .* must be a float or an int within"),
        ([1.0, "good", 0.0], TypeError, "for response 1 .* must be a number, got str 'good'"),
        (["1.0", 0.0, 0.0], TypeError, "for response 0 .* must be a number, got str '1.0'"),
        (torch.zeros(3, 1), TypeError, "for response 0 .* must be a number, got list"),
    ],
    ids=str,
)
def test_a_wrong_answer_names_the_function_and_the_response(answer, error, words) -> None:
    def reward(**_):
        return answer

    with pytest.raises(error, match=f"GRPOTrainer: .*reward function 'reward' .*{words}"):
        score(reward)


@pytest.mark.parametrize(
    "answer",
    [
        [1, True, 0.5],
        np.array([1.0, 1.0, 0.5]),
        torch.tensor([1.0, 1.0, 0.5]),
        [torch.tensor(1.0), np.float32(1), 0.5],
    ],
    ids=["numbers", "array", "tensor", "tensors"],
)
def test_rewards_are_numbers_of_any_kind(answer) -> None:
    assert score(lambda **_: answer)[1][:, 0].tolist() == [1.0, 1.0, 0.5]


def test_names_are_those_of_the_functions_and_distinct() -> None:
    def scaled(factor, **_):
        return [factor] * 3

    functions = [partial(scaled, 1.0), partial(scaled, 2.0), lengths]
    assert RewardFunctions(functions).names == ["scaled", "scaled_2", "lengths"]


def test_a_column_does_not_take_the_place_of_prompts_and_responses() -> None:
    assert score(lengths, columns={"completions": ["other"] * 3})[1][:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda prompts, completions: [0.0] * 3, "unexpected keyword argument 'answer'"),
        (lambda solution, **_: [0.0] * 3, "missing a required argument: 'solution'"),
    ],
)
def test_a_function_that_does_not_fit_the_columns_is_told_so(function, words) -> None:
    with pytest.raises(TypeError, match=f"'<lambda>' must take answer, trainer_state.*{words}"):
        score(function, columns={"answer": [1, 2, 3]}, trainer_state=None)


@pytest.mark.parametrize(
    "functions, options, words",
    [
        (None, {}, "must be a function or a list"),
        ([], {}, "must be a function or a list"),
        ([3], {}, "must be callable, a classifier or its name"),
        ([lengths], {"weights": [1.0, 2.0]}, "reward_weights must have one number for each of 1"),
        ([lengths], {"processing_classes": [None, None]}, "one entry for each of 1"),
    ],
    ids=str,
)
def test_what_is_no_reward_function_is_refused(functions, options, words) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        RewardFunctions(functions, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_a_classifier_s_reward_is_its_logit_of_the_unpadded_text(chat) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer

    tokenizer = make_tokenizer(CHAT_TEMPLATE if chat else None)
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    prompts, completions = ["a b", "c"], [" d e f g", " h"]
    if chat:
        prompts = [[{"role": "user", "content": each}] for each in prompts]
        completions = [[{"role": "assistant", "content": each}] for each in completions]
    rewards = RewardFunctions(model, processing_classes=tokenizer)
    found = rewards.score(prompts, completions, [[1]] * 2, {})[:, 0]
    for prompt, completion, reward in zip(prompts, completions, found, strict=True):
        text = (
            tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            if chat
            else prompt + completion
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert float(reward) == pytest.approx(float(model(ids).logits), abs=1e-5)
    config.num_labels = 2
    with pytest.raises(ValueError, match="must have one label, got 2"):
        RewardFunctions(
            transformers.LlamaForSequenceClassification(config), processing_classes=tokenizer
        )
