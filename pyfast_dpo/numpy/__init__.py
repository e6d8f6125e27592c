"""The losses on NumPy arrays, without torch tensors: for learners, for checks by hand, for data pipelines.

The same kernels as the torch operators, on the CPU. Gradients are those of the returned mean loss.
"""

from pyfast_dpo.numpy.batch import PreferencePair, create_preference_batch
from pyfast_dpo.numpy.logprobs import compute_sequence_logprob
from pyfast_dpo.numpy.pairs import PairResult, dpo_loss, ipo_loss, preference_loss
from pyfast_dpo.numpy.policy import PPOBuffer, PPOResult, ppo_loss
from pyfast_dpo.numpy.reward import RewardResult, reward_loss
from pyfast_dpo.numpy.unpaired import UnpairedResult, kto_loss, unpaired_loss

__all__ = [
    "PPOBuffer",
    "PPOResult",
    "PairResult",
    "PreferencePair",
    "RewardResult",
    "UnpairedResult",
    "compute_sequence_logprob",
    "create_preference_batch",
    "dpo_loss",
    "ipo_loss",
    "kto_loss",
    "ppo_loss",
    "preference_loss",
    "reward_loss",
    "unpaired_loss",
]
