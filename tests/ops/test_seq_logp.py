"""token_logps and sequence_logps on the CPU: accuracy, extreme rows, layouts, in-place gradient, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _helpers import (
    DTYPES,
    HALVES,
    INF,
    NAN,
    assert_rule,
    bits,
    check_both,
    check_gradient,
    check_token_logps,
    forward_tolerance,
    name_of,
    random_labels,
    random_logits,
    statistics_dtype,
    targets_of,
    torch_token_logps,
    true_token_logps,
)
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import sequence_logps, token_logps

pytestmark = pytest.mark.usefixtures("one_thread")
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
BLOCK = 2048  # kBlock of csrc/cpu/kernels-inl.h
BORDERS = [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]


# --- accuracy ---------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),  # no others: log p is 0, gradient 0
    (2, 3, 2),  # the smallest distribution
    (3, 2, 3),
    (2, 3, 15),  # around one vector of AVX-512, two of AVX2
    (2, 3, 16),
    (2, 3, 17),
    (2, 3, 31),  # around the pair of vectors that the kernels load at once
    (2, 3, 32),
    (2, 3, 33),
    (3, 5, 1003),  # odd: consecutive rows take every alignment
    (2, 2, 2 * BLOCK + 3),  # two blocks of the moving reference and a tail
    (4, 1, 4099),  # T = 1
    (1, 2, 49152),  # a vocabulary of the field
]


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_follow_the_accuracy_rule(shape, dtype) -> None:
    logits = random_logits(*shape, dtype=dtype)
    check_both(logits, random_labels(*shape[:2], vocab=shape[2], ignored=0.1))


@pytest.mark.numerics
@all_dtypes
def test_target_at_every_border_of_vectors_and_blocks(dtype) -> None:
    vocab = 2 * BLOCK + 37
    row = random_logits(vocab, dtype=dtype)
    labels = torch.tensor([[*BORDERS, vocab - 33, vocab - 2, vocab - 1]])
    check_both(row.expand(1, labels.shape[1], vocab), labels)


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("margin", [10, 17, 20, 40])  # exp(-17) is the last place of 1 in float32
def test_certain_model_keeps_its_digits(margin, dtype) -> None:
    """log p and 1 - p are relatively accurate, neither 0 nor above 0."""
    vocab = 4099
    logits = random_logits(1, 3, vocab, dtype=torch.float64) / 6
    targets = torch.tensor([[0, 1003, vocab - 1]])
    gap = logits.logsumexp(-1, keepdim=True) + margin
    logits = logits.scatter(-1, targets[..., None], gap).to(dtype)
    logps, gradient = check_both(logits, targets, torch.ones(1, 3, dtype=statistics_dtype(dtype)))
    truth = true_token_logps(logits, targets)
    relative = 8 * torch.finfo(statistics_dtype(dtype)).eps
    assert_rule("log p", logps, truth, truth, relative * truth.abs())
    assert (logps < 0).all()
    at_target = gradient.gather(-1, targets[..., None])[..., 0]
    rounding = 0.51 * torch.finfo(dtype).eps if dtype in HALVES else relative
    # float16 cannot hold 1 - p under its smallest number
    floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wanted = -torch.expm1(truth)
    assert_rule("1 - p", at_target, wanted, wanted, rounding * wanted + floor)


@pytest.mark.numerics
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("average", [False, True])
@all_dtypes
def test_sequence_is_the_sum_or_mean_of_its_scored_tokens(dtype, average, shift) -> None:
    logits = random_logits(5, 40, 37, dtype=dtype)
    labels = random_labels(5, 40, vocab=37, ignored=0.5)
    labels[3] = -100  # a sequence without scored positions: 0
    labels[4, :-1] = -100  # with one, the last
    targets = targets_of(labels, shift)
    leaf = logits.clone().requires_grad_()
    ours = sequence_logps(leaf, labels, average=average, shift=shift, impl="fused")
    assert ours.dtype == statistics_dtype(dtype)
    count = (targets >= 0).sum(-1)
    factor = 1 / count.clamp(min=1).double() if average else torch.ones(5, dtype=torch.float64)
    truth = true_token_logps(logits, targets)
    peer = torch_token_logps(logits, targets).double()
    tolerance = forward_tolerance(dtype, truth).sum(-1) * factor
    assert_rule("sequence_logps", ours, peer.sum(-1) * factor, truth.sum(-1) * factor, tolerance)
    assert ours[3] == 0

    upstream = torch.randn(5).to(ours.dtype)
    (gradient,) = torch.autograd.grad(ours, leaf, upstream)
    coefficient = (upstream * factor.to(ours.dtype))[:, None].expand(5, 40)
    check_gradient(gradient, logits, targets, coefficient)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 2**40, -(2**63)])
def test_ignore_index_may_be_any_number(ignore_index) -> None:
    """Also a token: rows with that label are not scored."""
    labels = random_labels(2, 30, vocab=9)
    labels[0, :5] = ignore_index
    check_both(random_logits(2, 30, 9), labels, ignore_index=ignore_index)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_half_precision_sequence_of_512_tokens_is_within_a_thousandth_of_a_nat(dtype) -> None:
    logits = random_logits(1, 512, 2503, dtype=dtype)
    labels = random_labels(1, 512, vocab=2503)
    truth = true_token_logps(logits, labels).sum()
    ours = sequence_logps(logits, labels, impl="fused").double()
    assert abs(ours - truth) < 1e-3, f"ours {ours.item()!r}, truth {truth.item()!r}"


def test_long_sequence_sum_loses_nothing() -> None:
    """32768 float32 addends: a float32 accumulator would be off by hundreds of last places."""
    logits, labels = random_logits(1, 32768, 7), random_labels(1, 32768, vocab=7)
    token, total = token_logps(logits, labels), sequence_logps(logits, labels)
    assert total == token.double().sum().float()
    truth = true_token_logps(logits, labels).sum(-1)
    assert_rule("sum", total, truth, truth, 2 * torch.finfo(torch.float32).eps * truth.abs())


# --- extreme rows -----------------------------------------------------------------------------------


def steps(*levels: float) -> Tensor:
    """One level a block, the last block cut, plus the spread of ordinary logits."""
    rows = random_logits(len(levels), BLOCK, dtype=torch.float64)
    return (rows + torch.tensor(levels, dtype=torch.float64)[:, None]).flatten()[:-19]


HEADROOM = 32 * math.log(2)  # kHeadroom of csrc/cpu/kernels-inl.h in nats: 22.2
RISING = {
    # below: the sum goes on against the old reference; above: the block is summed again
    "just_below_headroom": [0, 10, 10],
    "just_above_headroom": [0, HEADROOM + 3, 2 * HEADROOM + 9],
    "many_small_rises": [0, 12, 24, 36, 48],  # each is below, together far above
    "far_above": [0, 60, 200],  # 2^y of the first attempt overflows
    "farther_than_float": [-1000, 0, 1000],
    "falling": [200, 60, 0],  # later blocks vanish beside the first
    "up_and_down": [0, 100, -100, 100],
    "negative_offset": [-1e4, -1e4 + 40, -1e4],
    "positive_offset": [1e4 - 40, 1e4, 1e4 - 40],
}


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("levels", RISING.values(), ids=RISING)
def test_peak_may_rise_from_block_to_block(levels, dtype) -> None:
    row = steps(*levels).to(dtype)
    # a target in every block, and one beside the peak
    labels = torch.tensor([[BLOCK * b + 11 for b in range(len(levels))] + [int(row.argmax())]])
    check_both(row.expand(1, labels.shape[1], -1), labels)


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("gap", [31.9, 32.1, 126.9, 127.1, 128.1, 300.0])
def test_one_entry_above_the_others_by_powers_of_two(gap, dtype) -> None:
    """Around kHeadroom and around the largest exponent of float32, in a later block."""
    row = torch.zeros(2 * BLOCK, dtype=dtype)
    row[BLOCK + 5] = gap * math.log(2)
    check_both(row.expand(1, 3, -1), torch.tensor([[0, BLOCK + 5, BLOCK + 6]]))


MAGNITUDES = [1e4, 1e5, 1e7, 9.9e7, 1.01e8, 1e9, 1e10, 1e15, 1e20, 9e29, 1.1e30, 1e38, 3.3e38]


@pytest.mark.numerics
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float16], ids=name_of)
def test_rows_of_any_magnitude(magnitude, sign, dtype) -> None:
    """The reference is a rounded float: its rounding may neither overflow 2^y nor empty the sum."""
    row = torch.full((BLOCK + 40,), sign * magnitude, dtype=torch.float64)
    row[::7] *= 1 - 2.0**-6  # a representable step in every dtype
    row[1::5] = 0
    check_both(row.to(dtype).expand(1, 3, -1), torch.tensor([[0, 1, 2]]))
    equal = torch.full((1, 1, 33), sign * magnitude, dtype=dtype)
    uniform = token_logps(equal, torch.zeros(1, 1, dtype=torch.int64))
    assert uniform.item() == pytest.approx(-math.log(33), abs=1e-6)


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset_changes_nothing_but_the_rounding_of_the_inputs(offset, dtype) -> None:
    logits = (random_logits(2, 3, 4099, dtype=torch.float64) + offset).to(dtype)
    check_both(logits, random_labels(2, 3, vocab=4099))


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("masked", [1, BLOCK - 1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("mask", ["-inf", "finfo.min", "-1e4"])
def test_masked_vocabulary_at_the_start_of_the_row(mask, masked, dtype) -> None:
    logits = random_logits(1, 3, 2 * BLOCK + 50, dtype=dtype)
    value = {"-inf": -INF, "finfo.min": torch.finfo(dtype).min, "-1e4": -1e4}[mask]
    logits[..., :masked] = value
    # a target before the borders of the unmasked part, behind them, and at the end
    labels = torch.tensor([[2 * BLOCK + 1, 2 * BLOCK + 2, 2 * BLOCK + 49]])
    _, gradient = check_both(logits, labels)
    assert (gradient[..., :masked] == 0).all()


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("vocab", [1, 2, 33, 2 * BLOCK + 5])
def test_impossible_and_lone_targets(vocab, dtype) -> None:
    """Target -inf: log p is -inf. All others -inf: 0. All -inf: no distribution, NaN."""
    target = vocab // 2
    others = torch.arange(vocab) != target
    row = random_logits(vocab, dtype=dtype)
    impossible, lone = row.clone(), row.clone()
    impossible[target] = -INF
    lone[others] = -INF
    nothing = torch.full_like(row, -INF)
    rows = torch.stack([impossible, lone, nothing])[None]
    leaf = rows.clone().requires_grad_()
    labels = torch.full((1, 3), target)
    logps = token_logps(leaf, labels, impl="fused")
    expected = [NAN if vocab == 1 else -INF, 0.0, NAN]
    assert torch.equal(logps.isnan(), torch.tensor(expected).isnan()[None])
    assert logps[0].nan_to_num(7.0, neginf=-9.0).tolist() == [
        7.0 if vocab == 1 else -9.0,
        0.0,
        7.0,
    ]
    (gradient,) = torch.autograd.grad(logps, leaf, torch.ones_like(logps))
    assert (gradient[0, 1] == 0).all()
    assert gradient[0, 2].isnan().all()
    if vocab > 1:
        ones = torch.ones(1, 1, dtype=logps.dtype)
        check_gradient(gradient[:, :1], rows[:, :1], labels[:, :1], ones)
        assert gradient[0, 0, target] == 1


# the row's layout changes which code meets the NaN
POISONED_ROWS = {
    "ordinary": lambda row: row,
    "masked_first_block": lambda row: row.index_fill(0, torch.arange(BLOCK), -INF),
    "only_masked": lambda row: torch.full_like(row, -INF),
    "rising": lambda row: row + 60 * (torch.arange(len(row)) // BLOCK).to(row.dtype),
    "too_large_for_vectors": lambda row: row * 1e4,
}


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("layout", POISONED_ROWS.values(), ids=POISONED_ROWS)
def test_nan_or_inf_anywhere_gives_nan_and_never_a_finite_lie(layout, poison, dtype) -> None:
    """As in torch, a row with +inf has no distribution either. The rows beside it are not touched."""
    vocab, target = 2 * BLOCK + 21, 1500
    places = [*BORDERS, target - 1, target, target + 1, vocab - 22, vocab - 1]
    rows = layout(random_logits(vocab, dtype=torch.float64)).to(dtype).repeat(len(places) + 1, 1)
    rows[range(len(places)), places] = poison
    labels = torch.full((1, len(rows)), target)
    leaf = rows[None].clone().requires_grad_()
    logps = token_logps(leaf, labels, impl="fused")
    (gradient,) = torch.autograd.grad(logps, leaf, torch.ones_like(logps))
    finite = [p for p, bad in zip(places, logps[0, :-1].isnan().tolist(), strict=True) if not bad]
    assert finite == [], f"{poison} at {finite} gave a finite log-prob"
    assert gradient[0, :-1].isnan().all(), "NaN in, a finite gradient out"
    clean = token_logps(rows[None, -1:], labels[:, -1:], impl="fused")
    assert torch.equal(bits(logps[:, -1:]), bits(clean))


@all_dtypes
def test_lone_nan_logit_of_a_vocabulary_of_one(dtype) -> None:
    for value in (NAN, INF, -INF):
        logps = token_logps(torch.full((1, 1, 1), value, dtype=dtype), torch.zeros(1, 1).long())
        assert logps.isnan().all(), f"logit {value} gave {logps.item()}"


@all_dtypes
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_ignored_rows_are_not_read(shift, inplace, dtype) -> None:
    """NaN and inf in prompt and padding reach neither value nor gradient, which is exactly 0 there."""
    logits = random_logits(3, 12, 40, dtype=dtype)
    labels = random_labels(3, 12, vocab=40, ignored=0.4)
    ignored = targets_of(labels, shift) < 0
    clean, clean_gradient = check_both(logits, labels, shift=shift)
    logits[ignored] = torch.tensor([NAN, INF, -INF, 3e4] * 10).to(dtype)
    leaf = logits.requires_grad_()
    logps = token_logps(leaf, labels, shift=shift, inplace_backward=inplace, impl="fused")
    assert torch.equal(bits(logps), bits(clean))
    generator = torch.Generator().manual_seed(2)  # as in check_both
    coefficient = torch.randn(labels.shape, generator=generator).to(logps.dtype)
    (gradient,) = torch.autograd.grad(logps, leaf, coefficient)
    assert torch.equal(bits(gradient), bits(clean_gradient))
    assert (gradient[ignored] == 0).all()


# --- shapes and layouts -------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"inplace_backward": True}], ids=str)
def test_empty_batches_and_empty_sequences_are_zero(options, shape, dtype) -> None:
    logits = torch.zeros(shape, dtype=dtype, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    for average in (False, True):
        total = sequence_logps(logits, labels, average=average, impl="fused", **options)
        assert total.shape == shape[:1] and (total == 0).all()
        total.sum().backward()
        assert logits.grad is not None and logits.grad.shape == shape
    assert token_logps(logits, labels, **options).shape == shape[:2]


def test_shift_with_one_position_scores_nothing() -> None:
    logits = torch.full((3, 1, 5), NAN, requires_grad=True)
    total = sequence_logps(logits, torch.ones(3, 1, dtype=torch.int64), shift=True)
    total.sum().backward()
    assert total.tolist() == [0, 0, 0] and (logits.grad == 0).all()


def test_shift_equals_slicing() -> None:
    logits, labels = random_logits(3, 9, 21), random_labels(3, 9, vocab=21, ignored=0.3)
    shifted = token_logps(logits, labels, shift=True)
    sliced = token_logps(logits[:, :-1], labels[:, 1:])
    assert torch.equal(shifted[:, :-1], sliced) and (shifted[:, -1] == 0).all()
    assert torch.equal(
        sequence_logps(logits, labels, shift=True), sequence_logps(logits[:, :-1], labels[:, 1:])
    )


def misaligned(logits: Tensor) -> Tensor:
    """The same values one element into a buffer, so that no row starts at a vector's boundary."""
    buffer = torch.empty(logits.numel() + 1, dtype=logits.dtype)
    return buffer[1:].view(logits.shape).copy_(logits)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all_but_last_position": lambda z: torch.cat([z, z[:, :1]], 1)[:, :-1],  # the everyday slice
    "every_second_position": lambda z: z.repeat_interleave(2, 1)[:, ::2],
    "batch_and_time_swapped": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second_sequence": lambda z: z.repeat_interleave(2, 0)[::2],
    "part_of_padded_vocabulary": lambda z: torch.cat([z, z[..., :5]], -1)[..., : z.shape[-1]],
    "misaligned_storage": misaligned,
    "vocabulary_not_contiguous": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
    "every_second_token": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "one_row_for_all": lambda z: z[:1, :1].expand_as(z),  # strides 0
}


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_bits_of_the_contiguous_one(layout, dtype) -> None:
    logits = layout(random_logits(3, 4, 67, dtype=dtype))
    labels = random_labels(3, 4, vocab=67, ignored=0.2)
    logps, gradient = check_both(logits, labels)
    plain_logps, plain_gradient = check_both(logits.contiguous().clone(), labels)
    assert torch.equal(bits(logps), bits(plain_logps))
    assert torch.equal(bits(gradient), bits(plain_gradient))


