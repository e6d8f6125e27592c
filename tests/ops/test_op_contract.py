"""What torch users expect of an operator: opcheck, gradcheck, compile, autocast, checkpointing, double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers import (
    DTYPES,
    name_of,
    random_labels,
    random_logits,
    statistics_dtype,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from pyfast_dpo import (
    fused_dpo_loss,
    fused_ipo_loss,
    fused_kto_loss,
    kto_loss,
    preference_loss,
    sequence_logps,
    token_logps,
)
from pyfast_dpo.ops import _C

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.pyfast_dpo
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


# --- opcheck: schema, autograd registration, fake tensors, functionalization ---------------------------


@all_dtypes
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_of_every_dtype(needs_grad, dtype) -> None:
    logits = random_logits(2, 3, 33, dtype=dtype).requires_grad_(needs_grad)
    labels = random_labels(2, 3, vocab=33, ignored=0.3)
    opcheck(ops.seq_logp.default, (logits, labels, -100, False, False, False))


# nothing but a certain token, no positions, no sequences
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 0, 5), (0, 3, 5)], ids=str)
def test_opcheck_of_degenerate_shapes(shape) -> None:
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    logits = random_logits(*shape).requires_grad_()
    opcheck(ops.seq_logp.default, (logits, labels, -100, False, False, False))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_opcheck_of_every_option(shift, average, inplace) -> None:
    logits = random_logits(2, 4, 33).requires_grad_()
    labels = random_labels(2, 4, vocab=33, ignored=0.3)
    opcheck(ops.seq_logp.default, (logits, labels, -100, shift, average, inplace))


@pytest.mark.parametrize("layout", ["sliced", "swapped", "vocabulary_not_contiguous"])
def test_opcheck_of_strided_logits(layout) -> None:
    logits = {
        "sliced": random_logits(2, 5, 33)[:, :-1],
        "swapped": random_logits(4, 2, 33).transpose(0, 1),
        "vocabulary_not_contiguous": random_logits(2, 33, 4).transpose(1, 2),
    }[layout].requires_grad_()
    labels = random_labels(2, 4, vocab=33)
    opcheck(ops.seq_logp.default, (logits, labels, -100, False, False, False))


UPSTREAM = [  # which upstream gradients are given: of the sequences, of the tokens
    (torch.float64, (True, True)),
    (torch.float32, (True, True)),
    (torch.bfloat16, (True, True)),
    (torch.float16, (True, True)),
    (torch.float32, (True, False)),
    (torch.float32, (False, True)),
    (torch.float32, (False, False)),
]


@pytest.mark.parametrize("dtype, given", UPSTREAM, ids=str)
@pytest.mark.parametrize("op", [ops.seq_logp_backward.default, ops.seq_logp_backward_.default])
def test_opcheck_of_the_backward_operators(op, given, dtype) -> None:
    logits, labels = random_logits(2, 3, 33, dtype=dtype), random_labels(2, 3, vocab=33)
    _, *saved = ops.seq_logp(logits, labels, -100, False, True, False)
    stat = statistics_dtype(dtype)
    upstream = (torch.randn(2, dtype=stat), torch.randn(2, 3, dtype=stat))
    upstream = tuple(g if wanted else None for g, wanted in zip(upstream, given, strict=True))
    opcheck(op, (*upstream, logits, labels, *saved, -100, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradient_of_float_logits(dtype) -> None:
    """What the products of a half lm_head take, without a pass of its own."""
    logits, labels = random_logits(2, 3, 33), random_labels(2, 3, vocab=33)
    _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
    arguments = (torch.randn(2), None, logits, labels, *saved, -100, False)
    opcheck(ops.seq_logp_backward.default, arguments, {"out_dtype": dtype})
    gradient = ops.seq_logp_backward(*arguments, out_dtype=dtype)
    assert torch.equal(gradient, ops.seq_logp_backward(*arguments).to(dtype))
    out = torch.full_like(gradient, torch.nan)
    opcheck(ops.seq_logp_backward_out.default, (*arguments, out))
    ops.seq_logp_backward_out(*arguments, out)
    assert torch.equal(out, gradient)
    with pytest.raises(RuntimeError, match="seq_logp_backward: out_dtype"):
        ops.seq_logp_backward(*arguments, out_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="seq_logp_backward_out: out"):
        ops.seq_logp_backward_out(*arguments, out.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradient_of_float_logits_is_nan_where_they_are(dtype) -> None:
    logits, labels = random_logits(1, 3, 100), random_labels(1, 3, vocab=100, ignored=0.0)
    logits[0, 1, 77] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )  # all bits of a NaN set
    _, *saved = ops.seq_logp(logits, labels, -100, False, False, False)
    gradient = ops.seq_logp_backward(
        torch.ones(1), None, logits, labels, *saved, -100, False, out_dtype=dtype
    )
    assert gradient[0, 1].isnan().all() and gradient[0, ::2].isfinite().all()


def test_backward_operator_refuses_to_be_differentiated_when_called_directly() -> None:
    logits, labels = random_logits(2, 3, 33).requires_grad_(), random_labels(2, 3, vocab=33)
    _, *saved = ops.seq_logp(logits.detach(), labels, -100, False, False, False)
    gradient = ops.seq_logp_backward(torch.ones(2), None, logits, labels, *saved, -100, False)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        gradient.sum().backward()


NEEDS = [  # which log-probs need a gradient: chosen, rejected; is there a reference; dtype
    ((False, False), True, torch.float32),
    ((True, True), True, torch.float32),
    ((True, False), False, torch.float32),
    ((False, True), False, torch.float64),
]


@pytest.mark.parametrize("needs, with_reference, dtype", NEEDS, ids=str)
@pytest.mark.parametrize("loss", _C.pair_loss_names())
def test_opcheck_of_the_pair_loss(loss, needs, with_reference, dtype) -> None:
    policy = [torch.randn(3, dtype=dtype, requires_grad=need) for need in needs]
    constants = [torch.randn(3, dtype=dtype) if with_reference else None for _ in range(2)]
    lengths = [torch.tensor([3.0, 1.0, 7.0], dtype=dtype) if with_reference else None] * 2
    constants += [*lengths, torch.ones(3, dtype=dtype), torch.ones(1, dtype=dtype)]
    options = (loss, 0.1, 0.2, 0.05, 0.5, "alpha_divergence", 0.5, False)
    opcheck(ops.pair_loss.default, (*policy, *constants, *options))
    detached = [logp.detach() for logp in policy]
    opcheck(
        ops.pair_loss_backward.default, (torch.ones(3).to(dtype), *detached, *constants, *options)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_of_the_unpaired_loss(needs_grad, with_reference, dtype) -> None:
    policy = torch.randn(3, dtype=dtype, requires_grad=needs_grad)
    constants = torch.randn(3, dtype=dtype) if with_reference else None
    rest = (constants, torch.tensor([True, False, True]), torch.ones(1, dtype=dtype))
    options = ("kto", 0.1, 1.0, 0.5)
    opcheck(ops.unpaired_loss.default, (policy, *rest, *options))
    upstream = torch.ones(3, dtype=dtype)
    opcheck(ops.unpaired_loss_backward.default, (upstream, policy.detach(), *rest, *options))


@pytest.mark.parametrize("call", ["seq_logp", "pair_loss", "unpaired_loss"])
def test_fake_outputs_have_the_shape_dtype_and_layout_of_real_ones(call) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    logits, labels = (
        random_logits(2, 5, 33, dtype=torch.bfloat16)[:, ::2],
        random_labels(2, 3, vocab=33),
    )
    logps = torch.randn(8)[::2]  # not contiguous
    args: dict[str, tuple[Any, ...]] = {
        "seq_logp": (logits, labels, -100, False, False, False),
        "pair_loss": (
            logps,
            logps,
            *[None] * 6,
            "sigmoid",
            0.1,
            0.0,
            0.05,
            0.0,
            "reverse_kl",
            0.5,
            False,
        ),
        "unpaired_loss": (logps, None, torch.ones(4).bool(), torch.ones(1), "kto", 0.1, 1.0, 1.0),
    }
    real = getattr(ops, call)(*args[call])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args[call]]
        fake = getattr(ops, call)(*fakes)
    for ours, expected in zip(fake, real, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )


# --- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_sequence_gradient_equals_finite_differences(shift, average, impl) -> None:
    logits = random_logits(2, 3, 7, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[3, -100, 0], [6, 6, -100]])
    assert torch.autograd.gradcheck(
        lambda z: sequence_logps(z, labels, shift=shift, average=average, impl=impl), logits
    )


def test_gradient_of_both_outputs_equals_finite_differences() -> None:
    logits = random_logits(2, 3, 7, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[3, -100, 0], [6, 6, -100]])
    assert torch.autograd.gradcheck(
        lambda z: ops.seq_logp(z, labels, -100, False, True, False)[:2], logits
    )


def test_statistics_for_the_backward_pass_carry_no_gradient() -> None:
    logits = random_logits(2, 3, 7).requires_grad_()
    outputs = ops.seq_logp(logits, random_labels(2, 3, vocab=7), -100, False, False, False)
    assert [output.requires_grad for output in outputs] == [True, True, False, False, False]


def test_no_graph_without_logits_that_need_one() -> None:
    logits, labels = random_logits(2, 3, 7), random_labels(2, 3, vocab=7)
    assert not sequence_logps(logits, labels).requires_grad
    with torch.no_grad():
        assert not sequence_logps(logits.requires_grad_(), labels).requires_grad


LABELS = torch.tensor([[3, -100, 0], [6, 6, -100]])
DIFFERENTIABLE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "token_logps": (lambda z, **o: token_logps(z, LABELS, **o), (2, 3, 7)),
    "sequence_logps": (lambda z, **o: sequence_logps(z, LABELS, average=True, **o), (2, 3, 7)),
    "sigmoid": (lambda x, **o: preference_loss(x, -x, **o).losses, (3,)),
    "ipo": (lambda x, **o: preference_loss(x, -x, loss_type="ipo", **o).losses, (3,)),
    "kto": (
        lambda x, **o: kto_loss(x, torch.tensor([True, False, True]), kl=0.1, **o).losses,
        (3,),
    ),
    "fused_dpo_loss": (lambda z, **o: fused_dpo_loss(z, LABELS, **o).loss, (2, 3, 7)),
    "fused_ipo_loss": (lambda z, **o: fused_ipo_loss(z, LABELS, **o).loss, (2, 3, 7)),
    "fused_kto_loss": (
        lambda z, **o: fused_kto_loss(z, LABELS, torch.tensor([True, False]), kl=0.1, **o).loss,
        (2, 3, 7),
    ),
}
differentiable = pytest.mark.parametrize(
    "function, shape", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


@differentiable
def test_double_backward_raises_and_names_the_way_out(function, shape) -> None:
    """A second derivative from saved values would be a wrong number without an error."""
    leaf = random_logits(*shape).requires_grad_()
    output = function(leaf, impl="fused").sum()
    (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("function", [token_logps, sequence_logps])
def test_double_backward_raises_when_the_first_was_asked_to_be_in_place(function) -> None:
    leaf = random_logits(2, 3, 7).requires_grad_()
    before = leaf.detach().clone()
    output = function(leaf, LABELS, inplace_backward=True).sum()
    (gradient,) = torch.autograd.grad(output, leaf, create_graph=True)
    assert torch.equal(leaf, before), "create_graph needs the logits"
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        gradient.square().sum().backward()


def test_gradient_of_the_upstream_gradient_raises_too() -> None:
    """The first derivative is linear in it, so nothing else would stop a silent zero."""
    leaf, upstream = random_logits(2, 3, 7).requires_grad_(), torch.ones(2, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        sequence_logps(leaf, LABELS), leaf, upstream, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        gradient.sum().backward()


@differentiable
def test_plain_torch_has_second_derivatives(function, shape) -> None:
    leaf = random_logits(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: function(z, impl="torch"), leaf)


# --- torch.compile ---------------------------------------------------------------------------------------


def dpo_step(logits: Tensor, labels: Tensor, reference: Tensor, **options: Any) -> Tensor:
    return fused_dpo_loss(logits, labels, reference_logps=reference, **options).loss


def sequence_step(logits: Tensor, labels: Tensor, reference: Tensor, **options: Any) -> Tensor:
    return (sequence_logps(logits, labels, shift=True, average=True, **options) - reference).sum()


def kto_step(logits: Tensor, labels: Tensor, reference: Tensor, **options: Any) -> Tensor:
    is_desirable = labels[:, 0] % 2 == 0
    kl = reference.mean().abs()
    return fused_kto_loss(
        logits, labels, is_desirable, reference_logps=reference, kl=kl, **options
    ).loss


STEPS = {"dpo": dpo_step, "sequence_logps": sequence_step, "kto": kto_step}
SIZES = [(4, 9), (6, 17), (8, 9), (4, 64)]  # changing batches and lengths
ONE_PAIR = (2, 30)  # torch guards every size against 1, so one pair is a graph of its own


def graphs_for(
    step: Callable[..., Tensor],
    sizes: list[tuple[int, int]],
    backend: str,
    dynamic: bool | None,
    **options: Any,
) -> int:
    """How many graphs were compiled; loss and gradient of each must equal the eager ones."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows, length in sizes:
        labels = random_labels(rows, length, vocab=33, ignored=0.3)
        reference = torch.randn(rows)
        results = []
        for function in (step, compiled):
            leaf = random_logits(rows, length, 33).requires_grad_()
            logits = leaf * 1  # a model's output: not a leaf
            if function is compiled and dynamic is None:
                for tensor in (logits, labels, reference):
                    torch._dynamo.mark_dynamic(tensor, 0)
                for tensor in (logits, labels):
                    torch._dynamo.mark_dynamic(tensor, 1)
            loss = function(logits, labels, reference, **options)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "mark_dynamic"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_one_compiled_graph_serves_changing_lengths_and_batches(step, inplace, dynamic) -> None:
    assert graphs_for(step, SIZES, "aot_eager", dynamic, inplace_backward=inplace) == 1


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_two_compiled_graphs_serve_single_pairs_too(step) -> None:
    sizes = [*SIZES[:2], ONE_PAIR, SIZES[3], (2, 11)]
    assert graphs_for(step, sizes, "aot_eager", None) <= 2


