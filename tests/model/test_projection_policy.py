"""Policy losses and log-probs of tokens by a projection: from hidden states and from a model's own logits alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyfast_dpo import CompletionRows, policy_loss

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from pyfast_dpo.logprobs.head import Head
from pyfast_dpo.model.projections import LinearProjection, LogitsProjection, Projection

LENGTHS = (2, 0, 4)
ROWS = CompletionRows(
    torch.tensor([1, 2, 1, 6, 7, 8]), torch.tensor([3, 0, 7, 7, 2, 10]), torch.tensor(LENGTHS), LENGTHS
)  # fmt: skip
CAP, SCALE = 4.0, 0.5


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, 5, 8], weight, and the logits of the head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).requires_grad_()
    return hidden, weight, CAP * torch.tanh(SCALE * (hidden @ weight.T) / CAP)


@pytest.fixture(params=["hidden states", "logits"])
def case(request) -> tuple[Projection, list[Tensor], Tensor]:
    hidden, weight, logits = problem()
    if request.param == "logits":
        return LogitsProjection(logits), [hidden, weight], logits
    return LinearProjection(hidden, Head(weight, None, SCALE, CAP)), [hidden, weight], logits


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits.flatten(0, -2)[ROWS.index] / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_tokens_are_at_the_temperature(case, temperature):
    projection, leaves, logits = case
    expected = log_probs(logits, temperature).gather(1, ROWS.targets[:, None])[:, 0]
    ours = projection.token_logps(ROWS, temperature)
    torch.testing.assert_close(ours, expected)
    for mine, true in zip(
        torch.autograd.grad(ours.sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    if temperature == 1.0:
        sums = torch.stack([part.sum() for part in expected.split(list(LENGTHS))])
        torch.testing.assert_close(projection.sequence_logps(ROWS), sums)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_a_policy_loss_is_that_of_the_log_probs(case, bonus, per_token, level):
    projection, leaves, logits = case
    logps = log_probs(logits, 0.6)
    tokens = logps.gather(1, ROWS.targets[:, None])[:, 0]
    generator = torch.Generator().manual_seed(1)
    near = tokens.detach() + 0.3 * torch.randn(6, generator=generator)
    given: dict[str, Any] = {
        "advantages": torch.randn(6 if per_token else 3, generator=generator), "old_logps": near,
        "reference_logps": near + 0.1, "beta": 0.2, "loss_type": "grpo", "level": level, "normalizer": 2.0,
    }  # fmt: skip
    plain = dict(given)
    result = policy_loss(
        tokens, plain.pop("old_logps"), plain.pop("advantages"), counts=ROWS.counts, **plain
    )
    entropy = -(logps.exp() * logps).sum(-1)
    expected = result.loss - bonus * entropy.sum() / 5.0
    ours = projection.policy_loss(
        ROWS, temperature=0.6, entropy_coef=bonus, entropy_normalizer=5.0, **given
    )
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(ours.logps, tokens.detach())
    for field in ("token_losses", "ratios", "kl"):
        torch.testing.assert_close(getattr(ours, field), getattr(result, field))
    assert torch.equal(ours.clipped, result.clipped)
    torch.testing.assert_close(ours.statistics.entropy, entropy.detach())
    for mine, true in zip(
        torch.autograd.grad(ours.loss, leaves, retain_graph=True),
        torch.autograd.grad(expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"entropy_coef": 0.1}, "entropy_coef 0.1 needs entropy_normalizer"),
        ({"advantages": torch.ones(5)}, r"advantages must have shape \[3\]"),
        ({"beta": 0.1}, "beta 0.1 needs reference_logps"),
    ],
)
def test_mistakes_are_named(case, change, words):
    given: dict[str, Any] = {"advantages": torch.ones(3), "normalizer": 1.0}
    case[0].policy_loss(ROWS, **given)
    with pytest.raises(ValueError, match=f"policy_loss: {words}"):
        case[0].policy_loss(ROWS, **given | change)
