"""Checkpoints that are whole or not there, and that hold everything that changes in training."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

UNFINISHED = "_unfinished"  # a folder beside the checkpoints; the Hub's uploads leave out names with an underscore
SIZES = "checkpoint_sizes.json"  # of the files with weights and other state
READ_BACK = (".safetensors", ".pt", ".pth", ".bin", ".distcp")


class CheckpointingTrainer(Trainer):
    """A `Trainer` that goes on from a checkpoint to the bits of the run that was not stopped.

    Checkpoints are written to a folder of another name, which gets its own in one step when all is there: a
    run that is killed, or a disk that is full, leaves the checkpoints before it. A checkpoint in which a file has become
    shorter or is missing is not resumed from.
    """

    _unfinished = False  # a checkpoint is being written
    _read_from = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_GoOn(self))
        self._restored: dict[str, Any] = {}

    # What is in it ------------------------------------------------------------------------------------

    def _state_of_run(self) -> dict[str, Any]:
        """What this process needs beside model, optimizer, schedule and random numbers, which the Trainer keeps:
        tensors, numbers, lists and dicts of them. Subclasses add to it."""
        return {"loss_since_log": self._tr_loss, "last_logged_step": self._globalstep_last_logged}

    def _restore_run(self, state: dict[str, Any]) -> None:
        """Takes back what `_state_of_run` gave, at the start of training."""
        self._tr_loss += state["loss_since_log"]
        self._globalstep_last_logged = state["last_logged_step"]
        # The summary at the end is about the steps of this call alone.
        self._total_loss_scalar -= self.accelerator.gather(self._tr_loss).mean().item()

    def _moving_models(self) -> dict[str, nn.Module]:
        """Models beside the trained one that change in training, by the name of their file."""
        return {}

    # Writing ------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._unfinished else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished, finished = Path(folder, UNFINISHED, name), Path(folder, name)
        with self._writing(finished, unfinished.parent):
            if self.args.should_save:
                shutil.rmtree(unfinished.parent, ignore_errors=True)  # of a run that was killed
            self.accelerator.wait_for_everyone()
            self._unfinished = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = False
            self._save_run(unfinished)
            if self.state.best_model_checkpoint == str(unfinished):
                self.state.best_model_checkpoint = str(finished)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            # Where nodes share no files, each has a part.
            for writes in (self.args.should_save, self.args.local_process_index == 0):
                if writes and unfinished.exists():
                    _finish(unfinished, finished)
                self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(finished))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save_run(self, folder: Path) -> None:
        if self.args.save_only_model:
            return
        torch.save(self._state_of_run(), folder / self._run_file())
        for name, model in self._moving_models().items():
            state = self.accelerator.get_state_dict(model)
            if self.args.should_save:
                torch.save(state, folder / f"{name}.pt")

    def _run_file(self) -> str:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return f"run_state{rank}.pt"

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self._unfinished:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        unfinished = folder / UNFINISHED
        with self._writing(folder, unfinished):
            super()._save(str(unfinished), state_dict)
            if self.args.should_save:
                _move_files(unfinished, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._unfinished:
            super()._push_from_checkpoint(checkpoint_folder)

    @contextlib.contextmanager
    def _writing(self, folder: Path, unfinished: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"{type(self).__name__}: {folder} could not be written ({error}); "
                f"{_free_space(folder)}. Checkpoints that were there before are whole"
            ) from error

    # Reading ------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the last checkpoint of `output_dir` that is
        whole.

        Raises:
            ValueError: a checkpoint that is not whole, or cannot be read.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._last_whole_checkpoint() or True
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            lacking = what_is_lacking(Path(resume_from_checkpoint))
            if lacking is not None:
                raise ValueError(self._unusable(resume_from_checkpoint, lacking))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _last_whole_checkpoint(self) -> str | None:
        for folder in checkpoints_of(Path(str(self.args.output_dir))):
            lacking = what_is_lacking(folder)
            if lacking is None:
                return str(folder)
            warnings.warn(self._unusable(folder, lacking), stacklevel=3)
        return None

    def _unusable(self, folder: str | Path, reason: object) -> str:
        others = [
            each.name
            for each in checkpoints_of(Path(folder).parent)
            if each.name != Path(folder).name and what_is_lacking(each) is None
        ]
        return (
            f"{type(self).__name__}: the checkpoint {folder} cannot be resumed from: {reason}. "
            f"Whole ones beside it: {', '.join(others) or 'none'}"
        )

    @contextlib.contextmanager
    def _reading(self, checkpoint: str) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            raise ValueError(self._unusable(checkpoint, error)) from error

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._read_from = resume_from_checkpoint
        with self._reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._read_from = str(self.state.best_model_checkpoint)
        with self._reading(self._read_from):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Loads weights that have other names in files than in the model, such as those of experts, which the
        Trainer would leave as they are."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state, absent = model.state_dict(), set(load_result.missing_keys)
        there = {value.data_ptr() for name, value in state.items() if name not in absent}
        if all(state[name].data_ptr() in there for name in absent):  # tied to others
            return
        fresh, report = type(model).from_pretrained(
            self._read_from, dtype=model.dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise RuntimeError(f"it has no weights {sorted(report['missing_keys'])}")
        model.load_state_dict(fresh.state_dict())

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        with self._reading(resume_from_checkpoint):
            prepared = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
            for name, model in self._moving_models().items():
                state = torch.load(
                    Path(resume_from_checkpoint, f"{name}.pt"), "cpu", weights_only=True
                )
                set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        return prepared

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        self._restored = {}
        path = Path(resume_from_checkpoint or "", self._run_file())
        if resume_from_checkpoint is not None and path.exists():  # else of another trainer
            with self._reading(resume_from_checkpoint):
                device = self.args.device
                place = "cpu" if device.type == "cpu" else device  # torch.load knows no "cpu:0"
                self._restored = torch.load(path, place, weights_only=True)
        return super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )


class _GoOn(TrainerCallback):
    """When the Trainer has set everything back to the beginning."""

    def __init__(self, trainer: CheckpointingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer._restored:
            self._trainer._restore_run(self._trainer._restored)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one first."""
    found = [
        (int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def what_is_lacking(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is, as far as the sizes of its files tell."""
    sizes = {}
    for name in (TRAINER_STATE_NAME, SIZES):
        try:
            sizes = json.loads((checkpoint / name).read_text())
        except FileNotFoundError:
            if name == SIZES:  # of another trainer
                return None
            return f"{name} is missing"
        except ValueError as error:
            return f"{name} is no JSON ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} of its {size} bytes"
    return None


def _finish(unfinished: Path, finished: Path) -> None:
    """Gives a checkpoint its name when everything is on the disk."""
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    sizes = {
        path.relative_to(unfinished).as_posix(): path.stat().st_size
        for path in files
        if path.suffix in READ_BACK
    }
    (unfinished / SIZES).write_text(json.dumps(sizes, indent=1))
    for path in [*files, unfinished / SIZES]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if finished.exists():  # of an earlier run
        finished.rename(unfinished.parent / "replaced")
    unfinished.rename(finished)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    for path in [each for each in source.rglob("*") if each.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    shutil.rmtree(source)


def _free_space(folder: Path) -> str:
    """Of the file system where a folder is or would be."""
    place = next((each for each in (folder, *folder.parents) if each.exists()), Path("."))
    return f"{shutil.disk_usage(place).free / 2**20:.0f} MiB are free on its file system"