@pytest.mark.slow
def test_inductor_compiles_the_loss() -> None:
    assert graphs_for(dpo_step, SIZES[:3], "inductor", None, inplace_backward=True) == 1


@pytest.mark.slow
def test_compiled_losses_on_log_probs_serve_changing_batches() -> None:
    torch._dynamo.reset()
    counters.clear()

    def step(chosen: Tensor, rejected: Tensor) -> Tensor:
        ipo = preference_loss(chosen, rejected, loss_type="ipo").losses
        kto = kto_loss(chosen, rejected < 0, kl=0.5).losses
        return (preference_loss(chosen, rejected, label_smoothing=0.1).losses + ipo + kto).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs in (3, 5, 8):
        rejected = torch.randn(pairs)
        gradients = []
        for function in (step, compiled):
            chosen = torch.arange(float(pairs)).requires_grad_()
            function(chosen, rejected).backward()
            gradients.append(chosen.grad)
        torch.testing.assert_close(*gradients)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_function_takes_changing_beta() -> None:
    """A schedule of beta must give the right loss, whatever dynamo does with the number."""
    logits, labels = random_logits(4, 5, 33), random_labels(4, 5, vocab=33)
    step = torch.compile(
        lambda beta: fused_dpo_loss(logits, labels, beta=beta).loss,
        fullgraph=True,
        backend="aot_eager",
    )
    for beta in (0.1, 0.2, 0.3):
        torch.testing.assert_close(step(beta), fused_dpo_loss(logits, labels, beta=beta).loss)


