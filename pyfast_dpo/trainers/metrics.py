"""Averages of metrics between two log steps, kept on the device until then."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class MetricAverages:
    """Weighted means by name: every value comes as a sum with the number of its terms.

    Nothing waits for the device and no process for another before `pop`, which needs one reduction.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> float64 [2]: sum, count
        self._extremes: dict[str, Tensor] = {}  # name -> the largest; of least ones, negated

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds a sum (a scalar tensor) over `count` terms."""
        total = total.detach().double()
        entry = torch.stack([total, torch.as_tensor(count, device=total.device).double()])
        self._totals[name] = self._totals[name] + entry if name in self._totals else entry

    def add_extreme(self, name: str, value: Tensor) -> None:
        """Keeps the largest (the smallest, if the name ends with "min") of scalars."""
        value = value.detach().double() * _sign(name)
        known = self._extremes.get(name)
        self._extremes[name] = value if known is None else torch.maximum(known, value)

    def pop(
        self, reduce: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """The means and extremes since the last call; a name without any term is left out.

        Args:
            reduce: sums a tensor over the processes, all of which hold the same names.
            gather: `[n]` of every process, one after the other.
        """
        return {**self._pop_means(reduce), **self._pop_extremes(gather)}

    def _pop_extremes(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        if not self._extremes:
            return {}
        names = list(self._extremes)
        values = gather(torch.stack([self._extremes[name] for name in names]))
        largest = values.view(-1, len(names)).amax(0).tolist()
        self._extremes.clear()
        return {name: value * _sign(name) for name, value in zip(names, largest, strict=True)}

    def _pop_means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        if not self._totals:
            return {}
        names = list(self._totals)
        totals = reduce(torch.stack([self._totals[name] for name in names])).tolist()
        self._totals.clear()
        return {
            name: total / count
            for name, (total, count) in zip(names, totals, strict=True)
            if count > 0
        }

    def clear(self) -> None:
        self._totals.clear()
        self._extremes.clear()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What was added since the last call of `pop`, of this process."""
        return {"totals": dict(self._totals), "extremes": dict(self._extremes)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._totals, self._extremes = dict(state["totals"]), dict(state["extremes"])


def _sign(name: str) -> float:
    return -1.0 if name.endswith("min") else 1.0
