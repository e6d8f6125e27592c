"""Float64 truth, torch's own result, and the rule that compares ours with them; for host and device tests.

|ours - truth| <= |torch - truth| + tolerance, elementwise, where the truth is float64 from the same inputs
and torch computes in the statistics' dtype (float32 for half types: stricter than its own half types).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
HALVES = (torch.bfloat16, torch.float16)


class Scores(NamedTuple):
    """What the forward pass leaves."""

    token_logps: Tensor
    row_max: Tensor
    row_sum: Tensor
    sequence_logps: Tensor
    sequence_scale: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_rows(batch: int, length: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, vocab, (batch, length), generator=generator)


def bits(tensor: Tensor) -> Tensor:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def targets_of(labels: Tensor, shift: bool) -> Tensor:
    if not shift:
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def true_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """-softplus(lse of the others - target): keeps its digits when the model is certain."""
    scored = targets >= 0
    index = targets.clamp(min=0)[..., None]
    z = torch.where(scored[..., None], logits.double(), 0.0)  # ignored rows may hold anything
    others = z.scatter(-1, index, -INF).logsumexp(-1)
    distance = others - z.gather(-1, index)[..., 0]
    logps = -(distance.clamp(min=0) + torch.log1p(torch.exp(-distance.abs())))
    return torch.where(scored, logps, 0.0)


def torch_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    z = torch.where((targets >= 0)[..., None], logits, 0.0)
    logps = torch.log_softmax(z, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets >= 0, logps, 0.0)


def true_grad(logits: Tensor, targets: Tensor, coefficient: Tensor) -> Tensor:
    scored = (targets >= 0)[..., None]
    z = torch.where(scored, logits.double(), 0.0)
    probs = torch.softmax(z, -1)
    at_target = -torch.expm1(true_token_logps(logits, targets))[..., None]
    grad = (-probs).scatter(-1, targets.clamp(min=0)[..., None], at_target)
    return torch.where(scored, grad * coefficient[..., None].double(), 0.0)


def torch_grad(logits: Tensor, targets: Tensor, coefficient: Tensor) -> Tensor:
    z = logits.detach().clone().requires_grad_()
    (torch_token_logps(z, targets) * coefficient).sum().backward()
    assert z.grad is not None
    return z.grad


def check(what: str, ours: Tensor, truth: Tensor, peer: Tensor, tolerance: Tensor | float) -> None:
    truth = truth.double()
    bound = (peer.double() - truth).abs() + tolerance
    same = (ours.double() == truth) | (ours.isnan() & truth.isnan())  # also infinities
    excess = torch.where(same, -INF, (ours.double() - truth).abs() - bound)
    excess = torch.where(excess.isnan(), INF, excess)
    if (excess > 0).any():
        worst = int(excess.argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
        raise AssertionError(
            f"{what}: worst at {at}: ours {ours.flatten()[worst].item()!r}, truth "
            f"{truth.flatten()[worst].item()!r}, torch {peer.flatten()[worst].item()!r}"
        )


def check_forward(
    scores: Scores, logits: Tensor, labels: Tensor, shift: bool = False, average: bool = False
) -> None:
    stat = scores.token_logps.dtype
    eps = torch.finfo(stat).eps
    z = logits.detach().clone()
    targets = targets_of(labels, shift)
    scored = (targets >= 0)[..., None]
    truth = true_token_logps(z, targets)
    peer = torch_token_logps(z.to(stat), targets)
    check("token_logps", scores.token_logps, truth, peer, 16 * eps * truth.abs().clamp(min=1))

    rows = torch.where(scored, z.double(), 0.0)
    top = torch.where(scored[..., 0], rows.amax(-1), 0.0)
    assert torch.equal(scores.row_max.double(), top)
    total = torch.where(scored[..., 0], torch.exp(rows - top[..., None]).sum(-1), 1.0)
    check("row_sum", scores.row_sum, total, total, 16 * eps * total)

    count = (targets >= 0).sum(1)
    scale = torch.where(count > 0, 1 / count.double(), 0.0) if average else torch.ones(len(count))
    check("sequence_scale", scores.sequence_scale, scale, scale, eps)
    factor = scale if average else 1.0
    check(
        "sequence_logps",
        scores.sequence_logps,
        truth.sum(1) * factor,
        peer.sum(1) * factor,
        16 * eps * truth.abs().clamp(min=1).sum(1) * factor,
    )


def check_backward(grad: Tensor, logits: Tensor, targets: Tensor, coefficient: Tensor) -> None:
    stat = statistics_dtype(logits.dtype)
    truth = true_grad(logits, targets, coefficient)
    peer = torch_grad(logits.to(stat), targets, coefficient.to(stat)).to(grad.dtype)
    info = torch.finfo(grad.dtype)
    # Half a last place where torch rounds the other way; exponents carry |z - max| last places.
    tolerance = (0.51 if grad.dtype in HALVES else 32) * info.eps * truth.abs()
    check("gradient", grad, truth, peer, tolerance + info.smallest_normal * info.eps)
