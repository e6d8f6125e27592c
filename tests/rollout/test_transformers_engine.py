"""The embedded engine: greedy tokens of `generate`, log-probs of a scoring pass, what is computed, what repeats."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from engine_checks import NEVER, PROMPTS, scored
from model_families import MODELS, make
from tiny_models import make_model

from pyfast_dpo.rollout import Sampling, TransformersEngine

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate_and_log_probs_those_of_one_pass(name) -> None:
    """Padding on the left, windows, learned positions: each response as if it were alone."""
    model = make(name).eval()
    engine = TransformersEngine(model)
    groups = engine.generate(
        PROMPTS, 1, Sampling(max_tokens=9, temperature=0, stop_token_ids=NEVER)
    )
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, min_new_tokens=9,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert completion.ids == expected[0, len(prompt) :].tolist()
        difference = (
            (scored(model, prompt, completion) - torch.tensor(completion.logprobs)).abs().max()
        )
        assert difference < 1e-4, f"{float(difference):.2g} nats a token"


def test_a_response_does_not_depend_on_those_that_have_ended() -> None:
    """Each draws by its own numbers: a stop token cuts responses short and changes nothing else."""
    engine = TransformersEngine(make_model())
    whole = engine.generate(PROMPTS, 4, Sampling(max_tokens=12, seed=5, stop_token_ids=NEVER))
    stop = whole[0][0].ids[3]
    short = engine.generate(PROMPTS, 4, Sampling(max_tokens=12, seed=5, stop_token_ids=(stop,)))
    ended = 0
    for long, cut in zip(sum(whole, []), sum(short, []), strict=True):  # noqa: RUF017
        end = long.ids.index(stop) + 1 if stop in long.ids else 12
        assert cut.ids == long.ids[:end]
        assert cut.finish_reason == ("stop" if stop in long.ids else "length")
        ended += stop in long.ids
    assert 0 < ended < 16


@pytest.mark.parametrize("max_rows", [1, 5, 8, 64])
def test_any_number_of_rows_at_a_time_gives_the_same_tokens(max_rows) -> None:
    sampling = Sampling(max_tokens=8, seed=2)
    model = make_model()
    expected = TransformersEngine(model).generate(PROMPTS, 4, sampling)
    result = TransformersEngine(model, max_rows=max_rows).generate(PROMPTS, 4, sampling)
    assert [[c.ids for c in group] for group in result] == [
        [c.ids for c in group] for group in expected
    ]


def test_each_distinct_prompt_is_computed_once_and_ended_responses_leave(monkeypatch) -> None:
    model, rows = make_model(), []
    forward = model.forward

    def counted(*args, **kwargs):
        rows.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", counted)
    groups = TransformersEngine(model).generate(PROMPTS, 4, Sampling(max_tokens=12, seed=3))
    assert rows[0] == (3, 6), "three distinct prompts, and no row a response"
    lengths = [len(c.ids) for group in groups for c in group]
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert [count for count, width in rows[1:]] == alive and all(
        width == 1 for _, width in rows[1:]
    )
    assert alive[-1] < 16, "some have ended before others"


def test_frequencies_are_the_models_probabilities() -> None:
    model = make_model()
    n = 4000
    (group,) = TransformersEngine(model, max_rows=n).generate(
        [[5, 6]], n, Sampling(max_tokens=1, seed=0)
    )
    with torch.no_grad():
        probs = model(torch.tensor([[5, 6]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in group]), minlength=len(probs))
    chi_square = float(((counts - n * probs).square() / (n * probs)).sum())
    freedom = len(probs) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom), f"{chi_square:.1f} for {freedom}"


@pytest.mark.parametrize(
    "options, kept",
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0]),  # 0.5 is reached by the first
        ({"top_p": 0.51}, [0, 1]),
        ({"min_p": 0.5}, [0, 1]),  # at least half of the likeliest: 0.25 / 0.5
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # 0.8 of what the three hold
    ],
    ids=str,
)
def test_which_tokens_are_left(options, kept) -> None:
    from pyfast_dpo.rollout.sampler import Sampler

    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(2000, -1)
    sampler = Sampler(Sampling(max_tokens=1, seed=0, **options), 2000, torch.device("cpu"))
    tokens, logps = sampler.draw(logits, torch.arange(2000), 0)
    assert sorted(set(tokens.tolist())) == kept
    torch.testing.assert_close(logps, logits.gather(1, tokens.unsqueeze(1)).squeeze(1))


def test_the_model_is_as_it_was_and_its_weights_are_seen() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    engine = TransformersEngine(model)
    before = engine.generate(PROMPTS, 1, Sampling(max_tokens=5, temperature=0))
    assert model.training and not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.neg_()
    engine.update_weights(model, version=7)
    after = engine.generate(PROMPTS, 1, Sampling(max_tokens=5, temperature=0))
    assert after != before
    assert {c.version for group in after for c in group} == {7}


def test_an_adapter_writes() -> None:
    peft = pytest.importorskip("peft")
    from trainer_runs import lora

    model = peft.get_peft_model(make_model(), lora())
    engine = TransformersEngine(model)
    sampling = Sampling(max_tokens=6, temperature=0)
    before = engine.generate(PROMPTS, 1, sampling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    after = engine.generate(PROMPTS, 1, sampling)
    assert [c.ids for (c,) in after] != [c.ids for (c,) in before]
    with model.disable_adapter():
        assert engine.generate(PROMPTS, 1, sampling) == before


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda e: e.generate([[5, 99]], 1, Sampling(max_tokens=2)), ValueError, "in \\[0, 32\\), got 99 in prompt 0"),
        (lambda e: e.generate([[-1]], 1, Sampling(max_tokens=2)), ValueError, "got -1"),
        (lambda e: Sampling(max_tokens=0), ValueError, "Sampling: max_tokens must be at least 1"),
        (lambda e: Sampling(max_tokens=2.5), TypeError, "Sampling: max_tokens must be an integer"),
        (lambda e: Sampling(max_tokens=2, top_p=0.0), ValueError, "Sampling: top_p"),
        (lambda e: Sampling(max_tokens=2, temperature=-1), ValueError, "Sampling: temperature"),
        (lambda e: Sampling(max_tokens=2, min_p=float("nan")), ValueError, "Sampling: min_p"),
        (lambda e: TransformersEngine(e.model, max_rows=0), ValueError, "max_rows"),
        (lambda e: TransformersEngine(torch.nn.Linear(2, 2)), ValueError, "must be a causal language model"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(TransformersEngine(make_model()))
