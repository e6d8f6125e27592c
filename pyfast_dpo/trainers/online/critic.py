"""The critic: the expected return after every token, from a hidden state and one linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pyfast_dpo.layout.batches import completion_rows, model_inputs
from pyfast_dpo.model.causal_lm import causal_lm_of, head_of
from pyfast_dpo.model.projections import LinearProjection, Projection

NAME = "critic"  # the submodule of the policy, which so has its parameters in the optimizer, under DDP, on its device
FILE = "critic.safetensors"


class Critic(nn.Module):
    """Values of the scored rows of a batch: what is expected before each token is written.

    Args:
        model: a causal language model whose hidden states are read; None: the policy's own, whose call pays nothing.
        width: of the hidden states.
    """

    def __init__(self, model: nn.Module | None, width: int) -> None:
        super().__init__()
        self.model = model
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)  # the first advantages are the rewards to go
        nn.init.zeros_(self.score.bias)

    def forward(self, inputs: dict[str, Any], projection: Projection) -> Tensor:
        """`[R]` float32, within the policy's call that hands out the projection."""
        rows = completion_rows(inputs)
        if self.model is not None:
            states = self.model(**model_inputs(inputs), project=lambda own: own.states(rows))
        else:
            states = projection.states(rows)
        return self.score(states.to(self.score.weight.dtype)).squeeze(-1).float()


def add_critic(name: str, policy: Any, model: nn.Module | None) -> Critic:
    """Makes a critic a part of the policy.

    Raises:
        ValueError: the critic is the policy itself; a policy that has something of that name.
    """
    if model is policy:
        raise ValueError(
            f"{name}: value_model must be a model of its own, or None for the policy's hidden states, got the policy"
        )
    if hasattr(policy, NAME):
        raise ValueError(f"{name}: the policy has something called {NAME!r} already")
    head = head_of(causal_lm_of(policy if model is None else model))
    critic = Critic(model, head.weight.shape[1]).to(head.weight.device)
    policy.add_module(NAME, critic)
    return critic


def check_has_states(name: str, projection: Projection) -> None:
    """Raises ValueError where a model hands out its logits, which are no states."""
    if not isinstance(projection, LinearProjection):
        raise ValueError(
            f"{name}: the critic reads hidden states, which this model does not hand out; give a value_model"
        )


def without_critic(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policy's own weights."""
    return {key: value for key, value in state.items() if f"{NAME}." not in key}


def save_critic(critic: Critic, folder: Path) -> None:
    save_model(critic, str(folder / FILE))


def load_critic(critic: Critic, folder: Path) -> None:
    load_model(critic, str(folder / FILE))
