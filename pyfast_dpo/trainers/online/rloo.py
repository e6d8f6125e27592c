"""RLOO: the reward of a response against the mean of the others of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.losses.advantages import group_advantages, rloo_advantages
from pyfast_dpo.trainers.online.base import OnlineTrainer
from pyfast_dpo.trainers.online.config import RLOOConfig
from pyfast_dpo.trainers.online.scores import Table


class RLOOTrainer(OnlineTrainer):
    """REINFORCE Leave-One-Out (Ahmadian et al. 2024): advantages from the others of a group, the KL penalty in the
    reward, and the clipped ratio of whole sequences.

    Args and metrics: as in `GRPOTrainer`, with an `RLOOConfig`; `kl` is the mean of sampled - reference log-probs, a
    token.
    """

    config_class = RLOOConfig
    args: RLOOConfig
    penalty_in_reward = True
    _tag_names = ("pyfast_dpo", "rloo")
    paper = (
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "https://arxiv.org/abs/2402.14740",
    )

    def _advantages(self, table: Table, group: int) -> Tensor:
        rewards = table.rewards
        if self.args.reward_clip_range is not None:
            rewards = rewards.clamp(*self.args.reward_clip_range)
        rewards = rewards - self.args.beta * table.kl
        advantages = rloo_advantages(rewards.view(-1, group)).flatten()
        if not self.args.normalize_advantages:
            return advantages
        there = torch.where(rewards.isnan(), torch.nan, advantages)
        return group_advantages(there.view(1, -1)).flatten()
