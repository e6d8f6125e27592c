"""From rewards to advantages: within groups of responses to one prompt, and over the steps of an episode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.ops import operators
from pyfast_dpo.ops.checks import check_choice, check_finite, check_tensor, check_weight, describe
from pyfast_dpo.ops.dispatch import Impl, use_kernels_for
from pyfast_dpo.ops.dtypes import to_statistics_dtype

SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, *, scale: str = "group", epsilon: float = 1e-4) -> Tensor:
    """Rewards less the mean of their group, in units of a standard deviation (GRPO, Shao et al. 2024, section 4.1.2).

    Args:
        rewards: `[..., G]` floating point, the last dimension a group; NaN: no reward, which stays out of mean and
            deviation and gets 0.
        scale: "group": divided by the group's standard deviation (of a sample: n - 1) + epsilon; "batch": by that of
            all rewards; "none": not (Dr. GRPO, Liu et al. 2025). In a group of two "group" gives ±0.7071 whatever
            the gap.

    Returns:
        The same shape, float32 (float64 for float64), no gradient. The advantages of a group add up to 0.

    Raises:
        TypeError, ValueError: dtype, shape, scale, epsilon.
    """
    name = "group_advantages"
    values, given = _rewards(name, rewards)
    check_choice(name, "scale", scale, SCALES)
    check_weight(name, "epsilon", epsilon)
    counts = given.sum(-1, keepdim=True)
    centered = torch.where(given, values - values.sum(-1, keepdim=True) / counts.clamp(min=1), 0.0)
    if scale == "none":
        return centered.to(_narrow(rewards))
    if scale == "group":
        variance = centered.square().sum(-1, keepdim=True) / (counts - 1).clamp(min=1)
    else:
        count = given.sum()
        spread = torch.where(given, values - values.sum() / count.clamp(min=1), 0.0)
        variance = spread.square().sum() / (count - 1).clamp(min=1)
    return (centered / (variance.sqrt() + epsilon)).to(_narrow(rewards))


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Rewards less the mean of the others of their group (RLOO, Ahmadian et al. 2024, eq. 8).

    Args:
        rewards: `[..., G]` as in `group_advantages`.

    Returns:
        The same shape, float32 (float64 for float64), no gradient: G / (G - 1) (r - mean); 0 without a sibling.
    """
    values, given = _rewards("rloo_advantages", rewards)
    counts = given.sum(-1, keepdim=True)
    others = (values.sum(-1, keepdim=True) - values) / (counts - 1).clamp(min=1)
    return torch.where(given & (counts > 1), values - others, 0.0).to(_narrow(rewards))


def _rewards(function: str, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """In float64 with 0 for NaN, and which are none: equal rewards then have advantages of exactly 0."""
    check_tensor(function, "rewards", rewards)
    if not rewards.is_floating_point() or rewards.dim() == 0:
        raise TypeError(
            f"{function}: rewards must be floating point [..., G], got {describe(rewards)}"
        )
    given = ~rewards.isnan()
    return torch.where(given, rewards.detach(), 0.0).double(), given


def _narrow(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


class Gae(NamedTuple):
    """Result of `gae`."""

    advantages: Tensor  # [B, T], 0 where the mask is false
    returns: Tensor  # [B, T] advantages + values


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    dones: Tensor | None = None,
    mask: Tensor | None = None,
    last_values: Tensor | None = None,
    impl: Impl = "auto",
) -> Gae:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16):

        A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}

    Args:
        rewards, values: `[B, T]` floating point.
        gamma, lam: in [0, 1].
        dones: `[B, T]` bool: the episode ends with this step, nothing comes after it.
        mask: `[B, T]` bool: steps that are none (padding, tool tokens) get 0, and what comes after them is carried over.
        last_values: `[B]`, the value after the last step; 0 by default, the end.

    Returns:
        `Gae(advantages, returns)`, float32 (float64 when an input is float64), no gradient.

    Raises:
        TypeError, ValueError: types, shapes, devices, gamma or lam outside [0, 1].
    """
    name = "gae"
    check_tensor(name, "rewards", rewards)
    if rewards.dim() != 2 or not rewards.is_floating_point():
        raise ValueError(f"{name}: rewards must be floating point [B, T], got {describe(rewards)}")
    for argument, number in (("gamma", gamma), ("lam", lam)):
        check_finite(name, argument, number)
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: {argument} must be in [0, 1], got {number}")
    shapes = {"values": values, "dones": dones, "mask": mask, "last_values": last_values}
    for argument, value in shapes.items():
        if value is None:
            continue
        check_tensor(name, argument, value)
        expected = rewards.shape[:1] if argument == "last_values" else rewards.shape
        if value.shape != expected or value.device != rewards.device:
            raise ValueError(
                f"{name}: {argument} must have shape {list(expected)} on {rewards.device}, got {describe(value)}"
            )
        if argument in ("dones", "mask") and value.dtype != torch.bool:
            raise TypeError(f"{name}: {argument} must be bool, got {describe(value)}")
    gains, estimates, last = to_statistics_dtype(
        rewards.detach(), values.detach(), None if last_values is None else last_values.detach()
    )
    assert gains is not None and estimates is not None
    if use_kernels_for(name, impl, gains):
        advantages = operators.gae(gains, estimates, last, dones, mask, float(gamma), float(lam))
    else:
        advantages = _torch_gae(gains, estimates, last, dones, mask, gamma, lam)
    returns = advantages + estimates
    return Gae(advantages, returns if mask is None else torch.where(mask, returns, 0.0))


def _torch_gae(
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor | None,
    dones: Tensor | None,
    mask: Tensor | None,
    gamma: float,
    lam: float,
) -> Tensor:
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0]) if last_values is None else last_values
    carried = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        goes_on = torch.ones_like(following) if dones is None else (~dones[:, t]).to(following)
        error = rewards[:, t] + gamma * following * goes_on - values[:, t]
        now = error + gamma * lam * carried * goes_on
        step = torch.ones_like(now, dtype=torch.bool) if mask is None else mask[:, t]
        advantages[:, t] = torch.where(step, now, 0.0)
        carried = torch.where(step, now, carried)
        following = torch.where(step, values[:, t], following)
    return advantages
