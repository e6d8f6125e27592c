"""The fused losses are the composition of sequence_logps and the losses, value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _helpers import DTYPES, bits, name_of, random_labels, random_logits, statistics_dtype
from torch import Tensor

from pyfast_dpo import (
    CompletionRows,
    fused_dpo_loss,
    fused_ipo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    kto_loss,
    preference_loss,
    sequence_logps,
)

pytestmark = pytest.mark.usefixtures("one_thread")
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
VOCAB = 53
IS_DESIRABLE = torch.tensor([True, False, True, True, False, False])


def batch(dtype: torch.dtype = torch.float32, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """(policy logits, reference logits, labels)"""
    labels = random_labels(rows, 7, vocab=VOCAB, ignored=0.3)
    logits = [random_logits(rows, 7, VOCAB, dtype=dtype, seed=seed) for seed in (3, 4)]
    return logits[0].requires_grad_(), logits[1], labels


def mean_loss(losses: Tensor) -> Tensor:
    return losses.double().mean().to(losses.dtype)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@all_dtypes
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reference", ["logps", "logits", "none"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_pair_loss_is_the_composition(loss_type, reference, shift, dtype) -> None:
    policy, reference_logits, labels = batch(dtype)
    average = loss_type == "ipo"
    smoothing = 0.1 if loss_type == "sigmoid" else 0.0
    logps = sequence_logps(policy, labels, average=average, shift=shift)
    constants = sequence_logps(reference_logits, labels, average=average, shift=shift)
    given: dict[str, Any] = {"logps": {"reference_logps": constants}, "none": {}}.get(
        reference, {"reference_logits": reference_logits}
    )
    parts = [None, None] if reference == "none" else [constants[:3], constants[3:]]
    expected = preference_loss(
        logps[:3], logps[3:], *parts, loss_type=loss_type, beta=0.3, label_smoothing=smoothing
    )
    fused = fused_dpo_loss(
        policy,
        labels,
        **given,
        loss_type=loss_type,
        beta=0.3,
        label_smoothing=smoothing,
        shift=shift,
    )
    assert {t.dtype for t in fused} == {statistics_dtype(dtype)}
    assert torch.equal(fused.loss, mean_loss(expected.losses))
    assert torch.equal(fused.losses, expected.losses)
    assert torch.equal(fused.chosen_logps, logps[:3]) and torch.equal(
        fused.rejected_logps, logps[3:]
    )
    assert torch.equal(fused.chosen_rewards, expected.chosen_rewards)
    assert torch.equal(fused.rejected_rewards, expected.rejected_rewards)
    assert [name for name, t in fused._asdict().items() if t.requires_grad] == ["loss"]
    wanted = gradient_of(mean_loss(expected.losses), policy)
    gradient = gradient_of(fused.loss, policy)
    assert gradient.dtype == dtype and torch.equal(gradient, wanted) and gradient.any()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "loss_type, options, averaged",
    [
        ("simpo", {"simpo_gamma": 0.3}, True),
        ("orpo", {}, True),
        ("sigmoid_norm", {"label_smoothing": 0.1}, True),
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5]}, False),
        ("sigmoid", {"rpo_alpha": 0.5, "margins": torch.tensor([0.1, 0.2, 0.3])}, False),
        ("ipo", {"f_divergence_type": "forward_kl"}, False),  # divides after the divergence
        ("aot", {}, False),
    ],
    ids=str,
)
def test_losses_of_averages_see_averages_and_the_others_sums(loss_type, options, averaged, shift):
    policy, reference_logits, labels = batch(torch.float64)
    policy.data /= 20  # so that no reward leaves the middle of its curve
    sums, constants = (
        sequence_logps(z, labels, shift=shift) for z in (policy, reference_logits / 20)
    )
    targets = labels[:, 1:] if shift else labels
    lengths = (targets != -100).sum(1)
    expected = preference_loss(
        sums[:3], sums[3:], constants[:3], constants[3:], loss_type=loss_type,
        chosen_lengths=lengths[:3], rejected_lengths=lengths[3:], **options,
    )  # fmt: skip
    fused = fused_dpo_loss(
        policy,
        labels,
        reference_logits=reference_logits / 20,
        loss_type=loss_type,
        shift=shift,
        **options,
    )
    torch.testing.assert_close(fused.losses, expected.losses)
    logps = sums / lengths.clamp(min=1) if averaged else sums
    torch.testing.assert_close(fused.chosen_logps, logps[:3])
    wanted = gradient_of(mean_loss(expected.losses), policy)
    torch.testing.assert_close(gradient_of(fused.loss, policy), wanted)


FROM_HIDDEN: dict[
    str, dict[str, Any]
] = {  # each way in which pairs, lengths and batch come together
    "averages": {"loss_type": "simpo"},
    "sums_and_averages": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "margins": {"rpo_alpha": 0.3, "margins": torch.tensor([0.1, 0.2, 0.3])},
    "sorted_over_the_batch": {"loss_type": ["aot", "bco_pair"], "bco_shift": 0.1},
}


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("rows_at_once", [3, 1000])
@pytest.mark.parametrize("options", FROM_HIDDEN.values(), ids=FROM_HIDDEN)
def test_from_hidden_states_the_loss_is_the_one_from_logits(options, rows_at_once, by_rows) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = random_labels(6, 7, vocab=VOCAB, ignored=0.3)
    hidden, weight = (
        torch.randn(*shape, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((6, 7), (VOCAB,))
    )
    constants = -20 - torch.rand(6, generator=generator, dtype=torch.float64)
    given = {"reference_logps": constants, "beta": 0.3, **options}
    expected = fused_dpo_loss(hidden @ weight.T, labels, shift=True, **given)
    where: dict[str, Any] = {"labels": labels, "shift": True}
    if by_rows:
        where = {"rows": CompletionRows.from_labels(labels, shift=True)}
    budget = rows_at_once * VOCAB * 8
    result = fused_linear_dpo_loss(hidden, weight, max_chunk_bytes=budget, **where, **given)
    torch.testing.assert_close(list(result), list(expected))
    grads = torch.autograd.grad(result.loss, (hidden, weight))
    truth = torch.autograd.grad(expected.loss, (hidden, weight))
    torch.testing.assert_close(grads, truth)


def test_an_unknown_option_is_refused_by_name() -> None:
    policy, _, labels = batch()
    with pytest.raises(TypeError, match="fused_dpo_loss: unexpected keyword argument 'gamma'"):
        fused_dpo_loss(policy, labels, gamma=1.0)


@all_dtypes
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reference", ["logps", "logits", "none"])
def test_kto_is_the_composition(reference, shift, dtype) -> None:
    policy, reference_logits, labels = batch(dtype)
    logps = sequence_logps(policy, labels, shift=shift)
    constants = sequence_logps(reference_logits, labels, shift=shift)
    given: dict[str, Any] = {"logps": {"reference_logps": constants}, "none": {}}.get(
        reference, {"reference_logits": reference_logits}
    )
    weights = {"kl": 0.4, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    expected = kto_loss(logps, IS_DESIRABLE, None if reference == "none" else constants, **weights)
    fused = fused_kto_loss(policy, labels, IS_DESIRABLE, **given, shift=shift, **weights)
    assert torch.equal(fused.loss, mean_loss(expected.losses))
    assert torch.equal(fused.losses, expected.losses)
    assert torch.equal(fused.rewards, expected.rewards) and torch.equal(fused.logps, logps)
    assert [name for name, t in fused._asdict().items() if t.requires_grad] == ["loss"]
    wanted = gradient_of(mean_loss(expected.losses), policy)
    gradient = gradient_of(fused.loss, policy)
    assert gradient.dtype == dtype and torch.equal(gradient, wanted) and gradient.any()


def test_ipo_averages_over_the_tokens_by_default_and_sums_on_request() -> None:
    policy, reference_logits, labels = batch()
    given = {"reference_logits": reference_logits, "beta": 0.2}
    averaged = fused_ipo_loss(policy, labels, **given)
    summed = fused_ipo_loss(policy, labels, average=False, **given)
    assert torch.equal(averaged.chosen_logps, sequence_logps(policy, labels, average=True)[:3])
    assert torch.equal(summed.chosen_logps, sequence_logps(policy, labels)[:3])
    by_name = fused_dpo_loss(policy, labels, loss_type="ipo", **given)
    assert all(torch.equal(a, b) for a, b in zip(averaged, by_name, strict=True))
    by_name = fused_dpo_loss(policy, labels, loss_type="ipo", average=False, **given)
    assert all(torch.equal(a, b) for a, b in zip(summed, by_name, strict=True))
    sigmoid = fused_dpo_loss(policy, labels, average=True, **given)
    assert torch.equal(sigmoid.chosen_logps, averaged.chosen_logps)


@all_dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_policy_equal_to_reference_gives_ln_2_to_the_bit(smoothing, dtype) -> None:
    policy, _, labels = batch(dtype)
    result = fused_dpo_loss(
        policy, labels, reference_logits=policy.detach(), label_smoothing=smoothing
    )
    ln2 = torch.tensor(math.log(2), dtype=statistics_dtype(dtype))
    assert torch.equal(bits(result.loss), bits(ln2))
    assert (result.chosen_rewards == 0).all() and (result.rejected_rewards == 0).all()


CALLS = {
    "fused_dpo_loss": lambda z, y, **options: fused_dpo_loss(z, y, **options),
    "fused_ipo_loss": lambda z, y, **options: fused_ipo_loss(z, y, **options),
    "fused_kto_loss": lambda z, y, **options: fused_kto_loss(
        z, y, IS_DESIRABLE[: len(z)], kl=0.3, **options
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@all_dtypes
def test_inplace_gradient_is_the_same(dtype, call) -> None:
    policy, reference_logits, labels = batch(dtype)
    expected = gradient_of(call(policy, labels, reference_logits=reference_logits).loss, policy)
    leaf = policy.detach().clone().requires_grad_()
    result = call(leaf, labels, reference_logits=reference_logits, inplace_backward=True)
    gradient = gradient_of(result.loss, leaf)
    assert gradient.data_ptr() == leaf.data_ptr()
    assert torch.equal(bits(gradient), bits(expected))


@every_call
def test_reference_logits_stay_as_they_are(call) -> None:
    """The gradient may overwrite the policy's logits, never the reference's."""
    policy, reference_logits, labels = batch()
    before = reference_logits.clone()
    leaf = policy.detach().clone().requires_grad_()
    call(leaf, labels, reference_logits=reference_logits, inplace_backward=True).loss.backward()
    assert torch.equal(reference_logits, before)


@every_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_plain_torch_agrees(dtype, call) -> None:
    policy, reference_logits, labels = batch(dtype)
    results = [
        call(policy, labels, reference_logits=reference_logits, impl=impl)
        for impl in ("fused", "torch")
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
    gradients = [gradient_of(result.loss, policy) for result in results]
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=tolerance)


@every_call
def test_loss_scale_reaches_the_gradient(call) -> None:
    """Gradient scaling, accumulation: a power of two must be exact."""
    policy, _, labels = batch()
    plain = gradient_of(call(policy, labels).loss, policy)
    scaled = gradient_of(call(policy, labels).loss * 1024, policy)
    assert torch.equal(scaled, plain * 1024)


@every_call
def test_ignored_everything_has_zero_log_probs_and_no_gradient(call) -> None:
    policy, _, labels = batch()
    result = call(policy, torch.full_like(labels, -100))
    assert result.loss.isfinite()
    assert (gradient_of(result.loss, policy) == 0).all()


@every_call
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 0, 5)], ids=str)
def test_empty_batches(shape, impl, call) -> None:
    logits = torch.zeros(shape, requires_grad=True)
    result = call(logits, torch.zeros(shape[:2], dtype=torch.int64), impl=impl)
    result.loss.backward()
    assert result.loss.isfinite() and logits.grad.shape == shape
    assert shape[0] or result.loss.item() == 0


@every_call
def test_impossible_rejected_token_keeps_the_loss_finite(call) -> None:
    """A masked vocabulary that forbids a token of the last (rejected, undesirable) row."""
    if call is CALLS["fused_ipo_loss"]:
        pytest.skip("the square of an infinite distance is infinite")
    policy, _, labels = batch()
    with torch.no_grad():
        labels[-1, 0] = 5
        policy[-1, 0, 5] = -math.inf
    result = call(policy, labels)
    assert result.loss.isfinite()
    assert gradient_of(result.loss, policy).isfinite().all()


def test_one_pair_of_half_precision_trains() -> None:
    """A few steps of descent on the logits themselves raise the margin."""
    policy, reference_logits, labels = batch(torch.bfloat16, rows=2)
    logits = policy.detach().clone()
    losses = []
    for _ in range(5):
        leaf = logits.clone().requires_grad_()
        result = fused_dpo_loss(
            leaf, labels, reference_logits=reference_logits, inplace_backward=True
        )
        losses.append(result.loss.item())
        logits = logits - 20 * gradient_of(result.loss, leaf)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
