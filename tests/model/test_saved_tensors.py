"""Kept layers hold what autograd needs, without what a cheap operation makes of the rest."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from model_families import MODELS, make

from pyfast_dpo.model import saved_tensors
from pyfast_dpo.model.one_pass import RmsNorm, SiluGate
from pyfast_dpo.model.saved_tensors import SavedTensors

N, H = 6, 8  # tokens, width


class Setting:
    """Tensors that need a gradient, or not, and a linear layer that saves what it is given."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.first, self.second = draw(1, N, H).requires_grad_(), draw(1, N, H).requires_grad_()
        # results of an operation that saves nothing, as the outputs of other layers are
        self.x, self.y = self.first + 1.0, self.second + 2.0
        self.frozen, self.scale = draw(H), draw(H).requires_grad_()
        self.weight = draw(4, H).requires_grad_()
        self.leaves = [self.first, self.second, self.scale, self.weight]

    def linear(self, value):
        return functional.linear(value, self.weight.to(value.dtype))


def normalized(s):
    return s.x * (s.x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


OWN = 4 * N * H  # bytes of one [N, H]
COLUMN = 4 * N
GRAPHS = [
    (lambda s: s.linear(s.x), OWN, "the input itself is kept"),
    (lambda s: s.linear(s.x * s.y), 2 * OWN, "a product: its factors alone"),
    (lambda s: s.linear(s.x * s.scale), OWN + 32, "a trained factor for every row: x for its gradient, and itself"),
    (lambda s: s.linear(s.x * s.frozen), OWN + 32, "x is not saved for a frozen factor: the product is"),
    (lambda s: s.linear(normalized(s) * s.frozen), OWN + COLUMN + 32, "a norm with a frozen weight: from x"),
    (lambda s: s.linear(s.scale * normalized(s)), OWN + COLUMN + 32, "a norm with a trained weight: from x"),
    (lambda s: s.linear(RmsNorm.apply(s.x, s.scale, 1e-6)), OWN + COLUMN + 32, "our norm: from x"),
    (lambda s: s.linear(RmsNorm.apply(s.x, s.frozen, 1e-6)), OWN + COLUMN + 32, "the same with a frozen weight"),
    (lambda s: s.linear(functional.silu(s.x) * s.y), 2 * OWN, "a gated unit: gate and up"),
    (lambda s: s.linear(SiluGate.apply(s.x, s.y)), 2 * OWN, "our gate: gate and up"),
    (lambda s: s.linear(functional.gelu(s.x) * s.y), 2 * OWN, "the same with gelu"),
    (lambda s: s.linear(functional.gelu(s.x, approximate="tanh") * s.y), 2 * OWN, "its approximation"),
    (lambda s: s.linear(functional.silu(s.x)), OWN, "an activation alone"),
    (lambda s: s.linear((s.x * s.y).view(N, H)), 2 * OWN, "seen as a matrix"),
    (lambda s: s.linear((s.x * s.y).bfloat16()), 2 * OWN + 64, "rounded once: made again, and rounded (the weight is, too)"),
    (lambda s: s.linear((s.x * s.y).bfloat16().float()), 3 * OWN, "rounded and widened: kept"),
    (lambda s: s.linear((s.x * s.y)[0].T.contiguous().view(N, H)), 3 * OWN, "another order of elements: kept"),
    (lambda s: (s.x * s.y).expand(2, N, H) * s.linear(s.x).sum(), 3 * OWN + 4, "an expanded one: kept"),
    (lambda s: s.linear((s.x * s.y) * 2.0), 2 * OWN, "times a number, which saves nothing: from the factors"),
    (lambda s: s.linear(s.x + s.y), OWN, "a sum is not made again: it saves nothing to make it of"),
    (lambda s: s.linear(s.x.exp()), OWN, "what exp makes, it saves itself"),
]  # fmt: skip


@pytest.mark.parametrize("graph, kept", [row[:2] for row in GRAPHS], ids=[row[2] for row in GRAPHS])
def test_gradients_have_the_same_bits_and_cheap_results_are_not_kept(graph, kept):
    def gradients(with_hooks):
        setting = Setting()
        saved = SavedTensors([setting.weight])
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with hooks if with_hooks else contextlib.nullcontext():
            result = graph(setting)
        # the square saves the result, outside of the hooks
        result.float().square().sum().backward()
        return [leaf.grad for leaf in setting.leaves], saved.bytes

    (expected, _), (result, size) = gradients(False), gradients(True)
    for name, one, other in zip("first second scale weight".split(), expected, result, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name
    assert size == kept


def test_a_gated_layer_keeps_its_two_products_alone():
    gate, up, down = nn.Linear(H, 32), nn.Linear(H, 32), nn.Linear(32, H)
    hidden = torch.randn(N, H, requires_grad=True)
    weights = [p for layer in (gate, up, down) for p in layer.parameters()]
    saved = SavedTensors([hidden, *weights])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        down(functional.silu(gate(hidden)) * up(hidden))
    assert saved.bytes == 2 * 4 * N * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_same_gradients_and_keep_less(monkeypatch, name, frozen, dtype):
    model = make(name).to(dtype)
    if frozen:  # as under an adapter: norms and other layers have no gradient of their own
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    tokens = torch.arange(1, 17).view(2, 8)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def run():
        model.zero_grad()
        embedded.grad = None
        saved = SavedTensors(model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            hidden = model.base_model(inputs_embeds=embedded, use_cache=False)[0]
        hidden.float().square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {**gradients, "embedded": embedded.grad}, saved.bytes

    result, less = run()
    monkeypatch.setattr(saved_tensors, "_remade", lambda tensor: None)
    expected, everything = run()
    assert expected.keys() == result.keys()
    for key, value in expected.items():
        assert torch.equal(result[key], value), key
    print(f"{name}: {less} of {everything} bytes")
    if name != "gpt2 learned positions":  # its activation function is written out in operations
        assert less < (0.95 if frozen else 0.75) * everything
