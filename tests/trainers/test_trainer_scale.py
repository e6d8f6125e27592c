"""Accumulation, killed and resumed runs, streams, several processes: the same training each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_models import Stream, make_model, make_pairs, make_tokenizer
from trainer_runs import LN2, config, dpo_trainer, train_log

from pyfast_dpo.model.activations import KeptActivations
from pyfast_dpo.trainers import KTOConfig, KTOTrainer

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_one_batch_of_eight_is_eight_batches_of_one(tmp_path, tokenizer):
    logs = [
        train_log(
            dpo_trainer(
                tmp_path, tokenizer, make_model(), rows=make_pairs(24), per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size, max_steps=3, learning_rate=1e-2,
            )
        )
        for size in (8, 2, 1)
    ]  # fmt: skip
    for other in logs[1:]:
        for first, second in zip(logs[0], other, strict=True):
            assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
            assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
            assert second["rewards/margins"] == pytest.approx(first["rewards/margins"], abs=1e-5)


@pytest.mark.parametrize("with_datasets", [False, True])
def test_a_stream_trains_as_a_list_in_its_order(tmp_path, tokenizer, with_datasets):
    rows = make_pairs(12)
    rows[2]["rejected"] = rows[2]["chosen"]  # dropped and reported
    stream = Stream(rows)
    if with_datasets:
        stream = pytest.importorskip("datasets").Dataset.from_list(rows).to_iterable_dataset()
    logs = [
        train_log(
            dpo_trainer(
                tmp_path, tokenizer, make_model(), rows=source, max_steps=3, learning_rate=1e-2,
                per_device_train_batch_size=3, train_sampling_strategy="sequential",
            )
        )
        for source in (rows, stream)
    ]  # fmt: skip
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]
    assert logs[0][0]["loss"] == LN2


def test_a_stream_gives_kto_its_mismatched_completions(tmp_path, tokenizer):
    losses = []
    for rows in (make_pairs(9), Stream(make_pairs(9))):
        trainer = KTOTrainer(
            make_model(), None,
            config(KTOConfig, tmp_path, train_sampling_strategy="sequential", learning_rate=1e-2),
            train_dataset=rows, processing_class=tokenizer,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in train_log(trainer)])
    assert losses[0] == losses[1]


def test_an_iterator_that_is_used_up_is_refused(tmp_path, tokenizer):
    with pytest.raises(TypeError, match="train_dataset must be readable more than once"):
        dpo_trainer(tmp_path, tokenizer, rows=iter(make_pairs()))


# Other processes -----------------------------------------------------------------------------------------

RUN = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from trainer_runs import config, train_log
from tiny_models import make_model, make_pairs, make_tokenizer
from transformers import TrainerCallback
from pyfast_dpo.trainers import DPOConfig, DPOTrainer
from pyfast_dpo.data import SharedPromptCollatorForPreference

folder, options, kill_at = Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = DPOTrainer(
    make_model(), None, config(DPOConfig, folder, **options), train_dataset=make_pairs(16),
    processing_class=make_tokenizer(), callbacks=[Kill()],
)
assert isinstance(trainer.data_collator, SharedPromptCollatorForPreference)
log = train_log(trainer)
state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.is_world_process_zero():
    (folder / "log.json").write_text(json.dumps(log))
    torch.save({name: value.clone() for name, value in state.items()}, folder / "weights.pt")
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is written. Once in many runs a process was aborted ("terminate called without an active exception"),
    # probably by threads of torch that were still there at its end.
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
"""


def run(folder, options, *, kill_at=0, processes=1):
    return launch(folder, RUN, [str(folder), json.dumps(options), str(kill_at)], processes)


