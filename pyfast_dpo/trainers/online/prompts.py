"""Which prompts a rollout is made from: whole batches of them, again for every batch that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.trainers.online.config import OnlineConfig
from pyfast_dpo.trainers.sampling import order_seed


class PromptBatches(Sampler[list[int]]):
    """The prompts of one rollout after the other, each as often as batches are trained on it; what is left of an
    epoch and would not fill a rollout is left out. Every process gets all of them.

    Args:
        prompts: in the data.
        size: prompts of a rollout.
        repeats: batches that a rollout serves, all iterations together.
        shuffle: in a new order every epoch.
    """

    def __init__(self, prompts: int, size: int, repeats: int, *, shuffle: bool, seed: int) -> None:
        self._prompts, self._size, self._repeats = prompts, size, repeats
        self._shuffle, self._seed, self._epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._prompts // self._size * self._repeats

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = (
            torch.randperm(self._prompts, generator=generator).tolist()
            if self._shuffle
            else list(range(self._prompts))
        )
        for first in range(0, self._prompts - self._size + 1, self._size):
            for _ in range(self._repeats):
                yield order[first : first + self._size]


def prompt_loader(name: str, dataset: PreparedDataset, args: OnlineConfig) -> DataLoader[Any]:
    """Loads numbers of prompts.

    Raises:
        ValueError: fewer prompts than a rollout takes.
    """
    if len(dataset) < args.groups_per_rollout:
        raise ValueError(
            f"{name}: train_dataset must have the prompts of a rollout, {args.groups_per_rollout} "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}), got "
            f"{len(dataset)}"
        )
    assert args.steps_per_generation is not None
    batches = PromptBatches(
        len(dataset),
        args.groups_per_rollout,
        args.steps_per_generation * args.num_iterations,
        shuffle=args.shuffle_dataset,
        seed=order_seed(args),
    )
    return DataLoader(range(len(dataset)), batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]
