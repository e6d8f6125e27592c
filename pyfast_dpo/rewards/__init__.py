"""Judgements of responses as numbers: reward functions, ready ones, how they are called, tasks that a rule can judge."""

from pyfast_dpo.rewards.functions import RewardFunctions
from pyfast_dpo.rewards.ready import READY, reward_by_name
from pyfast_dpo.rewards.tasks import TASKS, Task, task_of

__all__ = ["READY", "TASKS", "RewardFunctions", "Task", "reward_by_name", "task_of"]
