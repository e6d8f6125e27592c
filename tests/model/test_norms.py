"""Normalization by the root mean square on the CPU: against float64, its contract, and models that use it."""

from __future__ import annotations

import pytest
import torch
from _helpers import NAN, bits, with_threads
from torch import nn
from torch.library import opcheck

import pyfast_dpo  # noqa: F401  registers the operators

ops = torch.ops.pyfast_dpo
EPSILON = 1e-5


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(inputs, weight, epsilon=EPSILON):
    return weight * (inputs * (inputs.square().mean(-1, keepdim=True) + epsilon).rsqrt())


def run(inputs, weight, grad_output):
    """Output, gradients of input and weight."""
    output, inverse = ops.rms_norm(inputs, weight, EPSILON)
    return [output, *ops.rms_norm_backward(grad_output, inputs, weight, inverse, True)]


SHAPES = [
    ((1,), "one number"),
    ((3, 15), "less than a vector"),
    ((2, 3, 16), "whole vectors"),
    ((64, 33), "as many rows as a task takes; a last vector that is not whole"),
    ((200, 576), "more rows than a task takes"),
    ((2, 4097), "long rows"),
    ((0, 5), "no rows"),
]


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [row[0] for row in SHAPES], ids=[row[1] for row in SHAPES])
def test_output_and_gradients_are_those_of_float64(shape):
    inputs, weight, grad_output = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2)
    exact_inputs, exact_weight = inputs.double().requires_grad_(), weight.double().requires_grad_()
    output = formula(exact_inputs, exact_weight)
    exact = torch.autograd.grad(output, (exact_inputs, exact_weight), grad_output.double())
    # The size of what is added up: gradients of rows are differences, that of the weight a sum over rows.
    spread = (inputs.double().square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    sizes = [
        output.detach().abs(),
        spread * ((grad_output * weight).abs() + inputs.abs() * spread * (grad_output * weight * inputs).abs().mean(-1, keepdim=True) * spread),
        (grad_output * inputs * spread).abs().reshape(-1, shape[-1]).sum(0),
    ]  # fmt: skip
    names = ("output", "gradient of the input", "of the weight")
    results = run(inputs, weight, grad_output)
    for name, result, expected, size in zip(names, results, (output, *exact), sizes, strict=True):
        assert result.shape == expected.shape and result.dtype == torch.float32
        error = (result.double() - expected).abs() - 2e-6 * size
        assert (error <= 0).all(), f"{name}: {float(error.max()):.2g} too far off"


@pytest.mark.numerics
def test_bits_do_not_depend_on_threads_and_rows_not_on_each_other():
    inputs, weight, grad_output = draw(300, 100), draw(100, seed=1), draw(300, 100, seed=2)
    runs = with_threads(lambda: run(inputs, weight, grad_output))
    for other in runs[1:]:
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(runs[0], other, strict=True))
    some = slice(70, 91)
    for one, other in zip(run(inputs[some], weight, grad_output[some])[:2], runs[0], strict=False):
        assert torch.equal(bits(one), bits(other[some]))


