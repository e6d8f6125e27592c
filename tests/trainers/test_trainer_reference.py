"""The reference in its forms: computed once and cached, following the policy, or refused where it makes no sense."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import Stream, make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, lora, train_log

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from pyfast_dpo.trainers import base as base_module
from pyfast_dpo.trainers import precomputed as precomputed_module
from pyfast_dpo.trainers import reference as reference_module


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyfast_dpo" / "reference_logps"


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_reference_trains_as_the_model_beside_it(tmp_path, tokenizer, adapter):
    logs = []
    for precompute in (False, True):
        trainer = dpo_trainer(
            tmp_path, tokenizer, make_model(), peft_config=lora() if adapter else None,
            precompute_ref_log_probs=precompute, max_steps=6, learning_rate=1e-2,
        )  # fmt: skip
        if precompute:
            assert trainer.ref_model is None
        logs.append(train_log(trainer))
    for beside, before in zip(*logs, strict=True):
        assert before["loss"] == pytest.approx(beside["loss"], abs=1e-5)
    assert logs[0][-1]["loss"] < LN2 - 0.01


def test_precomputed_reference_in_the_padded_layout_and_none_for_other_data(tmp_path, tokenizer):
    losses = []
    for shared in (True, False):
        trainer = dpo_trainer(
            tmp_path, tokenizer, make_model(), ref_model=make_model(seed=1), shared_prompt=shared,
            precompute_ref_log_probs=True, learning_rate=1e-2,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in train_log(trainer)])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        # The policy has moved: it must not pass for the reference that is gone.
        with pytest.raises(ValueError, match="reference's log-probs were computed before training"):
            trainer.evaluate(make_pairs(3))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != pytest.approx(LN2, abs=1e-4)


def test_precomputed_reference_for_kto_and_for_evaluation(tmp_path, tokenizer):
    losses = []
    for precompute in (False, True):
        trainer = KTOTrainer(
            make_model(), make_model(seed=1),
            config(KTOConfig, tmp_path, precompute_ref_log_probs=precompute, max_steps=3),
            train_dataset=make_pairs(), eval_dataset={"a": make_pairs(6), "b": make_pairs(4)},
            processing_class=tokenizer,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in train_log(trainer)])
        losses[-1] += [trainer.evaluate()[f"eval_{name}_loss"] for name in ("a", "b")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][0] != pytest.approx(0.5, abs=1e-4)  # another reference than the model itself


def test_cache_is_used_again_and_only_for_the_same_model_and_data(tmp_path, tokenizer, cache):
    def run(model, rows):
        dpo_trainer(
            tmp_path, tokenizer, model, rows=rows, precompute_ref_log_probs=True, max_steps=1
        )
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.npy")}

    first = run(make_model(), make_pairs())  # of the train and of the eval dataset
    assert len(first) == 2
    assert run(make_model(), make_pairs()) == first
    assert len(run(make_model(seed=1), make_pairs())) == 4
    assert len(run(make_model(), make_pairs(15))) == 5


def test_computing_the_reference_goes_on_where_it_was_stopped(cache):
    examples = [{"prompt_ids": [i], "chosen_ids": [i + 1]} for i in range(7)]
    calls = []

    def compute(part):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append([example["prompt_ids"][0] for example in part])
        return torch.tensor([[float(example["prompt_ids"][0])] for example in part])

    def run():
        return precomputed_module.computed_once(
            "key", examples, ("ref_logps",), 3, compute, name="train"
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [[0, 1, 2], [3, 4, 5]]
    calls.clear()
    assert run()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert calls == [[6]]
    (path,) = cache.glob("*.npy")
    path.write_bytes(path.read_bytes()[:40])  # cut off while it was created: made anew
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls[0] == [0, 1, 2]


def test_each_process_computes_its_own_share():
    examples = [{"prompt_ids": [i]} for i in range(5)]
    shares = [
        precomputed_module.computed_once(
            "share", examples, ("ref_logps",), 2,
            lambda part: torch.tensor([[float(e["prompt_ids"][0])] for e in part]),
            name="train", rank=rank, world=2,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert np.isnan(shares[0][1::2]).all() and np.isnan(shares[1][0::2]).all()
    assert np.nansum(shares, axis=0)[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_reference_that_follows_the_policy(tmp_path, tokenizer):
    trainer = dpo_trainer(
        tmp_path, tokenizer, make_model(), sync_ref_model=True, ref_model_mixup_alpha=0.25,
        ref_model_sync_steps=4, learning_rate=1e-2,
    )  # fmt: skip
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.train()  # four steps
    policy = trainer.model.state_dict()
    for name, value in trainer.ref_model.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(before[name], policy[name], 0.25))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model changes the reference"),
        ({"ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha must be in \(0, 1\]"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be positive"),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size must be None or positive"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be None or positive"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy must be 'random', 'seq"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(DPOConfig, tmp_path, **options)


def test_a_reference_that_cannot_be(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="sync_ref_model needs a reference model of its own"):
        dpo_trainer(tmp_path, tokenizer, peft_config=lora(), sync_ref_model=True)
    with pytest.raises(
        ValueError, match="precompute_ref_log_probs is not supported with an IterableDataset"
    ):
        dpo_trainer(tmp_path, tokenizer, rows=Stream(make_pairs()), precompute_ref_log_probs=True)
    peft = pytest.importorskip("peft")
    with pytest.raises(
        ValueError, match="PromptTuningConfig puts virtual tokens before the prompt"
    ):
        dpo_trainer(
            tmp_path, tokenizer,
            peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )  # fmt: skip
    with pytest.raises(ValueError, match="model must be a causal language model"):
        DPOTrainer(
            torch.nn.Linear(2, 2), args=config(DPOConfig, tmp_path), processing_class=tokenizer
        )


@pytest.mark.parametrize(
    "options, given, narrow",
    [
        ({"bf16": True}, False, True),
        ({}, False, False),
        ({"bf16": True}, True, False),  # somebody else's model stays as it is
        (
            {"bf16": True, "sync_ref_model": True},
            False,
            False,
        ),  # small moves need the float32 digits
    ],
    ids=str,
)
def test_a_copy_keeps_what_autocast_would_cast_in_half_the_memory(
    tmp_path, tokenizer, monkeypatch, options, given, narrow
):
    def run():
        model = make_model()
        trainer = dpo_trainer(
            tmp_path, tokenizer, model, ref_model=copy.deepcopy(model) if given else None,
            learning_rate=1e-2, **options,
        )  # fmt: skip
        log = train_log(trainer)
        return trainer.accelerator.unwrap_model(trainer.ref_model), log

    reference, log = run()
    dtypes = {name: parameter.dtype for name, parameter in reference.named_parameters()}
    halves = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert halves == {n for n in dtypes if narrow and n.endswith("_proj.weight")}
    assert len(halves) == (14 if narrow else 0), "7 a layer; not embeddings, norms and lm_head"

    monkeypatch.setattr(base_module, "narrow_linear_layers", lambda *_: None)
    _, plain = run()
    for entry, expected in zip(log, plain, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected"):
            assert entry[name] == expected[name], "the same bits"


def test_a_weight_that_another_module_shares_is_not_narrowed():
    model = make_model()
    layers = model.model.layers
    model.extra = torch.nn.Bilinear(1, 1, 1)
    model.extra.weight = layers[0].self_attn.q_proj.weight
    layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight  # both linear: still one
    reference_module.narrow_linear_layers(model, torch.bfloat16)
    assert layers[0].self_attn.q_proj.weight.dtype == torch.float32
    assert layers[1].mlp.up_proj.weight is layers[1].mlp.gate_proj.weight
    assert layers[1].mlp.up_proj.weight.dtype == torch.bfloat16
