"""Every loss of the table against its paper's formula, written here in plain torch and in mpmath.

The formulas take a namespace of elementary functions, so that one text serves float64 autograd (moderate inputs)
and 60 digits (log-ratios of 1e4, where float64 itself overflows).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from _helpers import assert_rule, bits, name_of
from torch import Tensor

from pyfast_dpo import preference_loss, unpaired_loss
from pyfast_dpo.losses.policy_table import POLICY_LOSS_NAMES
from pyfast_dpo.losses.table import (
    OPTIONS,
    PAIR_LOSS_NAMES,
    PAIR_LOSSES,
    UNPAIRED_LOSS_NAMES,
    couples_batch,
    needs_reference,
)
from pyfast_dpo.ops import _C

pytestmark = pytest.mark.usefixtures("one_thread")

IN_TORCH = SimpleNamespace(
    exp=torch.exp, log=torch.log, log_sigmoid=F.logsigmoid, sigmoid=torch.sigmoid,
    relu=torch.relu, sort=lambda x: torch.sort(x).values,
)  # fmt: skip
IN_MPMATH = SimpleNamespace(
    exp=mpmath.exp,
    log=mpmath.log,
    log_sigmoid=lambda x: -mpmath.log1p(mpmath.exp(-x)),
    sigmoid=lambda x: 1 / (1 + mpmath.exp(-x)),
    relu=lambda x: max(x, mpmath.mpf(0)),
)


def smoothed(m: Any, h: Any, eps: float) -> Any:
    return -(1 - eps) * m.log_sigmoid(h) - eps * m.log_sigmoid(-h)


def exo(m: Any, h: Any, eps: float) -> Any:
    win = m.sigmoid(h) * (m.log_sigmoid(h) - math.log(1 - eps))
    return win + m.sigmoid(-h) * (m.log_sigmoid(-h) - math.log(eps))


def discopop(m: Any, h: Any, tau: float) -> Any:
    share = m.sigmoid(h / tau)
    return -m.log_sigmoid(h) * (1 - share) + m.exp(-h) * share


def log_odds(m: Any, logp: Any) -> Any:
    return logp - m.log(1 - m.exp(logp))


# v: policy log-probs pc, pr; log-ratios c, r (through the divergence: sc, sr); lengths nc, nr; options. d is the
# difference of scores less margin / beta, h = beta d; dn the same of averages.
FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "sigmoid": lambda m, v: smoothed(m, v.h, v.label_smoothing),
    "robust": lambda m, v: (
        (v.label_smoothing * m.log_sigmoid(-v.h) - (1 - v.label_smoothing) * m.log_sigmoid(v.h))
        / (1 - 2 * v.label_smoothing)
    ),
    "hinge": lambda m, v: m.relu(1 - v.h),
    "ipo": lambda m, v: (v.sc / v.nc - v.sr / v.nr - 1 / (2 * v.beta)) ** 2,
    "exo_pair": lambda m, v: exo(m, v.h, v.label_smoothing),
    "nca_pair": lambda m, v: (
        -m.log_sigmoid(v.beta * v.c)
        - (m.log_sigmoid(-v.beta * v.c) + m.log_sigmoid(-v.beta * v.r)) / 2
    ),
    "bco_pair": lambda m, v: (
        -m.log_sigmoid(v.beta * v.c - v.bco_shift) - m.log_sigmoid(v.bco_shift - v.beta * v.r)
    ),
    "sppo_hard": lambda m, v: (v.c - 1 / (2 * v.beta)) ** 2 + (v.r + 1 / (2 * v.beta)) ** 2,
    "aot": lambda m, v: smoothed(
        m, v.beta * (m.sort(v.pc - v.pr) - m.sort(v.pc - v.pr - v.c + v.r)), v.label_smoothing
    ),
    "aot_unpaired": lambda m, v: smoothed(
        m, v.beta * (m.sort(v.c) - m.sort(v.r)), v.label_smoothing
    ),
    "apo_zero": lambda m, v: 1 - m.sigmoid(v.beta * v.c) + m.sigmoid(v.beta * v.r),
    "apo_down": lambda m, v: m.sigmoid(v.beta * v.c) + 1 - m.sigmoid(v.beta * (v.c - v.r)),
    "discopop": lambda m, v: discopop(m, v.h, v.discopop_tau),
    "sigmoid_norm": lambda m, v: smoothed(
        m, v.beta * (v.sc / v.nc - v.sr / v.nr) - v.margins, v.label_smoothing
    ),
    "sft": lambda m, v: -v.pc / v.nc,
    "cpo": lambda m, v: (
        smoothed(m, v.beta * (v.pc - v.pr) - v.margins, v.label_smoothing)
        - v.cpo_alpha * v.pc / v.nc
    ),
    "simpo": lambda m, v: smoothed(
        m, v.beta * (v.pc / v.nc - v.pr / v.nr) - v.simpo_gamma - v.margins, v.label_smoothing
    ),
    "alphapo": lambda m, v: smoothed(
        m,
        v.beta
        * (m.exp(-v.alphapo_alpha * v.pr / v.nr) - m.exp(-v.alphapo_alpha * v.pc / v.nc))
        / v.alphapo_alpha
        - v.simpo_gamma
        - v.margins,
        v.label_smoothing,
    ),
    "orpo": lambda m, v: (
        -v.pc / v.nc - v.beta * m.log_sigmoid(log_odds(m, v.pc / v.nc) - log_odds(m, v.pr / v.nr))
    ),
}
UNPAIRED_FORMULAS: dict[str, Callable[[Any, Any, float], Any]] = {  # of sign * (beta c - center)
    "kto": lambda m, h, weight: weight * (1 - m.sigmoid(h)),
    "apo_zero_unpaired": lambda m, h, weight: weight * (1 - m.sigmoid(h)),
    "bco": lambda m, h, weight: -weight * m.log_sigmoid(h),
}

SCORES: dict[str, Callable[[Any, Any, float], Any]] = {  # Wang et al. 2023, table 1: f'(e^x)
    "reverse_kl": lambda m, x, _: x,
    "forward_kl": lambda m, x, _: 1 - m.exp(-x),
    "js_divergence": lambda m, x, _: math.log(2) + m.log_sigmoid(x),
    "alpha_divergence": lambda m, x, alpha: (m.exp((alpha - 1) * x) - 1) / (alpha - 1),
}


def formula(loss: str, m: Any, pc: Any, pr: Any, rc: Any, rr: Any, **given: Any) -> Any:
    v = SimpleNamespace(
        **{**OPTIONS, "beta": 0.1, "nc": 1, "nr": 1, "f_alpha_divergence_coef": 0.5, **given}
    )
    v.margins = 0 if v.margins is None else v.margins
    v.bco_shift = 0 if v.bco_shift is None else v.bco_shift
    v.pc, v.pr, v.c, v.r = pc, pr, pc - rc, pr - rr
    score = SCORES[v.f_divergence_type]
    v.sc, v.sr = (score(m, x, v.f_alpha_divergence_coef) for x in (v.c, v.r))
    v.h = v.beta * (v.sc - v.sr) - v.margins
    return FORMULAS[loss](m, v)


# --- which options each loss is tested with ---------------------------------------------------------

# One value for each option of a loss at once, and each divergence by itself.
VALUES: dict[str, Any] = {
    "label_smoothing": 0.1, "discopop_tau": 0.3, "simpo_gamma": 0.7, "alphapo_alpha": 0.4,
    "cpo_alpha": 0.6, "bco_shift": 0.35,
}  # fmt: skip
DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
]


def plain_options(loss: str) -> dict[str, Any]:
    return {"label_smoothing": 0.1} if loss == "exo_pair" else {}


def cases() -> list[Any]:
    rows = []
    for loss, spec in PAIR_LOSSES.items():
        chosen = {name: VALUES[name] for name in VALUES if name in spec.options}
        rows.append(pytest.param(loss, plain_options(loss), id=loss))
        if chosen != plain_options(loss):
            rows.append(pytest.param(loss, chosen, id=f"{loss}-options"))
        if "f_divergence_type" in spec.options:
            for options in DIVERGENCES:
                shown = "-".join(str(value) for value in options.values())
                rows.append(
                    pytest.param(loss, {**plain_options(loss), **options}, id=f"{loss}-{shown}")
                )
    return rows


def batch(loss: str, dtype: torch.dtype, pairs: int = 7) -> tuple[list[Tensor], dict[str, Any]]:
    """(policy and reference log-probs, lengths and margins where the loss takes them)"""
    generator = torch.Generator().manual_seed(5)

    def draw() -> Tensor:
        return (-4 * torch.rand(pairs, generator=generator, dtype=torch.float64)).to(dtype)

    logps = [draw() for _ in range(4)]
    given: dict[str, Any] = {
        name: torch.randint(1, 9, (pairs,), generator=generator)
        for name in ("chosen_lengths", "rejected_lengths")
    }
    if "margins" in PAIR_LOSSES[loss].options:
        given["margins"] = -draw() / 8
    return logps, given


def run(
    loss: str,
    logps: list[Tensor],
    impl: str = "fused",
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Any, list[Tensor]]:
    """(result, gradients of the policy's log-probs)"""
    leaves = [logp.detach().clone().requires_grad_() for logp in logps[:2]]
    result = preference_loss(*leaves, *logps[2:], loss_type=loss, impl=impl, **options)
    seed = torch.ones_like(result.losses) if upstream is None else upstream
    grads = torch.autograd.grad(result.losses, leaves, seed, materialize_grads=True)
    return result, list(grads)


def in_float64(loss: str, logps: list[Tensor], upstream: Tensor, given: dict[str, Any]) -> Any:
    leaves = [logp.double().clone().requires_grad_() for logp in logps[:2]]
    rest = [logp.double() for logp in logps[2:]]
    names = {"chosen_lengths": "nc", "rejected_lengths": "nr"}
    options = {
        names.get(k, k): v.double() if isinstance(v, Tensor) else v for k, v in given.items()
    }
    truth = formula(loss, IN_TORCH, *leaves, *rest, **options)
    grads = torch.autograd.grad(truth, leaves, upstream.double(), materialize_grads=True)
    return truth.detach(), grads


# --- the table --------------------------------------------------------------------------------------


def test_every_name_has_a_formula_here_and_a_place_in_the_documentation() -> None:
    assert list(FORMULAS) == list(PAIR_LOSS_NAMES)
    assert list(UNPAIRED_FORMULAS) == list(UNPAIRED_LOSS_NAMES)
    pages = Path(__file__).parents[2] / "docs" / "losses"
    headings = [
        name
        for page in sorted(pages.glob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("## ")
        for name in re.findall(r"`(\w+)`", line)
    ]
    documented = {name for name in headings if name not in ("reward_loss",)}
    assert documented == {*PAIR_LOSS_NAMES, *UNPAIRED_LOSS_NAMES, *POLICY_LOSS_NAMES}, (
        "headings of docs/losses"
    )
    assert len(headings) == len(set(headings)), "a loss with two headings"


def test_the_documented_options_are_those_of_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses" / "options.md").read_text()
    rows = [re.findall(r"`(\w+)`", line) for line in page.splitlines() if line.startswith("| `")]
    documented = {option: losses for option, *losses in rows if losses and option in OPTIONS}
    table = {o: [n for n, spec in PAIR_LOSSES.items() if o in spec.options] for o in OPTIONS}
    assert documented == table


def test_what_a_loss_sees() -> None:
    free = [name for name in PAIR_LOSS_NAMES if not needs_reference(name)]
    assert free == ["sft", "cpo", "simpo", "alphapo", "orpo"]
    assert not needs_reference(["sft", "simpo"]) and needs_reference(["sft", "sigmoid"])
    coupled = [name for name in PAIR_LOSS_NAMES if couples_batch(name)]
    assert coupled == ["aot", "aot_unpaired"] and couples_batch(("sigmoid", "aot"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("loss, options", cases())
def test_value_and_gradient_are_the_formula_s(loss, options, impl, dtype) -> None:
    logps, tensors = batch(loss, dtype)
    given = {**tensors, **options, "beta": 0.3}
    upstream = torch.linspace(-2, 3, len(logps[0]), dtype=dtype)
    if PAIR_LOSSES[loss].sorts:  # the formula has its losses in sorted order
        upstream = torch.ones_like(upstream)
    truth, true_grads = in_float64(loss, logps, upstream, given)
    result, grads = run(loss, logps, impl, upstream, **given)
    losses = result.losses
    if PAIR_LOSSES[loss].sorts:
        losses, truth = losses.sort().values, truth.sort().values
    rtol = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(losses, truth.to(dtype), rtol=rtol, atol=rtol)
    for ours, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(ours, true.to(dtype), rtol=rtol, atol=rtol)
    for rewards, policy, constant in zip(result[1:], logps[:2], logps[2:], strict=True):
        torch.testing.assert_close(rewards, 0.3 * (policy - constant))
        assert not rewards.requires_grad


@pytest.mark.parametrize("loss, options", cases())
def test_gradient_equals_finite_differences(loss, options) -> None:
    logps, tensors = batch(loss, torch.float64, pairs=4)
    leaves = [logp.requires_grad_() for logp in logps[:2]]
    assert torch.autograd.gradcheck(
        lambda *policy: (
            preference_loss(
                *policy, *logps[2:], loss_type=loss, beta=0.3, **tensors, **options
            ).losses
        ),
        leaves,
    )


# --- far from the middle ----------------------------------------------------------------------------

FAR = [0.0, 1e-4, -0.3, 7.5, -40.0, 95.0, -1e3, 1e4, -1e4]
# AlphaPO's reward is an exponential of the log-prob: 0.25 * 1e4 nats are beyond any float.
MATHEMATICS_OVERFLOWS = {"alphapo": 300.0}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("loss", [name for name in PAIR_LOSS_NAMES if not couples_batch(name)])
def test_far_log_ratios_have_the_value_and_gradient_of_60_digits(loss, beta) -> None:
    """Up to 1e4 nats in float32, kernels and plain torch."""
    limit = MATHEMATICS_OVERFLOWS.get(loss, math.inf)
    sign = -1 if loss == "orpo" else 1  # of averaged log-probs, which are negative
    far = [x for x in FAR if abs(x) <= limit and (sign > 0 or x != 0)]
    far = sorted({-abs(x) if sign < 0 else x for x in far})
    pairs = list(itertools.product(far, far))
    logps = [torch.tensor(column) for column in zip(*pairs, strict=True)]
    options = {**plain_options(loss), "beta": beta}
    with mpmath.workdps(60):
        values = [
            [mpmath.mpf(x) for x in pair] for pair in zip(*(t.tolist() for t in logps), strict=True)
        ]

        def at(c: Any, r: Any) -> Any:
            return formula(loss, IN_MPMATH, c, r, 0, 0, **options)

        step = mpmath.mpf(10) ** -25
        truth = torch.tensor([float(at(c, r)) for c, r in values], dtype=torch.float64)
        slopes = torch.tensor(
            [
                [
                    float((at(c + step, r) - at(c - step, r)) / (2 * step)),
                    float((at(c, r + step) - at(c, r - step)) / (2 * step)),
                ]
                for c, r in values
            ],
            dtype=torch.float64,
        ).T
    size = logps[0].abs().double() + logps[1].abs().double() + 1 / beta
    eps = torch.finfo(torch.float32).eps
    exponent = 1 + (
        0.25 * size if loss == "alphapo" else 0
    )  # a rounding of it is one of the reward
    tolerance = 16 * eps * exponent * (truth.abs() + slopes.abs().sum(0) * size + 1e-30)
    curved = 2.0 if loss in ("ipo", "sppo_hard") else 0.0
    for impl in ("fused", "torch"):
        result, grads = run(loss, logps, impl, **options)
        assert_rule(f"{loss} by {impl}", result.losses, truth, truth, tolerance)
        for ours, true in zip(grads, slopes, strict=True):
            near = 16 * eps * exponent * ((1 + beta * size) * (true.abs() + beta) + curved * size)
            assert_rule(f"gradient of {loss} by {impl}", ours, true, true, near)


@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(
    "loss", [n for n, s in PAIR_LOSSES.items() if "f_divergence_type" in s.options]
)
def test_a_divergence_that_overflows_is_infinite_on_the_right_side_and_never_nan(
    loss, options
) -> None:
    logps = [torch.tensor(column) for column in zip(*itertools.product(FAR, FAR), strict=True)]
    constants = [torch.zeros_like(logps[0])] * 2
    given = {**plain_options(loss), **options}
    result, grads = run(loss, [*logps, *constants], **given)
    assert not result.losses.isnan().any(), "a loss is NaN"
    assert not any(grad.isnan().any() for grad in grads), "a gradient is NaN"
    equal = logps[0] == logps[1]
    middle, _ = run(loss, [torch.zeros(1)] * 4, **given)
    assert torch.equal(result.losses[equal], middle.losses.expand(int(equal.sum())))
    better = logps[0] > logps[1]
    if loss not in ("ipo", "exo_pair", "discopop"):  # which do not fall all the way
        worst = result.losses[better].max()
        assert worst <= middle.losses[0], "a better chosen response costs more than equal ones"
        assert (result.losses[logps[0] < logps[1]] >= middle.losses[0] - 1e-6).all()
    plain, _ = run(loss, [*logps, *constants], "torch", **given)
    torch.testing.assert_close(plain.losses, result.losses, rtol=2e-4, atol=1e-4)


AT_THE_REFERENCE = {  # value where policy == reference, exactly; the losses of the policy alone: where both equal
    **dict.fromkeys(("sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired"), math.log(2)),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
}


@pytest.mark.parametrize("loss, value", AT_THE_REFERENCE.items())
def test_policy_equal_to_reference_gives_the_exact_value(loss, value) -> None:
    for dtype in (torch.float64, torch.float32):
        same = [-100 * torch.rand(9, dtype=dtype) for _ in range(2)]
        smoothing = 0.2 if "label_smoothing" in PAIR_LOSSES[loss].options else 0.0
        result, grads = run(loss, [*same, *same], label_smoothing=smoothing, beta=0.7)
        expected = torch.full((9,), value, dtype=dtype)
        assert torch.equal(bits(result.losses), bits(expected)), result.losses
        assert loss == "apo_down" or torch.equal(grads[0], -grads[1]), "not antisymmetric"


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("loss", PAIR_LOSS_NAMES)
def test_nan_in_gives_nan_out_and_only_there(loss, impl) -> None:
    logps, tensors = batch(loss, torch.float32, pairs=1)
    logps[0] = torch.full((1,), math.nan)
    result, grads = run(loss, logps, impl, **tensors, **plain_options(loss))
    assert result.losses.isnan().all()
    if (
        impl == "fused" and loss != "sft"
    ):  # autograd's relu and clamp have slope 0 at NaN; sft's is -1
        assert grads[0].isnan().all()


# --- compositions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_a_weighted_sum_is_the_sum_of_its_losses(impl) -> None:
    logps, tensors = batch("sigmoid", torch.float64)
    parts = [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.5), ("ipo", -0.3), ("aot", 0.4)]
    total, grads = run(
        [n for n, _ in parts], logps, impl, loss_weights=[w for _, w in parts], **tensors
    )
    lengths = {k: v for k, v in tensors.items() if k != "margins"}
    expected = 0
    expected_grads = [0, 0]
    for name, weight in parts:
        part, slopes = run(name, logps, impl, **(tensors if name == "sigmoid" else lengths))
        expected = expected + weight * part.losses
        expected_grads = [g + weight * s for g, s in zip(expected_grads, slopes, strict=True)]
    torch.testing.assert_close(total.losses, expected)
    for ours, true in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, true)
    torch.testing.assert_close(total.chosen_rewards, 0.1 * (logps[0] - logps[2]))


IDENTITIES = {  # (a loss, with options) is (another, with others)
    "rpo_is_dpo_and_sft": (
        ("sigmoid", {"rpo_alpha": 0.5}),
        (["sigmoid", "sft"], {"loss_weights": [1.0, 0.5]}),
    ),
    "cpo_has_sft_in_it": (
        (["cpo"], {"cpo_alpha": 0.5}),
        (["cpo", "sft"], {"cpo_alpha": 0.0, "loss_weights": [1.0, 0.5]}),
    ),
    "alphapo_0_is_simpo": (("alphapo", {"alphapo_alpha": 0.0}), ("simpo", {})),
    "alpha_0_is_forward_kl": (
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0}),
        ("sigmoid", {"f_divergence_type": "forward_kl"}),
    ),
    "alpha_1_is_reverse_kl": (
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
        ("sigmoid", {}),
    ),
    "robust_without_flips_is_dpo": (("robust", {}), ("sigmoid", {})),
}


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("one, other", IDENTITIES.values(), ids=IDENTITIES)
def test_identities(one, other, impl) -> None:
    logps, tensors = batch("sft", torch.float64)
    ours, grads = run(one[0], logps, impl, **tensors, **one[1])
    same, same_grads = run(other[0], logps, impl, **tensors, **other[1])
    torch.testing.assert_close([*ours, *grads], [*same, *same_grads])


