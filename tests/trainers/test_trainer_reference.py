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
from pyfast_dpo.trainers import policy as policy_module
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


def test_precomputed_reference_in_either_layout(tmp_path, tokenizer, cache):
    losses = []
    for shared in (True, False):
        trainer = dpo_trainer(
            tmp_path, tokenizer, make_model(), ref_model=make_model(seed=1), shared_prompt=shared,
            precompute_ref_log_probs=True, learning_rate=1e-2,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in train_log(trainer)])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != pytest.approx(LN2, abs=1e-4)
    assert len(list(cache.iterdir())) == 4, "each layout has computed its own"


@pytest.mark.parametrize("kind, at_start", [(DPOTrainer, LN2), (KTOTrainer, 0.5)])
@pytest.mark.parametrize(
    "adapter, ref_seed, trained",
    [
        (False, None, False),  # the model is still its own reference
        (True, None, True),  # the base is under the adapter
        (False, 1, True),  # it was given
        (True, 1, True),
    ],
)
def test_new_data_get_the_reference_that_is_there(
    tmp_path, tokenizer, kind, at_start, adapter, ref_seed, trained
):
    def evaluated(precompute):
        trainer = kind(
            make_model(), None if ref_seed is None else make_model(seed=ref_seed),
            config(
                DPOConfig if kind is DPOTrainer else KTOConfig, tmp_path, learning_rate=1e-2,
                precompute_ref_log_probs=precompute,
            ),
            train_dataset=make_pairs(), processing_class=tokenizer,
            peft_config=lora() if adapter else None,
        )  # fmt: skip
        losses = [trainer.evaluate(make_pairs(5))["eval_loss"]]
        if trained:
            trainer.train()
            losses.append(trainer.evaluate(make_pairs(5))["eval_loss"])
            losses.append(trainer.predict(make_pairs(5)).metrics["test_loss"])
        return losses

    before, beside = evaluated(True), evaluated(False)
    assert before == pytest.approx(beside, abs=1e-5)
    assert (before[0] == at_start) == (ref_seed is None)


def test_new_data_after_full_training_without_a_reference_model_are_refused(tmp_path, tokenizer):
    trainer = dpo_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True, learning_rate=1e-2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < LN2  # of the constructor's data
    with pytest.raises(
        ValueError, match=r"DPOTrainer: this dataset has no log-probs .* no copy was kept"
    ):
        trainer.evaluate(make_pairs(3))  # the policy has moved: it must not pass for the reference


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
        return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}

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


EXAMPLES = [{"prompt_ids": [i], "chosen_ids": [i + 1]} for i in range(7)]
RECORD = 8 + 4 + 4  # bytes: which example, its log-prob, the checksum


def computed(calls):
    def compute(part):
        calls.append([example["prompt_ids"][0] for example in part])
        return torch.tensor([[example["prompt_ids"][0] / 3] for example in part])

    return precomputed_module.computed_once(
        "key", EXAMPLES, ("ref_logps",), 3, compute, name="train"
    )


@pytest.mark.parametrize(
    "damage, again, told",
    [
        (
            lambda content: content[: 4 * RECORD + 5],
            [[3, 4, 5], [6]],
            False,
        ),  # cut off with its run
        (lambda content: content[:40], [[0, 1, 2], [3, 4, 5], [6]], False),
        (lambda content: b"", [[0, 1, 2], [3, 4, 5], [6]], False),
        (lambda content: content[:9] + b"?" + content[10:], [[0, 1, 2]], True),  # another log-prob
        (lambda content: b"\1" + content[1:], [[0, 1, 2]], True),  # of another example
        (lambda content: content[:20] + content[21:], [[0, 1, 2], [3, 4, 5], [6]], True),
        (lambda content: b"\xff" * len(content), [[0, 1, 2], [3, 4, 5], [6]], True),
    ],
)
def test_a_damaged_cache_is_computed_again_where_it_is_damaged(cache, damage, again, told, recwarn):
    whole = computed([])
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    recwarn.clear()
    calls = []
    assert (computed(calls) == whole).all()
    assert calls == again  # whole batches: with the same ones come the same bits
    assert any("are damaged and are computed again" in str(w.message) for w in recwarn) == told
    assert list(cache.iterdir()) == [path]
    calls.clear()
    assert (computed(calls) == whole).all()
    assert calls == []


def test_a_cache_that_cannot_be_written_is_told_with_its_place(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    with pytest.raises(
        OSError, match=r"precompute_ref_log_probs: the cache .* XDG_CACHE_HOME names"
    ):
        computed([])


def test_a_log_prob_that_is_no_number_stays_one_and_is_known(cache):
    for _ in range(2):
        table = precomputed_module.computed_once(
            "nan", EXAMPLES, ("ref_logps",), 3, lambda part: torch.full((len(part), 1), torch.nan),
            name="train",
        )  # fmt: skip
        assert np.isnan(table).all()


@pytest.mark.parametrize(
    "change",
    [
        {"ld_alpha": 0.5},
        {"shared_prompt": False},
        {"bf16": True},
        {"model": lambda: make_model(seed=1)},
        {"model": lambda: capped(make_model())},  # no weight says so
        {"rows": make_pairs(15)},
    ],
    ids=str,
)
def test_the_cache_knows_everything_that_changes_a_log_prob(tmp_path, tokenizer, cache, change):
    def columns(**options):
        trainer = dpo_trainer(
            tmp_path, tokenizer, options.pop("model", make_model)(), precompute_ref_log_probs=True,
            **options,
        )  # fmt: skip
        return [trainer.train_dataset.examples[0][name] for name in trainer.reference_columns]

    columns()
    entries = set(cache.iterdir())
    cached = columns(**change)
    assert len(set(cache.iterdir()) - entries) >= 1
    for path in cache.iterdir():
        path.unlink()
    assert columns(**change) == cached


def capped(model):
    model.config.final_logit_softcapping = 0.5
    return model


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
    assert not shares[0][1::2].any() and not shares[1][0::2].any()
    assert sum(shares)[:, 0].tolist() == [0, 1, 2, 3, 4]


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

    monkeypatch.setattr(policy_module, "narrow_linear_layers", lambda *_: None)
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