def test_layouts_are_what_they_say() -> None:
    logits = random_logits(3, 4, 67)
    strides = {name: layout(logits).stride() for name, layout in LAYOUTS.items()}
    del strides["misaligned_storage"]
    assert all(stride != logits.stride() for stride in strides.values()), strides
    assert misaligned(logits).data_ptr() % 8 == 4


@pytest.mark.parametrize("labels_layout", ["contiguous", "strided", "expanded"])
def test_labels_of_any_layout(labels_layout) -> None:
    logits, labels = random_logits(4, 6, 11), random_labels(4, 6, vocab=11, ignored=0.2)
    if labels_layout == "strided":
        labels = labels.t().contiguous().t()
    elif labels_layout == "expanded":
        labels = labels[:1].expand(4, 6)
    logps, _ = check_both(logits, labels)
    assert torch.equal(logps, token_logps(logits, labels.contiguous()))


@pytest.mark.parametrize("lead", [(6,), (2, 3), (2, 1, 3), (2, 2, 2, 3), (0, 2, 3)], ids=str)
def test_token_logps_takes_any_number_of_leading_dimensions(lead) -> None:
    logits, labels = random_logits(*lead, 13), random_labels(*lead, vocab=13, ignored=0.2)
    logps, _ = check_both(logits, labels)
    flat = token_logps(logits.reshape(1, -1, 13), labels.reshape(1, -1))
    assert logps.shape == lead and torch.equal(logps.flatten(), flat.flatten())