@pytest.mark.parametrize("loss", ["ipo", "sigmoid_norm", "sft", "simpo", "alphapo", "orpo"])
def test_lengths_make_averages_and_an_empty_response_counts_as_one_token(loss) -> None:
    logps, tensors = batch(loss, torch.float64)
    tensors.pop("margins", None)
    tensors["chosen_lengths"][0] = 0
    with_lengths, _ = run(loss, logps, **tensors)
    chosen, rejected = (tensors[f"{s}_lengths"].clamp(min=1) for s in ("chosen", "rejected"))
    averages = [logp / n for logp, n in zip(logps, (chosen, rejected) * 2, strict=True)]
    without, _ = run(loss, averages)
    torch.testing.assert_close(with_lengths.losses, without.losses)


def test_losses_of_sums_do_not_see_lengths() -> None:
    for loss in ("sigmoid", "hinge", "nca_pair", "aot"):
        logps, tensors = batch("sft", torch.float32)
        assert torch.equal(run(loss, logps, **tensors)[0].losses, run(loss, logps)[0].losses)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_sorted_losses_keep_the_order_of_their_pairs(loss) -> None:
    """A loss belongs to the pair that has the quantile; one pair is plain DPO."""
    logps, _ = batch(loss, torch.float64)
    result, grads = run(loss, logps)
    order = torch.randperm(len(logps[0]), generator=torch.Generator().manual_seed(3))
    shuffled, shuffled_grads = run(loss, [logp[order] for logp in logps])
    torch.testing.assert_close(shuffled.losses, result.losses[order])
    torch.testing.assert_close(shuffled_grads[0], grads[0][order])
    one = [logp[:1] for logp in logps]
    torch.testing.assert_close(run(loss, one)[0].losses, run("sigmoid", one)[0].losses)


