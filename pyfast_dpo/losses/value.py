"""The loss of a critic."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.losses.policy import checked_normalizer
from pyfast_dpo.ops.checks import check_constants, check_tensor, check_weight, describe
from pyfast_dpo.ops.dtypes import to_statistics_dtype


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    *,
    normalizer: Tensor | float,
    mask: Tensor | None = None,
    cliprange_value: float = 0.2,
) -> Tensor:
    """Clipped squared error of a critic (Schulman et al. 2017; as in PPO's code):

        sum of 0.5 max((v - R)^2, (v_old + clip(v - v_old, ±c) - R)^2) / normalizer

    Args:
        values: any shape, floating point; the critic's estimates now.
        old_values: of that shape, constants: its estimates when the responses were sampled; None: not clipped.
        returns: of that shape, constants.
        normalizer: > 0, for the whole optimizer step, as in `policy_loss`: usually the scored tokens.
        mask: of that shape, bool: which count. Others may hold anything.
        cliprange_value: >= 0.

    Returns:
        A scalar, float32 (float64 when an input is float64).

    Raises:
        TypeError, ValueError: types, shapes, devices.
    """
    name = "value_loss"
    check_weight(name, "cliprange_value", cliprange_value)
    for argument, value in (("values", values), ("old_values", old_values), ("returns", returns)):
        if value is None and argument == "old_values":
            continue
        check_tensor(name, argument, value)
        assert value is not None
        if not value.is_floating_point():
            raise TypeError(f"{name}: {argument} must be floating point, got {describe(value)}")
        if value.shape != values.shape or value.device != values.device:
            raise ValueError(
                f"{name}: {argument} must have the shape and device of values, {describe(values)}, got "
                f"{describe(value)}"
            )
    check_constants(name, old_values=old_values, returns=returns)
    divisor = checked_normalizer(name, normalizer, values)
    estimates, old, targets = to_statistics_dtype(values, old_values, returns)
    assert estimates is not None and targets is not None
    if mask is not None:
        if mask.shape != values.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: mask must be bool of the shape of values, got {describe(mask)}"
            )
        # Replaced before any arithmetic: what is not counted reaches neither value nor gradient.
        estimates, targets = torch.where(mask, estimates, 0.0), torch.where(mask, targets, 0.0)
        old = None if old is None else torch.where(mask, old, 0.0)
    errors = (estimates - targets).square()
    if old is not None:
        near = old + (estimates - old).clamp(-cliprange_value, cliprange_value)
        errors = torch.maximum(errors, (near - targets).square())
    return (0.5 * errors.sum(dtype=torch.float64) / divisor).to(estimates.dtype)
