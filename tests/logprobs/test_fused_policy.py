"""Policy losses from hidden states: `policy_loss` on the whole matrix in float64, chunks, products, zeros, refusals."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from _helpers import bits, name_of
from test_gpu_head import PARTS, VOCAB, WIDTH, rows_into_weight, rows_of_logits, rows_times_weight
from torch import Tensor

from pyfast_dpo import (
    CompletionRows,
    FusedPolicyLoss,
    fused_linear_policy_loss,
    linear_token_logps,
    policy_loss,
)
from pyfast_dpo.logprobs import scores
from pyfast_dpo.losses.policy_table import POLICY_LOSSES
from pyfast_dpo.ops import operators

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [(name, level) for name, spec in POLICY_LOSSES.items() for level in spec.levels]
COUPLED = [("grpo", "sequence"), ("luspo", "sequence"), ("vespo", "token")]
LENGTHS = (3, 9, 0, 1, 11, 6)
TOTAL = sum(LENGTHS)
# What a loss may be told beside its name; each is tried with every loss.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty": {"beta": 0.3, "temperature": 0.7},
    "penalty with the ratio": {"beta": 0.3, "use_bias_correction_kl": True},
    "foreign sampler": {"correction": True, "softcap": 5.0, "temperature": 1.3},
    "token advantages": {"of_tokens": True, "bias": True, "logit_scale": 0.5},
    "nothing older": {"old": False},
    "entropy": {"entropy_coef": 0.5, "entropy_normalizer": 7.0, "temperature": 0.7},
    "entropy under a soft-cap": {
        "entropy_coef": -0.5, "entropy_normalizer": 7.0, "softcap": 5.0, "temperature": 1.3, "bias": True,
    },
}  # fmt: skip


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [t for t in self[:3] if t is not None and t.requires_grad]

    def in_float64(self) -> Batch:
        def wide(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        return Batch(*map(wide, self[:3]), {key: wide(v) for key, v in self.options.items()})

    def loss(self, **options: Any) -> FusedPolicyLoss:
        return fused_linear_policy_loss(
            self.hidden, self.weight, bias=self.bias, **{**self.options, **options}
        )

    def results(self, **options: Any) -> list[Tensor]:
        """Everything that comes out, then the gradients."""
        out = self.loss(statistics=True, **options)
        gradients = torch.autograd.grad(out.loss, self.leaves())
        return [*out[:-1], *out.statistics, *gradients]


def make(
    dtype: torch.dtype = torch.float32,
    trainable: bool = True,
    *,
    lengths: tuple[int, ...] = LENGTHS,
    bias: bool = False,
    old: bool = True,
    correction: bool = False,
    of_tokens: bool = False,
    **options: Any,
) -> Batch:
    """Ratios lie on both sides of the clip. Two rows are of one hidden state, as the first of two responses to a
    shared prompt are."""
    generator = torch.Generator().manual_seed(len(lengths))
    total = sum(lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    index = torch.randperm(total + 5, generator=generator)[:total]
    if total > 3:
        index[0] = index[3]
    targets = torch.randint(0, VOCAB, (total,), generator=generator)
    rows = CompletionRows(index, targets, torch.tensor(lengths, dtype=torch.int64), lengths)
    hidden = normal(total + 5, WIDTH, scale=0.3).to(dtype)
    weight = normal(VOCAB, WIDTH).to(dtype)
    own_bias = normal(VOCAB).to(dtype) if bias else None
    head = {
        key: value
        for key, value in options.items()
        if key in ("temperature", "softcap", "logit_scale")
    }
    temperature = head.pop("temperature", 1.0)
    scale = head.pop("logit_scale", 1.0) / temperature
    softcap = head["softcap"] / temperature if head else None
    with torch.no_grad():
        logps = linear_token_logps(
            hidden.double(), weight.double(), rows=rows, bias=None if own_bias is None else own_bias.double(),
            logit_scale=scale, softcap=softcap, impl="torch",
        )  # fmt: skip
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    given: dict[str, Any] = {
        "rows": rows,
        "advantages": normal(total if of_tokens else len(lengths)).to(stat),
        "normalizer": 3.0,
    }
    if old:
        given["old_logps"] = (logps + normal(total, scale=0.4)).to(stat)
    if "beta" in options:
        given["reference_logps"] = (logps + normal(total, scale=0.4)).to(stat)
    if correction:
        given["importance_sampling_ratio"] = normal(total, scale=0.2).exp().to(stat)
    return Batch(
        hidden.requires_grad_(),
        weight.requires_grad_(trainable),
        None if own_bias is None else own_bias.requires_grad_(trainable),
        given | options,
    )


def budget(rows: int, dtype: torch.dtype) -> int:
    return rows * VOCAB * (8 if dtype == torch.float64 else 4)


@pytest.fixture(params=["on the CPU", "as on a GPU"])
def where(request) -> str:
    if request.param == "as on a GPU":
        request.getfixturevalue("products")
    return request.param


# (head trained, rows in the budget): fewer than a sequence's, and more than there are.
HEADS = [(True, 5), (True, 1000), (False, 5)]
HEAD_NAMES = ["trainable, small chunks", "trainable, one chunk", "frozen, small chunks"]


# --- values and gradients -------------------------------------------------------------------------------


def check(ours: list[Tensor], truth: list[Tensor], dtype: torch.dtype, hidden_rows: int) -> None:
    precision = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-5}[dtype]
    for mine, true in zip(ours, truth, strict=True):
        if not mine.is_floating_point():
            assert torch.equal(mine, true)
            continue
        is_gradient = mine.dtype == dtype and mine.dim() > 0 and len(mine) in (hidden_rows, VOCAB)
        allowed = max(precision, 2 * torch.finfo(dtype).eps) if is_gradient else precision
        error = (mine.detach().double() - true.detach()).norm() / true.detach().norm().clamp(
            min=1e-3
        )
        assert error <= allowed, (mine.shape, float(error))


@pytest.mark.parametrize("trainable, rows", HEADS, ids=HEAD_NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name, level", CASES)
def test_everything_equals_policy_loss_in_float64(where, name, level, variant, trainable, rows):
    """The truth is impl="torch": the whole matrix, and the losses' definitions."""
    options = {"loss_type": name, "level": level, **VARIANTS[variant]}
    batch = make(torch.float32, trainable, **options)
    ours = batch.results(impl="fused", max_chunk_bytes=budget(rows, torch.float32))
    truth = batch.in_float64().results(impl="torch")
    check(ours, truth, torch.float32, len(batch.hidden))
    assert truth[-1].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("trainable, rows", HEADS, ids=HEAD_NAMES)
