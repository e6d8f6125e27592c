"""PPO for learners: a buffer of steps, their advantages, and the clipped loss with its gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyfast_dpo.numpy.arrays import FloatArray, arrays_of
from pyfast_dpo.numpy.metrics import mean
from pyfast_dpo.ops import _C
from pyfast_dpo.ops.checks import check_finite, check_weight


class PPOResult(NamedTuple):
    """Result of `ppo_loss`."""

    loss: float  # mean over the steps, 0 for none
    gradient: FloatArray  # [N] d loss / d new_log_probs


def ppo_loss(
    new_log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    clip_ratio: float = 0.2,
) -> PPOResult:
    """Mean of -min(r A, clip(r, 1 - clip_ratio, 1 + clip_ratio) A), r = e^(new - old) (Schulman et al. 2017, eq. 7).

    Args:
        new_log_probs, old_log_probs, advantages: `[N]`; the last two are constants.
        clip_ratio: in [0, 1).

    Returns:
        `(loss, gradient)`: the gradient is -r A / N where the ratio is not bounded, ties included, else 0.

    Raises:
        TypeError, ValueError: dtypes, shapes, clip_ratio.
    """
    name = "ppo_loss"
    check_weight(name, "clip_ratio", clip_ratio)
    if clip_ratio >= 1:
        raise ValueError(f"{name}: clip_ratio must be in [0, 1), got {clip_ratio}")
    names = ("new_log_probs", "old_log_probs", "advantages")
    new, old, gains = arrays_of(name, names, (new_log_probs, old_log_probs, advantages), 3)
    losses, gradient = _C.ppo_loss(new, old, gains, float(clip_ratio))
    return PPOResult(mean(losses), gradient / max(len(losses), 1))


@dataclass
class PPOBuffer:
    """Steps of one or more episodes in the order in which they were taken.

    Args:
        gamma: discount of later rewards, in [0, 1].
        lam: of generalized advantage estimation (Schulman et al. 2016, eq. 16), in [0, 1].

    Example:
        >>> buffer = PPOBuffer(gamma=1.0, lam=1.0)
        >>> for value, reward in ((0.5, 0.0), (0.6, 0.0), (0.7, 1.0)):
        ...     buffer.add(state=0, action=1, reward=reward, value=value, log_prob=-0.5, done=reward > 0)
        >>> advantages, returns = buffer.compute_advantages()
        >>> [round(float(a), 2) for a in advantages], returns.tolist()
        ([0.5, 0.4, 0.3], [1.0, 1.0, 1.0])
    """

    gamma: float = 0.99
    lam: float = 0.95
    states: list[Any] = field(default_factory=list, init=False)
    actions: list[Any] = field(default_factory=list, init=False)
    rewards: list[float] = field(default_factory=list, init=False)
    values: list[float] = field(default_factory=list, init=False)
    log_probs: list[float] = field(default_factory=list, init=False)
    dones: list[bool] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            check_finite("PPOBuffer", name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"PPOBuffer: {name} must be in [0, 1], got {value}")

    def __len__(self) -> int:
        return len(self.rewards)

    def add(
        self, state: Any, action: Any, reward: float, value: float, log_prob: float, done: bool
    ) -> None:
        """One step: what was seen and done, the reward, the critic's value of the state, the policy's log-prob of
        the action, and whether the episode ended with it."""
        self.states.append(state)
        self.actions.append(action)
        self.rewards.append(float(reward))
        self.values.append(float(value))
        self.log_probs.append(float(log_prob))
        self.dones.append(bool(done))

    def compute_advantages(
        self, last_value: float = 0.0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(advantages `[N]`, returns `[N]`), float64; `last_value` is the critic's of the state after the last step,
        where its episode goes on."""
        check_finite("PPOBuffer.compute_advantages", "last_value", last_value)
        values = np.array(self.values, dtype=np.float64)
        advantages = _C.gae(
            np.array(self.rewards, dtype=np.float64), values, np.array(self.dones, dtype=np.bool_),
            float(last_value), float(self.gamma), float(self.lam),
        )  # fmt: skip
        return advantages, advantages + values
