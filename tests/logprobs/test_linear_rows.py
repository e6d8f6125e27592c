"""Linear losses from CompletionRows and with any loss function: what is computed, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _helpers import bits
from linear_problem import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyfast_dpo import (
    CompletionRows,
    fused_linear_dpo_loss,
    fused_linear_ipo_loss,
    fused_linear_kto_loss,
    fused_linear_loss,
    linear_sequence_logps,
    linear_token_logps,
)
from pyfast_dpo.ops import dispatch

BUDGETS = [
    (1 << 20, "all units in one chunk"),
    (4 * 211 * 12, "a unit or two a chunk"),
    (4 * 211 * 5, "units larger than the budget"),
    (4 * 211, "one row at a time"),
]
every_budget = pytest.mark.parametrize(
    "budget", [b[0] for b in BUDGETS], ids=[b[1] for b in BUDGETS]
)


def shared_prompts() -> tuple[Tensor, CompletionRows]:
    """(labels, rows) of three pairs packed as `prompt | chosen | rejected` in one row of 9 positions each.

    The prompt's last state, at position 2, scores the first token of both responses: an index occurs twice.
    """
    generator = torch.Generator().manual_seed(3)
    index, lengths = [], []
    for response in (0, 1):
        for pair in range(3):
            length = (3, 2, 0)[pair] if response == 0 else (2, 3, 4)[pair]
            first = 3 if response == 0 else 6
            own = [pair * 9 + 2] * (length > 0) + [pair * 9 + first + i for i in range(length - 1)]
            index += own
            lengths.append(length)
    targets = torch.randint(0, 211, (len(index),), generator=generator)
    rows = CompletionRows(torch.tensor(index), targets, torch.tensor(lengths), tuple(lengths))
    return targets, rows


def by_hand(hidden: Tensor, weight: Tensor, rows: CompletionRows) -> Tensor:
    """Log-probs [S] in plain torch."""
    logits = hidden.flatten(0, -2)[rows.index] @ weight.T
    tokens = logits.log_softmax(-1).gather(1, rows.targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in tokens.split(rows.lengths)])


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_labels_give_the_bits_that_the_labels_give(shift):
    hidden, weight, _, labels = problem()
    rows = CompletionRows.from_labels(labels, shift=shift)
    results = []
    for options in ({"labels": labels, "shift": shift}, {"rows": rows}):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = fused_linear_dpo_loss(*leaves, reference_logps=torch.zeros(6), **options)
        result.loss.backward()
        logps = linear_sequence_logps(hidden, weight, average=True, **options)
        results.append([*result, *(leaf.grad for leaf in leaves), logps])
    for by_labels, by_rows in zip(*results, strict=True):
        assert torch.equal(bits(by_labels.detach()), bits(by_rows.detach()))
    scored = linear_token_logps(hidden, weight, rows=rows)
    tokens = linear_token_logps(hidden, weight, labels, shift=shift)
    assert torch.equal(tokens.flatten()[rows.index], scored)


@every_budget
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_shared_prompt_state_receives_the_gradients_of_both_responses(budget, trainable, dtype):
    hidden, weight, _, _ = problem(sequences=3, dtype=dtype)
    _, rows = shared_prompts()
    inputs = [hidden, weight] if trainable else [hidden]
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in inputs]
        full = [*leaves, weight][:2]
        if fused:
            options = {"rows": rows, "max_chunk_bytes": 2 * budget}
            loss = fused_linear_dpo_loss(*full, beta=0.3, **options).loss
        else:
            chosen, rejected = by_hand(*full, rows).chunk(2)
            loss = -F.logsigmoid(0.3 * (chosen - rejected)).mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        if fused and trainable:  # log-probs take another path than losses
            leaves = [t.clone().requires_grad_() for t in inputs]
            logps = linear_sequence_logps(*leaves, rows=rows, max_chunk_bytes=2 * budget)
            truth = by_hand(*(t.clone().requires_grad_() for t in inputs), rows)
            torch.testing.assert_close(logps, truth, rtol=2e-5, atol=2e-5)
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device, or copy to it, if the tensors were on one."""

    waits = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "is_nonzero",
        "masked_select",
        "unique",
        "lift_fresh",
    )

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert not function.__name__.startswith(self.waits), f"{function} waits for the device"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("budget", [1 << 20, 4 * 211 * 5], ids=["one chunk", "oversize units"])
def test_a_step_with_rows_waits_for_no_device(trainable, budget, monkeypatch):
    """What runs on a GPU, on these tensors."""
    monkeypatch.setattr(dispatch, "on_gpu", lambda tensor: True)
    hidden, weight, _, labels = problem()
    rows = CompletionRows.from_labels(labels)
    hidden.requires_grad_(), weight.requires_grad_(trainable)
    options = {"rows": rows, "max_chunk_bytes": budget, "validate": False}
    reference = torch.zeros(6)
    with NoWaiting():
        fused_linear_dpo_loss(hidden, weight, reference_logps=reference, **options)
        fused_linear_loss(hidden, weight, None, simpo, average=True, statistics=True, **options)
        linear_sequence_logps(hidden, weight, average=True, **options).sum().backward()
    with pytest.raises(AssertionError, match=r"nonzero|scalar"), NoWaiting():
        fused_linear_dpo_loss(hidden, weight, labels)  # the test sees what it looks for


