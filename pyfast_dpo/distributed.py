"""Log-probs of several ranks that share a vocabulary."""

from pyfast_dpo.logprobs.vocab_parallel import (
    vocab_parallel_sequence_logps,
    vocab_parallel_token_logps,
)

__all__ = ["vocab_parallel_sequence_logps", "vocab_parallel_token_logps"]
