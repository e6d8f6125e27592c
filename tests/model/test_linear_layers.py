"""Products of linear layers on the CPU: against float64, their contract, and models that use them."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from _helpers import NAN, bits, with_threads
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from pyfast_dpo.ops import _C

ops = torch.ops.pyfast_dpo
# A panel has up to 14 rows or 32 columns.

# rows, inputs, outputs
SHAPES = [
    (1, 1, 1, "one of each"),
    (13, 5, 31, "less than a panel"),
    (14, 16, 32, "exactly one panel"),
    (15, 17, 33, "one more than a panel"),
    (200, 70, 230, "more rows and columns than a task takes"),
    (3, 768, 2, "as deep as a block"),
    (29, 1537, 40, "three blocks of depth, the last one shorter"),
    (0, 5, 3, "no rows"),
    (4, 0, 3, "no inputs: zeros"),
    (4, 5, 0, "no outputs"),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(rows, weight, *low):
    output = torch.full((rows.shape[0], weight.shape[0]), NAN)
    ops.linear_(output, rows, weight, *low)
    return output


def results(rows, weight, gradient):
    return [
        linear(rows, weight),
        ops.linear_grad_rows(gradient, weight),
        ops.linear_grad_weight(gradient, rows),
    ]


@pytest.mark.numerics
@pytest.mark.parametrize(
    "rows, inputs, outputs", [row[:3] for row in SHAPES], ids=[row[3] for row in SHAPES]
)
def test_products_are_those_of_float64(rows, inputs, outputs):
    a, w, g = draw(rows, inputs), draw(outputs, inputs, seed=1), draw(rows, outputs, seed=2)
    truth = [a.double() @ w.double().T, g.double() @ w.double(), g.double().T @ a.double()]
    # What float32 sums may be off by: a rounding an addition, half of them one way, of the sum of magnitudes.
    sizes = [a.abs() @ w.abs().T, g.abs() @ w.abs(), g.abs().T @ a.abs()]
    names = ("output", "gradient of the rows", "of the weight")
    for name, result, expected, size in zip(names, results(a, w, g), truth, sizes, strict=True):
        assert result.shape == expected.shape and result.dtype == torch.float32
        error = (result.double() - expected).abs() - 1e-6 * size
        assert (error <= 0).all(), f"{name}: {float(error.max()):.2g} too far off"


@pytest.mark.numerics
def test_a_row_has_the_same_bits_for_any_threads_and_among_any_rows():
    a, w, g = draw(300, 900), draw(100, 900, seed=1), draw(300, 100, seed=2)
    runs = with_threads(lambda: results(a, w, g))
    for other in runs[1:]:
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(runs[0], other, strict=True))
    for first, last in ((0, 1), (13, 30), (150, 300)):
        assert torch.equal(linear(a[first:last], w), runs[0][0][first:last])
        assert torch.equal(ops.linear_grad_rows(g[first:last], w), runs[0][1][first:last])
        # Those of the weight's gradient are outputs.
        some = ops.linear_grad_weight(g[:, first:last], a)
        assert torch.equal(some, runs[0][2][first:last])


@pytest.mark.numerics
def test_a_nan_or_infinity_stays_in_its_row_and_column():
    a, w = draw(40, 50), draw(60, 50, seed=1)
    clean = linear(a, w)
    a[7, 3], w[9, 4] = NAN, float("inf")
    result = linear(a, w)
    assert result[7].isnan().all() and not result[:7, 9].isfinite().any()
    mask = torch.ones_like(clean, dtype=torch.bool)
    mask[7], mask[:, 9] = False, False
    assert torch.equal(result[mask], clean[mask])


@pytest.mark.numerics
def test_a_low_rank_term_is_added_in_the_same_pass():
    a, w = draw(100, 800), draw(70, 800, seed=1)
    low, up, down = draw(100, 5, seed=2), draw(70, 5, seed=3), draw(5, 800, seed=4)
    g, low_g = draw(100, 70, seed=5), draw(100, 5, seed=6)
    for result, terms in (
        (linear(a, w, low, up), ((a, w.T), (low, up.T))),
        (ops.linear_grad_rows(g, w, low_g, down), ((g, w), (low_g, down))),
    ):
        truth = sum(x.double() @ y.double() for x, y in terms)
        size = sum(x.abs() @ y.abs() for x, y in terms)
        assert ((result.double() - truth).abs() <= 1e-6 * size).all()
    assert torch.equal(linear(a, w, low[:, :0], up[:, :0]), linear(a, w))


@pytest.mark.numerics
@pytest.mark.parametrize("depth", [1, 700, 760, 768, 1536, 1600])
def test_an_adapter_that_adds_nothing_changes_no_bit(depth):
    """So that the first loss of an adapter, whose up weight is 0, is ln 2 exactly."""
    a, w, low, g = draw(40, depth), draw(70, depth, seed=1), draw(40, 16), draw(40, depth, seed=2)
    up, down = torch.zeros(70, 16), torch.zeros(16, 70)
    assert torch.equal(linear(a, w, low, up), linear(a, w))
    back = w.T.contiguous()
    assert torch.equal(ops.linear_grad_rows(g, back, low, down), ops.linear_grad_rows(g, back))


@pytest.mark.numerics
def test_strided_matrices_are_taken():
    a, w = draw(50, 20), draw(50, 30, seed=1)
    assert torch.equal(linear(a.T, w.T), linear(a.T.contiguous(), w.T.contiguous()))
    wide = draw(9, 200)
    assert torch.equal(linear(wide[:, ::4], w.T), linear(wide[:, ::4].contiguous(), w.T))
    # A gradient of a sum is one number everywhere.
    g = torch.ones(()).expand(9, 7)
    assert torch.equal(
        ops.linear_grad_weight(g, wide[:, ::4]),
        ops.linear_grad_weight(g.contiguous(), wide[:, ::4]),
    )


def test_operators_are_registered_correctly():
    rows, weight, gradient = draw(5, 7), draw(3, 7, seed=1), draw(5, 3, seed=2)
    opcheck(ops.linear_, [torch.zeros(5, 3), rows, weight])
    opcheck(ops.linear_, [torch.zeros(5, 3), rows, weight, draw(5, 2), draw(3, 2)])
    opcheck(ops.linear_grad_rows, [gradient, weight])
    opcheck(ops.linear_grad_rows, [gradient, weight, draw(5, 2), draw(2, 7)])
    opcheck(ops.linear_grad_weight, [gradient, rows])


BAD = [
    (lambda: (draw(3, 4), draw(5, 6)), "weight must have .*got .*shape \\[5, 6\\]", "depths differ"),
    (lambda: (draw(3, 4, 1), draw(5, 4)), "must be matrices", "not a matrix"),
    (lambda: (draw(3, 4).double(), draw(5, 4)), "rows must have dtype Float.*got dtype Double", "float64"),
    (lambda: (draw(3, 4), draw(5, 4).bfloat16()), "weight must have dtype Float.*got dtype BFloat16", "half"),
    (lambda: (draw(3, 4), draw(5, 4), draw(2, 1), draw(5, 1)), "low_rows must have .*got .*shape \\[2, 1\\]", "other rows"),
    (lambda: (draw(3, 4), draw(5, 4), draw(3, 1), draw(5, 2)), "low_weight must have .*got .*\\[5, 2\\]", "other rank"),
    (lambda: (draw(3, 4), draw(5, 4), draw(3, 1), None), "low_rows and low_weight go together", "half of a term"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", [row[:2] for row in BAD], ids=[r[2] for r in BAD])
def test_bad_input_is_refused_with_its_values(arguments, message):
    with pytest.raises(RuntimeError, match=f"pyfast_dpo::linear_: .*{message}"):
        ops.linear_(torch.zeros(3, 5), *arguments())


@pytest.mark.parametrize(
    "out, message",
    [
        (torch.zeros(3, 6), "out must have .*\\[3, 5\\].*got .*\\[3, 6\\]"),
        (torch.zeros(3, 5).double(), "out must have dtype Float.*got dtype Double"),
        (torch.zeros(5, 3).T, "out must be contiguous, got .*\\[3, 5\\]"),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_an_output_that_does_not_fit_is_refused(out, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear_(out, draw(3, 4), draw(5, 4))


def test_other_operands_of_gradients_are_refused_with_their_values():
    with pytest.raises(RuntimeError, match=r"linear_grad_rows: weight must have .*got .*\[5, 6\]"):
        ops.linear_grad_rows(draw(3, 4), draw(5, 6))
    with pytest.raises(RuntimeError, match=r"linear_grad_weight: rows must have .*got .*\[4, 6\]"):
        ops.linear_grad_weight(draw(3, 5), draw(4, 6))
    with pytest.raises(RuntimeError, match="linear_grad_weight: arguments must be matrices"):
        ops.linear_grad_weight(draw(3, 5, 1), draw(3, 6))


@pytest.mark.parametrize("name", ["linear_grad_rows", "linear_grad_weight"])
def test_a_second_derivative_is_refused(name):
    square = draw(4, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match=f"{name} has no second derivative"):
        getattr(ops, name)(square, square).sum().backward()


# --- models ---------------------------------------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch):
    """The module, as on a CPU where our products are faster."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyfast_dpo.model import linear_layers

    monkeypatch.setattr(linear_layers, "FASTER", True)
    return linear_layers


