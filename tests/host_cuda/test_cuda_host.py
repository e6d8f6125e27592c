"""The CUDA kernels, compiled by g++ with the stand-in of host_cuda/ and run on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from host_cuda import harness
from host_cuda.harness import DTYPES, HostCuda, KernelError
from host_cuda.policy_call import call_policy_loss
from host_cuda.truth import (
    HALVES,
    INF,
    NAN,
    Scores,
    bits,
    check,
    check_backward,
    check_forward,
    random_rows,
    statistics_dtype,
    targets_of,
    true_token_logps,
)
from torch import Tensor

from pyfast_dpo.losses.policy_table import check_policy_options


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="session")
def library() -> HostCuda:
    return HostCuda(harness.build())


@pytest.fixture
def cuda(library: HostCuda) -> HostCuda:
    library.set_order("forward")
    return library


def storage_of(tensor: Tensor) -> Tensor:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((size,), (1,), 0)


def run_both(
    cuda: HostCuda, logits: Tensor, labels: Tensor, *, shift: bool = False, average: bool = False
) -> tuple[Scores, Tensor]:
    """Forward, backward into a new tensor and in place, with the usual checks of all three."""
    batch, length, _ = logits.shape
    stat = statistics_dtype(logits.dtype)
    scores = cuda.seq_logp(logits, cuda.copy(labels), shift=shift, average=average)
    grad_sequence = cuda.copy(torch.randn(batch, dtype=stat))
    grad_token = cuda.copy(torch.randn(batch, length, dtype=stat))
    args = (cuda.copy(labels), scores, grad_sequence, grad_token)
    grad = cuda.seq_logp_backward(
        logits, *args, out=cuda.full(tuple(logits.shape), logits.dtype), shift=shift
    )
    check_forward(scores, logits, labels, shift, average)
    coefficient = grad_sequence[:, None] * scores.sequence_scale[:, None] + grad_token
    check_backward(grad, logits, targets_of(labels, shift), coefficient)

    before = storage_of(logits).clone()
    cuda.seq_logp_backward(logits, *args, out=logits, shift=shift)
    assert torch.equal(bits(logits), bits(grad)), "in place differs"
    logits.fill_(0)
    before.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(0)
    assert torch.equal(bits(storage_of(logits)), bits(before)), "wrote between the rows"
    return scores, grad


# --- numerics over shapes and layouts -------------------------------------------------------------

SHAPES = [
    (1, 1, 1),  # no others: log p is exactly 0
    (2, 2, 2),  # shortest row with another token
    (2, 3, 7),  # shorter than a vector of halves, odd
    (2, 3, 8),  # exactly one vector of halves
    (3, 9, 17),  # odd V: consecutive rows go through every alignment
    (2, 2, 64),  # fewer vectors than threads
    (1, 3, 4099),  # every thread once, and a tail (halves)
    (1, 2, 16391),  # one full round of loads in flight, and a tail (halves)
    (1, 2, 50257),  # an odd vocabulary from the field
    (1, 70, 12),  # more rows than blocks in the grid
    (2, 1, 61445),  # three slices of halves, six of floats; odd: the second row is misaligned
    (1, 33, 24584),  # two slices of halves, 66 of them: more than blocks in the grid
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "aligned": {},
    "up against the page above": {"aligned": False},
    "up against the page below": {"from_start": True},
    "storage offset": {"offset": 3},
    "strided rows": {"row_gap": 5, "batch_gap": 2},
    "rows of a wider tensor, still aligned": {"row_gap": 16, "batch_gap": 32},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(cuda: HostCuda, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    values, labels = random_rows(*shape)
    run_both(cuda, cuda.rows(values, dtype, aligned=False), labels)


def test_how_rows_are_cut(cuda: HostCuda) -> None:
    """A function of the vocabulary alone, or a row's bits would depend on the batch."""
    slices = {vocab: cuda.slices(torch.bfloat16, vocab) for vocab in (1, 24576, 24577, 151936)}
    assert slices == {1: 1, 24576: 1, 24577: 2, 151936: 7}
    assert cuda.slices(torch.float32, 151936) == 13 and cuda.slices(torch.float64, 6145) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", range(8))  # in elements: every misalignment of every dtype
