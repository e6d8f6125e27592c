"""Trainers that learn from responses of their own: prompts in, fresh responses every round, scores, a step."""

from pyfast_dpo.trainers.online.config import GRPOConfig, RLOOConfig
from pyfast_dpo.trainers.online.grpo import GRPOTrainer
from pyfast_dpo.trainers.online.ppo import PPOTrainer
from pyfast_dpo.trainers.online.ppo_config import PPOConfig
from pyfast_dpo.trainers.online.rloo import RLOOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "PPOConfig", "PPOTrainer", "RLOOConfig", "RLOOTrainer"]
