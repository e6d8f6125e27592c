"""Orders of examples, and batches by the number of their tokens instead of that of their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.trainers.options import PolicyConfig


class TokenBudgetBatches(Sampler[list[int]]):
    """Batches of consecutive examples that hold at most `budget` tokens together.

    The batches are cut once, so that their number stays; with `shuffle` from a random order, and in a new
    order every epoch. An example above the budget is a batch of its own.

    Args:
        tokens: of every example.
        multiple_of: the first batches are repeated until their number is a multiple of this (the number
            of processes, each of which must have as many).
    """

    def __init__(
        self,
        tokens: Sequence[int],
        budget: int,
        *,
        shuffle: bool,
        seed: int = 0,
        multiple_of: int = 1,
    ) -> None:
        self._shuffle, self._seed, self._epoch = shuffle, seed, 0
        order = self._permutation(len(tokens)) if shuffle else range(len(tokens))
        self._batches: list[list[int]] = []
        room = 0
        for i in order:
            if not self._batches or tokens[i] > room:
                self._batches.append([])
                room = budget
            self._batches[-1].append(i)
            room -= tokens[i]
        missing = -len(self._batches) % multiple_of
        self._batches += [self._batches[i % len(self._batches)] for i in range(missing)]

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._permutation(len(self)) if self._shuffle else range(len(self))
        return (self._batches[i] for i in order)

    def _permutation(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return torch.randperm(count, generator=generator).tolist()


class GroupedByLength(LengthGroupedSampler):
    """`transformers`' sampler, whose order depends on the epoch alone: a resumed run and every process has it."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)


def order_seed(args: PolicyConfig) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def token_budget_loader(
    dataset: PreparedDataset,
    budget: int,
    args: PolicyConfig,
    collate: Callable[..., Any],
    training: bool,
) -> DataLoader:
    """Loads such batches in the order that the Trainer's options ask for."""
    batches = TokenBudgetBatches(
        dataset.tokens(),
        budget,
        shuffle=training and args.train_sampling_strategy != "sequential",
        seed=order_seed(args),
        multiple_of=args.world_size,
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
