"""Log-probs of tokens and sequences, and losses right from logits or from hidden states and the lm_head."""

from pyfast_dpo.logprobs.fused import (
    FusedPreferenceLoss,
    FusedUnpairedLoss,
    fused_dpo_loss,
    fused_ipo_loss,
    fused_kto_loss,
)
from pyfast_dpo.logprobs.fused_linear import (
    fused_linear_dpo_loss,
    fused_linear_ipo_loss,
    fused_linear_kto_loss,
)
from pyfast_dpo.logprobs.fused_policy import FusedPolicyLoss, fused_linear_policy_loss
from pyfast_dpo.logprobs.linear import (
    FusedLinearLoss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from pyfast_dpo.logprobs.logits import sequence_logps, token_logps
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.logprobs.statistics import LinearStatistics

__all__ = [
    "CompletionRows",
    "FusedLinearLoss",
    "FusedPolicyLoss",
    "FusedPreferenceLoss",
    "FusedUnpairedLoss",
    "LinearStatistics",
    "fused_dpo_loss",
    "fused_ipo_loss",
    "fused_kto_loss",
    "fused_linear_dpo_loss",
    "fused_linear_ipo_loss",
    "fused_linear_kto_loss",
    "fused_linear_loss",
    "fused_linear_policy_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
]
