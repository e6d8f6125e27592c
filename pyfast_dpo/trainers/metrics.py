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

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Adds a sum (a scalar tensor) over `count` terms."""
        total = total.detach().double()
        entry = torch.stack([total, torch.as_tensor(count, device=total.device).double()])
        self._totals[name] = self._totals[name] + entry if name in self._totals else entry

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call; a name without any term is left out.

        Args:
            reduce: sums a tensor over the processes, all of which hold the same names.
        """
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

    def state_dict(self) -> dict[str, Tensor]:
        """The sums since the last call of `pop`, of this process."""
        return dict(self._totals)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._totals = dict(state)
