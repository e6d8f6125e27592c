"""The loss table on the CPU: kernels, formulas in plain torch, autograd and finite differences agree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from _helpers import INF, NAN, assert_rule, bits
from torch import Tensor

from pyfast_dpo import kto_kl, kto_loss, preference_loss
from pyfast_dpo.losses import oracle
from pyfast_dpo.losses.mean import mean_of_losses
from pyfast_dpo.losses.table import PAIR_LOSSES, UNPAIRED_LOSSES
from pyfast_dpo.ops import _C

pytestmark = pytest.mark.usefixtures("one_thread")

STATISTICS = [torch.float64, torch.float32]
float_and_double = pytest.mark.parametrize("dtype", STATISTICS, ids=["float64", "float32"])
every_pair_loss = pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
BETAS = [0.01, 0.1, 1.0, 5.0]


def smoothings(loss_type: str) -> list[float]:
    return [0.0, 0.1, 0.49] if loss_type == "sigmoid" else [0.0]


def true_pair_loss(
    loss_type: str, chosen: Tensor, rejected: Tensor, beta: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss and its derivative by the chosen log-ratio in float64, by the papers' formulas."""
    chosen, rejected = chosen.double(), rejected.double()
    if loss_type == "ipo":
        distance = chosen - rejected - 1 / (2 * beta)
        return distance**2, 2 * distance
    assert loss_type == "sigmoid", f"write the formula of {loss_type!r} here"
    h = beta * (chosen - rejected)
    wins, loses = torch.nn.functional.logsigmoid(h), torch.nn.functional.logsigmoid(-h)
    loss = -((1 - smoothing) * wins + smoothing * loses)
    return loss, -beta * ((1 - smoothing) * torch.sigmoid(-h) - smoothing * torch.sigmoid(h))