def launch(folder, script, arguments, processes):
    folder.mkdir(exist_ok=True)
    path = folder / "run.py"
    path.write_text(script)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(path), str(TESTS), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_run_resumes_to_the_bits_of_one_that_was_not(tmp_path, tokenizer):
    # The resumed run measures its layers anew, and keeps other ones than the whole run at the same step.
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2,
        "gradient_checkpointing": None,
    }  # fmt: skip
    killed = run(tmp_path / "killed", options, kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (tmp_path / "killed" / "checkpoint-4").exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = dpo_trainer(tmp_path / "whole", tokenizer, make_model(), **options)
        whole_log = train_log(whole)
        resumed = dpo_trainer(tmp_path / "killed", tokenizer, make_model(), **options)
        resumed.train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    resumed_log = [entry for entry in resumed.state.log_history if "loss" in entry]
    for first, second in zip(whole_log, resumed_log, strict=True):
        for name in first.keys() - {"tokens_per_second"}:
            assert first[name] == second[name], f"step {first['step']}: {name}"


def test_two_processes_train_as_one(tmp_path, tokenizer):
    options = {
        "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 2,
        "gradient_checkpointing": None,
    }  # fmt: skip
    done = run(tmp_path, options, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((tmp_path / "log.json").read_text())
    one = dpo_trainer(
        tmp_path, tokenizer, make_model(), **{**options, "per_device_train_batch_size": 4}
    )
    for ours, single in zip(log, train_log(one), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert ours[name] == pytest.approx(single[name], rel=1e-4, abs=1e-6), name
    weights = torch.load(tmp_path / "weights.pt")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


# accelerate shards on GPUs only, so here the model that the trainer has prepared is sharded by hand.
SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from trainer_runs import config
from tiny_models import make_model, make_pairs, make_tokenizer
from torch.distributed.fsdp import FSDPModule, fully_shard
from pyfast_dpo.trainers import DPOConfig, DPOTrainer

trainer = DPOTrainer(
    make_model(), make_model(seed=1), config(DPOConfig, sys.argv[2], gradient_checkpointing=None),
    train_dataset=make_pairs(8), processing_class=make_tokenizer(),
)
model = trainer.model.train()
getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
kept = trainer.kept_activations
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert isinstance(model, FSDPModule)
kept.on_train_begin(trainer.args, None, None, model=model)
batch = trainer.data_collator(trainer.train_dataset.examples[dist.get_rank()::2])
passes = []
for layers_kept in (1, 2):  # the first step measures one layer
    trainer.compute_loss(model, batch).backward()
    passes.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    model.zero_grad()
    assert kept.layers_kept == layers_kept
    if kept.budget is None:
        kept.on_step_end(trainer.args, None, None, model=model)
        assert kept.budget == sum(p.to_local().nbytes for p in model.parameters())
        kept.budget = 1 << 40  # the weights of so small a model do not pay for a layer
if dist.get_rank() == 0:
    torch.save((passes, kept.bytes_per_token), sys.argv[2] + "/gradients.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_gradients_of_a_sharded_model_are_those_of_the_whole(tmp_path, tokenizer):
    done = launch(tmp_path, SHARDED, [str(tmp_path)], processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    passes, bytes_per_token = torch.load(tmp_path / "gradients.pt")
    trainer = dpo_trainer(
        tmp_path, tokenizer, make_model(), ref_model=make_model(seed=1), rows=make_pairs(8)
    )
    batch = trainer.data_collator(trainer.train_dataset.examples)
    trainer.compute_loss(trainer.model, batch).backward()
    for name, parameter in trainer.model.named_parameters():
        for sharded in passes:
            torch.testing.assert_close(
                sharded[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
            )

    # Weights that were gathered for a layer are not its activations: the measure is that of a whole model.
    model = trainer.model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    kept = KeptActivations(None)
    kept.on_train_begin(trainer.args, None, None, model=model)
    trainer.compute_loss(model, trainer.data_collator(trainer.train_dataset.examples[::2]))
    assert bytes_per_token == kept.bytes_per_token > 0


READERS = """
import sys
sys.path.insert(0, sys.argv[1])
import json
import os
import datasets
from trainer_runs import config
from tiny_models import make_model, make_tokenizer
from pyfast_dpo.data import DataCollatorForPreference
from pyfast_dpo.trainers import DPOConfig, DPOTrainer

folder, workers, shards = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rows = [{"prompt": p, "chosen": " y", "rejected": " z"} for p in "abcdefghijklmnopqrstuvwx"]
stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
seen = []

class Recording(DPOTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"][: len(inputs["input_ids"]) // 2, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)

trainer = Recording(
    make_model(), None,
    config(
        DPOConfig, folder, max_steps=12, per_device_train_batch_size=2, dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    ),
    DataCollatorForPreference(1),
    train_dataset=stream.shuffle(seed=0, buffer_size=24), processing_class=make_tokenizer(),
)
trainer.train()
report = trainer.data_reports["train"]
with open(f"{folder}/seen{os.environ['RANK']}.json", "w") as file:
    json.dump([seen, report.total], file)
"""


@pytest.mark.parametrize("workers, shards", [(0, 1), (2, 1)])
def test_two_processes_read_every_row_of_a_stream_once_an_epoch(tmp_path, workers, shards):
    pytest.importorskip("datasets")
    done = launch(tmp_path, READERS, [str(tmp_path), str(workers), str(shards)], processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    (first, total), (second, _) = (
        json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)
    )
    steps = [a + b for a, b in zip(first, second, strict=True)]
    orders = [[row for step in steps[start : start + 6] for row in step] for start in (0, 6)]
    for order in orders:
        assert len(set(order)) == len(order) == 24
    assert orders[0] != orders[1]
    assert total == 24
