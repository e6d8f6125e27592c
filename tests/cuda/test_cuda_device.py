"""The CUDA kernels on a GPU, through the public API: the numerics of test_cuda_host.py and what only a device
has: streams, graphs, no hidden synchronisation, several devices. The numerics are rehearsed on the CPU."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _device import DEVICE, REHEARSAL, device_only, skip_if_slow_here
from host_cuda.truth import (
    INF,
    NAN,
    bits,
    check,
    check_backward,
    random_rows,
    statistics_dtype,
    targets_of,
    torch_token_logps,
    true_token_logps,
)
from torch import Tensor

import pyfast_dpo
from pyfast_dpo.ops import operators

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def name_of(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def fused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function` by the kernels: "auto" could fall back to torch and test nothing."""
    return function(*args, impl="fused", **kwargs)


def check_on_device(logits: Tensor, labels: Tensor, **options: bool) -> None:
    """token_logps and its gradient against the truth; `logits` on the device, `labels` anywhere."""
    targets = targets_of(labels.cpu(), options.get("shift", False))
    leaf = logits.detach().requires_grad_()
    logps = fused(pyfast_dpo.token_logps, leaf, labels.to(logits.device), **options)
    stat = statistics_dtype(logits.dtype)
    assert logps.dtype == stat
    host = logits.detach().cpu()
    truth = true_token_logps(host, targets)
    eps = torch.finfo(stat).eps
    peer = torch_token_logps(host.to(stat), targets)
    check("token_logps", logps.detach().cpu(), truth, peer, 16 * eps * truth.abs().clamp(min=1))
    coefficient = torch.randn(labels.shape, dtype=stat)
    (grad,) = torch.autograd.grad(logps, leaf, coefficient.to(logits.device))
    assert grad.dtype == logits.dtype
    check_backward(grad.cpu(), host, targets, coefficient)


# --- numerics ---------------------------------------------------------------------------------------