def true_kto_loss(
    logratios: Tensor, is_desirable: Tensor, kl: float, beta: float, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    sign = torch.where(is_desirable, 1.0, -1.0).double()
    desirable, undesirable = torch.tensor(weights, dtype=torch.float64)
    weight = torch.where(is_desirable, desirable, undesirable)
    h = sign * beta * (logratios.double() - kl)
    slope = torch.sigmoid(h) * torch.sigmoid(-h)
    return weight * torch.sigmoid(-h), -weight * sign * beta * slope


# from the middle of the curve to its far ends, and both orders
RATIOS = [0.0, 1e-6, 0.3, -2.0, 7.5, -40.0, 120.0, -1e3, 1e4, -1e4]


def all_ratio_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor(list(itertools.product(RATIOS, RATIOS)), dtype=dtype)
    return pairs[:, 0], pairs[:, 1]


# --- the table ----------------------------------------------------------------------------------------


def test_every_loss_of_the_compiled_table_has_its_formula_in_plain_torch() -> None:
    formulas = {*oracle.DIFFERENCE_FORMULAS, *oracle.PAIR_FORMULAS}
    assert formulas == set(_C.pair_loss_names()) == {s.formula for s in PAIR_LOSSES.values()}
    unpaired = {spec.formula for spec in UNPAIRED_LOSSES.values()}
    assert set(oracle.UNPAIRED_FORMULAS) == set(_C.unpaired_loss_names()) == unpaired


@float_and_double
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("beta", BETAS)
@every_pair_loss
def test_pair_loss_value_and_gradient(loss_type, beta, impl, dtype) -> None:
    """Also finite for log-ratios of 1e4."""
    eps = torch.finfo(dtype).eps
    chosen, rejected = all_ratio_pairs(dtype)
    reference_chosen, reference_rejected = torch.full_like(chosen, -3), torch.full_like(chosen, -5)
    ratios = chosen - reference_chosen, rejected - reference_rejected  # as rounded in the dtype
    for smoothing in smoothings(loss_type):
        leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
        result = preference_loss(
            *leaves,
            reference_chosen,
            reference_rejected,
            loss_type=loss_type,
            beta=beta,
            label_smoothing=smoothing,
            impl=impl,
        )
        losses, slope = true_pair_loss(loss_type, *ratios, beta, smoothing)
        # rounding of h, or of the distance: last places of the log-ratios, and what the loss makes of them
        noise = 4 * eps * (ratios[0].abs() + ratios[1].abs() + 1 / beta).double()
        what = f"{loss_type}, beta {beta}, label_smoothing {smoothing}"
        tolerance = noise * slope.abs().clamp(min=beta) + 4 * eps * losses
        assert result.losses.dtype == dtype and result.losses.isfinite().all()
        assert_rule(f"losses of {what}", result.losses, losses, losses, tolerance)
        upstream = torch.linspace(-2, 3, len(chosen), dtype=dtype)
        grads = torch.autograd.grad(result.losses, leaves, upstream)
        curvature = 2.0 if loss_type == "ipo" else beta * beta
        tolerance = (noise * curvature + 8 * eps * slope.abs()) * upstream.abs()
        truth = slope * upstream.double()
        assert_rule(f"chosen gradient of {what}", grads[0], truth, truth, tolerance)
        assert torch.equal(grads[0], -grads[1]), "not antisymmetric"
        for rewards, ratio in zip(result[1:], ratios, strict=True):
            assert not rewards.requires_grad
            torch.testing.assert_close(rewards, beta * ratio)


@float_and_double
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (0.0, 1.5)], ids=str)
@pytest.mark.parametrize("kl", [0.0, 1.7, 250.0])
def test_kto_value_and_gradient(kl, weights, beta, impl, dtype) -> None:
    eps = torch.finfo(dtype).eps
    policy = torch.tensor(RATIOS * 2, dtype=dtype)
    is_desirable = torch.arange(len(policy)) < len(RATIOS)
    constants = torch.full_like(policy, -3)
    leaf = policy.clone().requires_grad_()
    options = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    result = kto_loss(leaf, is_desirable, constants, kl=kl, impl=impl, **options)
    kl_used = float(torch.tensor(kl, dtype=dtype))
    losses, slope = true_kto_loss(policy - constants, is_desirable, kl_used, beta, weights)
    noise = 4 * eps * ((policy - constants).abs() + kl + 1 / beta).double()
    tiny = torch.finfo(dtype).tiny
    tolerance = noise * slope.abs() + 8 * eps * losses + tiny
    assert_rule("losses", result.losses, losses, losses, tolerance)
    upstream = torch.linspace(-2, 3, len(policy), dtype=dtype)
    (gradient,) = torch.autograd.grad(result.losses, leaf, upstream)
    # |second derivative| <= beta |first derivative|
    tolerance = (noise * beta + 8 * eps) * slope.abs()
    if impl == "torch":  # autograd's p (1 - p) rounds where p is near 1
        tolerance += eps * beta * max(weights)
    truth = slope * upstream.double()
    assert_rule("gradient", gradient, truth, truth, tolerance * upstream.abs() + tiny)
    assert not result.rewards.requires_grad
    torch.testing.assert_close(result.rewards, beta * (policy - constants))


@every_pair_loss
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("with_reference", [False, True])
def test_pair_loss_gradient_equals_finite_differences(with_reference, impl, loss_type) -> None:
    generator = torch.Generator().manual_seed(0)
    logps = [3 * torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4)]
    inputs = [logp.requires_grad_() for logp in logps[:2]]
    constants = logps[2:] if with_reference else []
    for smoothing in smoothings(loss_type):
        assert torch.autograd.gradcheck(
            lambda c, r, smoothing=smoothing: (
                preference_loss(
                    c, r, *constants, loss_type=loss_type, label_smoothing=smoothing, impl=impl
                ).losses
            ),
            inputs,
        )


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_kto_gradient_equals_finite_differences(impl) -> None:
    policy = (3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    is_desirable = torch.tensor([True, False] * 3)
    options = {"kl": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.4, "impl": impl}
    assert torch.autograd.gradcheck(
        lambda logps: kto_loss(logps, is_desirable, **options).losses, policy
    )


# --- exact answers --------------------------------------------------------------------------------------


@float_and_double
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.499])
@pytest.mark.parametrize("beta", BETAS)
def test_policy_equal_to_reference_gives_ln_2_to_the_bit(beta, smoothing, dtype) -> None:
    """And antisymmetric gradients, whatever the number of pairs: the mean must not round either."""
    ln2 = torch.tensor(math.log(2), dtype=dtype)
    for pairs in range(1, 18):
        chosen = (-100 * torch.rand(pairs, dtype=dtype)).requires_grad_()
        rejected = (-100 * torch.rand(pairs, dtype=dtype)).requires_grad_()
        result = preference_loss(
            chosen,
            rejected,
            chosen.detach(),
            rejected.detach(),
            beta=beta,
            label_smoothing=smoothing,
        )
        mean = mean_of_losses(result.losses)
        assert torch.equal(bits(result.losses), bits(ln2.expand(pairs)))
        assert torch.equal(bits(mean), bits(ln2)), f"mean over {pairs} pairs: {mean.item()!r}"
        grads = torch.autograd.grad(mean, (chosen, rejected))
        assert torch.equal(grads[0], -grads[1]) and (grads[0] < 0).all()
        assert (result.chosen_rewards == 0).all() and (result.rejected_rewards == 0).all()


