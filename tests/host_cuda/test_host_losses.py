"""The loss kernels of csrc/cuda/pair_loss.cu on the stand-in, against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from host_cuda import harness
from host_cuda.harness import DTYPES, HostCuda, KernelError
from host_cuda.truth import NAN, check
from torch import Tensor


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="module")
def cuda() -> HostCuda:
    return HostCuda(harness.build())


COUNTS = [0, 1, 5, 129, 64 * 128 + 3]  # none, one, part of a block, past a block, past the grid
PAIR_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": lambda c, r, beta, eps: (
        -(1 - eps) * torch.nn.functional.logsigmoid(beta * (c - r))
        - eps * torch.nn.functional.logsigmoid(-beta * (c - r))
    ),
    "ipo": lambda c, r, beta, eps: (c - r - 1 / (2 * beta)) ** 2,
}


def loss_tolerance(dtype: torch.dtype, truth: Tensor, inputs: Tensor) -> Tensor:
    # The inputs' difference carries last places of the inputs into the loss.
    return 8 * torch.finfo(dtype).eps * (truth.abs() + inputs.abs() * (1 + truth.abs().sqrt()) + 1)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_pair_losses(
    cuda: HostCuda, loss: str, dtype: torch.dtype, with_reference: bool, count: int
) -> None:
    beta, smoothing = 0.3, 0.1 if loss == "sigmoid" else 0.0
    inputs = [cuda.copy(-20 * torch.rand(count, dtype=dtype)) for _ in range(4)]
    upstream = cuda.copy(torch.randn(count, dtype=dtype))
    out = [cuda.full((count,), dtype) for _ in range(5)]
    names = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    params = harness.PairLossParams(
        dtype=DTYPES.index(dtype),
        loss=cuda.lib.pfd_pair_loss_index(loss.encode()),
        pairs=count,
        params=harness.LossParams(beta=beta, label_smoothing=smoothing),
        **{
            n: t.data_ptr()
            for n, t in zip(names[: 4 if with_reference else 2], inputs, strict=False)
        },
    )
    for name, tensor in zip(("losses", "chosen_rewards", "rejected_rewards"), out, strict=False):
        setattr(params, name, tensor.data_ptr())
    cuda.call("pair_loss_forward", params)
    params.grad_losses = upstream.data_ptr()
    params.grad_chosen, params.grad_rejected = out[3].data_ptr(), out[4].data_ptr()
    cuda.call("pair_loss_backward", params)

    policy = [t.double().requires_grad_() for t in inputs[:2]]
    reference = [t.double() if with_reference else torch.zeros(count) for t in inputs[2:]]
    ratios = policy[0] - reference[0], policy[1] - reference[1]
    truth = PAIR_LOSSES[loss](ratios[0], ratios[1], beta, smoothing)
    grads = torch.autograd.grad(truth, policy, upstream.double())
    expected = [truth, beta * ratios[0], beta * ratios[1], *grads]
    size = torch.stack([t.abs() for t in inputs]).amax(0) if count else torch.zeros(0)
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
def test_kto(cuda: HostCuda, dtype: torch.dtype, count: int) -> None:
    beta, desirable, undesirable = 0.2, 1.5, 0.7
    policy, reference = (cuda.copy(-20 * torch.rand(count, dtype=dtype)) for _ in range(2))
    labels = cuda.empty(count, torch.bool).copy_(torch.rand(count) < 0.5)
    kl = cuda.copy(torch.tensor([0.4], dtype=dtype))
    upstream = cuda.copy(torch.randn(count, dtype=dtype))
    losses, rewards, grad = (cuda.full((count,), dtype) for _ in range(3))
    params = harness.UnpairedLossParams(
        dtype=DTYPES.index(dtype),
        loss=cuda.lib.pfd_unpaired_loss_index(b"kto"),
        count=count,
        params=harness.LossParams(beta, 0, desirable, undesirable),
        **{"policy": policy.data_ptr(), "reference": reference.data_ptr(), "kl": kl.data_ptr()},
        **{"is_desirable": labels.data_ptr(), "losses": losses.data_ptr()},
        **{"rewards": rewards.data_ptr(), "grad_policy": grad.data_ptr()},
    )
    cuda.call("unpaired_loss_forward", params)
    params.grad_losses = upstream.data_ptr()
    cuda.call("unpaired_loss_backward", params)

    leaf = policy.double().requires_grad_()
    ratio = leaf - reference.double()
    margin = beta * (ratio - kl.double())
    truth = torch.where(
        labels, desirable * (1 - margin.sigmoid()), undesirable * (1 - (-margin).sigmoid())
    )
    (grads,) = torch.autograd.grad(truth, leaf, upstream.double())
    for ours, true in ((losses, truth), (rewards, beta * ratio), (grad, grads)):
        true = true.detach()
        check("kto", ours, true, true, loss_tolerance(dtype, true, policy.abs()))


def test_unknown_loss_is_refused(cuda: HostCuda) -> None:
    for index in (-1, 99):
        for name, params in (
            ("pair_loss_forward", harness.PairLossParams(loss=index, pairs=1)),
            ("unpaired_loss_backward", harness.UnpairedLossParams(loss=index, count=1)),
        ):
            with pytest.raises(KernelError, match=": 1:"):
                cuda.call(name, params)
