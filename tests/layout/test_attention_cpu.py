"""Attention over rows of shared prompts by the CPU kernel: against float64 block by block, and its contract."""

from __future__ import annotations

import pytest
import torch
from _helpers import NAN, bits, name_of, with_threads
from torch.library import opcheck

from pyfast_dpo.layout import attention_cpu
from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout

ops = torch.ops.pyfast_dpo
PLAIN = Scores(None, 0.0, None, None)

LAYOUTS = {
    "one token": [Group(0, (1,))],
    "no response": [Group(3, ())],
    "no prompt": [Group(0, (3, 1)), Group(0, (0, 2))],
    "pairs": [Group(5, (2, 4)), Group(1, (1, 1)), Group(17, (3, 30))],
    "five responses to a prompt": [Group(33, (1, 14, 15, 16, 40))],
    # several chunks of the backward pass (112 queries at most), prompts beyond a panel of keys (32)
    "long": [Group(130, (120, 90)), Group(20, (260,))],
}
# heads, heads of the keys, width: grouped; one head of the keys; widths that are no multiple of a vector or a panel
HEADS = [(4, 2, 8), (3, 1, 33), (2, 2, 80)]
WINDOWS = [None, 1, 3, 40]  # itself only; within a panel of keys; across panels
# Of the largest element. float32: some ten roundings; half types: two of a result.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def inputs(layout, heads, key_heads, width, dtype, seed=0):
    """Query, key and value as models hand them over, [1, heads, T, D] with the tokens apart; a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        values = torch.randn(1, layout.tokens, count, width, generator=generator)
        return values.to(dtype)

    leaves = [draw(count).transpose(1, 2) for count in (heads, key_heads, key_heads)]
    return leaves, draw(heads)


def results(attend, leaves, gradient, layout, scores=PLAIN):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = attend(*leaves, layout, scores)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


NAMES = ("output", "gradient of the query", "of the key", "of the value")


@pytest.mark.numerics
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_outputs_and_gradients_are_those_of_float64(dtype, name, shape, window) -> None:
    layout = SharedPromptLayout(tuple(LAYOUTS[name]))
    leaves, gradient = inputs(layout, *shape, dtype)
    for scaling in (None, 0.3):
        scores = Scores(scaling, 0.0, window, None)
        ours = results(attention_cpu.attend_on_cpu, leaves, gradient, layout, scores)
        truth = results(
            attend_by_blocks, [leaf.double() for leaf in leaves], gradient.double(), layout, scores
        )
        # A score's gradient is a difference from this, which is all of it where a query sees one key.
        taken_off = (gradient * truth[0]).sum(-1).abs().max() * (scaling or shape[2] ** -0.5)
        query, key, _ = (float(leaf.abs().max()) for leaf in leaves)
        sizes = [0.0, taken_off * key, taken_off * query, 0.0]
        for what, result, expected, size in zip(NAMES, ours, truth, sizes, strict=True):
            assert result.dtype == dtype and result.shape == expected.shape
            error = float((result.double() - expected).abs().max())
            error /= max(float(expected.abs().max()), float(size))
            assert error <= TOLERANCES[dtype], f"{what}: {error:.2g} of the largest element"


@pytest.mark.numerics
def test_large_scores_neither_overflow_nor_lose_a_weight() -> None:
    layout = SharedPromptLayout((Group(20, (5, 7)),))
    (query, key, value), gradient = inputs(layout, 2, 1, 16, torch.float32)
    leaves = [100 * query, 100 * key, value]
    ours = results(attention_cpu.attend_on_cpu, leaves, gradient, layout)
    truth = results(attend_by_blocks, [x.double() for x in leaves], gradient.double(), layout)
    assert torch.isfinite(torch.cat([x.flatten() for x in ours])).all()
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-3, atol=1e-3)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_a_nan_stays_among_those_who_see_it(dtype) -> None:
    layout = SharedPromptLayout((Group(20, (30, 40)), Group(3, (4,))))
    first, second, other = slice(20, 50), slice(50, 90), slice(90, 97)
    leaves, gradient = inputs(layout, 2, 1, 16, dtype)
    clean = results(attention_cpu.attend_on_cpu, leaves, gradient, layout)
    broken = [leaf.clone() for leaf in leaves]
    broken[1][:, :, 45] = NAN  # a key of the first response, late
    ours = results(attention_cpu.attend_on_cpu, broken, gradient, layout)
    assert ours[0][0, 45:50].isnan().all(), "those after it in its response"
    for kept in (slice(0, 45), second, other):
        assert torch.equal(ours[0][0, kept], clean[0][0, kept])
    assert torch.equal(ours[1][0, :, second], clean[1][0, :, second])
    assert ours[2][0, :, first].isnan().any() and not ours[2][0, :, other].isnan().any()


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_bits_depend_on_the_group_alone(dtype) -> None:
    """Not on the threads, nor on what else is in the row, nor on how the tensors lie in memory."""
    group = Group(40, (30, 50, 3))
    layout = SharedPromptLayout((Group(7, (200,)), group, Group(2, (1,))))
    leaves, gradient = inputs(layout, 4, 2, 24, dtype)
    before, count = 207, 123
    together = with_threads(lambda: results(attention_cpu.attend_on_cpu, leaves, gradient, layout))
    for other in together[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(together[0], other, strict=True))

    own = slice(before, before + count)
    alone = [leaf[:, :, own].contiguous() for leaf in leaves]  # heads apart, not tokens
    ours = results(
        attention_cpu.attend_on_cpu, alone, gradient[:, own], SharedPromptLayout((group,))
    )
    expected = [together[0][0][:, own], *(each[:, :, own] for each in together[0][1:])]
    for what, a, b in zip(NAMES, ours, expected, strict=True):
        assert torch.equal(bits(a), bits(b)), what


@pytest.mark.numerics
def test_nothing_beyond_the_row_is_read() -> None:
    layout = SharedPromptLayout((Group(20, (15, 3)),))
    leaves, gradient = inputs(layout, 2, 2, 12, torch.float32)

    def surrounded(tensor, dim):
        shape = list(tensor.shape)
        shape[dim] += 2
        buffer = torch.full(shape, NAN)
        return buffer.narrow(dim, 1, tensor.shape[dim]).copy_(tensor)

    expected = results(attention_cpu.attend_on_cpu, leaves, gradient, layout)
    inside = [surrounded(leaf, 2) for leaf in leaves]
    ours = results(attention_cpu.attend_on_cpu, inside, surrounded(gradient, 1), layout)
    wide = [surrounded(leaf, 3) for leaf in leaves]  # heads that do not lie side by side
    apart = results(attention_cpu.attend_on_cpu, wide, surrounded(gradient, 3), layout)
    for a, b, c in zip(ours, apart, expected, strict=True):
        assert torch.equal(bits(a), bits(c)) and torch.equal(bits(b), bits(c))


@pytest.mark.parametrize(
    "change, served",
    [
        ({}, True),
        ({"scores": PLAIN._replace(softcap=30.0)}, False),  # torch's tanh
        ({"scores": PLAIN._replace(dropout=0.1)}, False),  # torch's generator of random numbers
        ({"scores": PLAIN._replace(scaling=-1.0)}, False),  # what is hidden would be the largest
        ({"dtype": torch.float64}, False),
        ({"device": "meta"}, False),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_know_is_left_to_torch(change, served) -> None:
    options = {"dtype": torch.float32, "device": "cpu"} | change
    scores = options.pop("scores", PLAIN)
    query, key = torch.zeros(1, 4, 3, 8, **options), torch.zeros(1, 2, 3, 8, **options)
    assert attention_cpu.takes(query, key, key, scores) == served


def test_autocast_computes_in_its_dtype_as_torch_does() -> None:
    layout = SharedPromptLayout((Group(9, (4, 6)),))
    (query, key, value), gradient = inputs(layout, 4, 2, 8, torch.float32)
    leaves = [query, key, value.bfloat16()]  # rotary positions leave query and key in float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_cpu.takes(*leaves, PLAIN)
        ours = results(attention_cpu.attend_on_cpu, leaves, gradient.bfloat16(), layout)
        theirs = results(attend_by_blocks, leaves, gradient.bfloat16(), layout)
    assert not attention_cpu.takes(*leaves, PLAIN), "mixed dtypes"
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert float((a.float() - b.float()).abs().max() / b.float().abs().max()) < 2**-6


# --- the operator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name_of)
def test_opcheck(dtype, needs_grad) -> None:
    layout = SharedPromptLayout((Group(5, (2, 4)),))
    leaves, _ = inputs(layout, 4, 2, 8, dtype)
    leaves = [leaf[0].transpose(0, 1).requires_grad_(needs_grad) for leaf in leaves]
    opcheck(ops.shared_prompt_attention.default, (*leaves, layout.blocks(), 0.35, 11))


def test_an_empty_row_has_an_empty_result() -> None:
    layout = SharedPromptLayout(())
    leaves, gradient = inputs(layout, 4, 2, 8, torch.float32)
    ours = results(attention_cpu.attend_on_cpu, leaves, gradient, layout)
    assert [list(each.shape) for each in ours] == [[1, 0, 4, 8], [1, 4, 0, 8], *2 * [[1, 2, 0, 8]]]


def test_a_second_derivative_is_refused_by_name() -> None:
    layout = SharedPromptLayout((Group(5, (2,)),))
    leaves, gradient = inputs(layout, 2, 2, 8, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attention_cpu.attend_on_cpu(*leaves, layout, PLAIN)
    (first,) = torch.autograd.grad(output, leaves[0], gradient, create_graph=True)
    with pytest.raises(NotImplementedError, match="shared_prompt_attention_backward"):
        torch.autograd.grad(first.sum(), leaves[0])


GOOD = [[0, 4, 0, 0], [4, 2, 0, 3]]  # a prompt of 3 with a response of 1; another of 2


@pytest.mark.parametrize(
    "blocks, message",
    [
        ([[0, 4, 0, 0]], "fill the row of 6 tokens, got 4"),
        ([[0, 7, 0, 0]], "got block 0"),  # beyond the row
        ([[0, 4, 0, 0], [3, 3, 0, 0]], "got block 1"),  # overlapping
        ([[0, 4, 0, 0], [4, 2, 1, 3]], "got block 1"),  # not the beginning of the group
        ([[0, 4, 0, 0], [4, 2, 0, 5]], "got block 1"),  # more than the group's first block
        ([[0, 4, 0, 0], [4, 2, 0, -1]], "got block 1"),
        ([[0, 6, 0, 2]], "got block 0"),  # a prompt before any
        ([[0, 0, 0, 0], [0, 6, 0, 0]], "got block 0"),  # empty
        ([[0, 2**62, 0, 0], [4, 2, 0, 3]], "got block 0"),  # sums that would overflow
        ([[0, 6]], "int64 \\[B, 4\\]"),
    ],
    ids=str,
)
def test_blocks_that_do_not_fit_the_row_are_refused(blocks, message) -> None:
    query, key = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    ops.shared_prompt_attention(query, key, key, torch.tensor(GOOD), 1.0, 6)
    with pytest.raises(RuntimeError, match=message):
        ops.shared_prompt_attention(query, key, key, torch.tensor(blocks), 1.0, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": torch.zeros(6, 3, 8)}, "a multiple of those of the key"),
        ({"value": torch.zeros(6, 2, 7)}, "value must have"),
        ({"value": torch.zeros(6, 2, 8).half()}, "value must have"),
        ({"key": torch.zeros(5, 2, 8)}, "key must have"),
        ({"query": torch.zeros(1, 6, 4, 8)}, "must be \\[T, heads, D\\]"),
        ({"query": torch.zeros(6, 4, 8).double()}, "float64 is not supported"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": NAN}, "scale must be positive"),
        ({"window": 0}, "window must be positive"),
        ({"blocks": torch.tensor(GOOD).int()}, "blocks must be int64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message) -> None:
    arguments = {
        "query": torch.zeros(6, 4, 8), "key": torch.zeros(6, 2, 8), "value": torch.zeros(6, 2, 8),
        "blocks": torch.tensor(GOOD), "scale": 1.0, "window": 6,
    }  # fmt: skip
    ops.shared_prompt_attention(**arguments)
    with pytest.raises(RuntimeError, match=message):
        ops.shared_prompt_attention(**arguments | change)