def test_published_values() -> None:
    """By hand: h = 0.1 * ((-10 + 12) - (-20 + 18)) = 0.4; IPO (4 - 5)^2; KTO with kl 1."""
    logps = [torch.tensor([value]) for value in (-10.0, -20.0, -12.0, -18.0)]
    sigmoid = preference_loss(*logps)
    assert sigmoid.losses.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-6)
    assert sigmoid.chosen_rewards.item() == pytest.approx(0.2)
    assert sigmoid.rejected_rewards.item() == pytest.approx(-0.2)
    assert preference_loss(*logps, loss_type="ipo").losses.item() == pytest.approx(1.0)
    smooth = preference_loss(*logps, label_smoothing=0.25).losses.item()
    wins, loses = math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(0.4))
    assert smooth == pytest.approx(0.75 * wins + 0.25 * loses, rel=1e-6)
    kto = kto_loss(
        torch.tensor([-10.0, -10.0]),
        torch.tensor([True, False]),
        torch.tensor([-12.0, -12.0]),
        kl=1.0,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    worse = 1 / (1 + math.exp(0.1))  # 1 - sigmoid(0.1 * (2 - 1))
    assert kto.losses.tolist() == pytest.approx([2 * worse, 3 * (1 - worse)], rel=1e-6)
    assert kto.rewards.tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_impossible_response_gives_the_limit_and_not_nan(smoothing, impl) -> None:
    """Log-prob -inf: a rejected one costs nothing (without smoothing), a chosen one everything."""
    chosen = torch.tensor([-5.0, -INF], requires_grad=True)
    rejected = torch.tensor([-INF, -5.0], requires_grad=True)
    losses = preference_loss(chosen, rejected, label_smoothing=smoothing, impl=impl).losses
    assert losses.tolist() == [INF if smoothing else 0.0, INF]
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    torch.testing.assert_close(gradient, 0.1 * torch.tensor([smoothing, smoothing - 1]))


@every_pair_loss
@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_nan_log_prob_gives_nan(impl, loss_type) -> None:
    for place in range(2):
        logps = [torch.zeros(1), torch.zeros(1)]
        logps[place] = torch.full((1,), NAN)
        assert preference_loss(*logps, loss_type=loss_type, impl=impl).losses.isnan().all()
    labels = torch.tensor([True])
    assert kto_loss(torch.full((1,), NAN), labels, kl=0.0, impl=impl).losses.isnan().all()
    assert kto_loss(torch.zeros(1), labels, kl=torch.tensor(NAN), impl=impl).losses.isnan().all()


# --- inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
@every_pair_loss
def test_no_reference_is_a_uniform_one(loss_type, impl) -> None:
    chosen, rejected = torch.randn(7), torch.randn(7)
    zeros = torch.zeros(7)
    without = preference_loss(chosen, rejected, loss_type=loss_type, impl=impl)
    uniform = preference_loss(chosen, rejected, zeros, zeros, loss_type=loss_type, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(without, uniform, strict=True))
    is_desirable = torch.arange(7) < 3
    without = kto_loss(chosen, is_desirable, kl=0.5, impl=impl)
    uniform = kto_loss(chosen, is_desirable, zeros, kl=0.5, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(without, uniform, strict=True))


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
    ids=["halves", "half_and_float", "float_and_double"],
)
def test_results_are_float32_unless_an_input_is_float64(dtypes, expected, impl) -> None:
    """And gradients return in the dtype of their input."""
    chosen = torch.randn(3).to(dtypes[0]).requires_grad_()
    rejected = torch.randn(3).to(dtypes[1]).requires_grad_()
    result = preference_loss(chosen, rejected, impl=impl)
    assert {t.dtype for t in result} == {expected}
    result.losses.sum().backward()
    assert chosen.grad.dtype == dtypes[0] and rejected.grad.dtype == dtypes[1]
    is_desirable = torch.tensor([True, False, True])
    kto = kto_loss(chosen, is_desirable, rejected.detach(), kl=0.1, impl=impl)
    assert {t.dtype for t in kto} == {expected}
    assert kto_kl(chosen, rejected).dtype == expected


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["chosen", "rejected"])
def test_gradient_only_where_it_is_needed(needs) -> None:
    logps = [torch.randn(4, requires_grad=need) for need in needs]
    preference_loss(*logps).losses.sum().backward()
    assert [logp.grad is not None for logp in logps] == list(needs)


