"""Judgements of responses as numbers: reward functions, how they are called, tasks that a rule can judge."""

from pyfast_dpo.rewards.functions import RewardFunctions
from pyfast_dpo.rewards.tasks import TASKS, Task, task_of

__all__ = ["TASKS", "RewardFunctions", "Task", "task_of"]
