"""Dtypes: what logits may have, and what results have."""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64, every other dtype of logits has float32 results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_statistics_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in float64 when any of them is, else in float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return tuple(None if t is None else t.to(dtype) for t in tensors)
