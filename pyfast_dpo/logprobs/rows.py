"""Which hidden states score which tokens, known on the host: what the linear functions work through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.ops.checks import check_label_options, check_same_device, check_tensor, describe
from pyfast_dpo.ops.labels import shifted_labels


# Not a tuple: the batch movers of transformers and torch rebuild tuples element by element, but leave an
# object alone or call its `to` and `pin_memory`.
@dataclasses.dataclass(frozen=True)
class CompletionRows:
    """The scored rows of a batch of S sequences, R in all; rows of a sequence follow one another.

    With it no linear function waits for the device, so that a CUDA graph can capture a step.

    Attributes:
        index: `[R]` int64 into `hidden.flatten(0, -2)`; the hidden state that scores the row's token. An
            index may occur more than once (a prompt's last state scores the first token of both responses).
        targets: `[R]` int64, the tokens.
        counts: `[S]` int64, scored rows of every sequence, on the device of the others.
        lengths: the same numbers on the host; their sum is R. Sequences are stacked: chosen 0..P-1, then
            rejected P..2P-1.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices; lengths that do not add up to R.
    """

    index: Tensor
    targets: Tensor
    counts: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        name = "CompletionRows"
        object.__setattr__(self, "lengths", tuple(self.lengths))
        for field in ("index", "targets", "counts"):
            value = getattr(self, field)
            check_tensor(name, field, value)
            if value.dtype != torch.int64 or value.dim() != 1:
                raise TypeError(
                    f"{name}: {field} must be int64 of one dimension, got {describe(value)}"
                )
            check_same_device(name, "index", self.index, field, value)
        if self.targets.shape != self.index.shape:
            raise ValueError(
                f"{name}: targets must have shape {list(self.index.shape)}, got {describe(self.targets)}"
            )
        if self.counts.shape != (len(self.lengths),):
            raise ValueError(
                f"{name}: counts must have shape [{len(self.lengths)}], one a length, "
                f"got {describe(self.counts)}"
            )
        if min(self.lengths, default=0) < 0 or sum(self.lengths) != self.index.shape[0]:
            raise ValueError(
                f"{name}: lengths must not be negative and add up to the {self.index.shape[0]} rows of index, "
                f"got {self.lengths}"
            )

    @classmethod
    def from_labels(
        cls, labels: Tensor, *, shift: bool = False, ignore_index: int = -100
    ) -> CompletionRows:
        """The rows of labels `[..., T]` (of the hidden states' shape without H) that are not ignored.

        On CUDA this waits for the device once: the number of rows is read. `shift` as in `token_logps`.
        """
        name = "CompletionRows.from_labels"
        check_tensor(name, "labels", labels)
        check_label_options(name, shift, ignore_index)
        if labels.dtype != torch.int64 or labels.dim() == 0:
            raise TypeError(f"{name}: labels must be int64 [..., T], got {describe(labels)}")
        if labels.is_meta:
            raise ValueError(f"{name}: labels must have values, got {describe(labels)}")
        if shift:
            labels = shifted_labels(labels, ignore_index)
        scored = labels != ignore_index
        counts = scored.flatten(0, -2).sum(-1) if labels.dim() > 1 else scored.sum().view(1)
        lengths = tuple(counts.tolist())
        index = torch.nonzero_static(scored.flatten(), size=sum(lengths)).squeeze(1)
        return cls(index, labels.flatten().index_select(0, index), counts, lengths)

    def to(self, device: Any, *, non_blocking: bool = False) -> CompletionRows:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> CompletionRows:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> CompletionRows:
        return CompletionRows(
            function(self.index), function(self.targets), function(self.counts), self.lengths
        )
