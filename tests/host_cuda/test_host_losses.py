"""The loss kernels of csrc/cuda/pair_loss.cu on the stand-in, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from host_cuda import harness
from host_cuda.harness import DTYPES, HostCuda, KernelError
from host_cuda.truth import NAN, check
from torch import Tensor

from pyfast_dpo.losses import oracle


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="module")
def cuda() -> HostCuda:
    return HostCuda(harness.build())


COUNTS = [0, 1, 5, 129, 64 * 128 + 3]  # none, one, part of a block, past a block, past the grid
FORMULAS = [*oracle.DIFFERENCE_FORMULAS, *oracle.PAIR_FORMULAS]
TENSORS = (
    "policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected", "chosen_lengths",
    "rejected_lengths", "margins", "shift",
)  # fmt: skip
# which tensors are there, divergence, average_first
VARIANTS = {
    "policy_alone": (2, "reverse_kl", False),
    "reference": (4, "reverse_kl", False),
    "everything": (8, "reverse_kl", True),
    "js_divergence": (8, "js_divergence", False),
    "alpha_divergence": (8, "alpha_divergence", False),
}
DIVERGENCES = ("reverse_kl", "js_divergence", "alpha_divergence")  # the order of the enumeration


def loss_tolerance(dtype: torch.dtype, truth: Tensor, inputs: Tensor) -> Tensor:
    # The inputs' difference carries last places of the inputs into the loss.
    return 8 * torch.finfo(dtype).eps * (truth.abs() + inputs.abs() * (1 + truth.abs().sqrt()) + 1)


def pair_inputs(cuda: HostCuda, loss: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)

    def draw(size: int = count) -> Tensor:
        return torch.rand(size, generator=generator, dtype=dtype)

    logps = [-5 * draw() - 0.1 for _ in range(2)]
    constants = [torch.zeros(count, dtype=dtype)] * 2 if loss == "orpo" else [-5 * draw()] * 2
    lengths = [(9 * draw()).floor() for _ in range(2)]  # 0 counts as 1
    shift = torch.full((1,), 0.2, dtype=dtype)
    return [cuda.copy(t) for t in (*logps, *constants, *lengths, draw(), shift)]


@pytest.mark.parametrize(
    "loss, variant, dtype, count",
    [
        *[(loss, v, DTYPES[i % 2], 5) for loss in FORMULAS for i, v in enumerate(VARIANTS)],
        *[("sigmoid", "everything", dtype, n) for n in COUNTS for dtype in DTYPES[:2]],
    ],
    ids=str,
)
def test_pair_losses(
    cuda: HostCuda, loss: str, variant: str, dtype: torch.dtype, count: int
) -> None:
    tensors, divergence, average_first = VARIANTS[variant]
    if loss not in oracle.DIFFERENCE_FORMULAS:
        divergence = "reverse_kl"
    beta, smoothing, tau, margin, alpha = 0.3, 0.1, 0.4, 0.25, 0.6
    inputs = pair_inputs(cuda, loss, count, dtype)[:tensors]
    upstream = cuda.copy(torch.linspace(-2, 3, count, dtype=dtype))
    out = [cuda.full((count,), dtype) for _ in range(5)]
    params = harness.PairLossParams(
        dtype=DTYPES.index(dtype),
        loss=cuda.lib.pfd_pair_loss_index(loss.encode()),
        pairs=count,
        params=harness.LossParams(beta=beta, label_smoothing=smoothing, discopop_tau=tau),
        margin=margin,
        divergence=DIVERGENCES.index(divergence),
        divergence_alpha=alpha,
        average_first=average_first,
        **{name: t.data_ptr() for name, t in zip(TENSORS, inputs, strict=False)},
    )
    for name, tensor in zip(("losses", "chosen_rewards", "rejected_rewards"), out, strict=False):
        setattr(params, name, tensor.data_ptr())
    cuda.call("pair_loss_forward", params)
    params.grad_losses = upstream.data_ptr()
    params.grad_chosen, params.grad_rejected = out[3].data_ptr(), out[4].data_ptr()
    cuda.call("pair_loss_backward", params)

    wide: list[Tensor | None] = [t.double() for t in inputs]
    wide += [None] * (8 - len(wide))
    policy = [t.requires_grad_() for t in wide[:2] if t is not None]
    truth = oracle.pair_loss(
        *wide, loss, beta, smoothing, tau, margin, divergence, alpha, average_first
    )
    grads = torch.autograd.grad(truth, policy, upstream.double(), materialize_grads=True)
    ratios = [p if c is None else p - c for p, c in zip(policy, wide[2:4], strict=True)]
    expected = [truth, beta * ratios[0], beta * ratios[1], *grads]
    size = torch.stack([t.abs() for t in inputs[:2]]).amax(0) if count else torch.zeros(0)
    for ours, true in zip(out, expected, strict=True):
        true = true.detach()
        check(loss, ours, true, true, loss_tolerance(dtype, true, size))


def test_policy_equal_to_reference(cuda: HostCuda) -> None:
    """ln 2 to the bit and antisymmetric gradients, whatever the smoothing."""
    same, ones = torch.randn(3), torch.ones(3)
    out = [torch.full((3,), NAN) for _ in range(5)]
    params = harness.PairLossParams(
        dtype=DTYPES.index(torch.float32),
        loss=cuda.lib.pfd_pair_loss_index(b"sigmoid"),
        pairs=3,
        params=harness.LossParams(beta=0.1, label_smoothing=0.2),
        grad_losses=ones.data_ptr(),
        **{
            f"{a}_{b}": same.data_ptr()
            for a in ("policy", "reference")
            for b in ("chosen", "rejected")
        },
    )
    names = ("losses", "chosen_rewards", "rejected_rewards", "grad_chosen", "grad_rejected")
    for name, tensor in zip(names, out, strict=True):
        setattr(params, name, tensor.data_ptr())
    cuda.call("pair_loss_forward", params)
    cuda.call("pair_loss_backward", params)
    assert torch.equal(out[0], torch.full((3,), math.log(2), dtype=torch.float32))
    assert torch.equal(out[3], -out[4]) and (out[3] != 0).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("loss", oracle.UNPAIRED_FORMULAS)
def test_unpaired_losses(cuda: HostCuda, loss: str, dtype: torch.dtype, count: int) -> None:
    beta, desirable, undesirable = 0.2, 1.5, 0.7
    policy, constant = (cuda.copy(-20 * torch.rand(count, dtype=dtype)) for _ in range(2))
    labels = cuda.empty(count, torch.bool).copy_(torch.rand(count) < 0.5)
    kl = cuda.copy(torch.tensor([0.4], dtype=dtype))
    upstream = cuda.copy(torch.randn(count, dtype=dtype))
    losses, rewards, grad = (cuda.full((count,), dtype) for _ in range(3))
    params = harness.UnpairedLossParams(
        dtype=DTYPES.index(dtype),
        loss=cuda.lib.pfd_unpaired_loss_index(loss.encode()),
        count=count,
        params=harness.LossParams(
            beta=beta, desirable_weight=desirable, undesirable_weight=undesirable
        ),
        **{"policy": policy.data_ptr(), "reference": constant.data_ptr(), "kl": kl.data_ptr()},
        **{"is_desirable": labels.data_ptr(), "losses": losses.data_ptr()},
        **{"rewards": rewards.data_ptr(), "grad_policy": grad.data_ptr()},
    )
    cuda.call("unpaired_loss_forward", params)
    params.grad_losses = upstream.data_ptr()
    cuda.call("unpaired_loss_backward", params)

    leaf = policy.double().requires_grad_()
    ratio = leaf - constant.double()
    truth = oracle.UNPAIRED_FORMULAS[loss](ratio, labels, kl.double(), beta, desirable, undesirable)
    (grads,) = torch.autograd.grad(truth, leaf, upstream.double())
    for ours, true in ((losses, truth), (rewards, beta * ratio), (grad, grads)):
        true = true.detach()
        check(loss, ours, true, true, loss_tolerance(dtype, true, policy.abs()))


def test_unknown_loss_is_refused(cuda: HostCuda) -> None:
    for index in (-1, 99):
        for name, params in (
            ("pair_loss_forward", harness.PairLossParams(loss=index, pairs=1)),
            ("unpaired_loss_backward", harness.UnpairedLossParams(loss=index, count=1)),
        ):
            with pytest.raises(KernelError, match=": 1:"):
                cuda.call(name, params)