def test_shift_of_stacked_batches_stays_within_each_sequence() -> None:
    logits, labels = random_logits(2, 3, 5, 13), random_labels(2, 3, 5, vocab=13)
    logps, _ = check_both(logits, labels, shift=True)
    assert (logps[..., -1] == 0).all() and (logps[..., :-1] < 0).all()


# --- upstream gradients -------------------------------------------------------------------------------

UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "zero": torch.zeros_like,
    "negative": lambda g: -3.5 * torch.ones_like(g),
    "tiny_and_huge": lambda g: torch.logspace(-6, 3, g.numel(), dtype=g.dtype).view_as(g),
    "expanded": lambda g: torch.tensor(0.25, dtype=g.dtype).expand_as(g),
    "transposed": lambda g: torch.randn(g.shape[::-1], dtype=g.dtype).t(),
    "strided": lambda g: torch.randn(*g.shape, 2, dtype=g.dtype)[..., 1],
}


@all_dtypes
@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradient_of_any_value_and_layout(upstream, dtype) -> None:
    logits, labels = random_logits(3, 4, 45, dtype=dtype), random_labels(3, 4, vocab=45)
    stat = statistics_dtype(dtype)
    check_both(logits, labels, upstream(torch.empty(3, 4, dtype=stat)))


@all_dtypes
@pytest.mark.parametrize("average", [False, True])
def test_gradients_of_both_outputs_add_up(average, dtype) -> None:
    logits = random_logits(3, 4, 45, dtype=dtype)
    labels = random_labels(3, 4, vocab=45, ignored=0.3)
    leaf = logits.clone().requires_grad_()
    sequence, token, *_ = torch.ops.pyfast_dpo.seq_logp(leaf, labels, -100, False, average, False)
    of_sequence = torch.randn(6, dtype=sequence.dtype)[::2]
    of_token = torch.randn(4, 3, dtype=token.dtype).t()
    (gradient,) = torch.autograd.grad((sequence, token), leaf, (of_sequence, of_token))
    targets = targets_of(labels)
    count = (targets >= 0).sum(-1, keepdim=True).clamp(min=1) if average else 1
    check_gradient(gradient, logits, targets, of_sequence[:, None] / count + of_token)


