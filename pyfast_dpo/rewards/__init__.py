"""Judgements of responses as numbers: reward functions and how they are called."""

from pyfast_dpo.rewards.functions import RewardFunctions

__all__ = ["RewardFunctions"]
