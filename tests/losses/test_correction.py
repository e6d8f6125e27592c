"""Weights for tokens of another engine, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pyfast_dpo import policy_loss, sampling_correction

# Two sequences of three tokens: ratios 2, 2, 1 (product 4) and 1/2, 1, 1 (product 1/2).
RATIOS = torch.tensor([[2.0, 2.0, 1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "mode, clip_max, expected",
    [
        ("token_truncate", 1.5, [[1.5, 1.5, 1], [0.5, 1, 1]]),
        ("token_mask", 1.5, [[0, 0, 1], [0.5, 1, 1]]),
        ("token_mask", 3.0, [[2, 2, 1], [0.5, 1, 1]]),
        ("sequence_truncate", 3.0, [[3, 3, 3], [0.5] * 3]),
        ("sequence_mask", 3.0, [[0, 0, 0], [0.5] * 3]),
    ],
)
def test_modes_by_hand(mode, clip_max, expected) -> None:
    old = torch.full((2, 3), -1.0, dtype=torch.float64)
    sampling = old - RATIOS.log()
    rows = sampling_correction(old, sampling, mode=mode, clip_max=clip_max)
    assert rows.tolist() == [pytest.approx(row) for row in expected]
    packed = sampling_correction(
        old.flatten(), sampling.flatten(), mode=mode, clip_max=clip_max, counts=torch.tensor([3, 3])
    )
    assert torch.equal(packed, rows.flatten())


def test_padding_takes_no_part() -> None:
    mask = torch.tensor([[True, False]])
    weights = sampling_correction(
        torch.tensor([[-1.0, math.nan]]), torch.tensor([[-2.0, 7.0]]), mask=mask, clip_max=10.0
    )
    assert weights.tolist() == [[pytest.approx(math.e), 1.0]]


def test_it_weighs_the_loss_of_the_policy_and_not_the_penalty() -> None:
    logps, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.5]])
    weights = torch.tensor([[0.5, 2.0]])
    common = {"normalizer": 1, "reference_logps": reference, "beta": 0.7, "loss_type": "reinforce"}
    plain = policy_loss(logps, None, torch.ones(1), **common)
    weighed = policy_loss(logps, None, torch.ones(1), importance_sampling_ratio=weights, **common)
    penalty = 0.7 * plain.kl
    torch.testing.assert_close(
        weighed.token_losses - penalty, weights * (plain.token_losses - penalty)
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"mode": "tis"}, "sampling_correction: mode must be one of"),
        ({"clip_max": 0}, "sampling_correction: clip_max must be positive"),
        ({"sampling_logps": torch.ones(2, 2)}, "sampling_logps must have the shape"),
        ({"counts": torch.tensor([3, 3])}, "counts go with old_logps"),
    ],
)
def test_mistakes_are_named(change, words) -> None:
    good = {"old_logps": torch.ones(2, 3), "sampling_logps": torch.ones(2, 3)}
    sampling_correction(**good)
    with pytest.raises(ValueError, match=words):
        sampling_correction(**good | change)
