"""Weights for tokens that another engine has sampled, whose log-probs are not quite the policy's."""

from __future__ import annotations

import torch
from torch import Tensor

from pyfast_dpo.losses.policy import token_layout
from pyfast_dpo.ops.checks import check_choice, check_number, check_tensor, describe
from pyfast_dpo.ops.dtypes import to_statistics_dtype

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampling_correction(
    old_logps: Tensor,
    sampling_logps: Tensor,
    *,
    mode: str = "sequence_mask",
    clip_max: float = 3.0,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """pi_trainer / pi_engine of sampled tokens, bounded: the `importance_sampling_ratio` of `policy_loss`.

    Args:
        old_logps: `[S, T]` with `mask`, or `[N]` with `counts`: log-probs at sampling by the trainer's model.
        sampling_logps: of that shape, those that the engine reported.
        mode: "token_truncate": the ratio of the token, at most clip_max (TIS, Yao et al. 2025); "token_mask": 0
            above clip_max (as IcePop); "sequence_truncate", "sequence_mask": the same for the product of the
            sequence's ratios, one weight for all its tokens.
        clip_max: > 0.

    Returns:
        The shape of old_logps, float32 (float64 when an input is float64), no gradient; 1 where nothing is scored.

    Raises:
        TypeError, ValueError: types, shapes, devices, mode, clip_max.
    """
    name = "sampling_correction"
    check_choice(name, "mode", mode, MODES)
    check_number(name, "clip_max", clip_max)
    if not clip_max > 0:
        raise ValueError(f"{name}: clip_max must be positive, got {clip_max}")
    check_tensor(name, "old_logps", old_logps)
    check_tensor(name, "sampling_logps", sampling_logps)
    if sampling_logps.shape != old_logps.shape or sampling_logps.device != old_logps.device:
        raise ValueError(
            f"{name}: sampling_logps must have the shape and device of old_logps, {describe(old_logps)}, got "
            f"{describe(sampling_logps)}"
        )
    lengths, flat_mask = token_layout(name, "old_logps", old_logps, mask, counts)
    ours, theirs = to_statistics_dtype(
        old_logps.detach().flatten(), sampling_logps.detach().flatten()
    )
    assert ours is not None and theirs is not None
    difference = ours - theirs
    if flat_mask is not None:
        difference = torch.where(flat_mask, difference, 0.0)
    if mode.startswith("sequence"):
        owner = torch.arange(lengths.shape[0], device=ours.device).repeat_interleave(
            lengths, output_size=ours.shape[0]
        )
        sums = torch.zeros(lengths.shape[0], dtype=torch.float64, device=ours.device)
        difference = sums.index_add(0, owner, difference.double()).to(ours.dtype)[owner]
    ratios = difference.exp()
    if mode.endswith("truncate"):
        weights = ratios.clamp(max=clip_max)
    else:
        weights = torch.where(ratios > clip_max, 0.0, ratios)
    if flat_mask is not None:
        weights = torch.where(flat_mask, weights, 1.0)
    return weights.view(old_logps.shape)
