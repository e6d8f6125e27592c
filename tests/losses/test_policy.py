"""Policy losses: each formula against its oracle and by hand, the normalizer, extremes, what is refused."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from pyfast_dpo import policy_loss, policy_normalizer
from pyfast_dpo.losses.policy_table import POLICY_LOSSES

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [(name, level) for name, spec in POLICY_LOSSES.items() for level in spec.levels]
LENGTHS = [5, 0, 1, 7, 130]  # an empty sequence, one token, more than a block of the GPU's kernel


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def problem(dtype: torch.dtype = torch.float64, spread: float = 0.4) -> dict[str, Tensor]:
    """Packed tokens whose ratios lie on both sides of the clip, with a reference and a foreign sampler."""
    counts = torch.tensor(LENGTHS)
    tokens = int(counts.sum())
    logps = -draw(tokens).abs() - 0.01
    tensors = {
        "logps": logps,
        "old_logps": logps + draw(tokens, seed=1, scale=spread),
        "reference_logps": logps + draw(tokens, seed=2, scale=spread),
        "advantages": draw(len(LENGTHS), seed=3),
        "importance_sampling_ratio": draw(tokens, seed=4, scale=0.2).exp(),
    }
    return {name: value.to(dtype) for name, value in tensors.items()} | {"counts": counts}


def run(inputs: dict[str, Tensor], impl: str, **options):
    leaf = inputs["logps"].detach().clone().requires_grad_()
    rest = {k: v for k, v in inputs.items() if k not in ("logps", "old_logps", "advantages")}
    result = policy_loss(
        leaf,
        inputs.get("old_logps"),
        inputs["advantages"],
        normalizer=3.0,
        impl=impl,
        **rest,
        **options,
    )
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    return result, gradient


PENALTIES = [
    {},
    {"beta": 0.3},
    {"beta": 0.3, "kl_estimator": "k1"},
    {"beta": 0.3, "kl_estimator": "k2"},
    {"beta": 0.3, "use_bias_correction_kl": True},
]


@pytest.mark.parametrize(
    "per_token", [False, True], ids=["advantage a sequence", "advantage a token"]
)
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("name, level", CASES)
def test_value_and_gradient_are_the_oracles(name, level, penalty, per_token) -> None:
    inputs = problem()
    if per_token:
        inputs["advantages"] = draw(len(inputs["logps"]), seed=5)
    options = {"loss_type": name, "level": level, **penalty}
    if "delta" in POLICY_LOSSES[name].options:
        options["delta"] = 1.6
    ours, gradient = run(inputs, "fused", **options)
    truth, true_gradient = run(inputs, "torch", **options)
    for field, a, b in zip(truth._fields, ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=f"{field}: {a} for {b}")
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-11, atol=1e-13)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name, level", CASES)
def test_float32_is_as_exact_as_torch(name, level) -> None:
    truth, true_gradient = run(problem(), "torch", loss_type=name, level=level, beta=0.1)
    narrow = problem(torch.float32)
    for impl, share in (("torch", None), ("fused", 1.0)):
        result, gradient = run(narrow, impl, loss_type=name, level=level, beta=0.1)
        assert result.loss.dtype == gradient.dtype == torch.float32
        error = max(
            float((result.loss.detach().double() - truth.loss.detach()).abs()),
            float((gradient.double() - true_gradient).abs().max()),
        )
        if share is None:
            allowed = 2 * error + 4e-7
        else:
            assert error <= allowed, f"{error:.2g} for {allowed:.2g}"


def test_rloo_is_the_clip_of_the_product_of_a_sequence_s_ratios() -> None:
    """TRL's formula, from whole sequences; the loss is the mean over them."""
    inputs = problem()
    _, gradient = run(inputs, "fused", loss_type="rloo", level="sequence", epsilon=0.3)
    leaf = inputs["logps"].clone().requires_grad_()
    ratios = torch.stack([part.sum() for part in (leaf - inputs["old_logps"]).split(LENGTHS)]).exp()
    gains = inputs["advantages"]
    terms = -torch.minimum(ratios * gains, ratios.clamp(0.7, 1.3) * gains)
    there = torch.tensor(LENGTHS) > 0
    loss = terms[there].sum() / 3.0
    correction = inputs["importance_sampling_ratio"]
    plain, plain_gradient = run(
        {k: v for k, v in inputs.items() if v is not correction}, "fused", loss_type="rloo", level="sequence", epsilon=0.3
    )  # fmt: skip
    torch.testing.assert_close(plain.loss, loss)
    torch.testing.assert_close(plain_gradient, torch.autograd.grad(loss, leaf)[0])
    assert not torch.equal(gradient, plain_gradient), "a foreign sampler's weights count"


