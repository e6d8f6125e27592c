"""Weights of tokens and pairs, BCO's running shift, and the Bradley-Terry loss, against loops written out."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers import bits, name_of, random_labels, random_logits

from pyfast_dpo import (
    BcoShift,
    ld_row_weights,
    ld_token_weights,
    reward_loss,
    token_logps,
    wpo_weights,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- length-desensitised DPO ------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_tokens_past_the_shorter_response_weigh_alpha(alpha, shift) -> None:
    labels = random_labels(6, 9, vocab=11, ignored=0.4)
    labels[1] = -100  # an empty response: nothing of the other is shared
    logits = random_logits(6, 9, 11)
    logps = token_logps(logits, labels, shift=shift)
    weights = ld_token_weights(labels, alpha, shift=shift)
    assert weights.shape == labels.shape and weights.dtype == torch.float32
    targets = [row[1:] if shift else row for row in labels.tolist()]
    scored = [[t for t, label in enumerate(row) if label != -100] for row in targets]
    for i, positions in enumerate(scored):
        shared = min(len(positions), len(scored[(i + 3) % 6]))
        head, tail = positions[:shared], positions[shared:]
        expected = logps[i, head].sum() + alpha * logps[i, tail].sum()
        torch.testing.assert_close((logps[i] * weights[i]).sum(), expected)
    rows = torch.cat([weights[i, positions] for i, positions in enumerate(scored)])
    assert torch.equal(rows, ld_row_weights([len(positions) for positions in scored], alpha))


@pytest.mark.parametrize("call", [
    lambda alpha: ld_token_weights(torch.zeros(2, 3).long(), alpha),
    lambda alpha: ld_row_weights([1, 2], alpha),
])  # fmt: skip
@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_outside_0_to_1_is_refused(call, alpha) -> None:
    with pytest.raises(ValueError, match=r"ld_alpha must be in \[0, 1\]"):
        call(alpha)


# --- WPO --------------------------------------------------------------------------------------------


def test_weight_is_the_mean_token_probability_against_that_of_a_sample() -> None:
    logits, labels = random_logits(4, 6, 13), random_labels(4, 6, vocab=13, ignored=0.3)
    labels[2] = -100
    logps = token_logps(logits, labels).requires_grad_()
    sums = torch.log_softmax(logits, -1).exp().square().sum(-1).log()
    mask = labels != -100
    weights = wpo_weights(logps, sums, mask=mask)
    assert not weights.requires_grad
    for i in range(4):
        gaps = (logps - sums)[i, mask[i]].detach()
        expected = gaps.mean().exp() if len(gaps) else torch.tensor(1.0)
        torch.testing.assert_close(weights[i], expected)
    torch.testing.assert_close(wpo_weights(logps[mask], sums[mask], counts=mask.sum(1)), weights)


@pytest.mark.parametrize("options, words", [
    ({}, "mask or counts"),
    ({"mask": torch.ones(2, 3), "counts": torch.ones(2)}, "mask or counts"),
    ({"mask": torch.ones(3, 2)}, r"\[2, 3\]"),
    ({"counts": torch.ones(2).long()}, r"\[R\]"),
])  # fmt: skip
def test_layout_of_the_tokens_is_checked(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        wpo_weights(torch.zeros(2, 3), torch.zeros(2, 3), **options)


# --- BCO's shift ------------------------------------------------------------------------------------


def test_shift_is_the_mean_of_all_rewards_and_survives_a_checkpoint() -> None:
    shift = BcoShift()
    assert shift.value == 0.0
    first, second = torch.tensor([1.0, 2.0, 6.0], requires_grad=True), torch.tensor([-4.0])
    assert float(shift.update(first)) == 3.0
    assert float(shift.update(second)) == 1.25
    assert not torch.as_tensor(shift.value).requires_grad
    resumed = BcoShift()
    resumed.load_state_dict(shift.state_dict())
    assert float(resumed.update(torch.tensor([5.0]))) == 2.0


# --- Bradley-Terry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("coefficient", [0.0, 0.05])
@pytest.mark.parametrize("with_margins", [False, True])
def test_reward_loss_and_its_gradient(with_margins, coefficient, impl, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rewards = [(5 * torch.randn(8, generator=generator)).to(dtype) for _ in range(2)]
    rewards[0][:2] = torch.tensor([1e4, -1e4])
    rewards[1][:2] = torch.tensor([-1e4, 1e4])
    margins = torch.rand(8, generator=generator).to(dtype) if with_margins else None
    leaves = [r.clone().requires_grad_() for r in rewards]
    losses = reward_loss(
        *leaves, margins=margins, center_rewards_coefficient=coefficient, impl=impl
    )
    grads = torch.autograd.grad(losses.sum(), leaves)
    wide = [r.double().requires_grad_() for r in rewards]
    h = wide[0] - wide[1] - (0 if margins is None else margins.double())
    truth = -torch.nn.functional.logsigmoid(h) + coefficient * (wide[0] + wide[1]) ** 2
    expected = torch.autograd.grad(truth.sum(), wide)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), truth, rtol=2e-6, atol=2e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6  # the gradient has the dtype of its input
    for ours, true in zip(grads, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), true, rtol=tolerance, atol=tolerance)


def test_equal_rewards_cost_ln_2_to_the_bit() -> None:
    rewards = torch.randn(5)
    ln2 = torch.full((5,), math.log(2))
    assert torch.equal(bits(reward_loss(rewards, rewards.clone())), bits(ln2))


@pytest.mark.parametrize("options, words", [
    ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient"),
    ({"margins": torch.zeros(2)}, r"margins must have shape \[3\]"),
    ({"margins": torch.zeros(3, requires_grad=True)}, "margins requires grad"),
])  # fmt: skip
def test_reward_options_are_checked(options, words) -> None:
    with pytest.raises(ValueError, match=f"reward_loss: {words}"):
        reward_loss(torch.zeros(3), torch.zeros(3), **options)


ROWS = torch.zeros(5)
# counts, beside 5 rows; beyond them segment_reduce would read what lies behind
BAD_COUNTS = [
    (torch.tensor([2, 4]), "must not be negative and add up to the 5 rows"),
    (torch.tensor([2, 2]), "must not be negative and add up to the 5 rows"),
    (torch.tensor([7, -2]), "must not be negative"),
    (torch.tensor([2, 3], dtype=torch.int32), "must be int64"),
    (torch.tensor([2.0, 3.0]), "must be int64"),
    ([2, 3], "must be a torch.Tensor"),
    (torch.tensor([2, 3], device="meta"), "must be on the device of token_logps"),
]


@pytest.mark.parametrize("counts, words", BAD_COUNTS, ids=[row[1] for row in BAD_COUNTS])
def test_counts_that_are_not_those_of_the_rows_are_refused(counts, words) -> None:
    with pytest.raises((TypeError, ValueError), match=f"wpo_weights: counts {words}"):
        wpo_weights(ROWS, ROWS, counts=counts)


@pytest.mark.parametrize("lengths", [5, None, [1.0, 2.0], [1, -1], torch.tensor([1, 2]), "12"])
def test_lengths_that_are_no_numbers_of_tokens_are_refused(lengths) -> None:
    with pytest.raises(TypeError, match="ld_row_weights: lengths must be a list"):
        ld_row_weights(lengths, 0.5)


@pytest.mark.parametrize(
    "labels, options, words",
    [
        (torch.zeros(2, 3), {}, "labels must be int64"),
        (torch.zeros(2, 3).long(), {"shift": "x"}, "shift must be True or False"),
        (torch.zeros(2, 3).long(), {"ignore_index": None}, "ignore_index must be an int"),
    ],
)
def test_labels_and_their_options_are_checked(labels, options, words) -> None:
    with pytest.raises(TypeError, match=f"ld_token_weights: {words}"):
        ld_token_weights(labels, 0.5, **options)
