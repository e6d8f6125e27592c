"""Losses on a few numbers: log-probs of a pair, of a response or of sampled tokens, scores of a reward model."""

from pyfast_dpo.losses.advantages import Gae, gae, group_advantages, rloo_advantages
from pyfast_dpo.losses.correction import sampling_correction
from pyfast_dpo.losses.pairs import PreferenceLoss, preference_loss
from pyfast_dpo.losses.policy import PolicyLoss, policy_loss, policy_normalizer
from pyfast_dpo.losses.policy_table import POLICY_LOSS_NAMES
from pyfast_dpo.losses.reward import reward_loss
from pyfast_dpo.losses.table import PAIR_LOSS_NAMES, UNPAIRED_LOSS_NAMES
from pyfast_dpo.losses.unpaired import UnpairedLoss, kto_kl, kto_loss, unpaired_loss
from pyfast_dpo.losses.value import value_loss
from pyfast_dpo.losses.weighting import BcoShift, ld_row_weights, ld_token_weights, wpo_weights

__all__ = [
    "PAIR_LOSS_NAMES",
    "POLICY_LOSS_NAMES",
    "UNPAIRED_LOSS_NAMES",
    "BcoShift",
    "Gae",
    "PolicyLoss",
    "PreferenceLoss",
    "UnpairedLoss",
    "gae",
    "group_advantages",
    "kto_kl",
    "kto_loss",
    "ld_row_weights",
    "ld_token_weights",
    "policy_loss",
    "policy_normalizer",
    "preference_loss",
    "reward_loss",
    "rloo_advantages",
    "sampling_correction",
    "unpaired_loss",
    "value_loss",
    "wpo_weights",
]
