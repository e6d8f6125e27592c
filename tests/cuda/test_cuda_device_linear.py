"""The losses from hidden states on a GPU: numerics (rehearsed on the CPU), no hidden synchronisation, graphs, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from _device import DEVICE, device_only
from host_cuda.truth import bits, check, random_rows
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import CompletionRows

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Step = Callable[["Batch"], list[Tensor]]


class Batch(NamedTuple):
    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    rows: CompletionRows
    reference: Tensor  # [2P]


def make_batch(
    dtype: torch.dtype = torch.bfloat16, device: str = DEVICE, seed: int = 0, frozen: bool = False
) -> Batch:
    sequences, length, width, vocab = 6, 9, 24, 515
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((sequences, length, width), (vocab, width), (vocab,))
    )
    _, labels = random_rows(sequences, length, vocab, seed)
    labels[:, :3] = -100  # the lengths are those of every seed: a graph captures them
    labels[1, 5:] = labels[4, 7:] = -100
    rows = CompletionRows.from_labels(labels).to(device)
    reference = -30 * torch.rand(sequences, generator=generator).to(device)
    for tensor in (weight, bias):
        tensor.requires_grad_(not frozen)
    return Batch(hidden.requires_grad_(), weight, bias, rows, reference)


def leaves(batch: Batch) -> list[Tensor]:
    return [tensor for tensor in batch[:3] if tensor.requires_grad]


def dpo(batch: Batch, **options: Any) -> list[Tensor]:
    options.setdefault("impl", "fused")
    out = pyfast_dpo.fused_linear_dpo_loss(
        batch.hidden,
        batch.weight,
        rows=batch.rows,
        bias=batch.bias,
        reference_logps=batch.reference,
        **options,
    )
    return [out.loss, out.chosen_logps, *torch.autograd.grad(out.loss, leaves(batch))]


def kto(batch: Batch, **options: Any) -> list[Tensor]:
    options.setdefault("impl", "fused")
    out = pyfast_dpo.fused_linear_kto_loss(
        batch.hidden,
        batch.weight,
        None,
        batch.reference > -15,
        kl=0.05,
        rows=batch.rows,
        bias=batch.bias,
        reference_logps=batch.reference,
        **options,
    )
    return [out.loss, *torch.autograd.grad(out.loss, leaves(batch))]


def any_loss(batch: Batch, **options: Any) -> list[Tensor]:
    options.setdefault("impl", "fused")

    def hinge(logps: Tensor, units: slice) -> Tensor:
        return torch.relu(1 - 0.1 * (logps[0] - logps[1])).sum()

    out = pyfast_dpo.fused_linear_loss(
        batch.hidden, batch.weight, None, hinge, rows=batch.rows, bias=batch.bias, **options
    )
    return [out.loss, out.logps, *torch.autograd.grad(out.loss, leaves(batch))]


def log_probs(batch: Batch, **options: Any) -> list[Tensor]:
    options.setdefault("impl", "fused")
    logps = pyfast_dpo.linear_sequence_logps(
        batch.hidden, batch.weight, rows=batch.rows, bias=batch.bias, **options
    )
    return [logps, *torch.autograd.grad(logps.sum(), leaves(batch))]


STEPS = [dpo, kto, any_loss, log_probs]


def in_float64(batch: Batch, device: str = "cpu") -> Batch:
    hidden, weight, bias = (
        tensor.detach().to(device, torch.float64).requires_grad_(tensor.requires_grad)
        for tensor in batch[:3]
    )
    return Batch(hidden, weight, bias, batch.rows.to(device), batch.reference.to(device).double())


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("max_rows", [7, 1000])  # a unit larger than the budget; all at once
def test_against_float64(step: Step, dtype: torch.dtype, frozen: bool, max_rows: int) -> None:
    batch = make_batch(dtype, frozen=frozen)
    budget = max_rows * batch.weight.shape[0] * (8 if dtype == torch.float64 else 4)
    ours = step(batch, max_chunk_bytes=budget)
    truth = step(in_float64(batch), impl="torch")
    # Last places of sequence log-probs of some 40 nats reach the slope of the loss, and so every gradient.
    of_values = 1e-12 if dtype == torch.float64 else 1e-5
    of_gradients = max(of_values, 2 * torch.finfo(dtype).eps)
    for mine, true in zip(ours, truth, strict=True):
        mine, true = mine.detach().cpu(), true.detach()
        largest = float(true.abs().max())
        is_gradient = mine.dim() > 1 or mine.shape == batch.bias.shape
        tolerance = of_gradients * largest if is_gradient else of_values * (1 + largest)
        check(step.__name__, mine, true, true, tolerance)


@pytest.mark.parametrize("step", STEPS)
def test_two_runs_are_equal(step: Step) -> None:
    first, second = step(make_batch()), step(make_batch())
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("statistics", [False, True])
def test_statistics(statistics: bool) -> None:
    batch = make_batch(torch.float32)
    out = pyfast_dpo.fused_linear_loss(
        batch.hidden, batch.weight, None, lambda logps, units: logps.sum(), rows=batch.rows,
        statistics=statistics, impl="fused",
    )  # fmt: skip
    assert (out.statistics is not None) == statistics
    if out.statistics is not None:
        states = batch.hidden.detach().flatten(0, 1)[batch.rows.index].double()
        logps = (states @ batch.weight.detach().double().T).log_softmax(-1)
        truth = -(logps.exp() * logps).sum(-1).cpu()
        check("entropy", out.statistics.entropy.cpu(), truth, truth, 1e-4)


@device_only
@pytest.mark.parametrize("vocab", [32000, 50257])
def test_neighbours_do_not_matter(vocab: int) -> None:
    """The bits of a row's log-prob are those of the row alone: cuBLAS sees the same numbers of rows."""
    width, lengths = 1024, (300, 7, 190, 103)
    generator = torch.Generator(DEVICE).manual_seed(0)
    options = {"device": DEVICE, "dtype": torch.bfloat16, "generator": generator}
    hidden = torch.randn(sum(lengths), width, **options)
    weight = torch.randn(vocab, width, **options) / width**0.5
    targets = torch.randint(vocab, (sum(lengths),), device=DEVICE, generator=generator)

    def tokens(own: slice) -> Tensor:
        index = torch.arange(own.start, own.stop, device=DEVICE)
        count = own.stop - own.start
        rows = CompletionRows(index, targets[own], torch.tensor([count], device=DEVICE), (count,))
        return pyfast_dpo.linear_token_logps(hidden, weight, rows=rows, impl="fused")

    together, first = tokens(slice(0, sum(lengths))), 0
    for length in lengths:
        own = slice(first, first + length)
        assert torch.equal(bits(tokens(own)), bits(together[own])), length
        first += length


