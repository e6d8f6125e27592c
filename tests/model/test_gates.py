"""silu(gate) * up on the CPU: against float64, its contract, and models that use it."""

from __future__ import annotations

import pytest
import torch
from _helpers import NAN, bits, with_threads
from torch.library import opcheck
from torch.nn import functional

import pyfast_dpo  # noqa: F401  registers the operators

ops = torch.ops.pyfast_dpo

# Roundings of the result in its own dtype (half of this relative to it), and of the float32 arithmetic before it.
DTYPES = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ARITHMETIC = 6 * 2.0**-23


def draw(*shape, seed=0, dtype=torch.float32, scale=3.0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (scale * drawn).to(dtype)


def truth(grad_out, gate, up):
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    out = functional.silu(gate) * up
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad_out.double())]


SHAPES = [
    ((1,), "one element"),
    ((15,), "less than a vector"),
    ((3, 16), "whole vectors"),
    ((2, 3, 7), "a last vector that is not whole"),
    ((70, 700), "more than a thread takes"),
    ((0, 5), "none"),
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [row[0] for row in SHAPES], ids=[row[1] for row in SHAPES])
def test_gate_and_gradients_are_those_of_float64(shape, dtype):
    grad_out, gate, up = (draw(*shape, seed=i, dtype=dtype) for i in range(3))
    results = [ops.silu_gate(gate, up), *ops.silu_gate_backward(grad_out, gate, up)]
    names = ("silu(gate) * up", "gradient of gate", "gradient of up")
    for name, result, expected in zip(names, results, truth(grad_out, gate, up), strict=True):
        assert result.shape == gate.shape and result.dtype == dtype
        # The slope of silu has a zero, near which it is a difference: what it is made of counts there.
        size = expected.abs() + (name == names[1]) * (grad_out * up).double().abs()
        allowed = DTYPES[dtype] * expected.abs() + ARITHMETIC * size + torch.finfo(dtype).tiny
        error = (result.double() - expected).abs() - allowed
        assert (error <= 0).all(), f"{name}: {float(error.max()):.2g} too far off"


