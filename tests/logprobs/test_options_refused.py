"""Options of the functions from logits and from hidden states: what is merely true, beyond int64, or no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _helpers import random_labels, random_logits
from linear_problem import problem

import pyfast_dpo
from pyfast_dpo import CompletionRows
from pyfast_dpo.ops.labels import shifted_labels

LOGITS, LABELS = random_logits(2, 3, 7), random_labels(2, 3, vocab=7)
HIDDEN, WEIGHT, _, TARGETS = problem(sequences=2)
DESIRABLE = torch.tensor([True, False])


def share(logps, units):
    return logps.sum()


CALLS: dict[str, Any] = {
    "token_logps": lambda **o: pyfast_dpo.token_logps(LOGITS, LABELS, **o),
    "sequence_logps": lambda **o: pyfast_dpo.sequence_logps(LOGITS, LABELS, **o),
    "fused_dpo_loss": lambda **o: pyfast_dpo.fused_dpo_loss(LOGITS, LABELS, **o),
    "fused_ipo_loss": lambda **o: pyfast_dpo.fused_ipo_loss(LOGITS, LABELS, **o),
    "fused_kto_loss": lambda **o: pyfast_dpo.fused_kto_loss(LOGITS, LABELS, DESIRABLE, kl=0.0, **o),
    "linear_token_logps": lambda **o: pyfast_dpo.linear_token_logps(HIDDEN, WEIGHT, TARGETS, **o),
    "linear_sequence_logps": lambda **o: pyfast_dpo.linear_sequence_logps(
        HIDDEN, WEIGHT, TARGETS, **o
    ),
    "fused_linear_dpo_loss": lambda **o: pyfast_dpo.fused_linear_dpo_loss(
        HIDDEN, WEIGHT, TARGETS, **o
    ),
    "fused_linear_ipo_loss": lambda **o: pyfast_dpo.fused_linear_ipo_loss(
        HIDDEN, WEIGHT, TARGETS, **o
    ),
    "fused_linear_kto_loss": lambda **o: pyfast_dpo.fused_linear_kto_loss(
        HIDDEN, WEIGHT, TARGETS, DESIRABLE, kl=0.0, **o
    ),
    "fused_linear_loss": lambda **o: pyfast_dpo.fused_linear_loss(
        HIDDEN, WEIGHT, TARGETS, **{"loss_fn": share, **o}
    ),
    "fused_linear_policy_loss": lambda **o: pyfast_dpo.fused_linear_policy_loss(
        HIDDEN, WEIGHT, TARGETS, advantages=torch.ones(2), normalizer=1.0, **o
    ),
}
LINEAR = [name for name in CALLS if "linear" in name]
ON_LOGITS = [name for name in CALLS if "linear" not in name]
# Every value reached the dispatcher, or torch, and came back as an error of theirs, or meant something.
ROWS: list[tuple[list[str], str, Any, type[Exception]]] = [
    *[([*CALLS], "shift", value, TypeError) for value in (None, "x", 1, torch.tensor(True))],
    *[([*CALLS], "ignore_index", value, TypeError) for value in (None, -100.0, "1", [1], True)],
    ([*CALLS], "ignore_index", 2**63, ValueError),
    (ON_LOGITS, "inplace_backward", 1, TypeError),
    ([*CALLS], "validate", "yes", TypeError),
    (["sequence_logps", "fused_ipo_loss", "linear_sequence_logps", "fused_linear_loss"], "average", "x", TypeError),
    (LINEAR, "softcap", "1", TypeError),
    (LINEAR, "softcap", torch.tensor(1.0), TypeError),
    (LINEAR, "softcap", float("inf"), ValueError),
    (LINEAR, "logit_scale", None, TypeError),
    (LINEAR, "max_chunk_bytes", 1e9, TypeError),
    (LINEAR, "max_chunk_bytes", 2, ValueError),
    (LINEAR, "bias", 0.0, TypeError),
    (["fused_linear_loss"], "group", 2.0, TypeError),
    (["fused_linear_loss"], "loss_fn", 1, TypeError),
    (["fused_linear_loss"], "statistics", None, TypeError),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize(
    "name, option, value, error",
    [
        pytest.param(name, o, v, e, id=f"{name}-{o}={v!r:.12}")
        for names, o, v, e in ROWS
        for name in names
    ],
)
def test_an_option_is_refused_by_its_function_and_name(name, option, value, error, impl) -> None:
    with pytest.raises(error) as caught:
        CALLS[name](**{"impl": impl, option: value})
    assert type(caught.value) is error and f"{name}: {option}" in str(caught.value), caught.value


@pytest.mark.parametrize("name", [n for n in LINEAR if "dpo" in n or "kto" in n or "ipo" in n])
def test_an_unknown_option_is_refused_by_the_function_that_was_called(name) -> None:
    with pytest.raises(TypeError, match=f"{name}: unexpected keyword argument 'chunk_size'"):
        CALLS[name](chunk_size=3)


@pytest.mark.parametrize("name", [n for n in LINEAR if "dpo" in n or "kto" in n or "ipo" in n])
def test_errors_of_the_reference_s_head_name_the_function_that_was_called(name) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: "):
        CALLS[name](reference_hidden=HIDDEN, reference_weight=WEIGHT[:, :3])


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_a_tensor_that_is_not_dense_is_refused(layout) -> None:
    logits = LOGITS.to_sparse() if layout == "sparse" else LOGITS.to_mkldnn()
    with pytest.raises(TypeError, match="token_logps: logits must be a dense tensor"):
        pyfast_dpo.token_logps(logits, LABELS)


@pytest.mark.parametrize("name", ["linear_token_logps", "fused_linear_dpo_loss"])
def test_hidden_states_without_data_are_refused_by_name(name) -> None:
    """torch's question after autocast is an error for a device that has none."""
    function = getattr(pyfast_dpo, name)
    with pytest.raises((TypeError, ValueError), match=f"{name}: .*weight.*hidden"):
        function(HIDDEN.to("meta"), WEIGHT, TARGETS)