@pytest.mark.parametrize("loss", sorted(_C.pair_loss_names()))
def test_double_backward_is_refused_by_the_kernels_and_right_in_plain_torch(loss) -> None:
    logps, _ = batch("orpo", torch.float64, pairs=3)
    leaves = [logp.requires_grad_() for logp in logps[:2]]
    options = {"loss_type": loss, **plain_options(loss), "beta": 0.3}
    losses = preference_loss(*leaves, **options).losses
    (grad,) = torch.autograd.grad(losses.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda c, r: preference_loss(c, r, **options, impl="torch").losses, leaves
    )


# --- unpaired ---------------------------------------------------------------------------------------

CONSTANTS = {"kto": {"kl": 0.7}, "apo_zero_unpaired": {}, "bco": {"bco_shift": 0.2}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("loss", UNPAIRED_LOSS_NAMES)
def test_unpaired_value_and_gradient_are_the_formula_s(loss, impl, dtype) -> None:
    values = [0.0, 0.3, -2.0, 7.5, -40.0, 120.0, 1e4, -1e4]
    policy = torch.tensor(values * 2, dtype=dtype)
    desirable = torch.arange(len(policy)) < len(values)
    options = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.4}
    center = {"kto": 0.3 * 0.7, "bco": 0.2}.get(loss, 0.0)

    def truth_of(logratios: Tensor) -> Tensor:
        sign, weight = desirable.double() * 2 - 1, desirable.double() * 0.9 + 0.4
        h = sign * (0.3 * logratios - center)
        if loss == "bco":
            return UNPAIRED_FORMULAS[loss](IN_TORCH, h, weight)
        return weight * torch.sigmoid(-h)  # 1 - sigmoid(h) without rounding to 0

    leaf = policy.clone().requires_grad_()
    constant = torch.full_like(policy, -3.0)
    result = unpaired_loss(
        leaf, desirable, constant, loss_type=loss, impl=impl, **CONSTANTS[loss], **options
    )
    (grad,) = torch.autograd.grad(result.losses.sum(), leaf)
    wide = policy.double().requires_grad_()
    truth = truth_of(wide + 3.0)
    (true_grad,) = torch.autograd.grad(truth.sum(), wide)
    rtol = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.losses, truth.to(dtype), rtol=rtol, atol=rtol)
    torch.testing.assert_close(grad, true_grad.to(dtype), rtol=rtol, atol=rtol)
    torch.testing.assert_close(result.rewards, 0.3 * (policy + 3))


