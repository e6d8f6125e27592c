"""Every example of a step counts the same: one gradient, however the step is cut into batches, steps and processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import Stream, make_model, make_pairs, make_tokenizer
from trainer_runs import config, train_log

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def trainer_of(kind, folder, tokenizer, rows, **options):
    """With another model as the reference, so that no term of a gradient is 0 in the first step."""
    name = DPOConfig if kind is DPOTrainer else KTOConfig
    settings = {
        "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 1e9, "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return kind(
        make_model(), make_model(seed=1), config(name, folder, **settings), train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip


def rows_of(kind, count):
    """Of unlike lengths; for KTO as many examples, with labels in no regular order."""
    pairs = make_pairs(count)
    for i in range(0, count, 3):
        pairs[i]["chosen"] += " o" * 6
    if kind is DPOTrainer:
        return pairs
    labels = itertools.cycle([True, False, False, True, False])
    return [
        {"prompt": p["prompt"], "completion": p["chosen"] if good else p["rejected"], "label": good}
        for p, good in zip(pairs, labels, strict=False)
    ]


def gradients(trainer, cuts, order=range(12)):
    """Of one step over the trainer's examples, cut as the Trainer would into batches of these sizes."""
    trainer.model_wrapped.zero_grad()
    trainer.current_gradient_accumulation_steps = len(cuts)
    examples = [trainer.train_dataset.examples[i] for i in order]
    ends = list(itertools.accumulate(cuts))
    batches = [
        trainer.data_collator(examples[end - size : end])
        for size, end in zip(cuts, ends, strict=True)
    ]
    batches, items = trainer.get_batch_samples(iter(batches), len(cuts), trainer.args.device)
    loss = sum(trainer.training_step(trainer.model_wrapped, batch, items) for batch in batches)
    return float(loss), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


CUTS = [(12,), (6, 6), (4, 4, 4), (1,) * 12, (5, 7), (1, 11), (8, 3, 1), (2, 9, 1)]


@pytest.mark.parametrize("shared_prompt", [True, False])
@pytest.mark.parametrize(
    "kind, options",
    [
        (DPOTrainer, {}),
        (DPOTrainer, {"loss_type": "ipo"}),
        (DPOTrainer, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
        (DPOTrainer, {"rpo_alpha": 0.3, "ld_alpha": 0.5, "use_weighting": True}),
        (KTOTrainer, {}),  # its KL estimate is over the step too
        (KTOTrainer, {"clamp_kl": False, "desirable_weight": 2.0}),
        (KTOTrainer, {"loss_type": "apo_zero_unpaired"}),
        (KTOTrainer, {"precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_any_cut_of_a_step_has_the_same_gradient(
    tmp_path, tokenizer, monkeypatch, kind, options, shared_prompt
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = None
    for cut in CUTS:
        # KTO collates otherwise where steps have several batches.
        trainer = trainer_of(
            kind, tmp_path, tokenizer, rows_of(kind, 12), shared_prompt=shared_prompt,
            gradient_accumulation_steps=len(cut), **options,
        )  # fmt: skip
        loss, grads = gradients(trainer, cut)
        whole = whole or (loss, grads)
        assert loss == pytest.approx(whole[0], rel=1e-5), cut
        for name, grad in grads.items():
            # float32: other orders of additions
            torch.testing.assert_close(
                grad, whole[1][name], rtol=1e-4, atol=1e-6, msg=f"{cut} {name}"
            )


def test_examples_in_any_order_have_the_same_gradient(tmp_path, tokenizer):
    for kind in (DPOTrainer, KTOTrainer):
        trainer = trainer_of(
            kind, tmp_path, tokenizer, rows_of(kind, 12), gradient_accumulation_steps=2
        )
        loss, grads = gradients(trainer, (5, 7))
        other_loss, other = gradients(trainer, (5, 7), [7, 2, 11, 0, 9, 4, 1, 10, 3, 8, 5, 6])
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize(
    "options, source",
    [
        ({"max_tokens_per_batch": 45, "gradient_accumulation_steps": 100}, list),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, list),
        ({"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}, Stream),
        (
            {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 8},
            Stream,
        ),  # ends within a step
    ],
    ids=str,
)
def test_runs_of_other_cuts_take_the_same_steps(tmp_path, tokenizer, kind, options, source):
    """One step an epoch, of all examples; loss, gradient and rewards of three of them."""
    rows = rows_of(kind, 12)
    whole = train_log(
        trainer_of(kind, tmp_path, tokenizer, rows, per_device_train_batch_size=12, max_steps=3)
    )
    trainer = trainer_of(kind, tmp_path, tokenizer, source(rows), max_steps=3, **options)
    cut = train_log(trainer)
    assert len(cut) == 3
    for one, other in zip(whole, cut, strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "kl"):
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), name
    assert cut[0]["loss"] != pytest.approx(cut[2]["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", [DPOTrainer, KTOTrainer])
@pytest.mark.parametrize(
    "options", [{"per_device_eval_batch_size": 5}, {"max_tokens_per_batch": 45}]
)
def test_the_loss_of_an_evaluation_is_the_mean_over_its_examples(
    tmp_path, tokenizer, kind, options
):
    """apo_zero_unpaired: KTO's own loss depends on the KL estimate of each batch."""
    loss = {} if kind is DPOTrainer else {"loss_type": "apo_zero_unpaired"}
    losses = []
    for each in ({"per_device_eval_batch_size": 12}, options):
        trainer = trainer_of(kind, tmp_path, tokenizer, rows_of(kind, 12), **loss, **each)
        losses.append(trainer.evaluate(rows_of(kind, 12))["eval_loss"])
        losses.append(trainer.predict(rows_of(kind, 12)).metrics["test_loss"])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


RUN = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/trainers"]
import torch
from test_trainer_normalizer import DPOTrainer, KTOTrainer, rows_of, train_log, trainer_of
from tiny_models import make_tokenizer

logs = {}
for kind in (DPOTrainer, KTOTrainer):
    trainer = trainer_of(kind, sys.argv[2], make_tokenizer(), rows_of(kind, 12), max_steps=3, **json.loads(sys.argv[3]))
    logs[kind.__name__] = train_log(trainer)
if trainer.is_world_process_zero():
    json.dump(logs, open(sys.argv[2] + "/logs.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_with_batches_by_tokens_take_the_steps_of_one(tmp_path, tokenizer):
    """Their batches hold other numbers of examples, and the last one of an odd number comes twice, so the budget is one
    that gives an even number of them."""
    options = {"max_tokens_per_batch": 45, "gradient_accumulation_steps": 100}
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(tmp_path / "run.py"), str(TESTS), str(tmp_path), json.dumps(options),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "logs.json").exists(), done.stderr[-4000:]
    logs = json.loads((tmp_path / "logs.json").read_text())
    for kind in (DPOTrainer, KTOTrainer):
        trainer = trainer_of(
            kind,
            tmp_path,
            tokenizer,
            rows_of(kind, 12),
            per_device_train_batch_size=12,
            max_steps=3,
        )
        for one, two in zip(train_log(trainer), logs[kind.__name__], strict=True):
            for name in ("loss", "grad_norm", "rewards/chosen", "kl"):
                assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), (kind, name)