# --- shifted labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, 2**63 - 1, -(2**63), 2**53 + 1])
@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_the_last_position_is_ignored_whatever_the_number(ignore_index, impl) -> None:
    """As a float, which padding takes, 2^63 - 1 became -2^63: a label, and out of range."""
    assert shifted_labels(LABELS, ignore_index)[:, -1].tolist() == [ignore_index] * 2
    logps = pyfast_dpo.token_logps(LOGITS, LABELS, shift=True, ignore_index=ignore_index, impl=impl)
    expected = pyfast_dpo.token_logps(LOGITS, LABELS, shift=True, impl=impl)
    assert torch.equal(logps, expected)
    rows = CompletionRows.from_labels(LABELS, shift=True, ignore_index=ignore_index)
    assert rows.lengths == (2, 2) and rows.targets.tolist() == LABELS[:, 1:].flatten().tolist()


@pytest.mark.parametrize("impl", ["fused", "torch"])
@pytest.mark.parametrize("shift", [False, True])
def test_sequences_of_no_tokens_have_log_prob_0(shift, impl) -> None:
    """With shift, plain torch made a position out of none."""
    logits, labels = LOGITS[:, :0].requires_grad_(), LABELS[:, :0]
    logps = pyfast_dpo.sequence_logps(logits, labels, shift=shift, impl=impl)
    assert torch.equal(logps, torch.zeros(2)) and CompletionRows.from_labels(
        labels, shift=shift
    ).lengths == (0, 0)
    assert pyfast_dpo.token_logps(logits, labels, shift=shift, impl=impl).shape == (2, 0)
    tokens = pyfast_dpo.linear_token_logps(HIDDEN[:, :0], WEIGHT, labels, shift=shift, impl=impl)
    assert tokens.shape == (2, 0)


@pytest.mark.parametrize(
    "labels, options, words",
    [
        (LABELS.float(), {}, "labels must be int64"),
        (torch.tensor(3), {}, "labels must be int64"),
        (LABELS.to("meta"), {}, "labels must have values"),
        (LABELS, {"shift": 1}, "shift must be True or False"),
        (LABELS, {"ignore_index": np.float64(1)}, "ignore_index must be an int"),
    ],
)
def test_rows_of_labels_that_are_none_are_refused(labels, options, words) -> None:
    with pytest.raises((TypeError, ValueError), match=f"CompletionRows.from_labels: {words}"):
        CompletionRows.from_labels(labels, **options)


@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_with_shift_the_first_label_is_nobody_s_and_may_be_anything(impl) -> None:
    """Kernels took it, and plain torch refused it."""
    labels = LABELS.clone()
    labels[:, 0] = -(2**63)
    logps = pyfast_dpo.token_logps(LOGITS, labels, shift=True, impl=impl)
    assert torch.equal(logps, pyfast_dpo.token_logps(LOGITS, LABELS, shift=True, impl=impl))
    labels[1, 1] = 7
    with pytest.raises(ValueError, match=r"got 7 at \[1, 1\] \(1 such"):
        pyfast_dpo.token_logps(LOGITS, labels, shift=True, impl=impl)


@pytest.mark.parametrize("name", ["token_logps", "linear_token_logps"])
@pytest.mark.parametrize("impl", ["fused", "torch"])
def test_on_the_cpu_labels_are_looked_at_whatever_validate_says(name, impl) -> None:
    """With plain torch the error was an index of its own."""
    inputs = (LOGITS, LABELS) if name == "token_logps" else (HIDDEN, WEIGHT, TARGETS)
    labels = inputs[-1].clone()
    labels[0, -1] = 10**6
    with pytest.raises(ValueError, match=f"{name}: labels must be in"):
        getattr(pyfast_dpo, name)(*inputs[:-1], labels, validate=False, impl=impl)
