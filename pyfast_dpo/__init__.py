"""pyfast_dpo: fused kernels for preference optimization (DPO, IPO, KTO), for torch and NumPy."""

from pyfast_dpo._build import build_info
from pyfast_dpo.completion_rows import CompletionRows
from pyfast_dpo.functional import (
    kto_kl,
    kto_loss,
    preference_loss,
    reward_loss,
    sequence_logps,
    token_logps,
    unpaired_loss,
)
from pyfast_dpo.fused import fused_dpo_loss, fused_ipo_loss, fused_kto_loss
from pyfast_dpo.linear import (
    FusedLinearLoss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from pyfast_dpo.linear_losses import (
    fused_linear_dpo_loss,
    fused_linear_ipo_loss,
    fused_linear_kto_loss,
)
from pyfast_dpo.row_statistics import LinearStatistics
from pyfast_dpo.weighting import BcoShift, ld_row_weights, ld_token_weights, wpo_weights

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
