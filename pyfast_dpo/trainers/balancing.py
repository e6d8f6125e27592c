"""The balancing loss of mixtures of experts, over the tokens of a batch as often as sequences have them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.layout.batches import Batch
from pyfast_dpo.model.causal_lm import body_of
from pyfast_dpo.model.projections import Projection


class Balancing(NamedTuple):
    """Adds `coefficient` times the loss by which the model's own training balances its experts
    (Switch Transformer, arXiv 2101.03961, equations 4 to 6)."""

    coefficient: float
    loss_function: Callable[..., Tensor]  # transformers' load_balancing_loss_func
    experts: int
    experts_of_a_token: int

    def loss(self, projection: Projection, batch: Batch) -> Tensor:
        """A prompt that stands once for several sequences counts once for each, padding never."""
        uses = batch["token_uses"] if "token_uses" in batch else batch["attention_mask"]
        return self.loss_function(
            projection.router_logits, self.experts, self.experts_of_a_token, uses
        )


def balancing_of(name: str, model: Any, coefficient: float | None) -> Balancing | None:
    """What a model asks for, or None where it has no experts to balance or the coefficient is 0.

    Args:
        name: of the trainer, for errors.
        model: a causal language model of `transformers`.
        coefficient: None for the model's own, `config.router_aux_loss_coef`.

    Raises:
        ValueError: a coefficient is given for a model that does not show what its routers do, and how it
            balances them.

    Warns:
        UserWarning: the model's own coefficient asks for that; then it is trained without.
    """
    wanted = coefficient
    if wanted is None:
        wanted = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if not wanted:
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, top = (getattr(model, n, None) for n in ("num_experts", "num_experts_per_tok"))
    shown = _router_logits(model)
    if shown is not None and function is not None and experts and top:
        return Balancing(wanted, function, experts, top)
    kind = type(model).__name__
    if coefficient:
        lacks = (
            "returns no router logits"
            if shown is None
            else "does not show how it balances its experts"
        )
        raise ValueError(
            f"{name}: router_aux_loss_coef must be None or 0 for {kind}, which {lacks}, got {coefficient}"
        )
    if _has_experts(model):
        warnings.warn(
            f"{name}: the experts of {kind} are not balanced while it is trained: its configuration asks for a "
            f"weight of {wanted}, but it does not show what its routers do; router_aux_loss_coef=0 says that this "
            "is meant",
            stacklevel=3,
        )
    return None


@torch.no_grad()
def _router_logits(model: Any) -> Any:
    """Those of a few tokens, of every layer with experts; None where the model shows none."""
    body = body_of(model)
    parameter = next(body.parameters())
    if parameter.device.type == "meta":
        return () if hasattr(model.config.get_text_config(), "output_router_logits") else None
    tokens = torch.arange(1, 5, device=parameter.device).unsqueeze(0)
    was_training = body.training
    body.eval()
    try:
        outputs = body(input_ids=tokens, use_cache=False, output_router_logits=True)
    except Exception:  # it does not know the keyword
        return None
    finally:
        body.train(was_training)
    shown = getattr(outputs, "router_logits", None)
    return shown if shown and all(isinstance(layer, Tensor) for layer in shown) else None


def _has_experts(model: Any) -> bool:
    return any("experts" in name.split(".") for name, _ in model.named_modules())
