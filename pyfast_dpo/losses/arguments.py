"""Checks of arguments that several losses take."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.ops.checks import (
    check_constants,
    check_finite,
    check_same_device,
    check_tensor,
    describe,
)


def pair_of(function: str, names: str, chosen: object, rejected: object) -> None:
    """Two tensors of one dimension, or neither; `names` with the place of "chosen" and "rejected"."""
    first, second = names.format("chosen"), names.format("rejected")
    if (chosen is None) != (rejected is None):
        raise ValueError(f"{function}: pass both {first} and {second}, or neither")
    if chosen is not None:
        check_tensor(function, first, chosen)
        check_tensor(function, second, rejected)
        assert isinstance(chosen, Tensor)
        if chosen.dim() != 1:
            raise ValueError(f"{function}: {first} must have shape [P], got {describe(chosen)}")


def check_lengths(function: str, name: str, lengths: Tensor | None, like: Tensor) -> None:
    if lengths is None:
        return
    if lengths.dtype == torch.bool or lengths.is_complex():
        raise TypeError(f"{function}: {name} must hold numbers of tokens, got {describe(lengths)}")
    if lengths.shape != like.shape:
        raise ValueError(
            f"{function}: {name} must have shape {list(like.shape)}, got {describe(lengths)}"
        )
    check_same_device(function, "the log-probs", like, name, lengths)
    check_constants(function, **{name: lengths})


def one_constant(
    function: str, name: str, value: Tensor | float | None, like: Tensor
) -> Tensor | None:
    """A number, or a tensor of one that stays on its device, as `[1]` beside `like`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        check_finite(function, name, value)
        if abs(float(value)) > torch.finfo(like.dtype).max:
            raise ValueError(f"{function}: {name} must be within {like.dtype}, got {value}")
        return like.new_full((1,), float(value))
    check_tensor(function, name, value)
    if value.is_complex() or (value.device != like.device and value.is_meta):
        raise TypeError(f"{function}: {name} must be one real number, got {describe(value)}")
    if value.numel() != 1:
        raise ValueError(f"{function}: {name} must be one number, got {describe(value)}")
    check_constants(function, **{name: value})
    return value.detach().to(like).reshape(1)