# --- by hand ------------------------------------------------------------------------------------------


def test_ppo_by_hand() -> None:
    """Ratios and advantages with every branch; a tie counts as unclipped."""
    ratios, advantages = [1.5, 0.5, 1.5, 0.5, 1.1], [1.0, 1.0, -1.0, -1.0, 1.0]
    logps = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    result = policy_loss(
        logps, torch.zeros(5, dtype=torch.float64), torch.tensor(advantages).double(),
        counts=torch.ones(5, dtype=torch.int64), normalizer=5, loss_type="ppo",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, logps)
    assert result.token_losses.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -1.1])
    assert float(result.loss.detach()) == pytest.approx(-0.1)
    assert gradient.tolist() == pytest.approx([0, -0.1, 0.3, 0, -0.22], abs=1e-15)
    assert result.clipped.tolist() == [1, 0, 0, -1, 0]


def test_delta_bounds_the_ratio_of_a_bad_token() -> None:
    logps = torch.tensor([math.log(5.0)], dtype=torch.float64, requires_grad=True)
    old, advantage, one = torch.zeros(1).double(), torch.tensor([-1.0]).double(), torch.tensor([1])
    loose = policy_loss(logps, old, advantage, counts=one, normalizer=1, loss_type="ppo")
    bound = policy_loss(logps, old, advantage, counts=one, normalizer=1, loss_type="ppo", delta=3.0)
    assert (float(loose.loss.detach()), float(bound.loss.detach())) == (pytest.approx(5), 3)
    assert torch.autograd.grad(bound.loss, logps)[0].item() == 0


@pytest.mark.parametrize("name, level", CASES)
def test_what_was_sampled_by_this_policy_has_ratio_one_and_gradient_minus_the_advantage(
    name, level
) -> None:
    """So every loss is REINFORCE in its first step, up to the weights of its tokens."""
    inputs = problem(torch.float32)
    counts, advantages = inputs["counts"], inputs["advantages"]
    logps = inputs["logps"].requires_grad_()
    # The ratio of a whole sequence moves with each of its tokens undivided.
    means = POLICY_LOSSES[name].sequence_means and name != "rloo"
    weights = counts.clamp(min=1).reciprocal() if means else torch.ones(5)
    expected = -(weights * advantages).repeat_interleave(counts)
    gradients = []
    for old in (None, logps.detach()):
        result = policy_loss(
            logps, old, advantages, counts=counts, normalizer=1, loss_type=name, level=level
        )
        assert torch.equal(result.ratios, torch.ones_like(logps))
        assert not result.clipped.any()
        gradients.append(torch.autograd.grad(result.loss, logps)[0])
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=0)