@pytest.fixture
def calls(layers, monkeypatch):
    """Shapes of the weights of our products."""
    counted = []

    def count(output, rows, weight, *low):
        counted.append(tuple(weight.shape))
        ops.linear_(output, rows, weight, *low)

    monkeypatch.setattr(layers.operators, "linear_", count)
    return counted


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 16, bias=False), nn.Linear(16, 64), nn.Linear(64, 80, bias=False)
    )  # fmt: skip


def test_wide_layers_compute_in_our_products_and_narrow_ones_do_not(layers, calls):
    model, inputs = small_model(), draw(2, 5, 64)
    expected = model(inputs)
    layers.use_own_products(model)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-6)
    assert calls == [(96, 64), (80, 64)]


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "LoRA"])
def test_the_last_product_of_a_recomputed_layer_is_spared(layers, calls, adapter):
    model, inputs = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 80)), draw(5, 64)
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    layers.use_own_products(model)
    output = checkpoint(model, inputs.requires_grad_(), use_reentrant=False)
    assert calls == [(96, 64), (80, 96)]
    output.sum().backward()
    assert calls == [(96, 64), (80, 96), (96, 64)]


@pytest.mark.parametrize("case", ["bfloat16", "autocast", "float64", "compiled"])
def test_what_the_products_do_not_take_goes_torchs_way(layers, calls, case):
    model, inputs = small_model(), draw(5, 64)
    layers.use_own_products(model)
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs)
    elif case == "compiled":
        torch.compile(model, backend="eager", fullgraph=True)(inputs)
    else:
        model.to(getattr(torch, case))(inputs.to(getattr(torch, case)))
    assert calls == []


