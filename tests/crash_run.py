"""Training runs that are killed or find no room, each in a child of one process that has everything imported.

python crash_run.py FOLDER MOMENTS SEED writes FOLDER/report.json: what came of every run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

import torch
from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import config
from transformers import TrainerCallback

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, referenced
from pyfast_dpo.trainers.base import PreferenceTrainer

OPTIONS = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "logging_steps": 3,
    "learning_rate": 1e-2,
}
KINDS = (
    {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2},
    {"sync_ref_model": True, "ref_model_sync_steps": 2},
)


class Calls:
    """Counts calls of functions, in Python and in C, and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at = 0, kill_at
        self.phases: dict[str, list[tuple[int, int]]] = {"precompute": [], "checkpoint": []}

    def __call__(self, frame, event, argument) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner, function: str, phase: str) -> None:
        inner = getattr(owner, function)

        def watched(*args, **kwargs):
            start = self.count
            try:
                return inner(*args, **kwargs)
            finally:
                self.phases[phase].append((start, self.count))

        setattr(owner, function, watched)


def run(
    folder: Path, kind: int, calls: Calls | None = None, callback: TrainerCallback | None = None
):
    """Trains to the end, from the last checkpoint if there is one; (log, digest of the weights)"""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    if calls is not None:
        calls.watch(referenced, "computed_once", "precompute")
        calls.watch(PreferenceTrainer, "_save_checkpoint", "checkpoint")
        sys.setprofile(calls)
    trainer = DPOTrainer(
        make_model(), args=config(DPOConfig, folder / "run", **OPTIONS, **KINDS[kind]),
        train_dataset=make_pairs(16), processing_class=make_tokenizer(),
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=any((folder / "run").glob("checkpoint-*")) or None)
    sys.setprofile(None)
    digest = hashlib.sha256()
    for value in trainer.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    log = [
        {name: value for name, value in entry.items() if name != "tokens_per_second"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return [log, digest.hexdigest()]


def in_child(folder: Path, function, *args):
    """(signal or None, what the function returned)"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            (folder / "result.json").write_text(json.dumps(function(folder, *args)))
        except BaseException:
            (folder / "error.txt").write_text(traceback.format_exc())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    result = folder / "result.json"
    return ended, json.loads(result.read_text()) if ended is None and result.exists() else None


def counted(folder: Path, kind: int):
    calls = Calls(None)
    result = run(folder, kind, calls)
    return {"result": result, "calls": calls.count, "phases": calls.phases}


def killed(folder: Path, kind: int, kill_at: int):
    return run(folder, kind, Calls(kill_at))


class FullDisk(TrainerCallback):
    """No file may become longer than this, from the second step on."""

    def __init__(self, size: int) -> None:
        self._size = size

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            limit_files(self._size)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def without_room(folder: Path, kind: int, size: int, before: bool):
    """The error, the checkpoints that are there, and the end of the run when there is room again."""
    if before:
        limit_files(size)
    try:
        run(folder, kind, callback=None if before else FullDisk(size))
        message = None
    except OSError as error:
        message = str(error)
    limit_files(resource.RLIM_INFINITY)
    there = sorted(path.name for path in folder.glob("run/*"))
    return {"message": message, "there": there, "result": run(folder, kind)}


def moment(random_: random.Random, truth, number: int) -> int:
    """Every third one in the precomputation, or else anywhere; every third one in the writing of a checkpoint."""
    phases = truth["phases"][("precompute", "checkpoint")[number % 3 % 2]] if number % 3 < 2 else []
    start, end = random_.choice(phases or [(1, truth["calls"] - 1)])
    return random_.randint(start + 1, max(start + 1, end))


def main(folder: Path, moments: int, seed: int) -> None:
    random_ = random.Random(seed)
    truths = [in_child(folder / f"truth{k}", counted, k)[1] for k in range(len(KINDS))]
    report = {"truths": [truth["result"] for truth in truths], "kills": [], "full": []}
    for number in range(moments):
        place = folder / f"run{number}"
        kind = number % 2
        kill_at = moment(random_, truths[kind], number // 2)
        ended, _ = in_child(place, killed, kind, kill_at)
        again = None
        if number % 4 > 1:  # and once more while it resumes
            again, _ = in_child(place, killed, kind, random_.randint(1, truths[kind]["calls"] // 2))
        there = sorted(path.name for path in place.glob("run/*"))
        _, result = in_child(place, run, kind)
        report["kills"].append(
            {
                "kind": kind,
                "kill_at": kill_at,
                "ended": ended,
                "again": again,
                "there": there,
                "result": result,
            }
        )
    for size in (
        100,
        20_000,
        60_000,
    ):  # not even a configuration; no weights; no state of the optimizer
        place = folder / f"full{size}"
        report["full"].append(
            {"size": size, "kind": 1, **in_child(place, without_room, 1, size, False)[1]}
        )
    place = folder / "full_cache"
    report["full_cache"] = in_child(place, without_room, 0, 50, True)[1]
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