def test_estimates_of_the_divergence_have_their_expectation() -> None:
    """Over the whole vocabulary: k1 and k3 give KL(p || q) exactly, k2 nearly."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = p.flip(0)
    for estimator, expected in (("k1", 0.274887), ("k2", 0.293856), ("k3", 0.274887)):
        kl = policy_loss(
            p.log(), None, torch.zeros(3).double(), reference_logps=q.log(), counts=torch.ones(3).long(),
            normalizer=1, loss_type="reinforce", beta=1.0, kl_estimator=estimator,
        ).kl  # fmt: skip
        assert float((p * kl).sum()) == pytest.approx(expected, abs=1e-6)


def test_small_divergences_keep_their_digits() -> None:
    """k3 is u^2 / 2 for small u: e^u - 1 - u in float32 is rounding alone."""
    u = torch.tensor([1e-4, -3e-4, 5e-3, -9e-3])
    logps = torch.full((4,), -1.0)
    kl = policy_loss(
        logps, None, torch.zeros(4), reference_logps=logps + u, counts=torch.tensor([4]), normalizer=1,
        loss_type="reinforce", beta=1.0,
    ).kl  # fmt: skip
    exact = (logps + u).double() - logps.double()
    torch.testing.assert_close(kl.double(), torch.expm1(exact) - exact, rtol=1e-5, atol=0)


def test_the_level_of_a_sequence_is_the_mean_of_its_log_ratios() -> None:
    """GSPO: one ratio for all tokens; tokens share the gradient."""
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -1.7, -0.5], dtype=torch.float64)
    result = policy_loss(
        logps, old, torch.tensor([2.0]).double(), counts=torch.tensor([3]), normalizer=1, level="sequence",
        epsilon=0.5,
    )  # fmt: skip
    ratio = math.exp((0.1 - 0.3 + 0.0) / 3)
    assert result.ratios.tolist() == pytest.approx([ratio] * 3)
    assert float(result.loss.detach()) == pytest.approx(-2 * ratio)
    (gradient,) = torch.autograd.grad(result.loss, logps)
    assert gradient.tolist() == pytest.approx([-2 * ratio / 3] * 3)


# --- the layout and the normalizer ----------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("name, level", CASES)
def test_padded_rows_with_a_mask_are_packed_rows(name, level, impl) -> None:
    """Whatever stands in the padding."""
    inputs = problem()
    inputs.pop("importance_sampling_ratio")
    counts, width = inputs["counts"], max(LENGTHS) + 2
    mask = torch.arange(width) < counts.unsqueeze(1)
    padded = {}
    for key in ("logps", "old_logps", "reference_logps"):
        padded[key] = torch.full(mask.shape, math.nan, dtype=torch.float64)
        padded[key][mask] = inputs[key]
    packed, gradient = run(inputs, impl, loss_type=name, level=level, beta=0.2)
    rows, row_gradient = run(
        padded | {"advantages": inputs["advantages"], "mask": mask}, impl, loss_type=name, level=level, beta=0.2
    )  # fmt: skip
    # torch's own exponentials may differ in the last place with their place in memory.
    tolerance = 0.0 if impl == "fused" else 1e-14
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(rows.loss, packed.loss)
    close(row_gradient[mask], gradient)
    assert not row_gradient[~mask].any()
    for field in ("token_losses", "ratios", "kl", "clipped"):
        close(getattr(rows, field)[mask], getattr(packed, field), msg=field)


@pytest.mark.parametrize("name, level", CASES)
def test_any_cut_of_a_step_gives_the_same_gradient(name, level) -> None:
    """Micro-batches of any size, in any order, with the normalizer of the whole step."""
    inputs = problem()
    counts = inputs["counts"]
    normalizer = policy_normalizer(name, counts, max_completion_length=200)

    def gradient(order: list[int], cuts: list[int]) -> Tensor:
        parts = {k: v.split(LENGTHS) if k != "advantages" else v.split(1) for k, v in inputs.items() if k != "counts"}  # fmt: skip
        leaf = inputs["logps"].clone().requires_grad_()
        logps = leaf.split(LENGTHS)
        for first, last in zip([0, *cuts], [*cuts, len(order)], strict=True):
            chosen = order[first:last]
            if not chosen:
                continue
            joined = {k: torch.cat([v[i] for i in chosen]) for k, v in parts.items()}
            policy_loss(
                torch.cat([logps[i] for i in chosen]), joined["old_logps"], joined["advantages"],
                counts=counts[chosen], reference_logps=joined["reference_logps"], beta=0.1,
                importance_sampling_ratio=joined["importance_sampling_ratio"], normalizer=normalizer,
                loss_type=name, level=level,
            ).loss.backward()  # fmt: skip
        return leaf.grad

    whole = gradient([0, 1, 2, 3, 4], [])
    assert whole.abs().max() > 1e-5
    for order, cuts in (
        ([0, 1, 2, 3, 4], [1, 2, 3, 4]),
        ([4, 2, 0, 1, 3], [2]),
        ([3, 1, 4, 0, 2], [1, 4]),
    ):
        torch.testing.assert_close(gradient(order, cuts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, expected",
    [("ppo", 8), ("dapo", 8), ("bnpo", 8), ("cispo", 8), ("vespo", 8), ("reinforce", 8), ("grpo", 2),
     ("sapo", 2), ("luspo", 2), ("rloo", 2), ("dr_grpo", 20)],
)  # fmt: skip
def test_normalizer(name, expected) -> None:
    """An empty sequence is none."""
    lengths = torch.tensor([3, 0, 5])
    assert float(policy_normalizer(name, lengths, max_completion_length=10)) == expected


# --- extremes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("name, level", CASES)
def test_finite_for_log_ratios_of_ten_thousand(name, level, impl, dtype) -> None:
    distances = torch.tensor([-1e4, -100.0, -21.0, 0.0, 21.0, 100.0, 1e4], dtype=dtype)
    for distance, sign, penalty in product(distances, (-1.0, 1.0), PENALTIES):
        logps = torch.full((3,), -1.0, dtype=dtype, requires_grad=True)
        result = policy_loss(
            logps, (logps - distance).detach(), torch.full((1,), sign, dtype=dtype), normalizer=1,
            counts=torch.tensor([3]), reference_logps=(logps + distance).detach(), loss_type=name,
            level=level, impl=impl, **penalty,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert result.loss.isfinite() and gradient.isfinite().all(), (
            float(distance),
            sign,
            penalty,
        )


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("name, level", CASES)
def test_a_number_that_is_none_is_not_hidden(name, level, impl) -> None:
    logps = torch.tensor([-1.0, math.nan, -2.0, -3.0], requires_grad=True)
    result = policy_loss(
        logps, logps.detach().nan_to_num(-1.0), torch.ones(2), normalizer=1, counts=torch.tensor([3, 1]),
        loss_type=name, level=level, impl=impl,
    )  # fmt: skip
    assert result.loss.isnan() and not result.token_losses[3].isnan()


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("counts", [[], [0, 0]], ids=["no sequences", "empty sequences"])
def test_nothing_scored_costs_nothing(counts, impl) -> None:
    logps = torch.zeros(0, requires_grad=True)
    result = policy_loss(
        logps, None, torch.zeros(len(counts)), counts=torch.tensor(counts, dtype=torch.int64), normalizer=1,
        impl=impl,
    )  # fmt: skip
    result.loss.backward()
    assert float(result.loss.detach()) == 0 and logps.grad.shape == (0,)


# --- traps and mistakes ---------------------------------------------------------------------------------

GOOD = {"logps": -torch.ones(2, 3), "old_logps": -torch.ones(2, 3), "advantages": torch.ones(2)}


@pytest.mark.parametrize(
    "change, error, words",
    [
        # as an upper bound of 0.2 it would scale every gradient by 0.2
        ({"loss_type": "cispo", "epsilon_high": 0.2}, ValueError, "epsilon_high is the largest ratio"),
        ({"loss_type": "luspo"}, ValueError, "defined at the level 'sequence'"),
        ({"loss_type": "vespo", "level": "sequence"}, ValueError, "defined at the level 'token'"),
        ({"loss_type": "gspo"}, ValueError, "loss_type must be one of"),
        ({"loss_type": "sapo", "epsilon": 0.1}, ValueError, "epsilon is defined for the losses"),
        ({"delta": 1.1}, ValueError, "delta must be greater than 1 \\+ epsilon_high"),
        ({"beta": 0.1}, ValueError, "beta 0.1 needs reference_logps"),
        ({"normalizer": 0}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be one number"),
        ({"normalizer": "tokens"}, TypeError, "normalizer must be a number"),
        ({"advantages": torch.ones(3)}, ValueError, "advantages must have shape \\[2\\]"),
        ({"old_logps": torch.ones(2, 4)}, ValueError, "old_logps must have the shape"),
        ({"old_logps": torch.ones(2, 3, requires_grad=True)}, ValueError, "old_logps requires grad"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, "mask must have the shape"),
        ({"counts": torch.tensor([3, 3])}, ValueError, "counts go with logps \\[N\\]"),
        ({"logps": -torch.ones(6)}, ValueError, "logps must be"),
        ({"logps": torch.ones(2, 3).long()}, TypeError, "logps must be floating point"),
        ({"gamma": 0.9}, TypeError, "unexpected keyword argument 'gamma'"),
        ({"epsilon": 1.0}, ValueError, "epsilon must be in \\[0, 1\\)"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, words) -> None:
    arguments = {**GOOD, "normalizer": 6.0}
    policy_loss(**arguments)
    with pytest.raises(error, match=f"policy_loss: .*{words}"):
        policy_loss(**arguments | change)


@pytest.mark.parametrize("counts", [[2, 3], [7, -1]])
def test_counts_that_do_not_add_up_are_refused(counts) -> None:
    with pytest.raises(ValueError, match="counts must not be negative and add up to the 6 tokens"):
        policy_loss(-torch.ones(6), None, torch.ones(2), counts=torch.tensor(counts), normalizer=1)


# --- the operator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "vespo"])
def test_it_is_a_proper_operator(name) -> None:
    from pyfast_dpo.losses.policy_table import check_policy_options

    inputs = problem(torch.float32)
    offsets = torch.nn.functional.pad(inputs["counts"].cumsum(0), (1, 0))
    arguments = (
        inputs["logps"].requires_grad_(), inputs["old_logps"], inputs["reference_logps"], inputs["advantages"],
        inputs["importance_sampling_ratio"], None, offsets,
        *check_policy_options("test", name, "token", beta=0.1).formula_options(),
    )  # fmt: skip
    opcheck(torch.ops.pyfast_dpo.policy_loss.default, arguments)


def test_compiles_without_a_break() -> None:
    inputs = problem(torch.float32)

    def step(logps):
        return policy_loss(
            logps,
            inputs["old_logps"],
            inputs["advantages"],
            counts=inputs["counts"],
            normalizer=5.0,
        ).loss

    leaf = inputs["logps"].requires_grad_()
    compiled = torch.compile(step, backend="aot_eager")(leaf)
    assert torch.equal(compiled.detach(), step(leaf).detach())


def test_a_second_derivative_is_refused_by_name() -> None:
    logps = torch.full((3,), -1.0, requires_grad=True)
    loss = policy_loss(logps, None, torch.ones(1), counts=torch.tensor([3]), normalizer=1).loss
    (first,) = torch.autograd.grad(loss, logps, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"policy_loss has no second derivative.*impl='torch'"
    ):
        torch.autograd.grad(first.sum(), logps)


@pytest.mark.parametrize("offsets", [[0, 2], [0, 5, 4, 6], [1, 6], [0, 7], [0, 2**62]], ids=str)
def test_offsets_that_lead_outside_are_refused(offsets) -> None:
    from pyfast_dpo.losses.policy_table import check_policy_options

    options = check_policy_options("test", "grpo", "token").formula_options()
    with pytest.raises(RuntimeError, match="offsets must rise from 0 to the number of tokens, 6"):
        torch.ops.pyfast_dpo.policy_loss(
            torch.zeros(6),
            None,
            None,
            torch.zeros(len(offsets) - 1),
            None,
            None,
            torch.tensor(offsets),
            *options,
        )
