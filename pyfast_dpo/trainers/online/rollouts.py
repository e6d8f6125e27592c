"""Responses of the policy with everything that is known of them, and what a rollout keeps until it has been trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyfast_dpo.rollout import Completion


@dataclass
class Response:
    """One response to a prompt.

    Attributes:
        group: number of its prompt in the rollout; the responses to one prompt are a group.
        sampled_logps: `[T]` float32, by the engine that wrote it.
        truncated: it was cut at the most tokens.
        scored: False if it is not trained on.
        constants: what the loss takes of it beside its log-probs, by name: `[T]` of its tokens, or `[1]` of it as a
            whole. `advantages` is always there once it has been judged.
    """

    group: int
    prompt_ids: list[int]
    ids: list[int]
    sampled_logps: Tensor
    truncated: bool
    scored: bool = True
    constants: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, group: int, prompt_ids: list[int], completion: Completion) -> Response:
        return cls(
            group,
            prompt_ids,
            list(completion.ids),
            torch.tensor(completion.logprobs, dtype=torch.float32),
            completion.finish_reason == "length",
        )

    @property
    def length(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) if self.scored else 0

    def teaches(self) -> bool:
        """Whether its advantage moves the policy."""
        return self.length > 0 and bool(self.constants["advantages"].any())


@dataclass
class Rollout:
    """The responses of a rollout that are this process's, groups one after the other.

    Attributes:
        step: optimizer steps that the policy had made when it wrote them.
    """

    responses: list[Response]
    step: int

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"step": self.step, "responses": [asdict(each) for each in self.responses]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        return cls([Response(**each) for each in state["responses"]], state["step"])


def groups_of(responses: Sequence[Response]) -> list[list[Response]]:
    """Consecutive responses to one prompt together."""
    groups: list[list[Response]] = []
    for response in responses:
        if not groups or groups[-1][0].group != response.group:
            groups.append([])
        groups[-1].append(response)
    return groups


def spread(groups: Sequence[list[Response]], batches: int) -> list[list[Response]]:
    """Whole groups over a number of batches, of about as many tokens each; empty ones come first.

    The longest group goes to the batch with the fewest tokens so far: the same for the same groups."""

    def tokens(group: list[Response]) -> int:
        return len(group[0].prompt_ids) + sum(len(each.ids) for each in group)

    parts: list[list[Response]] = [[] for _ in range(batches)]
    loads = [0] * batches
    for group in sorted(groups, key=tokens, reverse=True):
        place = loads.index(min(loads))
        parts[place] += group
        loads[place] += tokens(group)
    return sorted(parts, key=bool)