# --- the gradient written over the logits ---------------------------------------------------------------


def sentinel_view(logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(buffer of sentinels, view into it that holds the logits)."""
    batch, length, vocab = logits.shape
    if name == "contiguous":
        buffer = torch.full((batch + 2, length, vocab), 42.0, dtype=logits.dtype)
        view = buffer[1:-1]
    elif name == "padded_on_every_side":
        buffer = torch.full((batch + 2, length + 2, vocab + 7), 42.0, dtype=logits.dtype)
        view = buffer[1:-1, 1:-1, 3:-4]
    elif name == "every_second_position":
        buffer = torch.full((batch, 2 * length, vocab + 1), 42.0, dtype=logits.dtype)
        view = buffer[:, ::2, :-1]
    else:
        buffer = torch.full((length, batch, vocab + 3), 42.0, dtype=logits.dtype)
        view = buffer.transpose(0, 1)[..., 2:-1]
    return buffer, view.copy_(logits)


@pytest.mark.numerics
@all_dtypes
@pytest.mark.parametrize("vocab", [1, 15, 33, 67, BLOCK + 19])
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "padded_on_every_side", "every_second_position", "batch_and_time_swapped"],
)
def test_inplace_gradient_has_the_same_bits_and_stays_in_its_memory(layout, vocab, dtype) -> None:
    logits = random_logits(3, 4, vocab, dtype=dtype)
    labels = random_labels(3, 4, vocab=vocab, ignored=0.3)
    _, expected = check_both(
        logits, labels, torch.full((3, 4), -0.7, dtype=statistics_dtype(dtype))
    )
    buffer, view = sentinel_view(logits, layout)
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert int(outside.sum()) == buffer.numel() - logits.numel()

    leaf = view.detach().requires_grad_()
    logps = token_logps(leaf, labels, inplace_backward=True, impl="fused")
    (gradient,) = torch.autograd.grad(logps, leaf, torch.full_like(logps, -0.7))
    assert gradient.data_ptr() == view.data_ptr() and gradient.stride() == view.stride()
    assert torch.equal(bits(gradient), bits(expected))
    assert (buffer[outside] == 42).all(), "written outside of the logits"


def test_inplace_gradient_of_two_dimensions() -> None:
    logits, labels = random_logits(5, 33), random_labels(5, vocab=33)
    _, expected = check_both(logits, labels, torch.ones(5))
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(token_logps(leaf, labels, inplace_backward=True).sum(), leaf)
    assert gradient.data_ptr() == leaf.data_ptr() and torch.equal(gradient, expected)


def test_inplace_gradient_flows_on_through_the_model() -> None:
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    labels = random_labels(2, 5, vocab=31, ignored=0.3)
    gradients = [
        torch.autograd.grad(
            sequence_logps(hidden @ weight.t(), labels, inplace_backward=inplace).sum(),
            (hidden, weight),
        )
        for inplace in (False, True)
    ]
    for plain, inplace in zip(*gradients, strict=True):
        assert torch.equal(plain, inplace)


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest block that any operator took from torch's CPU allocator meanwhile."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_forward_and_inplace_backward_allocate_a_few_numbers_a_row(dtype) -> None:
    logits = random_logits(2, 8, 8192, dtype=dtype)
    labels = random_labels(2, 8, vocab=8192)

    def step(inplace: bool) -> Callable[[], object]:
        leaf = logits.clone().requires_grad_()
        return lambda: sequence_logps(leaf, labels, inplace_backward=inplace).sum().backward()

    assert largest_allocation(step(False)) >= logits.nbytes  # so the measurement can see it
    assert largest_allocation(step(True)) <= 16 * 8 * 8


def test_second_backward_over_overwritten_logits_raises() -> None:
    leaf = random_logits(2, 3, 33).requires_grad_()
    logits = leaf * 1
    total = sequence_logps(logits, random_labels(2, 3, vocab=33), inplace_backward=True).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_another_operator_that_saved_the_logits_raises_instead_of_reading_the_gradient() -> None:
    leaf = random_logits(2, 3, 33).requires_grad_()
    logits = leaf * 1
    total = sequence_logps(logits, random_labels(2, 3, vocab=33), inplace_backward=True).sum()
    square = logits.square().sum()
    torch.autograd.grad(total, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_backward_may_run_twice_when_not_in_place() -> None:
    leaf = random_logits(2, 3, 33).requires_grad_()
    total = sequence_logps(leaf, random_labels(2, 3, vocab=33)).sum()
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second)


@pytest.mark.parametrize("which", ["logits", "labels"])
def test_changing_a_saved_input_before_the_backward_pass_raises(which) -> None:
    leaf = random_logits(2, 3, 33).requires_grad_()
    inputs = {"logits": leaf * 1, "labels": random_labels(2, 3, vocab=33)}
    total = sequence_logps(inputs["logits"], inputs["labels"]).sum()
    inputs[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- determinism ----------------------------------------------------------------------------------------


def run_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    total = sequence_logps(leaf, labels, average=True, impl="fused")
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    return total.detach(), gradient


@all_dtypes
def test_results_do_not_depend_on_threads_runs_or_neighbours(dtype) -> None:
    """Large enough for the parallel loop (32768 elements)."""
    logits = random_logits(6, 9, 1003, dtype=dtype)
    labels = random_labels(6, 9, vocab=1003, ignored=0.3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_batch(logits, labels)
        torch.set_num_threads(2)
        together = [run_batch(logits, labels) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for run in together:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(run, alone, strict=True))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = run_batch(logits[order], labels[order])
    for ours, expected in zip(permuted, alone, strict=True):
        assert torch.equal(bits(ours), bits(expected[order]))
    single = run_batch(logits[2:3], labels[2:3])  # below the parallel loop
    for ours, expected in zip(single, alone, strict=True):
        assert torch.equal(bits(ours), bits(expected[2:3]))


# --- impl="torch" -----------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("options", [{}, {"shift": True}, {"ignore_index": 3}], ids=str)
def test_plain_torch_agrees_with_the_kernels(options, dtype) -> None:
    logits = random_logits(3, 6, 67, dtype=dtype)
    logits[0, 0, :40] = -INF  # masked vocabulary
    labels = random_labels(3, 6, vocab=67, ignored=0.3)
    labels[0, 0] = 50
    targets = targets_of(labels, options.get("shift", False), options.get("ignore_index", -100))
    leaf = logits.clone().requires_grad_()
    if options.get("ignore_index"):
        labels[labels == -100] = 3
        targets = targets_of(labels, False, 3)
    logps = token_logps(leaf, labels, impl="torch", **options)
    check_token_logps(logps.detach(), logits, targets)
    coefficient = torch.randn(labels.shape).to(logps.dtype)
    (gradient,) = torch.autograd.grad(logps, leaf, coefficient)
    check_gradient(gradient, logits, targets, coefficient)
    for average in (False, True):
        ours = sequence_logps(logits, labels, average=average, impl="fused", **options)
        plain = sequence_logps(logits, labels, average=average, impl="torch", **options)
        assert plain.dtype == ours.dtype
        torch.testing.assert_close(plain, ours, rtol=2e-6, atol=2e-6)


SPECIAL_ROWS = {
    "lone_target": [0.0, -INF, -INF],
    "impossible_target": [-INF, 1.0, 2.0],
    "impossible_row": [-INF, -INF, -INF],
    "infinite_target": [INF, 0.0, 1.0],
    "infinite_other": [0.0, INF, 1.0],
    "two_infinities": [0.0, INF, INF],
    "nan_target": [NAN, 0.0, 1.0],
    "nan_target_alone": [NAN, -INF, -INF],
    "nan_other": [0.0, NAN, -INF],
}


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
def test_special_rows_answer_as_log_softmax_does(row, impl) -> None:
    """Value and gradient, in the same places finite, infinite and NaN."""
    leaf = torch.tensor([[row]], requires_grad=True)
    logps = token_logps(leaf, torch.zeros(1, 1, dtype=torch.int64), impl=impl)
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    peer = torch.log_softmax(leaf, -1)[..., 0]
    (peer_gradient,) = torch.autograd.grad(peer.sum(), leaf)
    torch.testing.assert_close(logps, peer, equal_nan=True)
    torch.testing.assert_close(gradient, peer_gradient, equal_nan=True)


def test_kernels_are_what_the_suite_runs() -> None:
    """impl="auto" means the kernels on the CPU, bit for bit."""
    logits, labels = random_logits(2, 3, 1003), random_labels(2, 3, vocab=1003)
    auto, fused = token_logps(logits, labels), token_logps(logits, labels, impl="fused")
    assert torch.equal(bits(auto), bits(fused))
    assert pyfast_dpo.build_info()["cpu_used"] in pyfast_dpo.build_info()["cpu_kernels"]
