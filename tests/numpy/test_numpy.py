"""pyfast_dpo.numpy against formulas written out by hand in NumPy."""

import math

import numpy as np
import pytest
import torch

import pyfast_dpo.numpy as dpo_np
from pyfast_dpo import preference_loss, unpaired_loss
from pyfast_dpo.losses.table import PAIR_LOSS_NAMES, PAIR_LOSSES


def logprob_by_hand(logits, tokens, mask):
    z = logits.astype(np.float64)
    peak = z.max(-1, keepdims=True)
    logp = z - peak - np.log(np.exp(z - peak).sum(-1, keepdims=True))
    return (np.take_along_axis(logp, tokens[..., None], -1)[..., 0] * mask).sum(-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(np.float64, 1e-12), (np.float32, 2e-5), (np.float16, 2e-5)],
    ids=["float64", "float32", "float16: exact from the same rounded logits"],
)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1003], ids="V={}".format)
def test_sequence_logprob_equals_the_formula(rng, dtype, tolerance, vocab):
    logits = (rng.normal(size=(3, 5, vocab)) * 4).astype(dtype)
    tokens = rng.integers(0, vocab, (3, 5))
    mask = rng.random((3, 5)) < 0.6
    result = dpo_np.compute_sequence_logprob(logits, tokens, mask)
    assert result.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(result, logprob_by_hand(logits, tokens, mask), atol=tolerance)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda z: z[:, ::2], id="strided positions are read in place"),
        pytest.param(lambda z: z[::-1], id="negative strides"),
        pytest.param(lambda z: z.astype(">f4"), id="foreign byte order"),
        pytest.param(lambda z: np.asfortranarray(z), id="rows that are not contiguous"),
        pytest.param(lambda z: np.broadcast_to(z[:1], z.shape), id="broadcast rows"),
    ],
)
def test_layout_does_not_change_the_result(rng, view):
    logits = view(rng.normal(size=(4, 6, 33)).astype(np.float32))
    tokens = rng.integers(0, 33, logits.shape[:2])
    mask = np.ones(tokens.shape)
    plain = np.array(logits, dtype=np.float32, order="C")
    np.testing.assert_array_equal(
        dpo_np.compute_sequence_logprob(logits, tokens, mask),
        dpo_np.compute_sequence_logprob(plain, tokens, mask),
    )


def test_one_sequence_gives_one_number(rng):
    logits, tokens = rng.normal(size=(5, 9)), rng.integers(0, 9, 5)
    result = dpo_np.compute_sequence_logprob(logits, tokens, np.ones(5, bool))
    assert result.shape == ()
    np.testing.assert_allclose(result, logprob_by_hand(logits, tokens, np.ones(5)), rtol=1e-12)


