"""Trainers: `transformers.Trainer` with preference losses. Names and arguments are those of TRL."""

from pyfast_dpo._allocator import align_large_tensors
from pyfast_dpo.diagnostics.extras import require

align_large_tensors()  # before anything that is imported below makes a tensor
require("transformers", "pyfast_dpo.trainers")
require("accelerate", "pyfast_dpo.trainers")

from pyfast_dpo.trainers.config import DPOConfig, KTOConfig  # noqa: E402
from pyfast_dpo.trainers.dpo import DPOTrainer  # noqa: E402
from pyfast_dpo.trainers.kto import KTOTrainer  # noqa: E402

__all__ = ["DPOConfig", "DPOTrainer", "KTOConfig", "KTOTrainer"]
