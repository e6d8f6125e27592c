"""Advantages, their estimation over steps, and the critic's loss, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from pyfast_dpo import gae, group_advantages, rloo_advantages, value_loss

NAN = math.nan


@pytest.mark.parametrize(
    "rewards, scale, expected",
    [
        ([1, 0, 0, 0], "group", [1.4997, -0.4999, -0.4999, -0.4999]),
        ([1, 1, 0, 0, 0, 0, 0, 0], "group", [1.6198] * 2 + [-0.5399] * 6),
        ([5, 0], "group", [0.7071, -0.7071]),  # ±0.7071 whatever the gap
        ([500, 0], "group", [0.7071, -0.7071]),
        ([1, 0, 0, 0], "none", [0.75, -0.25, -0.25, -0.25]),
        ([2, 2, 2], "group", [0, 0, 0]),  # no variance, no advantage
        ([1, NAN, 0], "none", [0.5, 0, -0.5]),  # without a reward: outside of the mean
        ([NAN, NAN], "group", [0, 0]),
        ([3, NAN], "group", [0, 0]),  # alone
        ([3], "group", [0]),
    ],
)
def test_group_advantages(rewards, scale, expected) -> None:
    result = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale)
    assert result.tolist() == pytest.approx(expected, abs=1e-4)


def test_batch_scale_divides_every_group_by_the_deviation_of_all_rewards() -> None:
    rewards = torch.tensor([[1.0, 0.0], [7.0, 3.0]], dtype=torch.float64)
    deviation = rewards.flatten().std()
    expected = torch.tensor([[0.5, -0.5], [2.0, -2.0]], dtype=torch.float64) / (deviation + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), expected)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
        ([1, NAN, 0], [1, 0, -1]),
        ([4, NAN], [0, 0]),  # no sibling
        ([2, 2], [0, 0]),
    ],
)
def test_rloo_advantages(rewards, expected) -> None:
    assert rloo_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist() == pytest.approx(
        expected
    )


def test_advantages_of_a_group_add_up_to_nothing_and_rloo_is_g_over_g_minus_one() -> None:
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, scale=scale).sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(
        rloo_advantages(rewards), 5 / 4 * group_advantages(rewards, scale="none")
    )


def test_equal_rewards_have_advantages_of_exactly_zero() -> None:
    """Not what rounding of a float32 mean leaves: such groups are skipped."""
    rewards = torch.full((3, 7), 0.1)
    assert not group_advantages(rewards).any() and not rloo_advantages(rewards).any()


IMPLS = pytest.mark.parametrize("impl", ["fused", "torch"])
ROW = {"rewards": [0.0, 0.0, 1.0], "values": [0.5, 0.6, 0.7]}
LONG = {"rewards": [1.0, 0, 2, 0, 1], "values": [0.1, 0.2, 0.3, 0.4, 0.5]}


@IMPLS
@pytest.mark.parametrize(
    "row, gamma, lam, extra, expected",
    [
        (ROW, 1.0, 1.0, {}, [0.5, 0.4, 0.3]),  # the return less the value
        (ROW, 1.0, 0.0, {}, [0.1, 0.1, 0.3]),  # the error of one step
        (ROW, 1.0, 0.95, {}, [0.46575, 0.385, 0.3]),
        (ROW, 0.99, 0.95, {}, [0.446828575, 0.37515, 0.3]),
        (LONG, 0.9, 0.8, {"dones": [0, 1, 0, 0, 1]}, [0.936, -0.2, 2.3552, 0.41, 0.5]),
        (ROW, 1.0, 1.0, {"last_values": 2.0}, [2.5, 2.4, 2.3]),
        ({"rewards": [0.0, 9, 0, 1], "values": [0.5, 9, 0.6, 0.7]}, 1.0, 0.95, {"mask": [1, 0, 1, 1]},
         [0.46575, 0, 0.385, 0.3]),  # a step that is none is passed over
    ],
)  # fmt: skip
def test_generalized_advantages(row, gamma, lam, extra, expected, impl) -> None:
    options = {
        key: torch.tensor([value], dtype=torch.float64 if key == "last_values" else torch.bool)
        for key, value in extra.items()
    }
    rewards, values = (
        torch.tensor([row[key]], dtype=torch.float64) for key in ("rewards", "values")
    )
    result = gae(rewards, values, gamma=gamma, lam=lam, impl=impl, **options)
    assert result.advantages[0].tolist() == pytest.approx(expected, abs=1e-12)
    kept = options.get("mask", torch.ones_like(values, dtype=torch.bool))
    torch.testing.assert_close(result.returns[kept], (result.advantages + values)[kept])


def test_the_kernel_is_the_loop_on_random_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 37, 29, generator=generator, dtype=torch.float64)
    dones, mask = torch.rand(2, 37, 29, generator=generator) < torch.tensor([0.1, 0.8]).view(
        2, 1, 1
    )
    last = torch.randn(37, generator=generator, dtype=torch.float64)
    options = {"gamma": 0.97, "lam": 0.9, "dones": dones, "mask": mask, "last_values": last}
    ours, truth = (gae(rewards, values, impl=impl, **options) for impl in ("fused", "torch"))
    torch.testing.assert_close(ours.advantages, truth.advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.returns, truth.returns, rtol=1e-12, atol=1e-12)
    opcheck(torch.ops.pyfast_dpo.gae.default, (rewards, values, last, dones, mask, 0.97, 0.9))


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 0.0, NAN], dtype=torch.float64, requires_grad=True)
    old, returns = (
        torch.tensor(row, dtype=torch.float64) for row in ([1.0, 1.0, 0.5, 0], [2.0, 1.0, 0.0, 1])
    )
    mask = torch.tensor([True, True, True, False])
    loss = value_loss(values, old, returns, mask=mask, normalizer=3)
    # (1-2)^2; max((2-1)^2, (1.2-1)^2); max(0, (0.3-0)^2)
    assert float(loss.detach()) == pytest.approx((1 + 1 + 0.09) / 2 / 3)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.tolist() == pytest.approx([-1 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: group_advantages(torch.ones(2, 2), scale="std"), ValueError, "group_advantages: scale"),
        (lambda: group_advantages(torch.ones(2).long()), TypeError, "group_advantages: rewards must be floating"),
        (lambda: rloo_advantages([1.0]), TypeError, "rloo_advantages: rewards"),
        (lambda: gae(torch.ones(3), torch.ones(3)), ValueError, "gae: rewards must be floating point \\[B, T\\]"),
        (lambda: gae(torch.ones(1, 3), torch.ones(1, 4)), ValueError, "gae: values must have shape \\[1, 3\\]"),
        (lambda: gae(torch.ones(1, 3), torch.ones(1, 3), gamma=1.1), ValueError, "gae: gamma must be in"),
        (lambda: gae(torch.ones(1, 3), torch.ones(1, 3), mask=torch.ones(1, 3)), TypeError, "gae: mask must be bool"),
        (lambda: value_loss(torch.ones(2), None, torch.ones(3), normalizer=1), ValueError, "value_loss: returns"),
        (lambda: value_loss(torch.ones(2), None, torch.ones(2), normalizer=0), ValueError, "value_loss: normalizer"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