def test_masked_positions_are_not_read(rng):
    logits, tokens = rng.normal(size=(2, 4, 9)), rng.integers(0, 9, (2, 4))
    mask = np.array([[1, 0, 1, 0], [0, 0, 0, 0]])
    expected = dpo_np.compute_sequence_logprob(logits, tokens, mask)
    logits[mask == 0], tokens[mask == 0] = np.nan, -7
    np.testing.assert_array_equal(dpo_np.compute_sequence_logprob(logits, tokens, mask), expected)
    assert expected[1] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_dpo_loss_and_gradient_equal_the_formula(rng, smoothing, dtype):
    logps = [(-50 + 5 * rng.normal(size=6)).astype(dtype) for _ in range(4)]
    beta = 0.3
    chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in logps)
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    losses = -(1 - smoothing) * np.log(sigmoid(h)) - smoothing * np.log(sigmoid(-h))
    slope = beta * (smoothing - sigmoid(-h)) / 6
    loss, metrics, grad_chosen, grad_rejected = dpo_np.dpo_loss(
        *logps, beta, label_smoothing=smoothing
    )
    rtol = 1e-10 if dtype == np.float64 else 1e-4
    assert loss == pytest.approx(losses.mean(), rel=rtol)
    np.testing.assert_allclose(grad_chosen, slope, rtol=rtol, atol=1e-7)
    np.testing.assert_array_equal(grad_rejected, -grad_chosen)
    assert metrics["rewards/margins"] == pytest.approx(h.mean(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((h > 0).mean())
    assert metrics["logps/chosen"] == pytest.approx(chosen.mean())


def test_ipo_loss_and_gradient_equal_the_formula(rng):
    logps = [-2 + 0.5 * rng.normal(size=4) for _ in range(4)]
    distance = (logps[0] - logps[2]) - (logps[1] - logps[3]) - 1 / (2 * 0.2)
    loss, _, grad_chosen, grad_rejected = dpo_np.ipo_loss(*logps, 0.2)
    assert loss == pytest.approx((distance**2).mean(), rel=1e-12)
    np.testing.assert_allclose(grad_chosen, 2 * distance / 4, rtol=1e-12)
    np.testing.assert_allclose(grad_rejected, -2 * distance / 4, rtol=1e-12)


def test_kto_loss_and_gradient_equal_the_formula(rng):
    policy, reference = -40 + 3 * rng.normal(size=5), -40 + 3 * rng.normal(size=5)
    desirable = np.array([True, False, True, True, False])
    beta, kl, w_up, w_down = 0.2, 0.7, 1.3, 0.8
    sign, weight = np.where(desirable, 1, -1), np.where(desirable, w_up, w_down)
    h = sign * beta * (policy - reference - kl)
    loss, metrics, gradient = dpo_np.kto_loss(
        policy, desirable, reference, beta, kl=kl, desirable_weight=w_up, undesirable_weight=w_down
    )
    assert loss == pytest.approx((weight * (1 - sigmoid(h))).mean(), rel=1e-12)
    np.testing.assert_allclose(
        gradient, -weight * sign * beta * sigmoid(h) * sigmoid(-h) / 5, rtol=1e-12
    )
    assert metrics["kl"] == kl
    assert metrics["rewards/chosen"] == pytest.approx(beta * (policy - reference)[desirable].mean())


@pytest.mark.parametrize("pairs", [1, 3, 7, 1000])
def test_policy_equal_to_reference_gives_ln_2_exactly(rng, pairs):
    logps = rng.normal(size=pairs) * 50
    assert dpo_np.dpo_loss(logps, logps + 1, logps, logps + 1, 0.1).loss == math.log(2)


def test_nothing_in_gives_zero_out():
    empty = np.zeros(0)
    loss, metrics, grad_chosen, _ = dpo_np.dpo_loss(empty, empty, empty, empty, 0.1)
    assert loss == 0 and grad_chosen.shape == (0,) and set(metrics.values()) == {0.0}


ONES = np.ones(3)
BAD_CALLS = [
    (lambda: dpo_np.dpo_loss(ONES, ONES, ONES, ONES, 0), ValueError, ["dpo_loss", "beta", "0"]),
    (
        lambda: dpo_np.dpo_loss(ONES, ONES, ONES, ONES, 0.1, label_smoothing=0.5),
        ValueError,
        ["label_smoothing", "0.5"],
    ),
    (
        lambda: dpo_np.ipo_loss(ONES, ONES, np.ones(2), ONES),
        ValueError,
        ["ipo_loss", "ref_chosen_logp", "[2]"],
    ),
    (
        lambda: dpo_np.dpo_loss(ONES, np.array(["a"] * 3), ONES, ONES),
        TypeError,
        ["policy_rejected_logp", "<U1"],
    ),
    (
        lambda: dpo_np.kto_loss(ONES, ONES, ONES, kl=0.0),
        TypeError,
        ["kto_loss", "is_desirable", "float64"],
    ),
    (
        lambda: dpo_np.kto_loss(ONES, ONES > 0, ONES, kl=float("nan")),
        ValueError,
        ["kto_loss", "kl", "nan"],
    ),
    (
        lambda: dpo_np.compute_sequence_logprob(np.ones((2, 3, 4)), np.full((2, 3), 4), np.ones((2, 3))),
        ValueError,
        ["tokens", "[0, 4)", "got 4 at [0, 0]", "6 such"],
    ),
    (
        lambda: dpo_np.compute_sequence_logprob(np.ones((2, 3, 4), int), np.ones((2, 3), int), np.ones((2, 3))),
        TypeError,
        ["logits", "int64"],
    ),
    (
        lambda: dpo_np.compute_sequence_logprob(np.ones((2, 3, 4)), np.ones((2, 3)), np.ones((2, 3))),
        TypeError,
        ["tokens", "float64"],
    ),
    (
        lambda: dpo_np.compute_sequence_logprob(np.ones((2, 3, 4)), np.ones((2, 2), int), np.ones((2, 2))),
        ValueError,
        ["tokens", "[2, 3]", "[2, 2]"],
    ),
    (
        lambda: dpo_np.compute_sequence_logprob(np.ones((2, 3, 4)), np.ones((2, 3), int), np.full((2, 3), 0.5)),
        ValueError,
        ["mask", "0 and 1"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# --- every loss, against the torch functions -------------------------------------------------------

LOSS_OPTIONS = {"exo_pair": {"label_smoothing": 0.1}, "bco_pair": {"bco_shift": 0.3}}
SUMS = {
    "sum": (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0]}),
    "rpo": ("sigmoid", {"rpo_alpha": 0.5, "label_smoothing": 0.2}),
    "divergence": ("robust", {"f_divergence_type": "js_divergence"}),
}
EVERY_LOSS = {name: (name, LOSS_OPTIONS.get(name, {})) for name in PAIR_LOSS_NAMES} | SUMS


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("loss_type, options", EVERY_LOSS.values(), ids=EVERY_LOSS)
def test_every_pair_loss_is_the_torch_function_and_its_gradient(rng, loss_type, options, dtype):
    logps = [-4 * rng.random(6).astype(dtype) for _ in range(4)]
    tensors = {f"{side}_lengths": rng.integers(0, 5, 6) for side in ("chosen", "rejected")}
    if "margins" in PAIR_LOSSES[loss_type if isinstance(loss_type, str) else "sft"].options:
        tensors["margins"] = rng.random(6).astype(dtype)
    result = dpo_np.preference_loss(*logps, 0.3, loss_type=loss_type, **tensors, **options)
    leaves = [torch.from_numpy(logp).requires_grad_() for logp in logps[:2]]
    expected = preference_loss(
        *leaves,
        *(torch.from_numpy(logp) for logp in logps[2:]),
        loss_type=loss_type,
        beta=0.3,
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
        **options,
    )
    loss = expected.losses.double().mean()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    tolerance = 1e-12 if dtype == np.float64 else 1e-6
    assert result.loss == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
    for ours, true in zip(result[2:], grads, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, true.numpy(), rtol=10 * tolerance, atol=tolerance)
    rewards = expected.chosen_rewards.double(), expected.rejected_rewards.double()
    assert result.metrics["rewards/chosen"] == pytest.approx(rewards[0].mean().item(), rel=1e-6)
    accuracy = (rewards[0] > rewards[1]).double().mean().item()
    assert result.metrics["rewards/accuracies"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "loss_type, constant",
    [("kto", {"kl": 0.4}), ("apo_zero_unpaired", {}), ("bco", {"bco_shift": 0.2})],
)
def test_every_unpaired_loss_is_the_torch_function_and_its_gradient(rng, loss_type, constant):
    policy, ref = (-4 * rng.random(6) for _ in range(2))
    desirable = np.arange(6) < 4
    options = {"desirable_weight": 0.7, "undesirable_weight": 1.5, **constant}
    result = dpo_np.unpaired_loss(policy, desirable, ref, 0.3, loss_type=loss_type, **options)
    leaf = torch.from_numpy(policy).requires_grad_()
    expected = unpaired_loss(
        leaf,
        torch.from_numpy(desirable),
        torch.from_numpy(ref),
        loss_type=loss_type,
        beta=0.3,
        **options,
    )
    (grad,) = torch.autograd.grad(expected.losses.mean(), leaf)
    assert result.loss == pytest.approx(expected.losses.mean().item(), rel=1e-12)
    np.testing.assert_allclose(result.grad_policy, grad.numpy(), rtol=1e-12)
    assert ("kl" in result.metrics) == (loss_type == "kto")


def test_reward_loss_by_hand(rng):
    chosen, rejected, margins = rng.normal(size=(3, 5))
    result = dpo_np.reward_loss(chosen, rejected, margins=margins, center_rewards_coefficient=0.1)
    losses = -np.log(sigmoid(chosen - rejected - margins)) + 0.1 * (chosen + rejected) ** 2
    assert result.loss == pytest.approx(losses.mean(), rel=1e-12)
    slope = -sigmoid(-(chosen - rejected - margins))
    np.testing.assert_allclose(result.grad_chosen, (slope + 0.2 * (chosen + rejected)) / 5)
    np.testing.assert_allclose(result.grad_rejected, (-slope + 0.2 * (chosen + rejected)) / 5)
    loss, grad_chosen, grad_rejected = result
    assert (loss, len(grad_chosen), len(grad_rejected)) == (result.loss, 5, 5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: dpo_np.preference_loss(ONES, ONES, loss_type="dpo"), ["loss_type", "'dpo'"]),
        (lambda: dpo_np.preference_loss(ONES, ONES, ONES), ["ref_chosen_logp", "ref_rejected_logp"]),
        (lambda: dpo_np.preference_loss(ONES, ONES, chosen_lengths=ONES), ["chosen_lengths", "rejected_lengths"]),
        (lambda: dpo_np.preference_loss(ONES, ONES, margins=np.ones(2)), ["margins", "[2]"]),
        (lambda: dpo_np.preference_loss(ONES, ONES, loss_type="bco_pair", bco_shift=math.inf), ["bco_shift", "inf"]),
        (lambda: dpo_np.unpaired_loss(ONES, ONES > 0, loss_type="bco", kl=0.1), ["kl", "'bco'"]),
        (lambda: dpo_np.reward_loss(ONES, np.ones(1)), ["rejected must", "chosen"]),
        (lambda: dpo_np.reward_loss(ONES, ONES, center_rewards_coefficient=-1), ["center_rewards_coefficient", "-1"]),
    ],
)  # fmt: skip
def test_options_are_checked_by_name(call, words):
    with pytest.raises(ValueError, match="_loss: ") as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