@pytest.mark.parametrize("loss", UNPAIRED_LOSS_NAMES)
def test_unpaired_gradient_equals_finite_differences(loss) -> None:
    policy = torch.tensor([0.5, -2.0, 3.0, -0.1], dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False, False, True])
    assert torch.autograd.gradcheck(
        lambda p: unpaired_loss(p, desirable, loss_type=loss, **CONSTANTS[loss]).losses, policy
    )


# --- options that do not go together ----------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(
        ({"loss_type": loss, **plain_options(loss), option: value}, (option, repr(loss)))
        for loss, spec in PAIR_LOSSES.items()
        for option, value in {**VALUES, "f_divergence_type": "forward_kl"}.items()
        if option not in spec.options
    ),
    ({"loss_type": "ipo", "margins": torch.zeros(1)}, ("margins", "'ipo'")),
    ({"loss_type": "exo_pair"}, ("'exo_pair'", "label_smoothing > 0")),
    ({"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"}, ("f_divergence_type", "'nca_pair'")),
    ({"f_alpha_divergence_coef": 0.3}, ("f_alpha_divergence_coef", "'reverse_kl'")),
    ({"f_divergence_type": "chi"}, ("f_divergence_type", "'chi'")),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, ("loss_weights", "['sigmoid', 'sft']")),
    ({"loss_weights": [math.nan]}, ("loss_weights", "finite")),
    ({"loss_type": "discopop", "discopop_tau": 0.0}, ("discopop_tau", "positive")),
    ({"rpo_alpha": math.inf}, ("rpo_alpha", "finite")),
    ({"loss_type": "bco_pair", "bco_shift": math.nan}, ("bco_shift", "finite")),
    ({"loss_type": "bco_pair", "bco_shift": torch.zeros(2)}, ("bco_shift", "one number")),
    ({"chosen_lengths": torch.ones(1)}, ("chosen_lengths", "rejected_lengths")),
    ({"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(1)}, ("chosen_lengths", "[1]")),
    ({"margins": torch.zeros(2)}, ("margins", "[1]")),
    ({"margins": torch.zeros(1, requires_grad=True)}, ("margins", "requires grad")),
]  # fmt: skip


@pytest.mark.parametrize(
    "options, words", REFUSED, ids=lambda v: "" if isinstance(v, dict) else v[0]
)
def test_what_does_not_go_together_is_refused_by_name(options, words) -> None:
    with pytest.raises(ValueError, match="preference_loss") as caught:
        preference_loss(torch.zeros(1), torch.zeros(1), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": "kto"}, ("needs kl",)),
        ({"loss_type": "bco", "kl": 0.1}, ("kl", "'bco'")),
        (
            {"loss_type": "apo_zero_unpaired", "bco_shift": 0.1},
            ("bco_shift", "'apo_zero_unpaired'"),
        ),
        ({"loss_type": "sigmoid"}, ("loss_type", "'sigmoid'")),
    ],
)
def test_unpaired_options_likewise(options, words) -> None:
    with pytest.raises(ValueError, match="unpaired_loss") as caught:
        unpaired_loss(torch.zeros(1), torch.ones(1).bool(), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
