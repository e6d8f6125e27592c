"""Prompts in, responses with their log-probs out: engines behind one protocol, token ids on both sides."""

from pyfast_dpo.ops.extras import require

require("transformers", "pyfast_dpo.rollout")

from pyfast_dpo.rollout.engine import (  # noqa: E402
    Completion,
    Engine,
    RolloutError,
    Sampling,
    check_completions,
)
from pyfast_dpo.rollout.http_engine import HTTPEngine  # noqa: E402
from pyfast_dpo.rollout.transformers_engine import TransformersEngine  # noqa: E402

__all__ = [
    "Completion",
    "Engine",
    "HTTPEngine",
    "RolloutError",
    "Sampling",
    "TransformersEngine",
    "check_completions",
]