def test_no_graph_without_inputs_that_need_one() -> None:
    assert not preference_loss(torch.randn(2), torch.randn(2)).losses.requires_grad
    assert not kto_loss(torch.randn(2), torch.ones(2).bool(), kl=0.0).losses.requires_grad


def test_upstream_of_any_layout() -> None:
    chosen = torch.randn(6, requires_grad=True)
    rejected = torch.randn(6)
    losses = preference_loss(chosen, rejected).losses
    (summed,) = torch.autograd.grad(losses.sum(), chosen, retain_graph=True)  # stride 0
    upstream = torch.randn(12)[::2]
    (weighted,) = torch.autograd.grad(losses, chosen, upstream)
    torch.testing.assert_close(weighted, summed * upstream)


def test_strided_inputs_equal_contiguous_ones() -> None:
    table = torch.randn(5, 4)
    strided = preference_loss(*table.unbind(1))
    plain = preference_loss(*(column.contiguous() for column in table.unbind(1)))
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))
    is_desirable = torch.tensor([True, False] * 5)
    strided = kto_loss(table[:, 0], is_desirable[::2], table[:, 1], kl=0.2)
    plain = kto_loss(table[:, 0].clone(), torch.ones(5).bool(), table[:, 1].clone(), kl=0.2)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@every_pair_loss
@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_no_pairs_are_a_loss_of_zero(impl, loss_type) -> None:
    empty = torch.zeros(0, requires_grad=True)
    result = preference_loss(empty, empty, loss_type=loss_type, impl=impl)
    mean = mean_of_losses(result.losses)
    mean.backward()
    assert result.losses.shape == (0,) and mean.item() == 0 and empty.grad.shape == (0,)
    assert kto_loss(empty, torch.zeros(0).bool(), kl=0.0, impl=impl).losses.shape == (0,)


# --- KTO's estimate of the divergence -------------------------------------------------------------------


def test_kto_kl_is_the_mean_log_ratio_not_below_zero_without_gradient() -> None:
    policy = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    assert kto_kl(policy, torch.tensor([-2.0, -4.0, -6.0])).item() == 1
    assert kto_kl(policy, torch.zeros(3)).item() == 0
    assert kto_kl(torch.zeros(0), torch.zeros(0)).item() == 0
    assert kto_kl(torch.tensor([NAN]), torch.zeros(1)).isnan()
    assert not kto_kl(policy, torch.zeros(3)).requires_grad


@pytest.mark.parametrize("kl", [0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_kl_may_be_a_number_or_a_tensor_of_one(kl) -> None:
    policy, is_desirable = torch.randn(4), torch.tensor([True, False, True, False])
    expected = kto_loss(policy, is_desirable, kl=torch.full((1,), 0.5))
    for impl in ("fused", "torch"):
        result = kto_loss(policy, is_desirable, kl=kl, impl=impl)
        assert result.losses.shape == (4,)
        torch.testing.assert_close(result.losses, expected.losses)
