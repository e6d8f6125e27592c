"""Trainers: `transformers.Trainer` with preference and policy losses. Names and arguments are those of TRL."""

from pyfast_dpo.ops.extras import require

require("transformers", "pyfast_dpo.trainers")
require("accelerate", "pyfast_dpo.trainers")

from pyfast_dpo.trainers.config import DPOConfig, KTOConfig  # noqa: E402
from pyfast_dpo.trainers.dpo import DPOTrainer  # noqa: E402
from pyfast_dpo.trainers.kto import KTOTrainer  # noqa: E402
from pyfast_dpo.trainers.online import (  # noqa: E402
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
]