def test_a_target_in_every_part_of_a_row(cuda: HostCuda, offset: int, dtype: torch.dtype) -> None:
    """At the ends of slices, vectors and rounds, in rows of any alignment: it is left out once."""
    lanes = 16 // torch.empty(0, dtype=dtype).element_size()
    cut = 3072 * lanes  # where the second slice starts
    vocab = cut + 3 * lanes + 3  # and ends with a vector that is not whole
    last = vocab - 1
    targets = [0, lanes - 1, lanes, 256 * lanes, 1023 * lanes, 1024 * lanes, cut - 1, cut]
    targets += [last - 4 * lanes, last - 3, last - 2, last]
    values, _ = random_rows(1, 1, vocab)
    logits = cuda.rows(values, dtype, offset=offset, aligned=True)
    for target in targets:
        labels = torch.tensor([[target]])
        check_forward(cuda.seq_logp(logits, labels), logits, labels)


@pytest.mark.parametrize("half", DTYPES[2:], ids=name_of)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("vocab", [1, 5, 8, 203, 4099])
def test_half_gradient_of_float_logits(
    cuda: HostCuda, vocab: int, offset: int, half: torch.dtype
) -> None:
    values, labels = random_rows(2, 5, vocab, seed=vocab)
    labels[0, 1] = -100
    labels[1, 2] = vocab  # not a token
    logits = cuda.rows(values, torch.float32, offset=offset)
    scores = cuda.seq_logp(logits, labels)
    grad_token = torch.randn(2, 5)
    args = (logits, labels, scores, None, grad_token)
    wide = cuda.seq_logp_backward(*args, out=cuda.full(tuple(logits.shape), torch.float32))
    for gap in (0, 1, 8):  # between the rows of the gradient: other alignments than the logits'
        out = cuda.rows(torch.zeros_like(values), half, row_gap=gap, aligned=False)
        grad = cuda.seq_logp_backward(*args, out=out)
        assert torch.equal(bits(grad[wide == wide]), bits(wide.to(half)[wide == wide]))
        assert grad[1, 2].isnan().all() and (grad[0, 1] == 0).all()


def test_dtypes_of_logits_and_gradient(cuda: HostCuda) -> None:
    """Their own, or a half type for float32; every other pair is refused before anything is written."""
    values, labels = random_rows(1, 2, 16)
    for dtype in DTYPES:
        logits = cuda.rows(values, dtype)
        scores = cuda.seq_logp(logits, labels)
        ones = torch.ones(1, dtype=scores.token_logps.dtype)
        for out_dtype in DTYPES:
            out = cuda.full((1, 2, 16), out_dtype)
            if dtype == out_dtype or (dtype == torch.float32 and out_dtype in HALVES):
                grad = cuda.seq_logp_backward(logits, labels, scores, ones, out=out)
                check_backward(grad, logits, labels, torch.ones(1, 2))
            else:
                with pytest.raises(KernelError):
                    cuda.seq_logp_backward(logits, labels, scores, ones, out=out)
                assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "vocab", [16, 19, 203]
)  # whole vectors; less than three; head, body and tail
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(cuda: HostCuda, layout: str, vocab: int, dtype: torch.dtype) -> None:
    values, labels = random_rows(2, 5, vocab, seed=vocab)
    labels[:, 1] = -100
    run_both(cuda, cuda.rows(values, dtype, **LAYOUTS[layout]), labels)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_masks(cuda: HostCuda, shift: bool, average: bool) -> None:
    values, labels = random_rows(4, 6, 33)
    labels[0, :3] = -100  # a prompt
    labels[1, 4:] = -100  # padding
    labels[2, :] = -100  # an empty completion
    scores, _ = run_both(
        cuda, cuda.rows(values, torch.bfloat16), labels, shift=shift, average=average
    )
    assert scores.sequence_logps[2] == 0 and scores.sequence_scale[2] == (0 if average else 1)


def test_gradient_of_another_alignment(cuda: HostCuda) -> None:
    for dtype in DTYPES:
        values, labels = random_rows(2, 3, 77)
        logits = cuda.rows(values, dtype, row_gap=2, offset=1)
        scores = cuda.seq_logp(logits, labels)
        ones = torch.ones(2, dtype=scores.token_logps.dtype)
        for gap in range(8):
            out = cuda.rows(torch.zeros_like(values), dtype, row_gap=gap, aligned=False)
            grad = cuda.seq_logp_backward(logits, labels, scores, ones, out=out)
            check_backward(grad, logits, labels, ones[:, None].expand(2, 3))


