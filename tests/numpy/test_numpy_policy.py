"""PPO on NumPy arrays: numbers worked out by hand, and what is refused."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from pyfast_dpo.numpy import PPOBuffer, policy, ppo_loss


def filled(rewards, values, dones, **options) -> PPOBuffer:
    buffer = PPOBuffer(**options)
    for reward, value, done in zip(rewards, values, dones, strict=True):
        buffer.add(None, 0, reward, value, -1.0, done)
    return buffer


@pytest.mark.parametrize(
    "gamma, lam, expected",
    [
        (1.0, 1.0, [0.5, 0.4, 0.3]),
        (1.0, 0.0, [0.1, 0.1, 0.3]),
        (1.0, 0.95, [0.46575, 0.385, 0.3]),
        (0.99, 0.95, [0.446828575, 0.37515, 0.3]),
    ],
)
def test_advantages_of_one_episode(gamma, lam, expected) -> None:
    buffer = filled([0, 0, 1], [0.5, 0.6, 0.7], [0, 0, 1], gamma=gamma, lam=lam)
    advantages, returns = buffer.compute_advantages()
    np.testing.assert_allclose(advantages, expected, rtol=1e-12)
    np.testing.assert_allclose(returns, np.add(expected, [0.5, 0.6, 0.7]), rtol=1e-12)


def test_an_episode_that_is_done_has_nothing_after_it() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    buffer = filled([1, 0, 2, 0, 1], values, [0, 1, 0, 0, 1], gamma=0.9, lam=0.8)
    advantages, returns = buffer.compute_advantages(last_value=100.0)  # not reached
    np.testing.assert_allclose(advantages, [0.936, -0.2, 2.3552, 0.41, 0.5])
    np.testing.assert_allclose(returns, [1.036, 0, 2.6552, 0.81, 1])


def test_an_episode_that_goes_on_is_worth_its_next_value() -> None:
    advantages, returns = filled([0.0], [0.5], [0], gamma=1.0).compute_advantages(last_value=2.0)
    assert (advantages.tolist(), returns.tolist()) == ([1.5], [2.0])


def test_an_empty_buffer_has_empty_advantages() -> None:
    advantages, returns = PPOBuffer().compute_advantages()
    assert len(advantages) == len(returns) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ppo_loss_with_every_branch(dtype) -> None:
    new = np.log(np.array([1.5, 0.5, 1.5, 0.5, 1.1])).astype(dtype)
    advantages = np.array([1, 1, -1, -1, 1], dtype)
    loss, gradient = ppo_loss(new, np.zeros(5, dtype), advantages)
    assert gradient.dtype == dtype
    assert loss == pytest.approx(-0.1, rel=1e-6)
    np.testing.assert_allclose(gradient, [0, -0.1, 0.3, 0, -0.22], rtol=1e-6, atol=1e-12)


def test_the_gradient_is_that_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    new, old, advantages = rng.normal(size=(3, 7)) * [[0.3], [0.3], [1.0]]
    _, gradient = ppo_loss(new, old, advantages, clip_ratio=0.25)
    for i, step in enumerate(np.eye(7) * 1e-6):
        slope = (
            ppo_loss(new + step, old, advantages, 0.25).loss
            - ppo_loss(new - step, old, advantages, 0.25).loss
        ) / 2e-6
        assert slope == pytest.approx(gradient[i], abs=1e-8)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ppo_loss(np.ones(2), np.ones(3), np.ones(2)), "ppo_loss: old_log_probs must be one-dimensional"),
        (lambda: ppo_loss(np.ones(2), np.ones(2), np.ones(2), 1.0), "ppo_loss: clip_ratio must be in"),
        (lambda: ppo_loss(np.ones(2), np.ones(2), np.ones(2), -0.1), "ppo_loss: clip_ratio"),
        (lambda: PPOBuffer(gamma=1.5), "PPOBuffer: gamma must be in"),
        (lambda: PPOBuffer(lam=-0.1), "PPOBuffer: lam must be in"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_example_of_the_docstring() -> None:
    results = doctest.testmod(policy)
    assert results.attempted >= 3 and results.failed == 0
