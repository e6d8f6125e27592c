"""Operators called directly with what does not fit together: an error that names operator and argument, never a
crash, never a number out of memory that nothing has written."""

from __future__ import annotations

import math

import pytest
import torch
from _helpers import random_labels, random_logits

import pyfast_dpo  # noqa: F401  (registers the operators)

ops = torch.ops.pyfast_dpo
X, W = torch.randn(3, 4), torch.randn(5, 4)
GRADIENT = torch.randn(3, 5)
LOGITS, LABELS = random_logits(2, 3, 7), random_labels(2, 3, vocab=7)
LOGPS = torch.tensor([-1.0, -2.0])
QUERY, BLOCKS = torch.randn(3, 2, 4), torch.tensor([[0, 3, 0, 0]])
SAVED = ops.seq_logp(LOGITS, LABELS, -100, False, False, False)[1:]
PAIR = ([None] * 6, ["sigmoid", 0.1, 0.0, 0.05, 0.0, "reverse_kl", 0.5, False])


def backward_of(logits, labels=LABELS):
    return [torch.ones(2), None, logits, labels, *SAVED, -100, False]


def refused(call, name, *words):
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
        call()
    missing = [word for word in (f"pyfast_dpo::{name}", *words) if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


NONE_FOR_A_TENSOR = {  # Python's None arrives as a tensor without dtype, shape and memory
    "seq_logp": (lambda: ops.seq_logp(None, LABELS, -100, False, False, False), "logits"),
    "seq_logp_backward": (lambda: ops.seq_logp_backward(*backward_of(LOGITS, None)), "labels"),
    "seq_logp_backward_out": (lambda: ops.seq_logp_backward_out(*backward_of(LOGITS), None), "out"),
    "row_statistics": (lambda: ops.row_statistics(None, LABELS[0]), "logits"),
    "head_logits_": (lambda: ops.head_logits_(GRADIENT.clone(), None, W), "matrices"),
    "head_grad_rows": (lambda: ops.head_grad_rows(None, W), "matrices"),
    "head_grad_weight_": (lambda: ops.head_grad_weight_(None, GRADIENT, X, False, None), "out"),
    "linear_": (lambda: ops.linear_(GRADIENT.clone(), X, None), "matrices"),
    "silu_gate": (lambda: ops.silu_gate(None, X), "gate"),
    "rms_norm": (lambda: ops.rms_norm(None, X[0], 1e-6), "input"),
    "shared_prompt_attention": (lambda: ops.shared_prompt_attention(QUERY, QUERY, QUERY, None, 1.0, 3), "blocks"),
    "pair_loss": (lambda: ops.pair_loss(None, LOGPS, *PAIR[0], *PAIR[1]), "policy_chosen"),
    "unpaired_loss": (lambda: ops.unpaired_loss(LOGPS, None, None, LOGPS[:1], "kto", 0.1, 1.0, 1.0), "is_desirable"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE_FOR_A_TENSOR)
def test_none_for_a_tensor_is_refused_by_name(name) -> None:
    call, argument = NONE_FOR_A_TENSOR[name]
    refused(call, name, argument, "None")


MIXED_DEVICES = {  # meta comes first in torch's dispatch: the shapes' function is called for the real tensors too
    "seq_logp": lambda: ops.seq_logp(LOGITS, LABELS.to("meta"), -100, False, False, False),
    "seq_logp_backward": lambda: ops.seq_logp_backward(*backward_of(LOGITS, LABELS.to("meta"))),
    "row_statistics": lambda: ops.row_statistics(LOGITS[0], LABELS[0].to("meta")),
    "head_grad_rows": lambda: ops.head_grad_rows(GRADIENT, W.to("meta")),
    "linear_grad_weight": lambda: ops.linear_grad_weight(GRADIENT, X.to("meta")),
    "silu_gate": lambda: ops.silu_gate(X, X.to("meta")),
    "rms_norm": lambda: ops.rms_norm(X, X[0].to("meta"), 1e-6),
    "shared_prompt_attention": lambda: ops.shared_prompt_attention(
        QUERY, QUERY, QUERY, BLOCKS.to("meta"), 1.0, 3
    ),
    "pair_loss": lambda: ops.pair_loss(LOGPS, LOGPS.to("meta"), *PAIR[0], *PAIR[1]),
    "unpaired_loss": lambda: ops.unpaired_loss(
        LOGPS, None, torch.ones(2).bool(), LOGPS[:1].to("meta"), "kto", 0.1, 1.0, 1.0
    ),
}


@pytest.mark.parametrize("name", MIXED_DEVICES)
def test_a_real_tensor_beside_one_without_data_is_refused(name) -> None:
    refused(MIXED_DEVICES[name], name, "one device", "cpu", "meta")


def test_blocks_of_attention_stay_on_the_cpu_beside_tensors_without_data() -> None:
    meta = QUERY.to("meta")
    output, _ = ops.shared_prompt_attention(meta, meta, meta, BLOCKS, 1.0, 3)
    assert output.is_meta and output.shape == QUERY.shape


def overlapping_windows(*shape):
    return torch.randn(100).as_strided(shape, (3, *shape[2:], 1)[: len(shape)])


SQUARE = torch.randn(4, 4)
SHARED_MEMORY = {  # what is written, over what is read or over itself
    "logits over the weight": ("head_logits_", lambda: ops.head_logits_(SQUARE, X[:, :4].new_ones(4, 4), SQUARE)),
    "weight's gradient over the rows": ("head_grad_weight_", lambda: ops.head_grad_weight_(SQUARE, SQUARE.clone(), SQUARE, False, None)),
    "linear over its rows": ("linear_", lambda: ops.linear_(SQUARE, SQUARE, SQUARE.clone())),
    "linear over a part of its weight": ("linear_", lambda: (m := torch.randn(20)) is None or ops.linear_(m[:16].view(4, 4), SQUARE, m[4:].view(4, 4))),
    "gradient over logits of another dtype": ("seq_logp_backward_out", lambda: ops.seq_logp_backward_out(*backward_of(LOGITS), LOGITS.view(torch.bfloat16).flatten()[:42].view(2, 3, 7))),
    "gradient over windows of one memory": ("seq_logp_backward_", lambda: ops.seq_logp_backward_(*backward_of(torch.randn(100).as_strided((2, 3, 7), (10, 3, 1))))),
    "gradient over an expanded batch": ("seq_logp_backward_", lambda: ops.seq_logp_backward_(*backward_of(LOGITS[:1].clone().expand(2, 3, 7)))),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED_MEMORY)
def test_written_memory_must_be_apart(name) -> None:
    operator, call = SHARED_MEMORY[name]
    refused(call, operator, "share memory")


def test_a_gradient_may_overwrite_its_own_logits_and_lie_between_rows_of_others() -> None:
    expected = ops.seq_logp_backward(*backward_of(LOGITS))
    own = LOGITS.clone()
    ops.seq_logp_backward_out(*backward_of(own), own)
    assert torch.equal(own, expected)
    rows = torch.zeros(2, 3, 14)[..., :7].copy_(LOGITS)  # the gaps belong to nobody here
    ops.seq_logp_backward_(*backward_of(rows))
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("rows, hidden, vocab", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_no_rows_no_width_or_no_vocabulary_are_zeros(
    rows, hidden, vocab, dtype
) -> None:
    """`head_grad_rows` divided by the number of slices of an empty vocabulary, which ended the process."""
    x, w = torch.ones(rows, hidden, dtype=dtype), torch.ones(vocab, hidden, dtype=dtype)
    gradient = torch.ones(rows, vocab)
    logits, weight = torch.full((rows, vocab), math.nan), torch.full((vocab, hidden), math.nan)
    ops.head_logits_(logits, x, w)
    ops.head_grad_weight_(weight, gradient, x, False, None)
    of_rows = ops.head_grad_rows(gradient, w)
    assert of_rows.shape == (rows, hidden)
    for result in (logits, weight, of_rows):
        assert torch.equal(result, torch.zeros_like(result))


def test_a_scale_that_is_no_number_is_refused() -> None:
    for scale in (math.inf, math.nan, 0.0, -1.0):
        refused(
            lambda scale=scale: ops.shared_prompt_attention(QUERY, QUERY, QUERY, BLOCKS, scale, 3),
            "shared_prompt_attention", "scale must be positive and finite",
        )  # fmt: skip
