"""pyfast_dpo: fused kernels for preference optimization (DPO, IPO, KTO), for torch and NumPy."""

from pyfast_dpo.logprobs import (
    CompletionRows,
    FusedLinearLoss,
    LinearStatistics,
    fused_dpo_loss,
    fused_ipo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    fused_linear_ipo_loss,
    fused_linear_kto_loss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
    sequence_logps,
    token_logps,
)
from pyfast_dpo.losses import (
    BcoShift,
    kto_kl,
    kto_loss,
    ld_row_weights,
    ld_token_weights,
    preference_loss,
    reward_loss,
    unpaired_loss,
    wpo_weights,
)
from pyfast_dpo.ops.build import build_info

__version__ = "0.1.0"

__all__ = [
    "BcoShift",
    "CompletionRows",
    "FusedLinearLoss",
    "LinearStatistics",
    "__version__",
    "build_info",
    "fused_dpo_loss",
    "fused_ipo_loss",
    "fused_kto_loss",
    "fused_linear_dpo_loss",
    "fused_linear_ipo_loss",
    "fused_linear_kto_loss",
    "fused_linear_loss",
    "kto_kl",
    "kto_loss",
    "ld_row_weights",
    "ld_token_weights",
    "linear_sequence_logps",
    "linear_token_logps",
    "preference_loss",
    "reward_loss",
    "sequence_logps",
    "token_logps",
    "unpaired_loss",
    "wpo_weights",
]
