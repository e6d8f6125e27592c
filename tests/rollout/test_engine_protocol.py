"""What every engine promises, held against the embedded one and against one that is reached by HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from completions_server import CompletionsServer
from engine_checks import NEVER, PROMPTS, scored
from tiny_models import make_model
from trainer_runs import lora

from pyfast_dpo.rollout import Engine, HTTPEngine, Sampling, TransformersEngine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["transformers", "http"])
def engine(request) -> Iterator[Engine]:
    if request.param == "transformers":
        yield TransformersEngine(make_model())
        return
    with CompletionsServer() as server:
        yield HTTPEngine(server.url)


def adapted(fill: float):
    """The same model under an adapter that changes what it says."""
    model = pytest.importorskip("peft").get_peft_model(make_model(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(fill)
    return model.eval()


def test_lengths_order_and_ends(engine) -> None:
    groups = engine.generate(PROMPTS, 3, Sampling(max_tokens=7, seed=0, stop_token_ids=NEVER))
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    for completion in sum(groups, []):  # noqa: RUF017
        assert len(completion.ids) == len(completion.logprobs) == 7
        assert completion.finish_reason == "length" and completion.version == 0
    distinct = {tuple(completion.ids) for completion in sum(groups, [])}  # noqa: RUF017
    assert len(distinct) == 12, "no two of one seed, not even of equal prompts"
    stop = groups[0][0].ids[2]
    ended = engine.generate(PROMPTS, 8, Sampling(max_tokens=7, seed=0, stop_token_ids=(stop,)))
    reasons = set()
    for completion in sum(ended, []):  # noqa: RUF017
        reasons.add(completion.finish_reason)
        assert stop not in completion.ids[:-1]
        assert (completion.ids[-1] == stop) == (completion.finish_reason == "stop")
        assert len(completion.ids) == 7 or completion.finish_reason == "stop"
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.05, "temperature": 1.3}],
    ids=str,
)  # fmt: skip
def test_log_probs_are_the_models_at_the_temperature_before_tokens_are_left_out(
    engine, options
) -> None:
    """What the loss computes with logit_scale = 1 / temperature; else its first ratio would not be 1."""
    model = make_model()
    groups = engine.generate(PROMPTS, 4, Sampling(max_tokens=12, seed=1, **options))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            truth = scored(model, prompt, completion, options.get("temperature") or 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), truth, rtol=0, atol=2e-6)


def test_a_seed_repeats_a_run_and_another_does_not(engine) -> None:
    first, again, other = (
        engine.generate(PROMPTS, 4, Sampling(max_tokens=10, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other
    torch.manual_seed(0)
    drawn = engine.generate(PROMPTS, 4, Sampling(max_tokens=10))
    torch.manual_seed(0)
    assert engine.generate(PROMPTS, 4, Sampling(max_tokens=10)) == drawn


def test_new_weights_write_under_their_version(engine) -> None:
    sampling = Sampling(max_tokens=8, temperature=0, stop_token_ids=NEVER)
    written = [engine.generate(PROMPTS, 1, sampling)]
    for version, fill in ((7, 0.5), (8, -0.5)):
        model = adapted(fill)
        engine.update_weights(model, version)
        groups = engine.generate(PROMPTS, 1, sampling)
        assert {completion.version for group in groups for completion in group} == {version}
        for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
            truth = scored(model, prompt, completion)
            torch.testing.assert_close(torch.tensor(completion.logprobs), truth, rtol=0, atol=1e-5)
        written.append(groups)
    ids = [[c.ids for (c,) in groups] for groups in written]
    assert ids[0] != ids[1] != ids[2] != ids[0]


def test_no_prompts_give_no_responses(engine) -> None:
    assert engine.generate([], 3, Sampling(max_tokens=2)) == []


@pytest.mark.parametrize(
    "prompts, n, max_tokens, error, words",
    [
        (["abc"], 1, 2, TypeError, "got a string as prompt 0"),
        ([[5], []], 1, 2, ValueError, "prompt 1 is empty"),
        ([[-1]], 1, 2, ValueError, "got -1"),
        ([[5]], 0, 2, ValueError, "n must be"),
        ([[5] * 60], 1, 9, ValueError, "need 69 positions, the (model has|servers have) 64"),
    ],
)
def test_mistakes_are_named(engine, prompts, n, max_tokens, error, words) -> None:
    with pytest.raises(error, match=words):
        engine.generate(prompts, n, Sampling(max_tokens=max_tokens))