@pytest.mark.slow
def test_compiled_label_out_of_range_still_raises_on_the_cpu() -> None:
    """The public check reads the labels and is left out of a graph; the operator has its own."""
    step = torch.compile(
        lambda z, y: sequence_logps(z, y).sum(), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"labels must be in \[0, 33\).*got 33 at \[1, 0\]"):
        step(random_logits(2, 2, 33), torch.tensor([[0, 1], [33, 2]]))


# --- autocast, checkpointing, modes ----------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_autocast_leaves_the_loss_in_float32(impl) -> None:
    model = torch.nn.Linear(8, 33)
    hidden, labels = torch.randn(4, 5, 8), random_labels(4, 5, vocab=33)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(hidden)
        assert logits.dtype == torch.bfloat16
        result = fused_dpo_loss(logits, labels, reference_logps=torch.zeros(4), impl=impl)
    assert {t.dtype for t in result} == {torch.float32}
    outside = fused_dpo_loss(logits, labels, reference_logps=torch.zeros(4), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(result, outside, strict=True))
    result.loss.backward()
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_activation_checkpointing_gives_the_same_gradient(inplace, use_reentrant) -> None:
    labels = random_labels(4, 5, vocab=33)
    gradients = []
    for checkpointed in (False, True):
        hidden = random_logits(4, 5, 8).requires_grad_()
        weight = random_logits(33, 8, seed=5).requires_grad_()

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            logits = hidden @ weight.t()
            return fused_dpo_loss(logits, labels, inplace_backward=inplace).loss

        if checkpointed:
            checkpoint(loss, hidden, weight, use_reentrant=use_reentrant).backward()
        else:
            loss(hidden, weight).backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_inference_mode() -> None:
    logits, labels = random_logits(4, 5, 33), random_labels(4, 5, vocab=33)
    expected = fused_dpo_loss(logits, labels)
    with torch.inference_mode():
        result = fused_dpo_loss(logits.clone(), labels, inplace_backward=True)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_meta_tensors_give_shapes() -> None:
    """For devices without kernels "auto" is plain torch."""
    logits = torch.empty(4, 5, 33, device="meta", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.empty(4, 5, device="meta", dtype=torch.int64)
    result = fused_dpo_loss(logits, labels)
    assert result.loss.shape == () and result.chosen_logps.shape == (2,)
    assert {t.dtype for t in result} == {torch.float32}
    result.loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_deterministic_algorithms_mode_is_no_obstacle() -> None:
    logits, labels = random_logits(4, 5, 33).requires_grad_(), random_labels(4, 5, vocab=33)
    torch.use_deterministic_algorithms(True)
    try:
        fused_dpo_loss(logits, labels).loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.grad is not None


def test_anomaly_mode_and_hooks_see_the_gradient() -> None:
    logits, labels = random_logits(4, 5, 33).requires_grad_(), random_labels(4, 5, vocab=33)
    seen = []
    logits.register_hook(lambda g: seen.append(g.clone()))
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        fused_dpo_loss(logits, labels).loss.backward()
    assert torch.equal(seen[0], logits.grad)
