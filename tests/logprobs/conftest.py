"""Shared by the tests of log-probs."""

from __future__ import annotations

import pytest
from torch import Tensor

from pyfast_dpo.logprobs import gpu_head
from pyfast_dpo.ops import dispatch


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int, int]]:
    """Everything runs as on a GPU, with multiples of 8 rows; what is multiplied: (rows, depth, columns)."""
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gpu_head, "GRAIN", 8)
    monkeypatch.setattr(gpu_head, "FROZEN_ROWS", 16)
    seen: list[tuple[int, int, int]] = []
    plain = gpu_head.product

    def counted(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
        seen.append((*left.shape, right.shape[1]))
        plain(left, right, out, accumulate)

    monkeypatch.setattr(gpu_head, "product", counted)
    return seen
