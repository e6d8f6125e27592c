"""Losses on a few numbers: log-probs of a pair or of one response, scores of a reward model."""

from pyfast_dpo.losses.pairs import PreferenceLoss, preference_loss
from pyfast_dpo.losses.reward import reward_loss
from pyfast_dpo.losses.table import PAIR_LOSS_NAMES, UNPAIRED_LOSS_NAMES
from pyfast_dpo.losses.unpaired import UnpairedLoss, kto_kl, kto_loss, unpaired_loss
from pyfast_dpo.losses.weighting import BcoShift, ld_row_weights, ld_token_weights, wpo_weights

__all__ = [
    "PAIR_LOSS_NAMES",
    "UNPAIRED_LOSS_NAMES",
    "BcoShift",
    "PreferenceLoss",
    "UnpairedLoss",
    "kto_kl",
    "kto_loss",
    "ld_row_weights",
    "ld_token_weights",
    "preference_loss",
    "reward_loss",
    "unpaired_loss",
    "wpo_weights",
]