@pytest.mark.parametrize("kept", [True, False], ids=["graph kept", "graph freed"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_gradients_take_the_factor_of_the_loss_every_time(factor: float, kept: bool) -> None:
    """In their own memory where the graph is freed, in other memory where it may be asked again."""
    batch = make_batch()
    plain = dpo(batch)[2:]

    def loss() -> Tensor:
        return pyfast_dpo.fused_linear_dpo_loss(
            batch.hidden, batch.weight, rows=batch.rows, bias=batch.bias, reference_logps=batch.reference,
            impl="fused",
        ).loss  # fmt: skip

    value = loss()
    upstream = torch.full_like(value, factor)
    for _ in range(2):
        if not kept:
            value = loss()
        ours = torch.autograd.grad(value, leaves(batch), upstream, retain_graph=kept)
        for mine, one in zip(ours, plain, strict=True):
            assert torch.equal(mine, one * factor)  # a power of two: nothing is rounded


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@device_only
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("step", STEPS)
def test_rows_of_the_caller_need_no_synchronisation(step: Step, frozen: bool) -> None:
    batch = make_batch(frozen=frozen)
    step(batch)
    with no_synchronisation():
        step(batch)


@device_only
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("step", STEPS)
def test_graph_capture_and_replay(step: Step, frozen: bool) -> None:
    static = make_batch(frozen=frozen)
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(static)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for seed in (1, 2):
        fresh = make_batch(seed=seed, frozen=frozen)
        assert fresh.rows.lengths == static.rows.lengths
        with torch.no_grad():
            for to, source in zip(static[:3], fresh[:3], strict=True):
                to.copy_(source)
            static.reference.copy_(fresh.reference)
            for name in ("index", "targets", "counts"):
                getattr(static.rows, name).copy_(getattr(fresh.rows, name))
        graph.replay()
        expected = step(fresh)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(captured, expected, strict=True))


@device_only
def test_no_matrix_of_all_logits() -> None:
    """Extra memory is a piece of logits, the gradients of logits that wait, as much as a float32 gradient of the
    weight, that gradient, and small change."""
    pairs, length, width, vocab = 16, 256, 512, 32768
    hidden = torch.randn(2 * pairs, length, width, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, vocab, (2 * pairs, length), device=DEVICE)
    rows = CompletionRows.from_labels(labels)
    hidden.requires_grad_()
    budget = 64 << 20

    def step() -> None:
        out = pyfast_dpo.fused_linear_dpo_loss(
            hidden, weight, rows=rows, max_chunk_bytes=budget, impl="fused"
        )
        torch.autograd.grad(out.loss, (hidden, weight))

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    # What waits; a float32 total, its sum with the next product, or its rounded copy; hidden's, with those of rows.
    allowed = budget + 3 * 4 * weight.numel() + 3 * 4 * hidden.numel() + (32 << 20)
    assert extra < allowed, f"{extra / 2**20:.0f} MiB"
    assert allowed < 6 * 2 * pairs * length * vocab, "as much as all logits and their gradient"