@pytest.mark.parametrize("variant", ["plain", "token advantages", "entropy"])
@pytest.mark.parametrize("name, level", [("grpo", "token"), *COUPLED])
def test_other_dtypes_equal_float64_as_well(where, name, level, variant, trainable, rows, dtype):
    options = {"loss_type": name, "level": level, **VARIANTS[variant]}
    batch = make(dtype, trainable, **options)
    ours = batch.results(impl="fused", max_chunk_bytes=budget(rows, dtype))
    truth = batch.in_float64().results(impl="torch")
    check(ours, truth, dtype, len(batch.hidden))


def test_plain_torch_is_policy_loss_on_log_probs_by_hand():
    """softcap and temperature, the bonus and its sign, written out."""
    batch = make(
        torch.float64, bias=True, softcap=5.0, logit_scale=0.5, temperature=0.7, entropy_coef=0.25,
        entropy_normalizer=11.0, beta=0.2, loss_type="dapo",
    )  # fmt: skip
    given, rows = batch.options, batch.options["rows"]
    logits = 0.5 * (batch.hidden[rows.index] @ batch.weight.T + batch.bias)
    logps = (5.0 * torch.tanh(logits / 5.0) / 0.7).log_softmax(-1)
    tokens = logps.gather(1, rows.targets[:, None])[:, 0]
    result = policy_loss(
        tokens, given["old_logps"], given["advantages"], counts=rows.counts, normalizer=3.0, beta=0.2,
        reference_logps=given["reference_logps"], loss_type="dapo",
    )  # fmt: skip
    entropy = -(logps.exp() * logps).sum(-1)
    expected = result.loss - 0.25 * entropy.sum() / 11.0
    for impl in ("torch", "fused"):
        out = batch.loss(impl=impl, statistics=True)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(out.logps, tokens)
        torch.testing.assert_close(out.statistics.entropy, entropy)
        for mine, true in zip(
            torch.autograd.grad(out.loss, batch.leaves()),
            torch.autograd.grad(expected, batch.leaves(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck_with_the_entropy_bonus(where, level):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = (1, 2)
    rows = CompletionRows(torch.arange(3), torch.tensor([0, 4, 2]), torch.tensor(lengths), lengths)
    given: dict[str, Any] = {
        "rows": rows, "advantages": normal(2), "old_logps": normal(3) * 0.1 - 1.7, "normalizer": 3.0, "epsilon": 0.9,
        "level": level, "temperature": 0.8, "entropy_coef": 0.7, "entropy_normalizer": 2.0,
    }  # fmt: skip
    hidden, weight = normal(3, 2).requires_grad_(), normal(5, 2).requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, impl: str) -> Tensor:
        return fused_linear_policy_loss(hidden, weight, impl=impl, **given).loss

    torch.autograd.gradcheck(lambda h, w: loss(h, w, "fused"), (hidden, weight))
    torch.autograd.gradgradcheck(lambda h, w: loss(h, w, "torch"), (hidden, weight))


@pytest.mark.parametrize("name, level", CASES)
def test_reports_are_to_the_bit_those_of_policy_loss(where, name, level):
    batch = make(loss_type=name, level=level, beta=0.1, correction=True)
    out = batch.loss(impl="fused", max_chunk_bytes=budget(5, torch.float32))
    given = {k: v for k, v in batch.options.items() if k not in ("rows", "old_logps", "advantages")}
    expected = policy_loss(
        out.logps, batch.options["old_logps"], batch.options["advantages"],
        counts=batch.options["rows"].counts, **given,
    )  # fmt: skip
    for mine, other in zip((out.loss, *out[2:6]), expected, strict=True):
        assert torch.equal(mine, other)


def test_where_nothing_is_older_every_ratio_is_exactly_1(where):
    out = make(old=False).loss(impl="fused")
    assert torch.equal(out.ratios, torch.ones(TOTAL)) and not out.clipped.any()
    assert not out.kl.any() and out.statistics is None


# --- layouts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("shift", [False, True])
def test_labels_say_what_rows_say(shift, impl):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    labels = torch.randint(0, VOCAB, (3, 6), generator=generator)
    labels[:, :2], labels[1] = -100, -100
    rows = CompletionRows.from_labels(labels, shift=shift)
    old, tokens = (-torch.rand(3, 6, generator=generator) * 9 for _ in range(2))
    whole = torch.randn(3, generator=generator)
    for gains, of_rows in ((whole, whole), (tokens, tokens.flatten()[rows.index])):
        shared: dict[str, Any] = {
            "normalizer": 2.0, "entropy_coef": 0.1, "entropy_normalizer": 3.0, "statistics": True, "impl": impl
        }  # fmt: skip
        by_labels = fused_linear_policy_loss(
            hidden, weight, labels, shift=shift, advantages=gains, old_logps=old, **shared
        )
        by_rows = fused_linear_policy_loss(
            hidden, weight, rows=rows, advantages=of_rows, old_logps=old.flatten()[rows.index], **shared
        )  # fmt: skip
        assert torch.equal(by_labels.loss, by_rows.loss)
        assert torch.equal(by_labels.statistics.entropy, by_rows.statistics.entropy)
        nowhere = torch.ones(18, dtype=torch.bool).index_fill(0, rows.index, False)
        for field, elsewhere in zip(
            ("logps", "token_losses", "ratios", "kl", "clipped"), (0, 0, 1, 0, 0), strict=True
        ):
            values = getattr(by_labels, field)
            assert values.shape == labels.shape
            assert torch.equal(values.flatten()[rows.index], getattr(by_rows, field)), field
            assert (values.flatten()[nowhere] == elsewhere).all(), field


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_as_many_tokens_as_sequences_are_told_apart(where, level, impl):
    """[R] and [S] are alike here: one number a sequence is meant, and labels say which anyway."""
    lengths = (0, 2, 1)
    batch = make(torch.float64, lengths=lengths, level=level)
    gains = batch.options["advantages"]
    rows = batch.options["rows"]
    expected = make(
        torch.float64, lengths=lengths, level=level
    )._replace(options=batch.options | {"advantages": gains[[1, 1, 2]], "rows": CompletionRows(
        rows.index, rows.targets, torch.tensor([2, 1]), (2, 1))})  # fmt: skip
    ours, truth = batch.loss(impl=impl), expected.loss(impl="torch")
    torch.testing.assert_close(ours.loss, truth.loss)
    labels = torch.tensor([[-100, -100], [3, 4], [5, -100]])
    hidden = torch.randn(3, 2, WIDTH, dtype=torch.float64)
    of_tokens = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 9.0]], dtype=torch.float64)
    out = fused_linear_policy_loss(
        hidden, batch.weight, labels, advantages=of_tokens, normalizer=1.0, level=level, impl=impl,
    )  # fmt: skip
    scored = out.token_losses[labels >= 0]
    torch.testing.assert_close(scored, -torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("name, level", CASES)
def test_a_step_may_be_cut_into_micro_batches(where, name, level):
    """Both normalizers are of the whole step: the gradients of parts add up to those of the whole."""
    batch = make(
        torch.float64, loss_type=name, level=level, beta=0.1, entropy_coef=0.3, entropy_normalizer=50.0
    )  # fmt: skip
    whole = torch.autograd.grad(batch.loss(impl="fused").loss, batch.leaves())
    sums = [torch.zeros_like(gradient) for gradient in whole]
    first_row = first = 0
    for count in (2, 1, 3):
        last = first + count
        lengths = LENGTHS[first:last]
        own = slice(first_row, first_row + sum(lengths))
        given, rows = dict(batch.options), batch.options["rows"]
        given["rows"] = CompletionRows(
            rows.index[own], rows.targets[own], rows.counts[first:last], lengths
        )
        given["advantages"] = given["advantages"][first:last]
        for key in ("old_logps", "reference_logps"):
            given[key] = given[key][own]
        loss = batch._replace(options=given).loss(impl="fused").loss
        for total, part in zip(sums, torch.autograd.grad(loss, batch.leaves()), strict=True):
            total += part
        first, first_row = last, own.stop
    for total, expected in zip(sums, whole, strict=True):
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_nothing_to_score_is_a_loss_of_0(where, level, lengths, trainable):
    batch = make(trainable=trainable, lengths=lengths, level=level, entropy_coef=0.1, entropy_normalizer=1.0)  # fmt: skip
    out = batch.loss(impl="fused", statistics=True)
    assert out.loss.item() == 0 and all(v.shape == (0,) for v in (*out[1:6], *out.statistics))
    assert all(not g.any() for g in torch.autograd.grad(out.loss, batch.leaves()))


# --- products ---------------------------------------------------------------------------------------------

PRODUCTS = [
    ("grpo", {}, "a token waits for nothing"),
    ("grpo", {"entropy_coef": 0.1, "entropy_normalizer": 1.0}, "nor with a bonus"),
    ("grpo", {"level": "sequence"}, "a ratio of the sequence"),
    ("vespo", {}, "another one"),
    ("grpo", {"level": "sequence", "entropy_coef": 0.1, "entropy_normalizer": 1.0}, "with a bonus"),
    ("grpo", {"level": "sequence", "softcap": 5.0}, "where gradients cannot wait in bfloat16"),
]
every_case = pytest.mark.parametrize(
    "name, options", [p[:2] for p in PRODUCTS], ids=[p[2] for p in PRODUCTS]
)


@every_case
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("rows", [5, 17, 1000], ids="{} rows in the budget".format)
@pytest.mark.parametrize("wait", [12, 1000], ids="{} rows wait".format)
def test_a_gpu_multiplies_three_times_or_twice(
    products, monkeypatch, wait, rows, trainable, name, options
):
    """Every row once in each product, but for rows that fill up the pieces of the first."""
    monkeypatch.setattr("pyfast_dpo.logprobs.linear_loss.rows_that_wait", lambda head: wait)
    batch = make(torch.bfloat16, trainable, loss_type=name, **options)
    loss = batch.loss(impl="fused", max_chunk_bytes=budget(rows, torch.bfloat16)).loss
    torch.autograd.grad(loss, batch.leaves())
    filled = sum(rows_of_logits(products)) - TOTAL
    assert 0 <= filled <= TOTAL + 256 * ("sequence" in str(options) and "entropy" in str(options))
    assert sum(rows_times_weight(products)) == TOTAL
    assert sum(rows_into_weight(products)) == (TOTAL if trainable else 0)
    if wait == 1000:
        assert len(rows_into_weight(products)) == trainable
    assert {n for shape in products for n in shape} & {VOCAB, *PARTS} == set(PARTS)


@pytest.fixture
def cpu_products(monkeypatch) -> dict[str, list[float]]:
    """Rows of every product of the head, by its name; a part of the vocabulary counts as a part of them."""
    seen: dict[str, list[float]] = {}
    logits_in = {"head_logits_": 0, "head_grad_rows": 0, "head_grad_weight_": 1}
    for name, argument in logits_in.items():
        plain = getattr(operators, name)
        own = seen.setdefault(name, [])

        def counted(*arguments, plain=plain, own=own, argument=argument):
            own.append(arguments[argument].numel() / VOCAB)
            return plain(*arguments)

        monkeypatch.setattr(operators, name, counted)
    return seen


@every_case
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("rows", [5, 1000], ids="{} rows in the budget".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_cpu_multiplies_three_times_or_twice(
    cpu_products, monkeypatch, dtype, rows, trainable, name, options
):
    monkeypatch.setattr(scores, "rows_with_gradient", lambda coefficients, tokens: None)
    batch = make(dtype, trainable, loss_type=name, **options)
    loss = batch.loss(impl="fused", max_chunk_bytes=budget(rows, dtype)).loss
    torch.autograd.grad(loss, batch.leaves())
    assert sum(cpu_products["head_logits_"]) == TOTAL
    assert sum(cpu_products["head_grad_rows"]) == TOTAL
    assert sum(cpu_products["head_grad_weight_"]) == pytest.approx(TOTAL if trainable else 0)


# --- rows without a gradient --------------------------------------------------------------------------------


def long_batch(dtype: torch.dtype, trainable: bool, zero: list[int], **options: Any) -> Batch:
    """Three sequences of more rows than a panel; the advantages of some are 0."""
    panel = operators.HEAD_PANEL_ROWS
    batch = make(dtype, trainable, lengths=(panel + 3, 2 * panel, panel + 5), old=False, **options)
    gains = batch.options["advantages"].clone()
    gains[zero] = 0.0
    return batch._replace(options=batch.options | {"advantages": gains})


@pytest.mark.parametrize("zero", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("rows", [40, 10_000], ids="{} rows in the budget".format)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_rows_without_a_coefficient_are_multiplied_once(
    cpu_products, monkeypatch, dtype, level, trainable, rows, zero
):
    """In the products of whole panels; results are those with all rows, the rows' own to the bit."""
    batch = long_batch(dtype, trainable, zero, level=level)
    ours = batch.results(impl="fused", max_chunk_bytes=budget(rows, dtype))
    counts = {name: sum(seen) for name, seen in cpu_products.items()}
    monkeypatch.setattr(scores, "rows_with_gradient", lambda coefficients, tokens: None)
    whole = batch.results(impl="fused", max_chunk_bytes=budget(rows, dtype))
    lengths, panel = batch.options["rows"].lengths, operators.HEAD_PANEL_ROWS
    present = sum(n for s, n in enumerate(lengths) if s not in zero)
    assert counts["head_logits_"] == sum(lengths)
    if (
        trainable or level == "token"
    ):  # else the rows' own gradients wait, and the products are done
        chunks = len(cpu_products["head_logits_"])
        assert present <= counts["head_grad_rows"] < present + chunks * panel
        assert counts["head_grad_rows"] < sum(lengths)
    gradients = len(batch.leaves())
    for mine, other in zip(ours[:-gradients], whole[:-gradients], strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours[-gradients], whole[-gradients]), "the rows' gradients"
    if trainable:
        torch.testing.assert_close(ours[-1], whole[-1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)  # fmt: skip
    assert (ours[-gradients].abs().sum() == 0) == (zero == [0, 1, 2])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_s_gradient_does_not_depend_on_its_neighbours(level):
    def of_hidden(zero: list[int]) -> Tensor:
        batch = long_batch(torch.float32, True, zero, level=level)
        loss = batch.loss(impl="fused").loss
        rows = batch.options["rows"].index[-operators.HEAD_PANEL_ROWS :]  # of the last sequence
        return torch.autograd.grad(loss, batch.hidden)[0][rows]

    alone = of_hidden([0, 1])
    for zero in ([], [0], [1]):
        assert torch.equal(bits(of_hidden(zero)), bits(alone))


def test_a_nan_is_not_hidden_by_a_coefficient_of_0():
    batch = long_batch(torch.float32, True, [0])
    with torch.no_grad():
        batch.hidden[batch.options["rows"].index[1]] = torch.nan
    out = batch.loss(impl="fused")
    gradients = torch.autograd.grad(out.loss, batch.leaves())
    assert out.logps[1].isnan() and gradients[0][batch.options["rows"].index[1]].isnan().all()
    assert gradients[1].isnan().any()


# --- refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef 0.1 needs entropy_normalizer"),
        ({"entropy_coef": float("nan")}, ValueError, "entropy_coef must be finite"),
        ({"entropy_coef": 0.1, "entropy_normalizer": 0.0}, ValueError, "entropy_normalizer must be positive"),
        ({"normalizer": -1.0}, ValueError, "normalizer must be positive"),
        ({"statistics": 1}, TypeError, "statistics must be True or False"),
        ({"loss_type": "gspo"}, ValueError, "loss_type must be one of"),
        ({"loss_type": "luspo"}, ValueError, "defined at the level 'sequence'"),
        ({"beta": 0.1}, ValueError, "beta 0.1 needs reference_logps"),
        ({"gamma": 0.9}, TypeError, "unexpected keyword argument 'gamma'"),
        ({"advantages": torch.ones(4)}, ValueError, r"advantages must have shape \[6\], one a sequence, or \[30\]"),
        ({"advantages": [1.0]}, TypeError, "advantages must be a torch.Tensor"),
        ({"old_logps": torch.ones(6)}, ValueError, "old_logps must have the shape"),
        ({"old_logps": torch.ones(TOTAL, requires_grad=True)}, ValueError, "old_logps requires grad"),
        ({"labels": torch.zeros(3, 4).long()}, ValueError, "pass either labels or rows, got both"),
        ({"rows": None}, ValueError, "pass either labels or rows, got neither"),
        ({"max_chunk_bytes": 3}, ValueError, "max_chunk_bytes must hold one row"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change, error, words):
    batch = make()
    batch.loss()
    with pytest.raises(error, match=f"fused_linear_policy_loss: .*{words}"):
        batch.loss(**change)


def test_a_second_derivative_is_refused_by_name(where):
    batch = make()
    (gradient, _) = torch.autograd.grad(batch.loss().loss, batch.leaves(), create_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='torch'"):
        gradient.sum().backward()


def test_nothing_is_computed_for_gradients_that_nobody_asks_for(cpu_products):
    batch = make(entropy_coef=0.1, entropy_normalizer=1.0)
    with torch.no_grad():
        out = batch.loss(impl="fused", statistics=True)
    assert not out.loss.requires_grad and out.statistics.entropy.isfinite().all()
    assert not cpu_products["head_grad_rows"] and not cpu_products["head_grad_weight_"]
