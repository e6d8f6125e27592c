"""A prepared model: called with `project` while that is in force, and the model it was for everybody else."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch

pytest.importorskip("transformers")

from model_families import MODELS, make
from tiny_models import make_model, make_pairs, make_tokenizer

from pyfast_dpo.data import SharedPromptCollatorForPreference, prepare_pairs
from pyfast_dpo.layout.attention import PREFIX
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.model.projections import score_responses

pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(count=4):
    return SharedPromptCollatorForPreference()(
        prepare_pairs(make_pairs(count), make_tokenizer()).examples
    )


def traces(model):
    """What preparing could leave behind."""
    return {
        "forwards": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "hooks": [
            n
            for n, m in model.named_modules()
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        ],
        "attention": model.config._attn_implementation,
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_it_was_afterwards(name):
    model = make(name)
    before = traces(model)
    with prepare("test", {"model": model}) as prepared:
        assert prepared.shared_prompt
        assert model.config._attn_implementation.startswith(PREFIX)
        with prepared:  # an evaluation within training
            pass
        assert model.config._attn_implementation.startswith(PREFIX)
    assert traces(model) == before


def test_a_model_is_as_it_was_after_an_error():
    model = make_model()
    before = traces(model)
    prepared = prepare("test", {"model": model})
    assert traces(model) == before, "finding out changes nothing"
    with pytest.raises(RuntimeError, match="stop"), prepared:

        def stop(projection):
            raise RuntimeError("stop")

        model(input_ids=torch.tensor([[1, 2]]), project=stop)
    assert traces(model) == before
    with prepared:  # and the call that failed is over
        assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 32)


def test_while_it_is_prepared_the_model_still_answers_everybody_else():
    model = make("gpt2 learned positions").eval()
    ids = torch.tensor([[1, 1, 7, 8], [5, 6, 7, 8]])  # the first is padded on the left
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def generated():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits  # fmt: skip

    def seen():
        return inspect.signature(model.forward), inspect.getsource(model.forward)

    expected, shown = generated(), seen()
    assert model._supports_logits_to_keep()
    with prepare("test", {"model": model}):
        for ours, theirs in zip(generated(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert seen() == shown
        assert model._supports_logits_to_keep()
        assert "forward" not in vars(model)


def test_two_who_prepare_one_model_do_not_disturb_each_other():
    model, batch = make_model(), batch_of()
    before = traces(model)
    first, second = prepare("test", {"model": model}), prepare("test", {"model": model})
    with first, torch.no_grad():
        expected = score_responses(model, batch)
        with second:
            assert torch.equal(score_responses(model, batch), expected)
        assert torch.equal(score_responses(model, batch), expected)
    with second:
        first.apply()
        second.apply()
        first.restore()
        second.apply()  # as trainers do before every call
        with torch.no_grad():
            assert torch.equal(score_responses(model, batch), expected)
    assert traces(model) == before


def test_a_copy_and_a_pickle_of_a_prepared_model_have_their_own_weights():
    model, batch = make_model(), batch_of()
    file = io.BytesIO()
    with prepare("test", {"model": model}), torch.no_grad():
        expected = score_responses(model, batch)
        twin = copy.deepcopy(model)
        torch.save(model, file)
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.equal(score_responses(model, batch), expected)
        assert torch.equal(score_responses(twin, batch), expected)
        file.seek(0)
        assert torch.equal(score_responses(torch.load(file, weights_only=False), batch), expected)


def test_a_call_that_the_model_is_not_prepared_for_is_an_error():
    model, batch = make_model(), batch_of()
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no projections"):
        score_responses(model, batch)
    with prepare("test", {"model": model}, shared_prompt=False):
        with pytest.raises(ValueError, match="the batch holds shared prompts"):
            score_responses(model, batch)
