"""The gradient of a row's entropy beside that of its log-prob, in one pass: CPU kernels, and CUDA on the stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _helpers import DTYPES, HALVES, bits, name_of, statistics_dtype
from host_cuda import harness
from host_cuda.harness import HostCuda, Scores
from torch import Tensor

from pyfast_dpo.logprobs.statistics import torch_row_statistics

ops = torch.ops.pyfast_dpo
INF, NAN = math.inf, math.nan
# (logits, labels, d loss / d log-prob, entropies, d loss / d entropy, out) -> out
Compute = Callable[..., Tensor]


def by_the_operator(
    logits: Tensor, labels: Tensor, coefficients: Tensor, entropy: Tensor, slopes: Tensor, out: Tensor
) -> Tensor:  # fmt: skip
    _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
    ops.seq_logp_backward_out(
        None, coefficients, logits, labels, *saved, -100, False, out, entropy, slopes
    )
    return out


@pytest.fixture(scope="module")
def on_the_stand_in() -> Compute:
    cuda = HostCuda(harness.build())

    def compute(
        logits: Tensor, labels: Tensor, coefficients: Tensor, entropy: Tensor, slopes: Tensor, out: Tensor
    ) -> Tensor:  # fmt: skip
        own = cuda.copy(logits)
        scores: Scores = cuda.seq_logp(own, labels)
        own_out = cuda.full(tuple(out.shape), out.dtype)
        cuda.seq_logp_backward(
            own, labels, scores, None, coefficients, out=own_out, entropy=(entropy, slopes)
        )
        return out.copy_(own_out)

    return compute


@pytest.fixture(params=["cpu", "cuda on the stand-in"])
def compute(request, on_the_stand_in) -> Compute:
    return by_the_operator if request.param == "cpu" else on_the_stand_in


def entropies(logits: Tensor) -> Tensor:
    flat = logits.flatten(0, 1)
    return torch_row_statistics(flat, torch.zeros(len(flat), dtype=torch.int64)).entropy.view(
        logits.shape[:2]
    )


def truth_and_size(
    logits: Tensor, labels: Tensor, coefficients: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """In float64; the size is that of the terms before they cancel."""
    logps = logits.double().log_softmax(-1)
    p = logps.exp()
    logps = logps.masked_fill(p == 0, 0.0)
    entropy = -(p * logps).sum(-1, keepdim=True)
    c, s = coefficients.double()[..., None], slopes.double()[..., None]
    hit = torch.zeros_like(p).scatter(-1, labels.clamp(min=0)[..., None], 1.0)
    truth = c * (hit - p) - s * p * (logps + entropy)
    # An exponential below 2^-125 may be 0 in float32: 2^-103 times the rounding that the test allows is more.
    least = p.clamp(min=2.0**-103 if logits.dtype != torch.float64 else 0.0)
    size = c.abs() * (hit + least) + s.abs() * least * (logps.abs() + entropy)
    scored = (labels >= 0)[..., None]
    return truth * scored, size * scored


PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, half) for half in HALVES]


@pytest.mark.numerics
@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 4099])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "model-like", "certain"])
@pytest.mark.parametrize("dtype, out_dtype", PAIRS, ids=name_of)
def test_the_gradient_equals_float64(compute, dtype, out_dtype, scale, vocab):
    generator = torch.Generator().manual_seed(vocab)
    z = torch.randn(2, 4, vocab, generator=generator, dtype=torch.float64) * scale
    z[0, 1] += 100.0  # an offset changes nothing
    z[1, 0, : vocab // 2] = -INF
    logits, stat = z.to(dtype), statistics_dtype(dtype)
    labels = torch.randint(vocab // 2, vocab, (2, 4), generator=generator)
    labels[1, 2] = -100
    coefficients, slopes = (torch.randn(2, 4, generator=generator, dtype=stat) for _ in range(2))
    out = torch.full(logits.shape, NAN, dtype=out_dtype)
    entropy = entropies(logits.double()).to(stat)
    ours = compute(logits, labels, coefficients, entropy, slopes, out).double()
    truth, size = truth_and_size(logits, labels, coefficients, slopes)
    # A rounding of the result; of the terms one of the exponent's and the entropy's float32.
    eps, info = torch.finfo(stat).eps, torch.finfo(out_dtype)
    allowed = 0.51 * info.eps * truth.abs() + 64 * eps * size + info.tiny
    if dtype in HALVES:  # whose exponentials have the precision of the result
        allowed = allowed + info.eps / 8 * size
    worst = (ours - truth).abs() - allowed
    assert (worst <= 0).all(), (float(worst.max()), ours.flatten()[worst.argmax()])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize(
    "row",
    [[1.0, NAN, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF]],
    ids=["NaN", "+inf", "nothing possible"],
)
def test_a_row_without_a_distribution_has_no_finite_gradient(compute, row, dtype):
    logits, labels = torch.tensor([[row, [0.0, 1.0, 2.0]]], dtype=dtype), torch.tensor([[2, 2]])
    ones, out = torch.ones(1, 2, dtype=dtype), torch.zeros(1, 2, 3, dtype=dtype)
    ours = compute(logits, labels, ones, entropies(logits), ones, out)
    assert ours[0, 0].isnan().all() and ours[0, 1].isfinite().all()


def test_a_label_that_the_model_excludes_has_its_entropy_alone(compute):
    logits, labels = torch.tensor([[[1.0, -INF, 2.0]]]), torch.tensor([[1]])
    zeros, ones, out = torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1, 3)
    ours = compute(logits, labels, zeros, entropies(logits), ones, out)
    truth, _ = truth_and_size(logits, labels, zeros, ones)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_without_a_slope_the_bits_are_those_of_the_log_prob_alone(compute, dtype):
    logits = (3 * torch.randn(2, 3, 203)).to(dtype)
    labels, stat = torch.randint(0, 203, (2, 3)), statistics_dtype(dtype)
    coefficients, zeros = torch.randn(2, 3, dtype=stat), torch.zeros(2, 3, dtype=stat)
    out = torch.zeros_like(logits)
    entropy = entropies(logits.to(stat))
    ours = compute(logits, labels, coefficients, entropy, zeros, out).clone()
    minus = compute(logits, labels, coefficients, entropy, -zeros, out)
    assert torch.equal(bits(ours), bits(minus))
    if compute is by_the_operator:
        _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
        alone = ops.seq_logp_backward(None, coefficients, logits, labels, *saved, -100, False)
        assert torch.equal(bits(ours), bits(alone))


def test_it_may_overwrite_the_logits_and_no_argument():
    logits, labels = torch.randn(1, 3, 33), torch.randint(0, 33, (1, 3))
    _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
    entropy, ones = entropies(logits), torch.ones(1, 3)
    expected = by_the_operator(logits, labels, ones, entropy, ones, torch.empty_like(logits))
    own = logits.clone()
    ops.seq_logp_backward_out(None, ones, own, labels, *saved, -100, False, own, entropy, ones)
    assert torch.equal(own, expected)
    memory = torch.zeros(99)
    with pytest.raises(RuntimeError, match="out must not share memory"):
        ops.seq_logp_backward_out(
            None, ones, logits, labels, *saved, -100, False, memory.view(1, 3, 33), memory[:3].view(1, 3), ones
        )  # fmt: skip


@pytest.mark.parametrize(
    "entropy, slopes, words",
    [
        (None, torch.ones(1, 3), "entropy and grad_entropy go"),
        (torch.ones(1, 3), None, "entropy and grad_entropy go"),
        (torch.ones(3), torch.ones(1, 3), "entropy must have"),
        (torch.ones(1, 3), torch.ones(1, 3).double(), "grad_entropy must have"),
    ],
    ids=["slopes alone", "entropies alone", "another shape", "another dtype"],
)
def test_what_does_not_fit_is_refused_by_name(entropy, slopes, words):
    logits, labels = torch.randn(1, 3, 33), torch.randint(0, 33, (1, 3))
    _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
    with pytest.raises(RuntimeError, match=f"seq_logp_backward_out: {words}"):
        ops.seq_logp_backward_out(
            None, torch.ones(1, 3), logits, labels, *saved, -100, False, torch.empty_like(logits), entropy, slopes
        )  # fmt: skip
