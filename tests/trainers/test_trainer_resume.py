"""A run that was stopped and resumed has the bits of one that was not, whatever carries state between its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import Stream, make_experts, make_model, make_pairs, make_tokenizer
from trainer_runs import config, lora

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

TIMES = {"tokens_per_second"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def adapter_that_came():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def shuffled_stream(rows):
    dataset = pytest.importorskip("datasets").Dataset.from_list(rows)
    return dataset.to_iterable_dataset().shuffle(seed=3, buffer_size=8)


def make_trainer(kind, folder, tokenizer, options):
    options = dict(options)
    model = options.pop("model", make_model)()
    rows = options.pop("rows", list)(make_pairs(options.pop("count", 16)))
    peft_config = lora(dropout) if (dropout := options.pop("lora", None)) is not None else None
    name = DPOConfig if kind is DPOTrainer else KTOConfig
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "steps",
        "save_steps": 3, **options,
    }  # fmt: skip
    return kind(
        model, args=config(name, folder, **settings), train_dataset=rows, eval_dataset=make_pairs(6),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


def finish(trainer, checkpoint=None):
    trainer.train(resume_from_checkpoint=checkpoint)
    log = [e for e in trainer.state.log_history if "loss" in e or "eval_loss" in e]
    timed = {
        name for entry in log for name in entry if name.startswith("eval_") and "_per_s" in name
    }
    skipped = TIMES | timed | {"eval_runtime", "eval_model_preparation_time"}
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return [{k: v for k, v in e.items() if k not in skipped} for e in log], state


# Two steps an epoch, so that the third is in the middle of the second epoch: the order of an epoch is state too.
OPTIONS = {
    "model, optimizer, schedule, random numbers": {},
    "the moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "the moving reference under autocast": {"sync_ref_model": True, "ref_model_sync_steps": 1, "bf16": True},
    "what was measured since the last log": {"logging_steps": 4},
    "several batches a step": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "a last step of fewer batches": {"count": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "a new adapter and its dropout": {"lora": 0.3, "disable_dropout": False},
    "an adapter that came": {"model": adapter_that_came},
    "dropout": {"model": lambda: make_model(attention_dropout=0.3), "disable_dropout": False},
    "log-probs computed before": {"precompute_ref_log_probs": True},
    "the same under an adapter": {"precompute_ref_log_probs": True, "lora": 0.0},
    "the order of batches by tokens": {"max_tokens_per_batch": 60},
    "several batches by tokens a step": {"max_tokens_per_batch": 30, "gradient_accumulation_steps": 2},
    "the order of examples of like length": {"train_sampling_strategy": "group_by_length", "data_seed": 5},
    "the place in a stream, in its third pass": {"rows": Stream, "count": 10},
    "the place in a stream whose passes end within a step": {
        "rows": Stream, "count": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "the place in a shuffled stream": {"rows": shuffled_stream, "count": 10},
    "bfloat16": {"bf16": True},
    "which layers keep their activations": {"gradient_checkpointing": None},
    "balanced experts": {"model": make_experts},
    "evaluation between the steps": {"eval_strategy": "steps", "eval_steps": 2},
}  # fmt: skip
OF_PAIRS = {
    "weights of WPO and LD-DPO": {"use_weighting": True, "ld_alpha": 0.5},
    "a loss without a reference": {"loss_type": "simpo"},
}
CASES = [
    *((DPOTrainer, name, options) for name, options in (OPTIONS | OF_PAIRS).items()),
    *((KTOTrainer, name, options) for name, options in OPTIONS.items()),
]


@pytest.mark.parametrize(
    "kind, options",
    [pytest.param(kind, options, id=f"{kind.__name__}-{name}") for kind, name, options in CASES],
)
def test_three_steps_and_three_resumed_are_six(tmp_path, tokenizer, kind, options):
    whole_log, whole = finish(make_trainer(kind, tmp_path, tokenizer, options))
    resumed = make_trainer(kind, tmp_path, tokenizer, options)
    resumed_log, state = finish(resumed, str(tmp_path / "checkpoint-3"))
    assert resumed_log == whole_log
    assert len({entry["loss"] for entry in whole_log if "loss" in entry}) > 1, "it trains"
    assert state.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(state[name], value), name


def test_resuming_twice_in_one_process_is_the_same(tmp_path, tokenizer):
    """What a trainer object keeps from a run before is not what a checkpoint says."""
    options = {"logging_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 2}
    trainer = make_trainer(DPOTrainer, tmp_path, tokenizer, options)
    first_log, first = finish(trainer)
    first = {name: value.clone() for name, value in first.items()}
    second_log, second = finish(trainer, str(tmp_path / "checkpoint-3"))
    assert second_log == first_log
    for name, value in first.items():
        assert torch.equal(second[name], value), name


RUN = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/trainers"]
import torch
from test_trainer_resume import DPOTrainer, finish, make_trainer
from tiny_models import make_tokenizer

same = {}
for name, options in json.loads(sys.argv[3]).items():
    folder = f"{sys.argv[2]}/{name}"
    log, whole = finish(make_trainer(DPOTrainer, folder, make_tokenizer(), options))
    resumed = make_trainer(DPOTrainer, folder, make_tokenizer(), options)
    resumed_log, state = finish(resumed, f"{folder}/checkpoint-3")
    same[name] = log == resumed_log and all(torch.equal(state[key], whole[key]) for key in whole)
if resumed.is_world_process_zero():
    json.dump(same, open(sys.argv[2] + "/same.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_resume_to_the_same_bits(tmp_path):
    """In the second epoch, where wrappers that skip and divide batches hide a sampler's epoch from the Trainer."""
    cases = {
        "random": {},
        "grouped": {"train_sampling_strategy": "group_by_length"},
        "budget": {"max_tokens_per_batch": 30},
        "moving": {"logging_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 2},
    }
    cases = {name: {"per_device_train_batch_size": 4, **options} for name, options in cases.items()}
    (tmp_path / "run.py").write_text(RUN)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(tmp_path / "run.py"), str(Path(__file__).parents[1]), str(tmp_path), json.dumps(cases),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "same.json").exists(), done.stderr[-4000:]
    assert json.loads((tmp_path / "same.json").read_text()) == dict.fromkeys(cases, True)
