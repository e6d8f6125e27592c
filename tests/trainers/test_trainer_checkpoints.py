"""What is written is whole or not there, and what is not whole is never resumed from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import make_experts, make_model, make_tokenizer
from trainer_runs import dpo_trainer, lora
from transformers import AutoModelForCausalLM, Trainer, TrainerState

from pyfast_dpo.trainers.checkpoints import what_is_lacking

SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    """A folder with the checkpoints 2 and 4, and the trainer that wrote them."""
    trainer = dpo_trainer(tmp_path, tokenizer, **SAVING)
    trainer.train()
    return tmp_path, trainer


def test_a_checkpoint_holds_no_trace_of_where_it_was_written(run):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "checkpoint-2",
        "checkpoint-4",
    ]
    for checkpoint in folder.glob("checkpoint-*"):
        assert what_is_lacking(checkpoint) is None
        assert "_unfinished" not in (checkpoint / "trainer_state.json").read_text()


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "weights cut off": (
        "model.safetensors",
        shorten,
        r"model.safetensors has \d+ of its \d+ bytes",
    ),
    "optimizer cut off": ("optimizer.pt", shorten, r"optimizer.pt has \d+ of its \d+ bytes"),
    "no optimizer": ("optimizer.pt", lambda path: path.unlink(), "optimizer.pt is missing"),
    "random numbers cut off": ("rng_state.pth", shorten, r"rng_state.pth has \d+ of"),
    "state cut off": ("run_state.pt", shorten, r"run_state.pt has \d+ of"),
    "steps cut off": ("trainer_state.json", shorten, "trainer_state.json is no JSON"),
    "no steps": ("trainer_state.json", lambda path: path.unlink(), "trainer_state.json is missing"),
    "sizes cut off": ("checkpoint_sizes.json", shorten, "checkpoint_sizes.json is no JSON"),
}


@pytest.mark.parametrize("file, fault, reason", FAULTS.values(), ids=FAULTS)
def test_a_checkpoint_that_is_not_whole_is_refused_or_passed_over(
    run, tokenizer, file, fault, reason
):
    folder, _ = run
    fault(folder / "checkpoint-4" / file)
    trainer = dpo_trainer(folder, tokenizer, **SAVING)
    with pytest.raises(
        ValueError,
        match=rf"DPOTrainer: .*checkpoint-4 cannot be resumed from: {reason}.*: checkpoint-2",
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.warns(UserWarning, match=f"checkpoint-4 cannot be resumed from: {reason}"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert what_is_lacking(folder / "checkpoint-4") is None, "written anew from step 2 on"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_damaged_checkpoint_of_plain_transformers_is_refused_by_name(run, tokenizer, file):
    """It has no list of sizes; reading it tells."""
    folder, _ = run
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "checkpoint_sizes.json").unlink()
    (checkpoint / "run_state.pt").unlink()
    trainer = dpo_trainer(folder, tokenizer, **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))  # the whole one serves
    shorten(checkpoint / file)
    with pytest.raises(ValueError, match=r"DPOTrainer: .*checkpoint-2 cannot be resumed from"):
        dpo_trainer(folder, tokenizer, **SAVING).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    "owner, name", [(torch, "save"), (TrainerState, "save_to_json"), (Trainer, "_save")]
)  # fmt: skip
def test_a_failed_write_is_told_by_name_and_leaves_the_checkpoints_before_it(
    tmp_path, tokenizer, monkeypatch, owner, name
):
    trainer = dpo_trainer(tmp_path, tokenizer, **SAVING)
    inner = getattr(owner, name)

    def full(*args, **kwargs):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        OSError,
        match=r"DPOTrainer: .*checkpoint-4 could not be written \(.*No space left .* MiB are free",
    ):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("*check*")) == ["checkpoint-2"]
    assert not (tmp_path / "_unfinished").exists()


def test_a_failed_save_of_the_model_leaves_the_one_before(run, monkeypatch):
    folder, trainer = run
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def half(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save", half)
    with pytest.raises(OSError, match="could not be written"):
        trainer.save_model()
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        dpo_trainer(tmp_path / "file" / "run", tokenizer, **SAVING).train()
    trainer = dpo_trainer(tmp_path, tokenizer)
    with pytest.raises(OSError, match=r"DPOTrainer: .*file/model could not be written"):
        trainer.save_model(str(tmp_path / "file" / "model"))


def test_an_earlier_run_in_the_same_folder_is_replaced_checkpoint_by_checkpoint(run, tokenizer):
    folder, _ = run
    old = (folder / "checkpoint-4" / "model.safetensors").read_bytes()
    dpo_trainer(folder, tokenizer, make_model(seed=1), **SAVING).train()
    assert (folder / "checkpoint-4" / "model.safetensors").read_bytes() != old
    assert what_is_lacking(folder / "checkpoint-4") is None


def test_best_checkpoint_and_limit_on_their_number_hold(tmp_path, tokenizer):
    trainer = dpo_trainer(
        tmp_path, tokenizer, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=2, learning_rate=1e-2,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-4")
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_weights_that_files_name_otherwise_are_loaded_when_a_run_resumes(tmp_path, tokenizer):
    """Experts: the Trainer warned and trained on with those of the new model."""
    whole = dpo_trainer(tmp_path, tokenizer, make_experts(), **SAVING)
    whole.train()
    resumed = dpo_trainer(tmp_path, tokenizer, make_experts(), **SAVING)
    resumed._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
        assert torch.equal(reloaded.state_dict()[name], value), name


def test_weights_that_a_checkpoint_does_not_have_are_refused(run, tokenizer):
    from safetensors.torch import load_file, save_file

    folder, _ = run
    path = folder / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    (folder / "checkpoint-4" / "checkpoint_sizes.json").unlink()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"checkpoint-4 cannot be resumed from: it has no weights \['model.norm"
    ):
        dpo_trainer(folder, tokenizer, **SAVING).train(
            resume_from_checkpoint=str(folder / "checkpoint-4")
        )


def test_an_adapter_is_saved_whole_and_resumed(tmp_path, tokenizer):
    options = {**SAVING, "peft_config": lora()}
    dpo_trainer(tmp_path, tokenizer, **options).train()
    shorten(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    trainer = dpo_trainer(tmp_path, tokenizer, **options)
    with pytest.warns(UserWarning, match=r"adapter_model.safetensors has \d+ of its"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