@pytest.mark.numerics
def test_every_gate_from_minus_to_plus_infinity_is_exact_or_what_torch_says():
    finite = torch.cat([torch.linspace(-120, 120, 100_001), torch.logspace(-40, 38, 2000)])
    gate = torch.cat([finite, -finite])
    result, expected = ops.silu_gate(gate, torch.ones_like(gate)), functional.silu(gate.double())
    # Below -87.7, where e^x is no normal float, the result is zero.
    assert ((result - expected).abs() <= ARITHMETIC * expected.abs() + 1e-36).all()
    special = torch.tensor([float("inf"), float("-inf"), NAN, 0.0, -0.0])
    one = torch.ones(5)
    for ours, theirs in zip(
        [ops.silu_gate(special, one), *ops.silu_gate_backward(one, special, one)],
        [functional.silu(special), *torch_gradients(special)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def torch_gradients(gate):
    gate, up = gate.clone().requires_grad_(), torch.ones_like(gate).requires_grad_()
    return torch.autograd.grad(functional.silu(gate) * up, (gate, up), torch.ones_like(gate))


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_has_the_same_bits_for_any_threads_and_any_neighbours(dtype):
    grad_out, gate, up = (draw(50_001, seed=i, dtype=dtype) for i in range(3))
    runs = with_threads(
        lambda: [ops.silu_gate(gate, up), *ops.silu_gate_backward(grad_out, gate, up)]
    )
    some = slice(3, 20)
    runs.append([ops.silu_gate(gate[some], up[some]),
                 *ops.silu_gate_backward(grad_out[some], gate[some], up[some])])  # fmt: skip
    for run in runs[1:]:
        for first, other in zip(runs[0], run, strict=True):
            assert torch.equal(bits(first if len(other) > 17 else first[some]), bits(other))


def test_strided_tensors_are_taken():
    wide = draw(20, 64)
    gate, up = wide[:, :32], wide[:, 32:]
    assert torch.equal(ops.silu_gate(gate, up), ops.silu_gate(gate.clone(), up.clone()))
    one = torch.ones(()).expand(20, 32)  # the gradient of a sum
    for result, expected in zip(
        ops.silu_gate_backward(one, gate.T.clone().T, up),
        ops.silu_gate_backward(one.clone(), gate.clone(), up.clone()),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_operators_are_registered_correctly():
    opcheck(ops.silu_gate, [draw(5, 7), draw(5, 7, seed=1)])
    opcheck(ops.silu_gate_backward, [draw(5, 7), draw(5, 7, seed=1), draw(5, 7, seed=2)])


BAD = [
    (lambda: (draw(3, 4), draw(4, 3)), "up must have .*\\[3, 4\\].*got .*\\[4, 3\\]", "another shape"),
    (lambda: (draw(3, 4), draw(12)), "up must have .*\\[3, 4\\].*got .*\\[12\\]", "as many elements"),
    (lambda: (draw(3, 4), draw(3, 4).bfloat16()), "up must have dtype Float.*got dtype BFloat16", "two dtypes"),
    (lambda: (draw(3, 4).double(), draw(3, 4).double()), "gate must be float32, .*got dtype Double", "float64"),
    (lambda: (torch.ones(3, dtype=torch.int64),) * 2, "gate must be float64, float32, .*got dtype Long", "integers"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", [row[:2] for row in BAD], ids=[r[2] for r in BAD])
def test_bad_input_is_refused_with_its_values(arguments, message):
    with pytest.raises(RuntimeError, match=f"pyfast_dpo::silu_gate: .*{message}"):
        ops.silu_gate(*arguments())
    with pytest.raises(RuntimeError, match=f"pyfast_dpo::silu_gate_backward: .*{message}"):
        ops.silu_gate_backward(arguments()[0], *arguments())


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"grad_output must have .*\[3, 4\].*got .*\[3, 5\]"):
        ops.silu_gate_backward(draw(3, 5), draw(3, 4), draw(3, 4))


def test_a_second_derivative_is_refused():
    gate = draw(4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="silu_gate_backward has no second derivative"):
        ops.silu_gate_backward(gate, gate, gate)[0].sum().backward()


# --- models ---------------------------------------------------------------------------------------------


@pytest.fixture
def calls(one_pass, monkeypatch):
    """Shapes of our gates."""
    counted = []

    def count(gate, up):
        counted.append(tuple(gate.shape))
        return ops.silu_gate(gate, up)

    monkeypatch.setattr(one_pass.operators, "silu_gate", count)
    return counted


class Gated(torch.nn.Module):
    """As Llama's feed-forward layer, and most."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 24)
        self.down_proj, self.act_fn = torch.nn.Linear(24, 8), torch.nn.SiLU()

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class OfAnotherActivation(Gated):
    def __init__(self):
        super().__init__()
        self.act_fn = torch.nn.GELU()


class WithoutGate(Gated):
    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)))


class Exchanged(Gated):
    def forward(self, hidden):
        return self.down_proj(self.gate_proj(hidden) * self.act_fn(self.up_proj(hidden)))


class WithMore(Gated):
    def forward(self, hidden):
        return super().forward(hidden) + hidden


class WithOtherParts(Gated):
    def forward(self, hidden):
        return self.training * super().forward(hidden)


LAYERS = [
    (Gated, True, "that formula"),
    (OfAnotherActivation, False, "another activation function"),
    (WithoutGate, False, "no gate"),
    (Exchanged, False, "gate and up exchanged"),
    (WithMore, False, "something added"),
    (WithOtherParts, False, "it needs more than the four parts"),
]


@pytest.mark.parametrize("kind, ours", [row[:2] for row in LAYERS], ids=[row[2] for row in LAYERS])
def test_a_layer_is_known_by_what_it_computes(one_pass, calls, kind, ours):
    torch.manual_seed(0)
    layer, inputs = kind(), draw(2, 5, 8).requires_grad_()

    def run():
        inputs.grad = None
        layer.zero_grad()
        output = layer(inputs)
        output.square().sum().backward()
        return [output.detach(), inputs.grad, *(p.grad for p in layer.parameters())]

    expected = run()
    one_pass.use_one_pass(layer)
    for result, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6)
    assert calls == ([(2, 5, 24)] if ours else [])


def test_of_transformers_models_those_with_silu_gates_are_known(one_pass, calls):
    from model_families import MODELS, make

    with_gates = {
        "llama": 2, "llama eager": 2, "qwen2 tied head": 2, "qwen3": 2, "mistral sliding window": 2, "cohere": 2,
        "qwen2 experts": 2,  # of the shared expert
        "gemma2 soft-cap": 0, "gemma3 two positions": 0,  # gelu
        "gpt2 learned positions": 0,  # no gate
    }  # fmt: skip
    tokens = torch.arange(1, 9).view(1, 8)
    for name in MODELS:
        model = make(name)
        expected = model(tokens).logits
        one_pass.use_one_pass(model)
        calls.clear()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == with_gates[name], name


@pytest.mark.parametrize("case", ["float64", "compiled", "meta"])
def test_what_the_kernel_does_not_take_goes_torchs_way(one_pass, calls, case):
    layer, inputs = Gated(), draw(5, 8)
    if case == "meta":
        layer, inputs = layer.to("meta"), inputs.to("meta")
    one_pass.use_one_pass(layer)
    if case == "compiled":
        torch.compile(layer, backend="eager", fullgraph=True)(inputs)
    elif case == "float64":
        layer.double()(inputs.double())
    else:
        layer(inputs)
    assert calls == []


def test_bfloat16_under_autocast_is_taken(one_pass, calls):
    layer, inputs = Gated(), draw(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(inputs)
        one_pass.use_one_pass(layer)
        torch.testing.assert_close(layer(inputs), expected, rtol=0.02, atol=0.02)
    assert calls == [(5, 24)]


def test_a_forward_that_somebody_has_replaced_stays(one_pass, calls):
    layer = Gated()
    layer.forward = lambda hidden: hidden
    one_pass.use_one_pass(layer)
    assert layer(draw(5, 8)).shape == (5, 8)
    assert calls == []
