"""What reward functions say of responses, and what is reported of a rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo.data.templates import tokenizer_of
from pyfast_dpo.rewards import RewardFunctions
from pyfast_dpo.trainers.online.rollouts import Response

# Columns that a reward function gets under these names anyway, or that are not the user's.
OWN_COLUMNS = ("prompt", "prompt_ids", "completion", "completions", "completion_ids")


class Table(NamedTuple):
    """Of all responses of a rollout, over all processes, N in all: groups one after the other."""

    per_function: Tensor  # [N, F]; NaN: no reward
    rewards: Tensor  # [N] the weighted sum; NaN: none
    kl: Tensor  # [N] sum of sampled - reference log-probs; 0 without a reference in the reward
    lengths: Tensor  # [N] tokens
    truncated: Tensor  # [N] bool


def score(
    functions: RewardFunctions,
    rows: Sequence[Mapping[str, Any]],
    responses: Sequence[Response],
    processing_class: Any,
    extras: Mapping[str, Any],
) -> tuple[list[Any], Tensor]:
    """(completions as text or messages, rewards `[n, F]`) of responses, whose prompts are rows of the data."""
    texts = tokenizer_of(processing_class).batch_decode(
        [each.ids for each in responses], skip_special_tokens=True
    )
    own = [rows[each.group] for each in responses]
    prompts = [row["prompt"] for row in own]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row if name not in OWN_COLUMNS)
    columns = {name: [row.get(name) for row in own] for name in names}
    rewards = functions.score(
        prompts, completions, [each.ids for each in responses], columns, **extras
    )
    return completions, rewards


def without_variance(rewards: Tensor) -> Tensor:
    """`[P]` bool, of rewards `[P, G]`: all that a group has are equal."""
    least = torch.where(rewards.isnan(), torch.inf, rewards).amin(-1)
    most = torch.where(rewards.isnan(), -torch.inf, rewards).amax(-1)
    return (most - least).nan_to_num(nan=0.0) <= 0


def metrics_of(table: Table, names: Sequence[str], group: int) -> dict[str, float]:
    """Under TRL's names."""
    lengths = table.lengths.double()
    ended = lengths[~table.truncated]
    found = {
        "reward": _mean(table.rewards),
        "reward_std": _deviation(table.rewards),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(table.truncated.double().mean()),
        "completions/mean_terminated_length": float(ended.mean()) if len(ended) else 0.0,
        "completions/min_terminated_length": float(ended.min()) if len(ended) else 0.0,
        "completions/max_terminated_length": float(ended.max()) if len(ended) else 0.0,
    }
    if group > 1:
        flat = without_variance(table.rewards.view(-1, group))
        found["frac_reward_zero_std"] = float(flat.double().mean())
    for name, column in zip(names, table.per_function.T, strict=True):
        found[f"rewards/{name}/mean"] = _mean(column)
        found[f"rewards/{name}/std"] = _deviation(column)
    return {name: value for name, value in found.items() if value == value}


def _mean(values: Tensor) -> float:
    return float(values.double().nanmean())


def _deviation(values: Tensor) -> float:
    """Of a sample (n - 1), of the values that are there."""
    there = values[~values.isnan()].double()
    return float(there.std()) if len(there) > 1 else 0.0
