"""The balancing loss of mixtures of experts, over the tokens of a batch as often as sequences have them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from pyfast_dpo.layout.batches import Batch
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
        ValueError: a coefficient for a model without experts, or whose balancing loss is not known.
    """
    config = model.config.get_text_config()
    has_experts = hasattr(config, "output_router_logits")
    if coefficient and not has_experts:
        raise ValueError(
            f"{name}: router_aux_loss_coef must be None or 0 for {type(model).__name__}, which returns no "
            f"router logits, got {coefficient}"
        )
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if not has_experts or not coefficient:
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, top = (getattr(model, n, None) for n in ("num_experts", "num_experts_per_tok"))
    if function is None or experts is None or top is None:
        raise ValueError(
            f"{name}: router_aux_loss_coef is {coefficient}, but {type(model).__name__} does not show how it "
            "balances its experts; set router_aux_loss_coef=0 to train without"
        )
    return Balancing(coefficient, function, experts, top)