def test_which_gradients_come_in(cuda: HostCuda) -> None:
    values, labels = random_rows(2, 3, 40)
    logits = cuda.rows(values, torch.float32)
    scores = cuda.seq_logp(logits, labels, average=True)
    sequence, token = torch.randn(2), torch.randn(2, 3)
    for grad_sequence, grad_token, coefficient in [
        (sequence, None, (sequence / 3)[:, None].expand(2, 3)),
        (None, token, token),
        (None, None, torch.zeros(2, 3)),
    ]:
        out = cuda.full((2, 3, 40), torch.float32)
        grad = cuda.seq_logp_backward(logits, labels, scores, grad_sequence, grad_token, out=out)
        check_backward(grad, logits, labels, coefficient)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("margin", [10, 17, 20, 40])  # 17: 1 + e^-17 rounds to 1 in float32
def test_certain_model(cuda: HostCuda, margin: int, dtype: torch.dtype) -> None:
    values = torch.randn(1, 4, 100, dtype=torch.float64) * 0.25
    labels = torch.randint(0, 100, (1, 4))
    values.scatter_(-1, labels[..., None], float(margin))
    logits = cuda.rows(values, dtype)
    scores = cuda.seq_logp(logits, labels)
    truth = true_token_logps(logits, labels)
    ours = scores.token_logps.double()
    assert (ours < 0).all()
    # Relative, not absolute: log p is as small as 1e-15 here.
    eps = torch.finfo(scores.token_logps.dtype).eps
    ones = torch.ones_like(truth)
    check("relative", ours / truth, ones, ones, 64 * eps)
    if dtype != torch.float16:  # whose smallest number is 6e-8
        upstream = torch.ones(1, dtype=scores.token_logps.dtype)
        out = cuda.full(tuple(logits.shape), dtype)
        grad = cuda.seq_logp_backward(logits, labels, scores, upstream, out=out).double()
        at_target = grad.gather(-1, labels[..., None])[..., 0] / -torch.expm1(truth)
        check("at the target", at_target, ones, ones, 64 * eps + torch.finfo(dtype).eps)
    run_both(cuda, logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offsets(cuda: HostCuda, offset: float, dtype: torch.dtype) -> None:
    values, labels = random_rows(2, 3, 300)
    run_both(cuda, cuda.rows(values + offset, dtype), labels)


# --- infinities and NaN -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
def test_masked_vocabulary(cuda: HostCuda, mask: str, dtype: torch.dtype) -> None:
    """Masked entries get 0, also when all that a thread, a warp or the first round sees is masked."""
    value = -INF if mask == "-inf" else torch.finfo(dtype).min
    values, labels = random_rows(1, 5, 20000)
    values[0, 0, :17000] = value
    values[0, 1, 100:] = value
    values[0, 2, ::2] = value
    values[0, 3, 1:] = value
    values[0, 4, :-1] = value
    labels[0] = torch.tensor([17001, 3, 501, 0, 19999])
    scores, grad = run_both(cuda, cuda.rows(values, dtype, aligned=False), labels)
    assert (scores.token_logps[0, 3:] == 0).all()  # the only token left is certain
    assert (grad[0, 0, :17000] == 0).all() and (grad[0, 2, ::2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_lowest_everywhere(cuda: HostCuda, dtype: torch.dtype) -> None:
    """A row of the lowest number is a uniform distribution, not an empty one."""
    values = torch.full((1, 2, 300), torch.finfo(dtype).min, dtype=torch.float64)
    values[0, 1, 7] = torch.finfo(dtype).max
    labels = torch.tensor([[5, 7]])
    scores = cuda.seq_logp(cuda.rows(values, dtype), labels)
    assert scores.token_logps[0].tolist() == pytest.approx([-math.log(300), 0], abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_target_of_minus_infinity(cuda: HostCuda, dtype: torch.dtype) -> None:
    values, labels = random_rows(1, 1, 90)
    values[0, 0, 11] = -INF
    labels[0, 0] = 11
    scores, grad = run_both(cuda, cuda.rows(values, dtype), labels)
    assert scores.token_logps[0, 0] == -INF and scores.sequence_logps[0] == -INF
    assert grad.isfinite().all()  # as torch's log_softmax: the coefficient itself


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nan_comes_out(cuda: HostCuda, dtype: torch.dtype) -> None:
    values, labels = random_rows(7, 1, 1000)
    labels[:, 0] = 500
    values[0, 0, 700] = NAN  # among the others
    values[1, 0, 500] = NAN  # at the target
    values[2, 0, :] = NAN
    values[3, 0, :] = -INF  # nothing left: no distribution
    values[4, 0, 3] = INF
    values[5, 0, 500] = INF
    logits = cuda.rows(values, dtype)
    scores = cuda.seq_logp(logits, labels)
    assert scores.token_logps[:6].isnan().all() and scores.sequence_logps[:6].isnan().all()
    assert scores.sequence_logps[6].isfinite()
    for weight in (1.0, 0.0):  # 0 * NaN is NaN
        upstream = torch.full((7,), weight, dtype=scores.token_logps.dtype)
        out = cuda.full(tuple(logits.shape), dtype)
        grad = cuda.seq_logp_backward(logits, labels, scores, upstream, out=out)
        assert grad[:6].isnan().all() and grad[6].isfinite().all()


# --- rows that are not scored -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ignored_rows_are_not_read(cuda: HostCuda, dtype: torch.dtype) -> None:
    values, labels = random_rows(2, 3, 50)
    labels[0, 1] = labels[1, 2] = -100
    values[labels == -100] = NAN
    scores, grad = run_both(cuda, cuda.rows(values, dtype), labels)
    assert scores.token_logps[0, 1] == 0 and scores.sequence_logps.isfinite().all()
    assert (grad[labels == -100] == 0).all()

    nowhere = torch.empty(1, 3, 1000, dtype=dtype, device="meta")  # a null pointer
    assert cuda.seq_logp(nowhere, torch.full((1, 3), -100)).sequence_logps.tolist() == [0]
    with pytest.raises(KernelError, match="outside its memory"):
        cuda.seq_logp(nowhere, torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_invalid_labels(cuda: HostCuda, dtype: torch.dtype) -> None:
    values, labels = random_rows(6, 2, 50)
    for row, label in enumerate([50, -1, 1 << 40, -(1 << 40), -99]):
        labels[row, 1] = label
    logits = cuda.rows(values, dtype, aligned=False)
    scores = cuda.seq_logp(logits, labels)
    assert scores.token_logps[:5, 1].isnan().all() and scores.token_logps[:, 0].isfinite().all()
    assert scores.sequence_logps[:5].isnan().all() and scores.sequence_logps[5].isfinite()
    ones = torch.ones(6, dtype=scores.token_logps.dtype)
    out = cuda.full(tuple(logits.shape), dtype)
    grad = cuda.seq_logp_backward(logits, labels, scores, ones, out=out)
    assert grad[:5, 1].isnan().all() and grad[:, 0].isfinite().all() and grad[5].isfinite().all()


def test_another_ignore_index(cuda: HostCuda) -> None:
    values, labels = random_rows(1, 4, 30)
    labels[0, 2] = 7  # a valid token, but not to be scored
    scores = cuda.seq_logp(cuda.rows(values, torch.float32), labels, ignore_index=7)
    assert scores.token_logps[0, 2] == 0


# --- sizes: nothing, many, far apart ----------------------------------------------------------------


def test_empty(cuda: HostCuda) -> None:
    for batch, length in [(0, 3), (0, 0), (2, 0)]:
        logits, labels = (
            torch.empty(batch, length, 8),
            torch.empty(batch, length, dtype=torch.int64),
        )
        scores = cuda.seq_logp(logits, labels, average=True)
        assert scores.sequence_logps.tolist() == scores.sequence_scale.tolist() == [0] * batch
        cuda.seq_logp_backward(logits, labels, scores, torch.ones(batch), out=logits)


def test_more_rows_than_65535(cuda: HostCuda) -> None:
    rows = 65536 + 7
    labels = torch.full((1, rows), -100)
    labels[0, [0, 65535, 65536, rows - 1]] = 3
    values = torch.randn(1, rows, 4, dtype=torch.float64)
    logits = cuda.rows(values, torch.float16)
    scores = cuda.seq_logp(logits, labels)
    check_forward(scores, logits, labels)
    grad = cuda.seq_logp_backward(logits, labels, scores, torch.ones(1), out=logits.clone())
    check_backward(grad, logits, labels, torch.ones(1, rows))


@pytest.mark.parametrize("layout", ["far rows", "far batches"])
def test_offsets_beyond_31_bits(cuda: HostCuda, layout: str) -> None:
    """Strides of 2^30 elements over memory that is mapped but, between the rows, never touched."""
    values, labels = random_rows(*((1, 4, 37) if layout == "far rows" else (4, 1, 37)))
    stride = (1 << 30) + 5
    try:
        memory = cuda.empty(3 * stride + 37, torch.bfloat16)
    except MemoryError as error:
        pytest.skip(f"cannot map a sparse range: {error}")
    logits = memory.as_strided(values.shape, (stride, stride, 1)).copy_(values)
    scores = cuda.seq_logp(logits, labels)
    check_forward(scores, logits, labels)
    expected = logits.clone()
    ones = torch.ones(values.shape[0])
    cuda.seq_logp_backward(logits, labels, scores, ones, out=logits)
    check_backward(logits.clone(), expected, labels, torch.ones(labels.shape))


def test_long_sequence_keeps_its_digits(cuda: HostCuda) -> None:
    labels = torch.zeros(1, 4096, dtype=torch.int64)
    values = torch.randn(1, 4096, 3, dtype=torch.float64)
    logits = cuda.rows(values, torch.bfloat16)
    scores = cuda.seq_logp(logits, labels)
    total = float(scores.token_logps.double().sum())
    assert float(scores.sequence_logps[0]) == pytest.approx(total, rel=1e-7)


# --- determinism ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("count", [0, 5, 4096, 3 * 4096 + 7])
def test_scale_rounds_once_and_leaves_values_alone_where_the_factor_is_1(
    cuda: HostCuda, count: int, dtype: torch.dtype
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    source = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    for factor in (1.0, 0.3, 0.0, math.inf):
        values = cuda.copy(source)
        cuda.scale(values, cuda.copy(torch.tensor([factor], dtype=wide)))
        expected = (source.to(wide) * factor).to(dtype)
        assert torch.equal(bits(values), bits(expected)), factor


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "shape", [(2, 2, 9001), (1, 70, 600), (1, 2, 41001)], ids=str
)  # a row a block; two; blocks a row
def test_order_of_threads_does_not_matter(
    library: HostCuda, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    values, labels = random_rows(*shape)
    results = []
    for order, seed in [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]:
        library.set_order(order, seed)
        logits = library.rows(values, dtype, aligned=False)
        scores = library.seq_logp(logits, labels, average=True)
        ones = torch.ones(shape[0], dtype=scores.token_logps.dtype)
        grad = library.seq_logp_backward(logits, labels, scores, ones, out=logits)
        results.append([bits(tensor) for tensor in (*scores, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "vocab", [4096, 4101, 24601]
)  # odd: every place in the batch has another alignment; more slices than one
def test_neighbours_do_not_matter(cuda: HostCuda, vocab: int, dtype: torch.dtype) -> None:
    values, labels = random_rows(3, 3, vocab)
    logits = cuda.rows(values, dtype)
    together = cuda.seq_logp(logits, labels)
    ones = torch.ones(3, dtype=together.token_logps.dtype)
    out = cuda.full(tuple(logits.shape), dtype)
    grads = cuda.seq_logp_backward(logits, labels, together, ones, out=out)
    for b in range(3):
        own = cuda.rows(values[b : b + 1], dtype)
        alone = cuda.seq_logp(own, labels[b : b + 1])
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(bits(one[0]), bits(all_of_them[b]))
        grad = cuda.seq_logp_backward(own, labels[b : b + 1], alone, ones[:1], out=own)
        assert torch.equal(bits(grad[0]), bits(grads[b]))


# --- the tests themselves ---------------------------------------------------------------------------

BARRIERS = [
    (path.name, number)
    for path in sorted((harness.CSRC / "cuda").glob("*.cu*"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line
]


@pytest.mark.parametrize("file, line", BARRIERS)
def test_no_barrier_could_be_left_out(library: HostCuda, file: str, line: int) -> None:
    """With any one barrier of the kernels missing, some order of the threads gives another result."""
    values, labels = random_rows(70, 1, 600)  # more rows and sequences than blocks
    counts = torch.tensor([130, 3] * 35)
    tokens = library.copy(-torch.rand(int(counts.sum())))
    given = dict.fromkeys(("logps", "reference", "correction"), tokens)
    given |= {"old": library.copy(tokens.roll(1)), "advantages": library.copy(torch.randn(70))}
    mask = library.empty(len(tokens), torch.bool).fill_(True)
    term = check_policy_options("test", "grpo", "sequence", beta=0.1)

    def results() -> list[Tensor]:
        logits = library.rows(values, torch.float32)
        scores = library.seq_logp(logits, labels)
        ones = torch.ones(70)
        grad = library.seq_logp_backward(logits, labels, scores, ones, out=logits.clone())
        entropy, *_ = library.row_statistics(library.copy(logits[:, 0]), library.copy(labels[:, 0]))
        policy = call_policy_loss(library, given, mask, counts, term)
        policy.pop("clipped")
        return [bits(tensor) for tensor in (*scores, grad, entropy, *policy.values())]

    library.set_order("forward")
    expected = results()
    changed = []
    for order in harness.ORDERS:
        library.set_order(order, 1)
        with library.without_barrier(file, line):
            changed.append(
                any(not torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
            )
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    assert any(changed), f"{file}:{line}: nothing noticed that this barrier was missing"