def test_nothing_is_changed_where_torch_is_as_fast(layers, monkeypatch):
    monkeypatch.setattr(layers, "FASTER", False)
    model = small_model()
    layers.use_own_products(model)
    assert all("forward" not in vars(layer) for layer in model)


def test_a_forward_that_somebody_has_replaced_stays(layers, calls):
    model, inputs = small_model(), draw(5, 64)
    layers.use_own_products(model)
    own = model[0].forward
    model[4].forward = lambda hidden: hidden
    layers.use_own_products(model)
    assert model[0].forward is own
    assert model(inputs).shape == (5, 64)
    assert calls == [(96, 64)]


def test_a_copied_model_computes_with_its_own_weights(layers, calls):
    model, inputs = small_model(), draw(5, 64)
    layers.use_own_products(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(inputs).abs().max() > 0.01
    assert len(calls) == 2


def test_a_vendor_is_known_on_x86():
    if platform.machine() != "x86_64":
        pytest.skip("only x86 CPUs name their vendor")
    assert len(_C.cpu_vendor()) == 12


def test_trainers_use_them_and_come_to_the_same_losses(layers, calls, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    from tiny_models import make_model, make_tokenizer
    from trainer_runs import dpo_trainer, lora, train_log
    from transformers import LlamaForCausalLM

    def losses(faster, **options):
        monkeypatch.setattr(layers, "FASTER", faster)
        model = make_model()
        model.config.update({"hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
        torch.manual_seed(0)
        options = {"max_steps": 3, "learning_rate": 1e-3, **options}
        log = train_log(
            dpo_trainer(tmp_path, make_tokenizer(), LlamaForCausalLM(model.config), **options)
        )
        return [(entry["loss"], entry["grad_norm"]) for entry in log]

    for adapter in ({}, {"peft_config": lora()}):
        own, recomputed = (
            losses(True, **adapter),
            losses(True, gradient_checkpointing=True, **adapter),
        )
        assert {(64, 64), (96, 64), (64, 96)} <= set(calls)
        calls.clear()
        torchs = losses(False, **adapter)
        assert calls == []
        assert own == recomputed
        torch.testing.assert_close(torch.tensor(own), torch.tensor(torchs), rtol=1e-5, atol=0)


ADAPTERS = [
    ({}, None, True, "one plain adapter"),
    ({"use_rslora": True}, None, True, "another scaling"),
    ({}, lambda m: m.set_adapter("second"), True, "another adapter"),
    ({}, lambda m: m.base_model.set_adapter(["default", "second"]), False, "two at once"),
    ({"lora_dropout": 0.5}, lambda m: m.eval(), False, "dropout, even where it is off"),
    ({"use_dora": True}, None, False, "DoRA"),
    ({"lora_bias": True}, None, False, "a bias of the adapter"),
    ({}, lambda m: m.merge_adapter(), None, "merged: the base alone"),
    ({}, lambda m: m.base_model.disable_adapter_layers(), None, "disabled: the base alone"),
]  # fmt: skip


@pytest.mark.parametrize(
    "options, change, fused", [row[:3] for row in ADAPTERS], ids=[row[3] for row in ADAPTERS]
)
def test_an_adapter_is_part_of_the_product_where_it_is_plain(
    layers, monkeypatch, options, change, fused
):
    peft = pytest.importorskip("peft")
    terms = []

    def count(output, rows, weight, *low):
        terms.append(bool(low))
        ops.linear_(output, rows, weight, *low)

    monkeypatch.setattr(layers.operators, "linear_", count)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 80, bias=False))
    settings = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False, **options)
    model = peft.get_peft_model(base, settings)
    model.add_adapter(
        "second", peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    )
    if change is not None:
        change(model)
    inputs = draw(2, 5, 64).requires_grad_()

    def run():
        model.zero_grad()
        inputs.grad = None
        output = model(inputs)
        output.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"output": output.detach(), "inputs": inputs.grad, **gradients}

    expected = run()
    for _ in range(2):  # a second trainer of the same model changes nothing
        layers.use_own_products(model)
    result = run()
    assert terms == [bool(fused)] * 2
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        print(name)  # shown if it fails
        torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-4)
    assert len(result) == 2 if fused is None else len(result) > 2