def test_rows_move_and_keep_their_numbers():
    _, rows = shared_prompts()
    moved = rows.to("meta")
    assert moved.lengths == rows.lengths and moved.index.device.type == "meta"
    assert moved.counts.shape == rows.counts.shape


# --- any loss ---------------------------------------------------------------------------------------


NUMBERS = torch.arange(3)


def simpo(logps: Tensor, units: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    losses = -F.logsigmoid(2.0 * (logps[0] - logps[1]) - 0.5)
    return losses.sum() / 3, (losses, NUMBERS[units])


@every_budget
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
def test_any_loss_equals_plain_torch_for_every_budget(budget, average, weighted, trainable):
    hidden, weight, bias, labels = problem()
    rows = CompletionRows.from_labels(labels)
    weights = torch.linspace(0, 2, rows.index.shape[0]) if weighted else None
    results = {}
    for impl in ("fused", "torch"):
        leaves = [
            t.clone().requires_grad_(t is hidden or trainable) for t in (hidden, weight, bias)
        ]
        result = fused_linear_loss(
            leaves[0], leaves[1], None, simpo, rows=rows, bias=leaves[2], row_weights=weights,
            average=average, statistics=True, max_chunk_bytes=budget, impl=impl,
        )  # fmt: skip
        (2 * result.loss).backward()
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
        assert result.outputs[1].tolist() == [0, 1, 2], "outputs come in the order of the units"
        results[impl] = [
            result.loss,
            result.logps,
            result.outputs[0],
            *result.statistics,
            *gradients,
        ]
    for ours, truth in zip(results["fused"], results["torch"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)


@every_budget
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
def test_a_loss_may_couple_the_whole_batch(budget, trainable):
    hidden, weight, _, labels = problem()

    def sorted_margins(logps: Tensor, units: slice) -> Tensor:
        assert logps.shape == (6, 1) and units == slice(0, 1)
        chosen, rejected = logps.view(2, 3)
        return -F.logsigmoid(0.1 * (chosen.sort().values - rejected.sort().values)).mean()

    results = {}
    for impl in ("fused", "torch"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)
        result = fused_linear_loss(
            *leaves, labels, sorted_margins, group=None, max_chunk_bytes=budget, impl=impl
        )
        result.loss.backward()
        results[impl] = [result.loss, result.logps, leaves[0].grad]
        results[impl] += [leaves[1].grad] if trainable else []
    for ours, truth in zip(results["fused"], results["torch"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("group", [1, 2, None])
def test_an_empty_batch_has_a_finite_loss_and_gradient(group):
    hidden = torch.randn(0, 9, 16, requires_grad=True)
    labels = torch.zeros(0, 9, dtype=torch.int64)
    result = fused_linear_loss(
        hidden,
        torch.randn(5, 16),
        labels,
        lambda logps, units: logps.sum(),
        group=group,
        statistics=True,
    )
    result.loss.backward()
    assert result.loss.item() == 0 and hidden.grad.shape == hidden.shape
    assert result.logps.shape == (0,) and result.statistics.entropy.shape == (0,)


def test_every_loss_takes_rows():
    hidden, weight, _, labels = problem()
    rows = CompletionRows.from_labels(labels)
    ipo = fused_linear_ipo_loss(hidden, weight, rows=rows, beta=0.2)
    assert torch.equal(ipo.loss, fused_linear_ipo_loss(hidden, weight, labels, beta=0.2).loss)
    desirable = torch.tensor([True, False, True, True, False, False])
    kto = fused_linear_kto_loss(hidden, weight, None, desirable, kl=0.1, rows=rows)
    assert torch.equal(
        kto.loss, fused_linear_kto_loss(hidden, weight, labels, desirable, kl=0.1).loss
    )


# --- what is refused --------------------------------------------------------------------------------

H, W, _, L = problem()
R = CompletionRows.from_labels(L)
COUNT = R.index.shape[0]


def rows_with(**changes: object) -> CompletionRows:
    fields = {"index": R.index, "targets": R.targets, "counts": R.counts, "lengths": R.lengths}
    return CompletionRows(**{**fields, **changes})


def linear(loss_fn=lambda logps, units: logps.sum(), rows=R, labels=None, **options):
    return fused_linear_loss(H.clone().requires_grad_(), W, labels, loss_fn, rows=rows, **options)


BAD = [
    (lambda: linear(rows=None), ValueError, ["either labels or rows", "neither"]),
    (lambda: linear(labels=L), ValueError, ["either labels or rows", "both"]),
    (lambda: linear(rows=L), TypeError, ["rows must be CompletionRows", "int64"]),
    (lambda: linear(group=4), ValueError, ["group", "6", "4"]),
    (lambda: linear(group=0), ValueError, ["group", "0"]),
    (lambda: linear(lambda logps, units: logps), ValueError, ["loss_fn", "scalar"]),
    (lambda: linear(lambda logps, units: logps.sum().detach()), ValueError, ["loss_fn", "depend"]),
    (lambda: linear(row_weights=torch.ones(3)), ValueError, ["row_weights", f"[{COUNT}]", "[3]"]),
    (lambda: linear(row_weights=torch.ones(COUNT).long()), TypeError, ["row_weights", "int64"]),
    (lambda: linear(rows=rows_with(index=R.index + 40)), ValueError, ["rows.index", "[0, 54)"]),
    (lambda: linear(rows=rows_with(targets=R.targets - 211)), ValueError, ["rows.targets", "[0, 211)"]),
    (lambda: linear(rows=rows_with(counts=R.counts.flip(0))), ValueError, ["rows.counts", "rows.lengths"]),
    (lambda: linear(rows=R.to("meta")), ValueError, ["rows.index", "meta"]),
    (lambda: rows_with(lengths=R.lengths[:5]), ValueError, ["counts", "[5]", "[6]"]),
    (lambda: rows_with(lengths=(1,) * 6), ValueError, ["lengths", str(COUNT)]),
    (lambda: rows_with(targets=R.targets[1:]), ValueError, ["targets", f"[{COUNT}]"]),
    (lambda: rows_with(index=R.index.int()), TypeError, ["index", "int64", "int32"]),
]  # fmt: skip


@pytest.mark.parametrize("call, error, words", BAD, ids=[" ".join(b[2]) for b in BAD])
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
