"""What some preference losses do beside the loss itself: weights of tokens and of pairs, a running reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyfast_dpo.ops.checks import (
    check_label_options,
    check_number,
    check_same_device,
    check_tensor,
    describe,
)
from pyfast_dpo.ops.dtypes import LOGITS_DTYPES
from pyfast_dpo.ops.labels import shifted_labels


def ld_token_weights(
    labels: Tensor, ld_alpha: float, *, shift: bool = False, ignore_index: int = -100
) -> Tensor:
    """Weights of the tokens of stacked pairs for length-desensitised DPO (LD-DPO, Liu et al. 2024).

    The log-prob of a response becomes the sum over as many tokens as both responses have plus ld_alpha times
    the sum over the rest: `(token_logps(logits, labels) * weights).sum(-1)`, for the policy and for the
    reference.

    Args:
        labels: `[2P, T]`, chosen rows first; `ignore_index` is not scored.
        ld_alpha: in [0, 1]; 1 is the plain log-prob, 0 ignores what is longer than the other response.
        shift: as in `token_logps`.

    Returns:
        `[2P, T]` float32, aligned with `token_logps`; 0 where nothing is scored.
    """
    name = "ld_token_weights"
    check_tensor(name, "labels", labels)
    check_label_options(name, shift, ignore_index)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels must be int64, got {describe(labels)}")
    _check_ld_alpha(name, ld_alpha)
    if labels.dim() != 2 or labels.shape[0] % 2:
        raise ValueError(
            f"{name}: labels must have shape [2P, T], chosen rows first, got {describe(labels)}"
        )
    scored = (shifted_labels(labels, ignore_index) if shift else labels) != ignore_index
    counts = scored.sum(1)
    shared = torch.minimum(*counts.chunk(2)).repeat(2)
    head = scored.cumsum(1) <= shared[:, None]
    return torch.where(head, 1.0, float(ld_alpha)) * scored


def ld_row_weights(
    lengths: Sequence[int], ld_alpha: float, *, device: torch.device | str | None = None
) -> Tensor:
    """The same for rows that follow one another, as in `CompletionRows`.

    Args:
        lengths: 2P numbers of scored tokens, chosen first, on the host (`CompletionRows.lengths`).

    Returns:
        `[sum(lengths)]` float32: the `row_weights` of `fused_linear_loss`.
    """
    name = "ld_row_weights"
    _check_ld_alpha(name, ld_alpha)
    if not isinstance(lengths, (list, tuple)) or any(type(n) is not int or n < 0 for n in lengths):
        raise TypeError(f"{name}: lengths must be a list of numbers of tokens, got {lengths!r}")
    if len(lengths) % 2:
        raise ValueError(
            f"{name}: lengths must be of 2P sequences, chosen first, got {len(lengths)}"
        )
    pairs = len(lengths) // 2
    weights = torch.full((sum(lengths),), float(ld_alpha))
    start = 0
    for i, length in enumerate(lengths):
        weights[start : start + min(length, lengths[(i + pairs) % len(lengths)])] = 1.0
        start += length
    return weights if device is None else weights.to(device)


def wpo_weights(
    token_logps: Tensor,
    log_sum_sq_probs: Tensor,
    *,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Weight of every sequence for WPO (Zhou et al. 2024, eq. 2, with weights aligned by the expected probability):

        exp(mean over the tokens of (log p(token) - log sum_v p(v)^2))

    A pair's loss is multiplied by the weights of both its responses:
    `losses * weights[:P] * weights[P:]`.

    Args:
        token_logps, log_sum_sq_probs: either `[S, T]` with `mask [S, T]`, true where a token is scored; or
            `[R]`, the rows of all sequences one after the other, with `counts [S]`, their numbers.
        log_sum_sq_probs: the logarithm of the sum of the squared probabilities, as in `LinearStatistics`.

    Returns:
        `[S]` without gradient; 1 for a sequence without tokens.
    """
    name = "wpo_weights"
    check_tensor(name, "token_logps", token_logps)
    check_tensor(name, "log_sum_sq_probs", log_sum_sq_probs)
    if (mask is None) == (counts is None):
        raise ValueError(f"{name}: pass mask or counts, one of the two")
    if log_sum_sq_probs.shape != token_logps.shape:
        raise ValueError(
            f"{name}: log_sum_sq_probs must have shape {list(token_logps.shape)}, "
            f"got {describe(log_sum_sq_probs)}"
        )
    scored_or_counts, given = ("mask", mask) if counts is None else ("counts", counts)
    for argument, value in (("log_sum_sq_probs", log_sum_sq_probs), (scored_or_counts, given)):
        check_tensor(name, argument, value)
        assert isinstance(value, Tensor)
        check_same_device(name, "token_logps", token_logps, argument, value)
    for argument, value in (("token_logps", token_logps), ("log_sum_sq_probs", log_sum_sq_probs)):
        if value.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name}: {argument} must be floating point, got {describe(value)}")
    gaps = (token_logps - log_sum_sq_probs).detach()
    if mask is not None:
        if mask.shape != token_logps.shape or mask.dim() != 2:
            raise ValueError(
                f"{name}: mask must have the shape [S, T] of token_logps, {list(token_logps.shape)}, "
                f"got {describe(mask)}"
            )
        scored = mask.bool()
        counts = scored.sum(1)
        totals = gaps.masked_fill(~scored, 0.0).sum(1)
    else:
        assert counts is not None
        if counts.dim() != 1 or token_logps.dim() != 1:
            raise ValueError(
                f"{name}: counts must have shape [S] and token_logps [R], "
                f"got {describe(counts)} and {describe(token_logps)}"
            )
        if counts.dtype != torch.int64:
            raise TypeError(f"{name}: counts must be int64, got {describe(counts)}")
        if counts.device.type == "cpu" and (
            bool((counts < 0).any()) or int(counts.sum()) != token_logps.shape[0]
        ):
            raise ValueError(
                f"{name}: counts must not be negative and add up to the {token_logps.shape[0]} rows of "
                f"token_logps, got {counts.tolist()}"
            )
        # deterministic, and with unsafe it does not wait for the device to check the counts
        totals = torch.segment_reduce(gaps, "sum", lengths=counts, unsafe=True)
    return (totals / counts.clamp(min=1)).exp()


class BcoShift:
    """The running shift of BCO (Jung et al. 2024): the mean of all the rewards seen so far.

        shift = BcoShift()
        delta = shift.update(rewards)  # of this batch, both kinds of responses
        loss = preference_loss(..., loss_type="bco_pair", bco_shift=delta)

    `update` never waits for the device. In distributed training, pass the gathered rewards.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    @property
    def value(self) -> Tensor | float:
        """The mean so far, float64; 0.0 before the first reward."""
        return self.total / self.count if self.count else 0.0

    def update(self, rewards: Tensor) -> Tensor | float:
        """Adds rewards beta * (policy - reference), of any shape, and returns the new mean."""
        check_tensor("BcoShift.update", "rewards", rewards)
        self.total = self.total + rewards.detach().sum(dtype=torch.float64)
        self.count += rewards.numel()
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"total": float(self.total), "count": float(self.count)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.total, self.count = float(state["total"]), int(state["count"])


def _check_ld_alpha(function: str, ld_alpha: float) -> None:
    check_number(function, "ld_alpha", ld_alpha)
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"{function}: ld_alpha must be in [0, 1], got {ld_alpha}")
