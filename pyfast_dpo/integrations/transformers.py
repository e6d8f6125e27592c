"""Causal language models of transformers: their lm_head, and supervised fine-tuning through our head.

`patch_causal_lm_loss(model)` makes `model(..., labels=...)` return the same mean cross-entropy without a logits
matrix: scored rows only, three matrix products (two where the head is frozen) instead of logits and their
gradient in memory. transformers' Trainer and hand-written loops need no other change.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.logprobs.linear import fused_linear_loss
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.model.causal_lm import causal_lm_of, head_of
from pyfast_dpo.model.ways import check_head


def patch_causal_lm_loss(model: Any) -> None:
    """Makes `model(..., labels=...)` compute its loss without logits, in training mode.

    The output's `loss` is the model's own: the mean of the negative log-probs of `labels`, shifted by one, or
    with `num_items_in_batch` their sum over that number; 0 where no label is scored. Its `logits` are None.
    In evaluation mode, without labels, or where a mixture of experts asks for its balancing loss, the model's
    own forward answers, logits included; `model(..., skip_logits=True)` or `False` decides for one call.
    A second call does nothing. Call it before the model is wrapped (DDP, FSDP) or compiled.

    Args:
        model: a causal language model of transformers, or a PEFT model around one, on its device.

    Raises:
        ValueError: the lm_head is no plain linear layer (LoRA on it, quantized), or the model does something to
            its logits that its configuration does not tell: a few tokens are tried.
    """
    inner = causal_lm_of(model)
    if _is_patched(inner):
        return
    check_head("patch_causal_lm_loss", inner)
    # Something else, such as accelerate's hooks, may have put a forward of its own there.
    inner._pyfast_dpo_forward = vars(inner).get("forward", inner.forward)
    inner._pyfast_dpo_had_forward = "forward" in vars(inner)

    # With the signature of the model's own: the Trainer reads there which columns and options it takes.
    # A method, not a closure over the model: copy.deepcopy binds it to the copy.
    @functools.wraps(type(inner).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    inner.forward = MethodType(forward, inner)


def unpatch_causal_lm_loss(model: Any) -> None:
    """Undoes `patch_causal_lm_loss`; does nothing to a model that is not patched."""
    inner = causal_lm_of(model)
    if not _is_patched(inner):
        return
    if inner._pyfast_dpo_had_forward:
        inner.forward = inner._pyfast_dpo_forward
    else:
        del inner.forward
    del inner._pyfast_dpo_forward, inner._pyfast_dpo_had_forward


def _is_patched(model: Any) -> bool:
    return "_pyfast_dpo_forward" in vars(model)


def _forward(
    model: Any,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    scored = labels if shift_labels is None else shift_labels
    balanced = kwargs.get("output_router_logits")
    if balanced is None:
        balanced = getattr(model.config, "output_router_logits", False)
    skip = model.training if skip_logits is None else skip_logits
    if scored is None or balanced or kwargs.get("logits_to_keep") or not skip:
        given = {
            "labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch,
        }  # fmt: skip
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return model._pyfast_dpo_forward(*args, **kwargs)

    from transformers.modeling_outputs import CausalLMOutputWithPast

    as_tuple = kwargs.pop("return_dict", None) is False
    outputs = model.base_model(*args, **{**kwargs, "use_cache": False})
    loss = causal_lm_loss(
        outputs.last_hidden_state, head_of(model), scored, shift_labels is None, num_items_in_batch
    )
    if as_tuple:
        return (loss,)
    return CausalLMOutputWithPast(
        loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions
    )


def causal_lm_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    shift: bool,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of labels `[..., T]` from hidden states `[..., T, H]`, float32."""
    rows = CompletionRows.from_labels(labels.to(hidden.device), shift=shift)
    count = rows.index.shape[0]
    total = max(count, 1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(total, Tensor):
        total = total.to(hidden.device)
    # Tokens do not depend on each other here: each is a sequence, so that chunks fill the budget exactly.
    rows = CompletionRows(rows.index, rows.targets, torch.ones_like(rows.index), (1,) * count)
    return fused_linear_loss(
        hidden,
        head.weight,
        None,
        lambda logps, units: -logps.sum() / total,
        group=1,
        rows=rows,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    ).loss
