"""What an optimizer step is made of: which batches, how much each example counts, and where in the data it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from pyfast_dpo.trainers.checkpoints import CheckpointingTrainer

# In a batch of training: the mean number of examples over the batches of its step, on all processes. A loss is the
# sum over its batch divided by this; so every example of a step counts the same, however the step is cut.
MEAN_EXAMPLES = "mean_examples"


class StepTrainer(CheckpointingTrainer):
    """A `Trainer` whose steps weigh their examples alike and end where the data end, resumed or not."""

    _epoch = 0
    _batches_read = 0  # of this epoch
    _last_batch: int | None = None  # of a stream, known when it has been read

    def _count_examples(self, batch: dict[str, Any]) -> int:
        """Of a batch, over which the loss takes its mean."""
        raise NotImplementedError

    def _step_batches(self, batches: list[Any]) -> list[dict[str, Any]]:
        """As many batches for the loss as were read for a step."""
        return batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_read += len(batches)
        if len(batches) < num_batches:
            self._last_batch = self._batches_read
        batches = self._step_batches(batches)
        if batches:
            mean: float | Tensor = sum(map(self._count_examples, batches)) / len(batches)
            if self.args.world_size > 1:
                mean = self.accelerator.reduce(
                    torch.tensor(mean, dtype=torch.float64, device=device), "mean"
                )
            for batch in batches:
                batch[MEAN_EXAMPLES] = mean
        return batches, items

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        loader, epoch = kwargs["train_dataloader"], kwargs["epoch"]
        _set_epoch(loader, epoch)
        first = kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]
        self._epoch, self._last_batch = epoch, None
        self._batches_read = kwargs["steps_trained_in_current_epoch"] if first else 0
        if not has_length(loader):
            kwargs["steps_in_epoch"] = _UnknownNumber(kwargs["steps_in_epoch"], self)
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begin = super()._init_training_state(*args, **kwargs)
        if "place" in self._restored and not has_length(self.train_dataset):
            return self._restored["place"]  # the Trainer takes a stream for one that never ends
        return begin

    def _state_of_run(self) -> dict[str, Any]:
        return {**super()._state_of_run(), "place": (self._epoch, self._batches_read)}


class _UnknownNumber(int):
    """The number of batches of a stream: equal to the one with which it ended, once that is known.

    The Trainer makes a step of the last batches of an epoch, however few, and finds the last one by its number."""

    _trainer: StepTrainer

    def __new__(cls, value: int, trainer: StepTrainer) -> _UnknownNumber:
        number = super().__new__(cls, value)
        number._trainer = trainer
        return number

    def __eq__(self, other: object) -> bool:
        return int(self) == other or other == self._trainer._last_batch

    __hash__ = int.__hash__


def _set_epoch(loader: Any, epoch: int) -> None:
    """For every sampler in the wrappers of a loader: those that skip batches or divide them pass it on to some."""
    inner = getattr(loader, "batch_sampler", None)
    while inner is not None:
        if hasattr(inner, "set_epoch"):
            inner.set_epoch(epoch)
        inner = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