@pytest.mark.numerics
@pytest.mark.parametrize(
    "value", [NAN, float("inf"), 1e30, 0.0], ids=["nan", "inf", "squares overflow", "zeros"]
)
def test_extreme_rows_are_what_torch_says_and_stay_alone(value):
    inputs, weight = draw(5, 40), draw(40, seed=1)
    clean, _ = ops.rms_norm(inputs, weight, EPSILON)
    inputs[2] = value
    result, _ = ops.rms_norm(inputs, weight, EPSILON)
    torch.testing.assert_close(result[2], formula(inputs[2], weight), equal_nan=True)
    assert torch.equal(result[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_strided_tensors_are_taken():
    wide, weight, one = draw(9, 80), draw(40, seed=1), torch.ones(()).expand(9, 40)
    strided = run(wide[:, ::2], weight, one)
    for result, expected in zip(
        strided, run(wide[:, ::2].contiguous(), weight, one.contiguous()), strict=True
    ):
        assert torch.equal(result, expected)


def test_the_gradient_of_a_frozen_weight_is_not_made():
    inputs, weight = draw(3, 8), draw(8, seed=1)
    _, inverse = ops.rms_norm(inputs, weight, EPSILON)
    of_rows, of_weight = ops.rms_norm_backward(inputs, inputs, weight, inverse, False)
    assert torch.equal(of_rows, run(inputs, weight, inputs)[1]) and of_weight.shape == (0,)


def test_operators_are_registered_correctly():
    inputs, weight = draw(2, 3, 8), draw(8, seed=1)
    opcheck(ops.rms_norm, [inputs, weight, EPSILON])
    inverse = torch.ones(6)
    opcheck(ops.rms_norm_backward, [inputs, inputs, weight, inverse, True])
    opcheck(ops.rms_norm_backward, [inputs, inputs, weight, inverse, False])


BAD = [
    (lambda: (draw(3, 4), draw(5)), "weight must have .*\\[4\\].*got .*\\[5\\]", "another width"),
    (lambda: (draw(3, 4), draw(4, 1)), "weight must have .*\\[4\\].*got .*\\[4, 1\\]", "a matrix"),
    (lambda: (draw(3, 4).double(), draw(4)), "input must have dtype Float.*got dtype Double", "float64"),
    (lambda: (draw(3, 4), draw(4).bfloat16()), "weight must have dtype Float.*got dtype BFloat16", "half"),
    (lambda: (draw(3, 0), draw(0)), "input must have a last dimension with elements", "no columns"),
    (lambda: (draw(()), draw(1)), "input must have a last dimension with elements", "a scalar"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", [row[:2] for row in BAD], ids=[r[2] for r in BAD])
def test_bad_input_is_refused_with_its_values(arguments, message):
    inputs, weight = arguments()
    with pytest.raises(RuntimeError, match=f"pyfast_dpo::rms_norm: .*{message}"):
        ops.rms_norm(inputs, weight, EPSILON)
    with pytest.raises(RuntimeError, match=f"pyfast_dpo::rms_norm_backward: .*{message}"):
        ops.rms_norm_backward(inputs, inputs, weight, torch.ones(3), True)


def test_tensors_of_another_forward_pass_are_refused():
    inputs, weight = draw(3, 4), draw(4)
    with pytest.raises(RuntimeError, match=r"grad_output must have .*\[3, 4\].*got .*\[3, 5\]"):
        ops.rms_norm_backward(draw(3, 5), inputs, weight, torch.ones(3), True)
    with pytest.raises(RuntimeError, match=r"inverse must have .*\[3\].*got .*\[4\]"):
        ops.rms_norm_backward(inputs, inputs, weight, torch.ones(4), True)


def test_a_second_derivative_is_refused():
    inputs = draw(4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="rms_norm_backward has no second derivative"):
        ops.rms_norm_backward(inputs, inputs, draw(4), torch.ones(4), False)[0].sum().backward()


# --- models ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(one_pass, monkeypatch):
    """Widths of our norms."""
    counted = []

    def count(inputs, weight, epsilon):
        counted.append(len(weight))
        return ops.rms_norm(inputs, weight, epsilon)

    monkeypatch.setattr(one_pass.operators, "rms_norm", count)
    return counted


class Norm(nn.Module):
    """As Llama's."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(draw(8, seed=3)), EPSILON

    def forward(self, hidden):
        return formula(hidden, self.weight, self.variance_epsilon)


class FromOne(Norm):
    def forward(self, hidden):
        return formula(hidden, 1 + self.weight, self.variance_epsilon)


class Centered(Norm):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class WithoutEpsilon(Norm):
    def forward(self, hidden):
        return formula(hidden, self.weight, 0.0)


class WithOtherParts(Norm):
    def forward(self, hidden):
        return self.training * super().forward(hidden)


KINDS = [
    (Norm, True, "that formula"),
    (FromOne, False, "a weight counted from 1"),
    (Centered, False, "around the mean"),
    (WithoutEpsilon, False, "epsilon left out"),
    (WithOtherParts, False, "it needs more than weight and epsilon"),
]


@pytest.mark.parametrize("kind, ours", [row[:2] for row in KINDS], ids=[row[2] for row in KINDS])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_norm_is_known_by_what_it_computes(one_pass, calls, kind, ours, frozen):
    norm, inputs = kind().requires_grad_(not frozen), draw(2, 5, 8).requires_grad_()

    def results():
        inputs.grad = norm.weight.grad = None
        output = norm(inputs)
        output.square().sum().backward()
        return [output.detach(), inputs.grad, torch.zeros(8) if frozen else norm.weight.grad]

    expected = results()
    one_pass.use_one_pass(norm)
    for result, value in zip(results(), expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)
    assert calls == ([8] if ours else [])


def test_of_transformers_models_those_with_that_norm_are_known(one_pass, calls):
    from model_families import MODELS, make

    # before attention and feed-forward of two layers, and at the end
    known = dict.fromkeys(MODELS, 5) | {
        "qwen3": 9,  # of queries and keys, too
        "gemma2 soft-cap": 0, "gemma3 two positions": 0,  # weights counted from 1
        "cohere": 0, "gpt2 learned positions": 0,  # around the mean
    }  # fmt: skip
    tokens = torch.arange(1, 9).view(1, 8)
    for name in MODELS:
        model = make(name)
        expected = model(tokens).logits
        one_pass.use_one_pass(model)
        calls.clear()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == known[name], name


@pytest.mark.parametrize("case", ["bfloat16", "float64", "compiled", "meta"])
def test_what_the_kernel_does_not_take_goes_torchs_way(one_pass, calls, case):
    norm, inputs = Norm(), draw(5, 8)
    if case == "meta":
        norm, inputs = norm.to("meta"), inputs.to("meta")
    one_pass.use_one_pass(norm)
    if case == "compiled":
        torch.compile(norm, backend="eager", fullgraph=True)(inputs)
    elif case == "meta":
        norm(inputs)
    else:
        norm.to(getattr(torch, case))(inputs.to(getattr(torch, case)))
    assert calls == []


def test_a_forward_that_somebody_has_replaced_stays(one_pass, calls):
    norm = Norm()
    norm.forward = lambda hidden: hidden
    one_pass.use_one_pass(norm)
    assert norm(draw(5, 8)).shape == (5, 8)
    assert calls == []
