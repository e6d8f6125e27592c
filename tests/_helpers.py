"""Float64 truth, torch's own result, and the rule that compares ours with them.

The rule, elementwise: |ours - truth| <= |torch - truth| + tolerance. The truth is computed in float64 from the
very same inputs. "torch" is `log_softmax().gather()` in the dtype of the statistics (float32 for half types,
which is stricter than its own half arithmetic), its gradient rounded once to the dtype of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = (torch.bfloat16, torch.float16)


def name_of(value: object) -> str | None:
    """Test ids: dtypes without their module."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Logits with the spread of a language model's, drawn in float64 so that dtypes see one row."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def random_labels(*shape: int, vocab: int, ignored: float = 0.0, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN and 0 differs from -0."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def with_threads(run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What it returns with 1, 2 and 5 threads."""
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(run())
    torch.set_num_threads(threads)
    return results


# --- the three results ------------------------------------------------------------------------------


def targets_of(labels: Tensor, shift: bool = False, ignore_index: int = -100) -> Tensor:
    """The label that each position scores, -1 where it scores none."""
    if shift:
        last = torch.full_like(labels[..., :1], ignore_index)
        labels = torch.cat([labels[..., 1:], last], -1) if labels.shape[-1] else labels
    return labels.masked_fill(labels == ignore_index, -1)


def true_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """-softplus(log-sum-exp of the others - target): keeps its digits when the model is certain."""
    return truths(logits, targets)[0]


def true_gradient(logits: Tensor, targets: Tensor, coefficient: Tensor) -> Tensor:
    """coefficient * (1 at the target - softmax), with 1 - p of the target from its log-prob."""
    return truths(logits, targets)[1] * coefficient.double()[..., None]


def truths(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, d log-prob / d logits) in float64; float64 logits are themselves worth extended precision."""
    scored, index = (targets >= 0)[..., None].numpy(), targets.clamp(min=0)[..., None].numpy()
    work = np.longdouble if logits.dtype == torch.float64 else np.float64
    with np.errstate(all="ignore"):
        z = np.where(scored, logits.detach().double().numpy(), 0.0).astype(work)
        others = z.copy()
        np.put_along_axis(others, index, -INF, -1)
        peak = others.max(-1, keepdims=True)
        total = np.exp(others - np.where(peak == -INF, 0.0, peak)).sum(-1, keepdims=True)
        # the difference first: a log-sum-exp near 1e4 would round away what the inputs can tell
        distance = (peak - np.take_along_axis(z, index, -1)) + np.log(total)
        logps = -(np.maximum(distance, 0) + np.log1p(np.exp(-np.abs(distance))))
        weights = np.exp(z - z.max(-1, keepdims=True))
        gradient = -weights / weights.sum(-1, keepdims=True)
        np.put_along_axis(gradient, index, -np.expm1(logps), -1)
    results = np.where(scored, logps, 0.0)[..., 0], np.where(scored, gradient, 0.0)
    return torch.from_numpy(results[0].astype(np.float64)), torch.from_numpy(
        results[1].astype(np.float64)
    )


def torch_token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    scored, index = targets >= 0, targets.clamp(min=0)[..., None]
    z = torch.where(scored[..., None], logits.to(statistics_dtype(logits.dtype)), 0.0)
    logps = torch.log_softmax(z, -1).gather(-1, index)[..., 0]
    return torch.where(scored, logps, 0.0)


def torch_gradient(logits: Tensor, targets: Tensor, coefficient: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch_token_logps(leaf, targets), leaf, coefficient)
    return gradient


# --- the rule ---------------------------------------------------------------------------------------


def assert_rule(
    what: str, ours: Tensor, peer: Tensor, truth: Tensor, tolerance: Tensor | float
) -> None:
    """|ours - truth| <= |torch - truth| + tolerance; infinities and NaN must be those of the truth."""
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, not {list(truth.shape)}"
    ours, peer, truth = (t.detach().double() for t in (ours, peer, truth))
    torch_error = torch.where(truth.isfinite(), (peer - truth).abs(), 0.0).nan_to_num(0.0)
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    excess = torch.where(same, 0.0, (ours - truth).abs() - torch_error - tolerance)
    excess = torch.where(excess.isnan(), INF, excess)
    if ours.numel() and excess.max() > 0:
        worst = int(excess.argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape)]
        values = (t.flatten()[worst].item() for t in (ours, peer, truth))
        raise AssertionError(
            "{}: worst of {} elements at {}: ours {!r}, torch {!r}, truth {!r}".format(
                what, int((excess > 0).sum()), index, *values
            )
        )


def forward_tolerance(dtype: torch.dtype, truth: Tensor) -> Tensor:
    """A few last places of the result or, near 0, of 1: the sum of exponentials carries them."""
    return 4 * torch.finfo(statistics_dtype(dtype)).eps * truth.abs().clamp(min=1)


def gradient_tolerance(logits: Tensor, truth: Tensor, coefficient: Tensor) -> Tensor:
    """Half types: half a last place, where torch happens to round better, and 2% of that for exp.
    Else some last places, and as many as the distance to the peak, whose rounding exp magnifies.
    Entries under 2^-126 of the peak may become 0."""
    info = torch.finfo(logits.dtype)
    if logits.dtype in HALVES:
        relative: Tensor | float = 0.51 * info.eps
    else:
        z = logits.detach().double()
        distance = (z.amax(-1, keepdim=True) - z).nan_to_num(0.0, 0.0, 0.0)
        relative = (8 + distance) * info.eps
    floor = 2.0**-126 * coefficient.double().abs()[..., None] + info.smallest_normal * info.eps
    return relative * truth.abs() + floor


def check_token_logps(ours: Tensor, logits: Tensor, targets: Tensor) -> None:
    assert ours.dtype == statistics_dtype(logits.dtype)
    truth = true_token_logps(logits, targets)
    tolerance = forward_tolerance(logits.dtype, truth)
    assert_rule("token_logps", ours, torch_token_logps(logits, targets), truth, tolerance)
    assert not (ours > 0).any(), "a log-prob above 0"
    assert (ours[targets < 0] == 0).all(), "an ignored row has a log-prob"


def check_gradient(ours: Tensor, logits: Tensor, targets: Tensor, coefficient: Tensor) -> None:
    assert ours.dtype == logits.dtype
    truth = true_gradient(logits, targets, coefficient)
    peer = torch_gradient(logits, targets, coefficient)
    tolerance = gradient_tolerance(logits, truth, coefficient)
    assert_rule("gradient", ours, peer, truth, tolerance)
    assert (ours[targets < 0] == 0).all(), "an ignored row has a gradient"


def check_both(
    logits: Tensor, labels: Tensor, coefficient: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """token_logps and its gradient by the rule, for logits of any layout; returns both."""
    import pyfast_dpo

    leaf = logits.detach().requires_grad_()
    targets = targets_of(labels, options.get("shift", False), options.get("ignore_index", -100))
    logps = pyfast_dpo.token_logps(leaf, labels, impl="fused", **options)
    check_token_logps(logps.detach(), logits, targets)
    if coefficient is None:
        generator = torch.Generator().manual_seed(2)
        coefficient = torch.randn(labels.shape, generator=generator).to(logps.dtype)
    (gradient,) = torch.autograd.grad(logps, leaf, coefficient)
    check_gradient(gradient, logits, targets, coefficient)
    return logps.detach(), gradient
