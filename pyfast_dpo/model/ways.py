"""Which layout and which head a model can take, found by trying them on a small batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.layout.attention import use_shared_prompt_attention
from pyfast_dpo.layout.batches import Collator, completion_rows, model_inputs
from pyfast_dpo.model.causal_lm import causal_lm_of, head_of
from pyfast_dpo.model.projections import take_projections

EXAMPLES = 2  # of the check
PROMPT_TOKENS, RESPONSE_TOKENS = 48, 24  # of each: the check costs a fraction of a step

# What two right ways of calling a model may differ by. The layouts, by the norm of the difference of their hidden
# states over the norm: float32 layouts differ by 1e-6. The heads, by the mean over the responses of nats a token:
# a half type's own logits are rounded by up to 0.06.
TOLERANCES = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 1e-3)}
HALF_TOLERANCES = 0.05, 0.1


class Ways(NamedTuple):
    """How a model is called."""

    shared_prompt: bool  # each prompt once, no padding; else one padded row a sequence
    own_logits: bool  # the whole logits matrix; else completion rows through the lm_head's weight


def choose_ways(
    name: str,
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    shared: Collator,
    padded: Collator,
    *,
    try_shared_prompt: bool,
    context: Callable[[], Any],
) -> Ways:
    """Prepares the model for the fastest way of calling it that gives the log-probs of the padded layout
    with the model's own logits.

    Args:
        name: of the trainer, for the warnings.
        model: on its device; a PEFT model or a causal language model.
        examples: `EXAMPLES` prepared ones; cut short, they are the batch of the check.
        shared, padded: collators of the two layouts.
        try_shared_prompt: False for the padded layout anyway.
        context: makes the context of a forward pass (autocast).

    Warns:
        UserWarning: what was not possible, why, and what it costs.
    """
    inner = causal_lm_of(model)
    short = [_shortened(example) for example in examples]
    device = next(inner.parameters()).device
    measured = bool(short) and device.type != "meta"
    with context():
        narrow = torch.is_autocast_enabled(device.type) or (
            device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        )
    layout_tolerance, head_tolerance = (
        HALF_TOLERANCES if narrow else TOLERANCES.get(inner.dtype, HALF_TOLERANCES)
    )
    was_training = model.training
    model.eval()

    @functools.cache  # both checks ask for the padded layout
    def scores(shared_prompt: bool, own_logits: bool) -> tuple[Tensor, Tensor]:
        """(hidden states or logits of the scored rows, log-probs a token of the responses)"""
        take_projections(inner, own_logits=own_logits)
        batch = (shared if shared_prompt else padded)(short)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        rows = completion_rows(batch)
        with torch.no_grad(), context():
            states, logps = model(
                **model_inputs(batch), project=lambda p: (p.states(rows), p.sequence_logps(rows))
            )
        return states.double(), logps / rows.counts.clamp(min=1)

    # Whatever a model of somebody else's raises, the other way remains.

    def against_head() -> str | None:
        try:
            head_of(inner)
            if not measured:
                return None
            difference = float((scores(False, False)[1] - scores(False, True)[1]).abs().mean())
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if difference <= head_tolerance:
            return None
        return f"its log-probs differ by {difference:.2g} nats a token from those of the model's own logits"

    def against_shared_prompt(own_logits: bool) -> str | None:
        try:
            use_shared_prompt_attention(inner)
            if not measured:
                return None
            truth, result = scores(False, own_logits)[0], scores(True, own_logits)[0]
            difference = float((result - truth).norm() / truth.norm())
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if difference <= layout_tolerance:
            return None
        return f"its hidden states differ by {difference:.2g} of their norm from those of the padded layout"

    try:
        reason = against_head()
        own_logits = reason is not None
        if own_logits:
            warnings.warn(
                f"{name}: the log-probs come from the model's own logits, which costs the memory of a logits "
                f"matrix, since its lm_head cannot be used by itself ({reason})",
                stacklevel=3,
            )
        reason = against_shared_prompt(own_logits) if try_shared_prompt else "not asked for"
        shared_prompt = reason is None
        if try_shared_prompt and not shared_prompt:
            warnings.warn(
                f"{name}: falling back to padded batches that repeat the prompt, since "
                f"{type(inner).__name__} does not take shared prompts ({reason})",
                stacklevel=3,
            )
    finally:
        model.train(was_training)
    take_projections(inner, own_logits=own_logits)
    return Ways(shared_prompt, own_logits)


def prepare_reference(model: Any, ways: Ways) -> None:
    """Makes a reference model callable in the same ways as the policy."""
    inner = causal_lm_of(model)
    take_projections(inner, own_logits=ways.own_logits)
    if ways.shared_prompt:
        use_shared_prompt_attention(inner)


def _shortened(example: Mapping[str, Any]) -> dict[str, Any]:
    short = dict(example)
    for name, value in example.items():
        if name == "prompt_ids":
            short[name] = value[-PROMPT_TOKENS:]
        elif name.endswith("_ids"):
            short[name] = value[:RESPONSE_TOKENS]
    return short