SHAPES = [
    (1, 1, 1),  # no others: log p is exactly 0
    (2, 3, 7),  # shorter than a vector of halves, odd
    (3, 9, 17),  # odd V: consecutive rows go through every alignment
    (1, 3, 4099),  # every thread once, and a tail
    (2, 2, 50257),  # an odd vocabulary from the field
    (2, 4, 128256),  # Llama 3; several slices a row
    (1, 5, 151937),  # odd and long: slices of misaligned rows
    (4, 700, 64),  # many rows, one slice each
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    skip_if_slow_here(math.prod(shape))
    values, labels = random_rows(*shape)
    if shape[1] > 1:
        labels[:, 1] = -100
    check_on_device(values.to(DEVICE, dtype), labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", range(0, 8, 3))
@pytest.mark.parametrize("gap", [0, 1, 16])
def test_layouts(gap: int, offset: int, dtype: torch.dtype) -> None:
    """Strided and misaligned rows; NaN between them must neither be read nor written over."""
    batch, length, vocab = 2, 5, 203
    values, labels = random_rows(batch, length, vocab)
    stride = vocab + gap
    memory = torch.full((offset + batch * length * stride + 8,), NAN, dtype=dtype, device=DEVICE)
    logits = memory.as_strided(values.shape, (length * stride, stride, 1), offset)
    logits.copy_(values)
    check_on_device(logits, labels)
    check_on_device(logits, labels, shift=True)
    before = memory.clone()
    work = memory.requires_grad_().clone()  # not `* 1`: that rewrites the NaNs
    view = work.as_strided(values.shape, (length * stride, stride, 1), offset)
    logps = fused(pyfast_dpo.token_logps, view, labels.to(DEVICE), inplace_backward=True)
    torch.autograd.grad(logps.sum(), view)
    before.as_strided(values.shape, logits.stride(), offset).copy_(view.detach())
    assert torch.equal(bits(work.detach()), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("margin", [10, 17, 20, 40])
def test_certain_model(margin: int, dtype: torch.dtype) -> None:
    values, labels = random_rows(1, 4, 1000)
    values = (values / 12).scatter(-1, labels[..., None], float(margin))
    logits = values.to(DEVICE, dtype)
    ours = fused(pyfast_dpo.token_logps, logits, labels.to(DEVICE)).cpu().double()
    truth = true_token_logps(logits.cpu(), labels)
    ones = torch.ones_like(truth)
    check("relative", ours / truth, ones, ones, 64 * torch.finfo(statistics_dtype(dtype)).eps)
    check_on_device(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    values, labels = random_rows(9, 1, 20000)
    labels[:] = 18000
    values[0, 0, :17000] = -INF  # whole rounds of nothing
    values[1, 0, :17000] = torch.finfo(dtype).min
    values[2, 0, 18000] = -INF
    values[3] += 1e4
    check_on_device(values[:4].to(DEVICE, dtype), labels[:4])

    values[4, 0, 3] = NAN
    values[5, 0, 18000] = NAN
    values[6] = -INF
    values[7, 0, 5] = INF
    labels[8] = 20000  # not a token: NaN on a GPU, where a check would wait for it; the CPU raises
    rows = slice(8 if REHEARSAL else 9)
    logits = values[rows].to(DEVICE, dtype).requires_grad_()
    logps = fused(pyfast_dpo.sequence_logps, logits, labels[rows].to(DEVICE))
    assert logps[:4].isnan().sum() == 0 and logps[4:].isnan().all()
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert grad[:4].isfinite().all() and grad[4:].isnan().all()


@device_only
def test_beyond_31_bits() -> None:
    length, vocab = 17000, 128256  # 2.18e9 elements
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * vocab:
        pytest.skip("needs 13 GB of free device memory")
    # Rows that are not scored stay uninitialised: they are not read.
    logits = torch.empty(1, length, vocab, dtype=torch.bfloat16, device=DEVICE)
    labels = torch.full((1, length), -100)
    rows = [0, 16743, 16744, length - 1]  # around 2^31
    labels[0, rows] = torch.tensor([1, 5, 7, vocab - 1])
    values, _ = random_rows(1, 4, vocab)
    logits[0, rows] = values[0].to(DEVICE, torch.bfloat16)
    few, few_labels = logits[:, rows].clone(), labels[:, rows]
    expected = fused(pyfast_dpo.token_logps, few.requires_grad_(), few_labels.to(DEVICE))
    logps = fused(pyfast_dpo.token_logps, logits.requires_grad_(), labels.to(DEVICE))
    assert torch.equal(logps[:, rows], expected)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    (few_grad,) = torch.autograd.grad(expected.sum(), few)
    assert torch.equal(grad[:, rows], few_grad) and grad[0, 1].count_nonzero() == 0
    check_on_device(few, few_labels)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_pair_losses(dtype: torch.dtype, loss_type: str) -> None:
    inputs = [-20 * torch.rand(1000, dtype=dtype) for _ in range(4)]

    def run(impl: Any, tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in tensors[:2]]
        out = pyfast_dpo.preference_loss(
            *leaves, *tensors[2:], loss_type=loss_type, beta=0.3, impl=impl
        )
        return [*out, *torch.autograd.grad(out.losses.sum(), leaves)]

    ours = run("fused", [t.to(DEVICE) for t in inputs])
    truth = run("torch", [t.double() for t in inputs])
    for mine, true in zip(ours, truth, strict=True):
        true = true.detach()
        tolerance = 8 * torch.finfo(dtype).eps * (true.abs() + 20 * (1 + true.abs().sqrt()))
        check(loss_type, mine.detach().cpu(), true, true, tolerance)


def test_ln2_to_the_bit() -> None:
    values, labels = random_rows(4, 5, 100)
    logits = values.to(DEVICE, torch.bfloat16)
    out = fused(pyfast_dpo.fused_dpo_loss, logits, labels.to(DEVICE), reference_logits=logits)
    assert torch.equal(out.losses.cpu(), torch.full((2,), math.log(2)))


# --- what only a device has ---------------------------------------------------------------------------


def dpo_step(
    logits: Tensor, labels: Tensor, reference: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    out = fused(pyfast_dpo.fused_dpo_loss, logits, labels, reference_logps=reference, **options)
    (grad,) = torch.autograd.grad(out.loss, logits)
    return out.loss.detach(), grad


def dpo_inputs(device: str = DEVICE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    values, labels = random_rows(4, 33, 4097, seed)
    labels[:, :9] = -100
    reference = torch.linspace(-90, -80, 4)
    return (
        values.to(device, torch.bfloat16).requires_grad_(),
        labels.to(device),
        reference.to(device),
    )


def test_two_runs_are_equal() -> None:
    (loss, grad), (loss2, grad2) = (dpo_step(*dpo_inputs()) for _ in range(2))
    assert torch.equal(bits(loss), bits(loss2)) and torch.equal(bits(grad), bits(grad2))


@pytest.mark.parametrize("half", DTYPES[2:], ids=name_of)
@pytest.mark.parametrize("vocab", [8, 4101, 50257])
def test_half_gradient_of_float_logits(vocab: int, half: torch.dtype) -> None:
    """What the linear losses hand to the next product: rounded once, where the kernel has it in float32."""
    values, labels = random_rows(1, 5, vocab)
    labels[0, 1] = -100
    logits, labels = values.to(DEVICE, torch.float32), labels.to(DEVICE)
    _, *saved = operators.seq_logp(logits, labels, -100, False, False, False)
    grad_token = torch.randn(1, 5).to(DEVICE)
    arguments = (None, grad_token, logits, labels, *saved, -100, False)
    narrow = operators.seq_logp_backward(*arguments, out_dtype=half)
    assert torch.equal(bits(narrow), bits(operators.seq_logp_backward(*arguments).to(half)))
    out = torch.full_like(narrow, torch.nan)
    operators.seq_logp_backward_out(*arguments, out)
    assert torch.equal(bits(out), bits(narrow))


@pytest.mark.parametrize("vocab", [4096, 4101, 61445])
def test_neighbours_do_not_matter(vocab: int) -> None:
    values, labels = random_rows(5, 7, vocab)
    logits, labels = values.to(DEVICE, torch.bfloat16), labels.to(DEVICE)
    together = fused(pyfast_dpo.sequence_logps, logits, labels)
    for b in range(5):
        alone = fused(pyfast_dpo.sequence_logps, logits[b : b + 1].clone(), labels[b : b + 1])
        assert torch.equal(bits(alone), bits(together[b : b + 1]))


def test_in_place_backward() -> None:
    logits, labels, reference = dpo_inputs()
    loss, grad = dpo_step(logits, labels, reference)
    copy = logits * 1
    loss_in_place, grad_in_place = dpo_step(copy, labels, reference, inplace_backward=True)
    assert grad_in_place.data_ptr() == copy.data_ptr()
    assert torch.equal(loss, loss_in_place) and torch.equal(bits(grad), bits(grad_in_place))


@device_only
def test_side_stream() -> None:
    """The kernels run on the current stream: after a slow write of their input on that stream."""
    logits, labels, reference = dpo_inputs()
    expected = dpo_step(logits, labels, reference)
    late = torch.zeros_like(logits)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        late.detach().copy_(logits.detach())
        loss, grad = dpo_step(late.requires_grad_(), labels, reference)
        done.record()
    torch.cuda.current_stream().wait_event(done)
    assert torch.equal(loss.clone(), expected[0]) and torch.equal(grad.clone(), expected[1])


@device_only
def test_no_synchronisation() -> None:
    inputs = dpo_inputs()
    dpo_step(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dpo_step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@device_only
def test_graph_capture_and_replay() -> None:
    logits, labels, reference = dpo_inputs()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        dpo_step(logits, labels, reference)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = dpo_step(logits, labels, reference)
    for seed in (1, 2):
        new = dpo_inputs(seed=seed)
        with torch.no_grad():
            for static, fresh in zip((logits, labels, reference), new, strict=True):
                static.copy_(fresh)
        graph.replay()
        expected = dpo_step(*new)
        assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device() -> None:
    """Tensors on device 1 while device 0 is current."""
    expected = dpo_step(*dpo_inputs("cuda:0"))
    with torch.cuda.device(0):
        loss, grad = dpo_step(*dpo_inputs("cuda:1"))
    assert loss.device.index == grad.device.index == 1
    assert torch.equal(loss.cpu(), expected[0].cpu()) and torch.equal(grad.cpu(), expected[1].cpu())


@device_only
def test_stream_symbol_is_in_torch() -> None:
    """The extension finds the current stream through this symbol, weakly, and links no libtorch_cuda."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    function = ctypes.CDLL(str(library)).aoti_torch_get_current_cuda_stream
    stream = ctypes.c_void_p()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert function(torch.cuda.current_device(), ctypes.byref(stream)) == 0
    assert stream.value == side.cuda_stream
