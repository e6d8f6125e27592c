"""Entropy, mean logit, top-1 hits and squared probabilities of rows: CPU kernels, and CUDA on the stand-in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _helpers import assert_rule, bits, name_of
from host_cuda import harness
from host_cuda.harness import DTYPES, HostCuda
from torch import Tensor

from pyfast_dpo.logprobs.statistics import LinearStatistics, row_statistics, torch_row_statistics

INF, NAN = math.inf, math.nan
Compute = Callable[[Tensor, Tensor], LinearStatistics]


@pytest.fixture(scope="module")
def on_the_stand_in() -> Compute:
    cuda = HostCuda(harness.build())

    def compute(logits: Tensor, targets: Tensor, row_max: Tensor | None = None) -> LinearStatistics:
        known = None if row_max is None else cuda.copy(row_max)
        gap = logits.stride(0) - logits.shape[1] if logits.numel() else 0
        own = (
            cuda.rows(logits.unsqueeze(0), logits.dtype, row_gap=gap)[0]
            if gap
            else cuda.copy(logits)
        )
        return LinearStatistics(*cuda.row_statistics(own, cuda.copy(targets), known))

    return compute


@pytest.fixture(params=["cpu", "cuda on the stand-in"])
def compute(request, on_the_stand_in) -> Compute:
    return row_statistics if request.param == "cpu" else on_the_stand_in


SHAPES = [
    (0, 5, "no rows"),
    (1, 1, "one token: certain"),
    (2, 7, "shorter than a vector"),
    (3, 33, "one more than a pair of vectors"),
    (70, 12, "more rows than blocks in the stand-in's grid"),
    (2, 4099, "more than a block of the CPU's sums, a ragged end"),
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "model-like", "certain"])
@pytest.mark.parametrize("rows, vocab", [s[:2] for s in SHAPES], ids=[s[2] for s in SHAPES])
def test_statistics_equal_float64_as_well_as_torch_does(compute, rows, vocab, scale, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    if rows:
        targets[0] = logits[0].argmax()
    truth = torch_row_statistics(logits.double(), targets)
    peer = torch_row_statistics(logits, targets)
    ours = compute(logits, targets)
    eps = torch.finfo(dtype).eps
    for name, value, other, true in zip(truth._fields, ours, peer, truth, strict=True):
        if name == "is_top1":
            assert torch.equal(value, true)
            continue
        assert value.dtype == dtype and value.shape == (rows,)
        # Differences of numbers as large as the logits' range and log V.
        tolerance = eps * (4 * true.abs() + scale * 8 + math.log(vocab) + 1)
        assert_rule(name, value, other, true, tolerance)


ROWS = [
    ([0.0, 0.0, 0.0], 2, (math.log(3), 0.0, True, -math.log(3)), "a tie is a hit, wherever the target is"),
    ([1e4, 1e4, 0.0], 0, (math.log(2), 2e4 / 3, True, -math.log(2)), "a large offset"),
    ([5.0, -INF, 5.0], 0, (math.log(2), -INF, True, -math.log(2)), "masked tokens add nothing"),
    ([0.0, 50.0, 0.0], 0, (2 * 51 * math.exp(-50), 50 / 3, False, 0.0), "certain of another token"),
    ([7.0, -INF, -INF], 0, (0.0, -INF, True, 0.0), "one token is possible"),
    ([1.0, NAN, 2.0], 2, (NAN, NAN, False, NAN), "NaN in, NaN out"),
    ([NAN, 1.0, 2.0], 2, (NAN, NAN, False, NAN), "NaN first"),
    ([INF, 1.0, 2.0], 0, (NAN, INF, False, NAN), "+inf is no distribution"),
    ([-INF, -INF, -INF], 0, (NAN, -INF, False, NAN), "nothing is possible"),
    ([0.0, 0.0, 0.0], 3, (math.log(3), 0.0, False, -math.log(3)), "a target past the vocabulary is no hit"),
    ([0.0, 0.0, 0.0], -7, (math.log(3), 0.0, False, -math.log(3)), "nor one before it"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("row, target, expected", [r[:3] for r in ROWS], ids=[r[3] for r in ROWS])
def test_special_rows_have_documented_answers(compute, row, target, expected, dtype):
    logits, targets = torch.tensor([row], dtype=dtype), torch.tensor([target])
    for what, function in (("kernel", compute), ("torch", torch_row_statistics)):
        for name, value, wanted in zip(
            LinearStatistics._fields, function(logits, targets), expected, strict=True
        ):
            torch.testing.assert_close(
                value.double(), torch.tensor([float(wanted)], dtype=torch.float64), equal_nan=True,
                rtol=1e-5, atol=1e-6, msg=lambda m, n=name, w=what: f"{w}, {n}: {m}",
            )  # fmt: skip


def test_a_row_does_not_depend_on_its_neighbours_or_on_threads():
    logits = torch.randn(40, 5003)
    targets = torch.randint(0, 5003, (40,))
    together = row_statistics(logits, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        other = row_statistics(logits, targets)
    finally:
        torch.set_num_threads(threads)
    alone = row_statistics(logits[7:8], targets[7:8])
    for a, b, c in zip(together, other, alone, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and torch.equal(a[7:8], c)
    assert torch.equal(bits(together.entropy), bits(other.entropy))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("vocab", [7, 4099])
def test_known_maxima_and_rows_apart_change_no_bit(compute, vocab, dtype):
    """What lies between the rows, NaN here, is not read."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, vocab, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocab, (5,), generator=generator)
    expected = compute(logits, targets)
    for gap in (1, 5):
        apart = torch.full((5, vocab + gap), torch.nan, dtype=dtype)
        apart[:, :vocab] = logits
        for known in (None, logits.amax(1)):
            for ours, plain in zip(
                compute(apart[:, :vocab], targets, known), expected, strict=True
            ):
                same = torch.equal if ours.dtype == torch.bool else _same_bits
                assert same(ours.cpu(), plain.cpu()), (gap, known)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_it_is_a_proper_operator(dtype):
    arguments = torch.randn(3, 5, dtype=dtype), torch.tensor([0, 4, 2])
    torch.library.opcheck(torch.ops.pyfast_dpo.row_statistics, arguments)
    known = arguments[0].amax(1)
    torch.library.opcheck(torch.ops.pyfast_dpo.row_statistics, (*arguments, known))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.zeros(2, 3).bfloat16(), torch.zeros(2).long()), ["float32 or float64", "BFloat16"]),
        ((torch.zeros(2, 0), torch.zeros(2).long()), ["V >= 1", "[2, 0]"]),
        ((torch.zeros(2, 3), torch.zeros(3).long()), ["targets", "[2]", "[3]"]),
    ],
    ids=["dtype", "no vocabulary", "targets"],
)
def test_bad_input_is_refused_by_name(arguments, words):
    with pytest.raises(RuntimeError) as caught:
        row_statistics(*arguments)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
