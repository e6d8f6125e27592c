"""What users pass by mistake: the type of the error, and a message that names function, argument and value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers import NAN, random_labels, random_logits
from torch import Tensor

from pyfast_dpo import (
    fused_dpo_loss,
    fused_ipo_loss,
    fused_kto_loss,
    kto_kl,
    kto_loss,
    preference_loss,
    sequence_logps,
    token_logps,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.pyfast_dpo


def pair_loss(
    chosen: Tensor, rejected: Tensor, loss: str, divergence: str = "reverse_kl", **tensors: Any
):
    """The operator with everything else at its default."""
    names = (
        "reference_chosen",
        "reference_rejected",
        "chosen_lengths",
        "rejected_lengths",
        "margins",
        "shift",
    )
    rest = [tensors.get(name) for name in names]
    return ops.pair_loss(chosen, rejected, *rest, loss, 0.1, 0.0, 0.05, 0.0, divergence, 0.5, False)


LOGITS, LABELS = random_logits(4, 3, 7), random_labels(4, 3, vocab=7)
LOGPS, OTHER_LOGPS = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0])
IS_DESIRABLE = torch.tensor([True, False, True, False])
META_LABELS = torch.empty(4, 3, dtype=torch.int64, device="meta")


def refused(call: Callable[[], Any], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error, f"{type(caught.value).__name__} instead of {error.__name__}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def with_label(value: int, *index: int) -> Tensor:
    labels = LABELS.clone()
    labels[index] = value
    return labels


# --- logits and labels ----------------------------------------------------------------------------------

# every function that takes logits and labels, and what it calls its logits
ON_LOGITS: dict[str, tuple[Callable[..., Any], str]] = {
    "token_logps": (token_logps, "logits"),
    "sequence_logps": (sequence_logps, "logits"),
    "fused_dpo_loss": (fused_dpo_loss, "policy_logits"),
    "fused_ipo_loss": (fused_ipo_loss, "policy_logits"),
    "fused_kto_loss": (
        lambda z, y, **o: fused_kto_loss(
            z, y, IS_DESIRABLE.to(getattr(z, "device", "cpu")), kl=0.0, **o
        ),
        "policy_logits",
    ),
}
every_function = pytest.mark.parametrize("name", ON_LOGITS)

BAD_LOGITS: dict[str, tuple[Any, Any, type[Exception], tuple[str, ...]]] = {
    # logits, labels, error, words ("{z}" is the name of the logits)
    "logits_a_list": ([[1.0]], LABELS, TypeError, ("{z}", "torch.Tensor", "list")),
    "logits_none": (None, LABELS, TypeError, ("{z}", "torch.Tensor", "None")),
    "labels_a_list": (LOGITS, [[1]], TypeError, ("labels", "torch.Tensor", "list")),
    "logits_integers": (LOGITS.long(), LABELS, TypeError, ("{z}", "bfloat16", "int64 [4, 3, 7]")),
    "logits_complex": (LOGITS + 0j, LABELS, TypeError, ("{z}", "complex64")),
    "logits_float8": (LOGITS.to(torch.float8_e4m3fn), LABELS, TypeError, ("{z}", "float8_e4m3fn")),
    "labels_int32": (LOGITS, LABELS.int(), TypeError, ("labels", "int64", "int32 [4, 3]")),
    "labels_floating": (LOGITS, LABELS.float(), TypeError, ("labels", "int64", "float32")),
    "labels_bool": (LOGITS, LABELS > 2, TypeError, ("labels", "int64", "bool")),
    "labels_shorter": (LOGITS, LABELS[:, :2], ValueError, ("labels", "[4, 3]", "[4, 2]")),
    "labels_fewer": (LOGITS, LABELS[:2], ValueError, ("labels", "[4, 3]", "[2, 3]")),
    "labels_with_vocabulary": (
        LOGITS,
        LOGITS.long(),
        ValueError,
        ("labels", "[4, 3]", "[4, 3, 7]"),
    ),
    "empty_vocabulary": (LOGITS[..., :0], LABELS, ValueError, ("{z}", "V >= 1", "[4, 3, 0]")),
    "labels_elsewhere": (LOGITS, META_LABELS, ValueError, ("labels", "device", "{z}", "meta")),
    "logits_elsewhere": (LOGITS.to("meta"), LABELS, ValueError, ("labels", "{z}", "meta", "cpu")),
    "label_of_vocabulary": (
        LOGITS,
        with_label(7, 2, 1),
        ValueError,
        ("labels", "[0, 7)", "ignore_index (-100)", "got 7 at [2, 1]", "1 such"),
    ),
    "label_negative": (LOGITS, with_label(-1, 0, 0), ValueError, ("labels", "got -1 at [0, 0]")),
    "label_huge": (
        LOGITS,
        with_label(2**62, 3, 2),
        ValueError,
        ("labels", f"got {2**62} at [3, 2]"),
    ),
}


@pytest.mark.parametrize("impl", ["auto", "fused", "torch"])
@pytest.mark.parametrize("logits, labels, error, words", BAD_LOGITS.values(), ids=BAD_LOGITS)
@every_function
def test_logits_and_labels(name, logits, labels, error, words, impl) -> None:
    function, logits_name = ON_LOGITS[name]
    named = [word.format(z=logits_name) for word in words]
    refused(lambda: function(logits, labels, impl=impl), error, f"{name}: ", *named)


SHAPES: dict[str, tuple[str, Tensor, Tensor, tuple[str, ...]]] = {
    "token_logps_of_a_vector": ("token_logps", LOGITS[0, 0], LABELS[0, 0], ("[..., T, V]", "[7]")),
    "sequence_logps_of_a_matrix": ("sequence_logps", LOGITS[0], LABELS[0], ("[B, T, V]", "[3, 7]")),
    "sequence_logps_of_four": ("sequence_logps", LOGITS[None], LABELS[None], ("[1, 4, 3, 7]",)),
    "odd_rows": ("fused_dpo_loss", LOGITS[:3], LABELS[:3], ("[2P, T, V]", "[3, 3, 7]")),
    "odd_rows_ipo": ("fused_ipo_loss", LOGITS[:1], LABELS[:1], ("[2P, T, V]", "[1, 3, 7]")),
    "one_row": ("fused_dpo_loss", LOGITS[0], LABELS[0], ("[2P, T, V]", "[3, 7]")),
    "kto_of_a_matrix": ("fused_kto_loss", LOGITS[0], LABELS[0], ("[N, T, V]", "[3, 7]")),
}


@pytest.mark.parametrize("name, logits, labels, words", SHAPES.values(), ids=SHAPES)
def test_shape_of_the_logits(name, logits, labels, words) -> None:
    function, logits_name = ON_LOGITS[name]
    refused(lambda: function(logits, labels), ValueError, f"{name}: {logits_name}", *words)


@every_function
def test_label_message_counts_the_bad_labels_and_gives_the_first(name) -> None:
    labels = torch.full((4, 3), 9)
    function, _ = ON_LOGITS[name]
    refused(lambda: function(LOGITS, labels), ValueError, "got 9 at [0, 0]", "12 such labels")


def test_ignore_index_of_another_number_makes_minus_100_a_bad_label() -> None:
    refused(
        lambda: token_logps(LOGITS, with_label(-100, 1, 2), ignore_index=-1),
        ValueError,
        "ignore_index (-1)",
        "got -100 at [1, 2]",
    )


@pytest.mark.parametrize("shift", [False, True])
def test_unchecked_label_out_of_range_is_still_caught_on_the_cpu(shift) -> None:
    """There the operator looks at its labels anyway: validate=False only saves the wait on a GPU."""
    refused(
        lambda: token_logps(LOGITS, with_label(7, 2, 1), shift=shift, validate=False),
        ValueError,
        "labels",
        "[0, 7)",
        "got 7 at [2, 1]",
    )


@every_function
def test_inplace_backward_refuses_plain_torch(name) -> None:
    function, _ = ON_LOGITS[name]
    refused(
        lambda: function(LOGITS, LABELS, inplace_backward=True, impl="torch"),
        ValueError,
        f"{name}: inplace_backward",
        "impl='torch'",
    )


SHARED_MEMORY = {
    "expanded_batch": LOGITS[:1].expand(4, 3, 7),
    "expanded_time": LOGITS[:, :1].expand(4, 3, 7),
    "expanded_vocabulary": LOGITS[..., :1].expand(4, 3, 7),
    "overlapping_windows": torch.randn(100).as_strided((4, 3, 7), (21, 5, 1)),
    "vocabulary_not_contiguous": LOGITS.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("logits", SHARED_MEMORY.values(), ids=SHARED_MEMORY)
@every_function
def test_inplace_backward_refuses_logits_it_cannot_overwrite(name, logits) -> None:
    function, logits_name = ON_LOGITS[name]
    refused(
        lambda: function(logits, LABELS, inplace_backward=True),
        ValueError,
        f"{name}: inplace_backward needs {logits_name}",
        "[4, 3, 7]",
        f"strides {list(logits.stride())}",
    )


def test_inplace_backward_refuses_four_dimensions() -> None:
    refused(
        lambda: token_logps(LOGITS[None], LABELS[None], inplace_backward=True),
        ValueError,
        "token_logps: inplace_backward",
        "[1, 4, 3, 7]",
    )


# --- impl -------------------------------------------------------------------------------------------------

ON_LOGPS: dict[str, Callable[..., Any]] = {
    "preference_loss": lambda **o: preference_loss(LOGPS, OTHER_LOGPS, **o),
    "kto_loss": lambda **o: kto_loss(LOGPS, IS_DESIRABLE[:2], **{"kl": 0.0, **o}),
}
CALLS: dict[str, Callable[..., Any]] = {
    **{name: (lambda f=f, **o: f(LOGITS, LABELS, **o)) for name, (f, _) in ON_LOGITS.items()},
    **ON_LOGPS,
    "fused_kto_loss": lambda **o: fused_kto_loss(LOGITS, LABELS, IS_DESIRABLE, **{"kl": 0.0, **o}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("impl", ["triton", "", None])
def test_unknown_impl(impl, name) -> None:
    refused(lambda: CALLS[name](impl=impl), ValueError, f"{name}: impl", "'torch'", f"got {impl!r}")


def test_fused_without_kernels() -> None:
    meta = LOGITS.to("meta")
    words = ("impl='fused'", "meta", "impl='torch'")
    refused(
        lambda: token_logps(meta, META_LABELS, impl="fused"), ValueError, "token_logps: ", *words
    )
    meta = LOGPS.to("meta")
    refused(
        lambda: preference_loss(meta, meta, impl="fused"), ValueError, "preference_loss: ", *words
    )


# --- options of the losses -----------------------------------------------------------------------------------

INF = float("inf")
PAIR, UNPAIRED = ("preference_loss", "fused_dpo_loss"), ("kto_loss", "fused_kto_loss")
WITH_BETA = (*PAIR, "fused_ipo_loss", *UNPAIRED)
BAD_OPTIONS: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    # functions, options, error, what the message says of the value
    *[(WITH_BETA, {"beta": b}, ValueError, f"got {b}") for b in (0, 0.0, -0.1, NAN, INF, -INF)],
    # 0 in float32, where it divides a margin: NaN
    *[(WITH_BETA, {"beta": b}, ValueError, f"got {b}") for b in (1e-320, 1e-45, 1e39)],
    (WITH_BETA, {"beta": "0.1"}, TypeError, "got str '0.1'"),
    (WITH_BETA, {"beta": None}, TypeError, "got NoneType None"),
    # a tensor's gradient would be lost
    (WITH_BETA, {"beta": torch.tensor(0.1)}, TypeError, "got float32 []"),
    *[(PAIR, {"label_smoothing": s}, ValueError, f"got {s}") for s in (-0.1, 0.5, 1.0, NAN, INF)],
    (PAIR, {"label_smoothing": "0.1"}, TypeError, "got str '0.1'"),
    (PAIR, {"label_smoothing": 0.1, "loss_type": "ipo"}, ValueError, "got 0.1 with 'ipo'"),
    (PAIR, {"loss_type": "dpo"}, ValueError, "'apo_down', 'discopop', 'sigmoid_norm', 'sft'"),
    (PAIR, {"loss_type": "kto"}, ValueError, "got 'kto'"),
    (PAIR, {"loss_type": None}, ValueError, "got None"),
    (PAIR, {"loss_type": ["sigmoid", "dpo"]}, ValueError, "got 'dpo'"),
    (PAIR, {"loss_type": []}, ValueError, "at least one loss, got []"),
    *[(UNPAIRED, {"desirable_weight": w}, ValueError, f"got {w}") for w in (-1.0, NAN, INF)],
    (UNPAIRED, {"undesirable_weight": -0.5}, ValueError, "got -0.5"),
    (UNPAIRED, {"undesirable_weight": "1"}, TypeError, "got str '1'"),
    *[(UNPAIRED, {"kl": k}, ValueError, f"got {k}") for k in (NAN, INF)],
    (UNPAIRED, {"kl": "0"}, TypeError, "got str '0'"),
    (UNPAIRED, {"kl": torch.zeros(2)}, ValueError, "one number, got float32 [2]"),
    (UNPAIRED, {"kl": torch.zeros(0)}, ValueError, "one number, got float32 [0]"),
    (UNPAIRED, {"kl": torch.zeros(1, requires_grad=True)}, ValueError, "requires grad"),
]
OPTION_ROWS = [
    pytest.param(name, options, error, words, id=f"{name}-{options}".replace(" ", ""))
    for names, options, error, words in BAD_OPTIONS
    for name in names
]


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("name, options, error, words", OPTION_ROWS)
def test_option(name, options, error, words, impl) -> None:
    argument = next(iter(options))
    refused(lambda: CALLS[name](impl=impl, **options), error, f"{name}: {argument}", words)


@pytest.mark.parametrize("name", ["fused_dpo_loss", "fused_ipo_loss", "fused_kto_loss"])
def test_options_are_refused_before_the_work_on_the_logits(name, monkeypatch) -> None:
    monkeypatch.setattr(
        "pyfast_dpo.logprobs.fused.checked_logps", lambda *a, **o: pytest.fail("logits read")
    )
    refused(lambda: CALLS[name](beta=0), ValueError, "beta")


# --- log-probs and references ------------------------------------------------------------------------------

A, B = LOGPS, OTHER_LOGPS
BAD_PAIRS: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "chosen_a_list": (([1.0], B), TypeError, ("policy_chosen_logps", "list")),
    "rejected_a_number": ((A, 1.0), TypeError, ("policy_rejected_logps", "float")),
    "rejected_none": ((A, None), TypeError, ("policy_rejected_logps", "None")),
    "chosen_integers": ((A.long(), B), TypeError, ("policy_chosen_logps", "int64")),
    "rejected_bool": ((A, B > 0), TypeError, ("policy_rejected_logps", "bool")),
    "chosen_a_matrix": ((A[None], B[None]), ValueError, ("policy_chosen_logps", "[P]", "[1, 2]")),
    "chosen_a_scalar": ((A[0], B[0]), ValueError, ("policy_chosen_logps", "[P]", "[]")),
    "rejected_longer": ((A, torch.ones(3)), ValueError, ("policy_rejected_logps", "[2]", "[3]")),
    "rejected_elsewhere": ((A, B.to("meta")), ValueError, ("policy_rejected_logps", "cpu", "meta")),
    "one_reference": ((A, B, A), ValueError, ("both", "reference_rejected_logps")),
    "other_reference": ((A, B, None, A), ValueError, ("both", "reference_chosen_logps")),
    "reference_shorter": ((A, B, A[:1], B), ValueError, ("reference_chosen_logps", "[2]", "[1]")),
    "reference_a_list": ((A, B, [1.0], B), TypeError, ("reference_chosen_logps", "list")),
    "reference_integers": ((A, B, A, B.long()), TypeError, ("reference_rejected_logps", "int64")),
    "reference_with_grad": (
        (A, B, A, B.clone().requires_grad_()),
        ValueError,
        ("reference_rejected_logps", "requires grad", "no_grad"),
    ),
}


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("args, error, words", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_log_probs_of_pairs(args, error, words, impl) -> None:
    refused(lambda: preference_loss(*args, impl=impl), error, "preference_loss: ", *words)


T2 = torch.tensor([True, False])
BAD_UNPAIRED: dict[str, tuple[tuple[Any, ...], type[Exception], tuple[str, ...]]] = {
    "policy_a_list": (([1.0], T2), TypeError, ("policy_logps", "list")),
    "policy_integers": ((A.long(), T2), TypeError, ("policy_logps", "int64")),
    "policy_a_matrix": ((A[None], T2), ValueError, ("policy_logps", "[N]", "[1, 2]")),
    "labels_a_list": ((A, [True, False]), TypeError, ("is_desirable", "torch.Tensor", "list")),
    "labels_integers": ((A, T2.long()), TypeError, ("is_desirable", "bool", "int64")),
    "labels_longer": ((A, IS_DESIRABLE), ValueError, ("is_desirable", "[2]", "[4]")),
    "labels_elsewhere": ((A, T2.to("meta")), ValueError, ("is_desirable", "cpu", "meta")),
    "reference_shorter": ((A, T2, A[:1]), ValueError, ("reference_logps", "[2]", "[1]")),
    "reference_with_grad": (
        (A, T2, A.clone().requires_grad_()),
        ValueError,
        ("reference_logps", "requires grad"),
    ),
}


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("args, error, words", BAD_UNPAIRED.values(), ids=BAD_UNPAIRED)
def test_log_probs_of_unpaired_rows(args, error, words, impl) -> None:
    refused(lambda: kto_loss(*args, kl=0.0, impl=impl), error, "kto_loss: ", *words)


FOUR = torch.zeros(4)
BAD_REFERENCES: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "both": (
        {"reference_logps": FOUR, "reference_logits": LOGITS},
        ValueError,
        ("reference_logps or reference_logits, not both",),
    ),
    "logps_of_half": ({"reference_logps": FOUR[:2]}, ValueError, ("reference_logps", "[4]", "[2]")),
    "logps_a_list": ({"reference_logps": [0.0] * 4}, TypeError, ("reference_logps", "list")),
    "logps_integers": ({"reference_logps": FOUR.long()}, TypeError, ("reference_logps", "int64")),
    "logps_with_grad": (
        {"reference_logps": torch.zeros(4, requires_grad=True)},
        ValueError,
        ("reference_logps", "requires grad", "no_grad"),
    ),
    "logits_with_grad": (
        {"reference_logits": LOGITS.clone().requires_grad_()},
        ValueError,
        ("reference_logits", "requires grad", "no_grad"),
    ),
    "logits_a_list": ({"reference_logits": [0.0]}, TypeError, ("reference_logits", "list")),
    "logits_shorter": (
        {"reference_logits": LOGITS[:, :2]},
        ValueError,
        ("reference_logits", "policy_logits", "[4, 3, 7]", "[4, 2, 7]"),
    ),
    "logits_integers": (
        {"reference_logits": LOGITS.long()},
        TypeError,
        ("reference_logits", "int64"),
    ),
    "logits_elsewhere": ({"reference_logits": LOGITS.to("meta")}, ValueError, ("meta", "cpu")),
}


@pytest.mark.parametrize("name", ["fused_dpo_loss", "fused_ipo_loss", "fused_kto_loss"])
@pytest.mark.parametrize("options, error, words", BAD_REFERENCES.values(), ids=BAD_REFERENCES)
def test_reference_of_the_fused_losses(options, error, words, name) -> None:
    refused(lambda: CALLS[name](**options), error, f"{name}: ", *words)


def test_reference_that_needs_grad_is_fine_where_no_gradient_is_recorded() -> None:
    with torch.no_grad():
        fused_dpo_loss(LOGITS, LABELS, reference_logits=LOGITS.clone().requires_grad_())


@pytest.mark.parametrize(
    "is_desirable, error, words",
    [
        (IS_DESIRABLE[:3], ValueError, ("[4]", "[3]")),
        (IS_DESIRABLE.int(), TypeError, ("bool", "int32")),
        (None, TypeError, ("None",)),
    ],
    ids=["shorter", "integers", "none"],
)
def test_labels_of_the_fused_kto_loss(is_desirable, error, words) -> None:
    refused(
        lambda: fused_kto_loss(LOGITS, LABELS, is_desirable, kl=0.0),
        error,
        "fused_kto_loss: is_desirable",
        *words,
    )


@pytest.mark.parametrize(
    "args, error, words",
    [
        ((A, None), TypeError, ("reference_kl_logps", "None")),
        (([0.0], A), TypeError, ("policy_kl_logps", "list")),
        ((A, A[:1]), ValueError, ("reference_kl_logps", "[2]", "[1]")),
        ((A.long(), A), TypeError, ("policy_kl_logps", "int64")),
        ((A[None], A[None]), ValueError, ("policy_kl_logps", "[1, 2]")),
    ],
    ids=["none", "list", "lengths", "integers", "matrix"],
)
def test_kl_estimate(args, error, words) -> None:
    refused(lambda: kto_kl(*args), error, "kto_kl: ", *words)


# --- operators called directly ---------------------------------------------------------------------------------

_, *SAVED = ops.seq_logp(LOGITS, LABELS, -100, False, False, False)
STRIDED = LOGITS.transpose(1, 2).contiguous().transpose(1, 2)
ONE = torch.ones(1)
DIRECT: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "label": (
        lambda: ops.seq_logp(LOGITS, with_label(8, 1, 1), -100, False, False, False),
        ("seq_logp: labels", "[0, 7)", "got 8 at [1, 1]"),
    ),
    "logits_matrix": (
        lambda: ops.seq_logp(LOGITS[0], LABELS[0], -100, False, False, False),
        ("seq_logp: logits", "[B, T, V]", "[3, 7]"),
    ),
    "logits_integers": (
        lambda: ops.seq_logp(LOGITS.long(), LABELS, -100, False, False, False),
        ("seq_logp: logits", "bfloat16"),
    ),
    "labels_shape": (
        lambda: ops.seq_logp(LOGITS, LABELS[:2], -100, False, False, False),
        ("seq_logp: labels", "[4, 3]", "[2, 3]"),
    ),
    "upstream_shape": (
        lambda: ops.seq_logp_backward(torch.ones(3), None, LOGITS, LABELS, *SAVED, -100, False),
        ("seq_logp_backward: grad_sequence", "[4]", "[3]"),
    ),
    "inplace_strides": (
        lambda: ops.seq_logp_backward_(torch.ones(4), None, STRIDED, LABELS, *SAVED, -100, False),
        ("seq_logp_backward_: ", "contiguous", "3"),
    ),
    "pair_lengths": (
        lambda: pair_loss(A, ONE, "sigmoid"),
        ("pair_loss: policy_rejected", "[2]", "[1]"),
    ),
    "pair_dtypes": (
        lambda: pair_loss(A, B.double(), "sigmoid"),
        ("pair_loss: policy_rejected", "Float", "Double"),
    ),
    "pair_half": (
        lambda: pair_loss(A.half(), B.half(), "sigmoid"),
        ("pair_loss: policy_chosen", "Half"),
    ),
    "pair_name": (
        lambda: pair_loss(A, B, "kto"),
        ("pair_loss: loss", "sigmoid, robust", "kto"),
    ),
    "pair_margins": (
        lambda: pair_loss(A, B, "sigmoid", margins=ONE),
        ("pair_loss: margins", "[2]", "[1]"),
    ),
    "pair_chosen_lengths": (
        lambda: pair_loss(A, B, "sigmoid", chosen_lengths=ONE),
        ("pair_loss: chosen_lengths", "[2]", "[1]"),
    ),
    "pair_shift": (
        lambda: pair_loss(A, B, "bco_pair", shift=A),
        ("pair_loss: shift", "[1]", "[2]"),
    ),
    "pair_divergence": (
        lambda: pair_loss(A, B, "sigmoid", divergence="forward"),
        ("pair_loss: divergence", "js_divergence", "forward"),
    ),
    "unpaired_name": (
        lambda: ops.unpaired_loss(A, None, T2, ONE, "sigmoid", 0.1, 1.0, 1.0),
        ("unpaired_loss: loss", "kto", "sigmoid"),
    ),
    "unpaired_kl": (
        lambda: ops.unpaired_loss(A, None, T2, torch.ones(2), "kto", 0.1, 1.0, 1.0),
        ("unpaired_loss: kl", "[1]", "[2]"),
    ),
}


@pytest.mark.parametrize("call, words", DIRECT.values(), ids=DIRECT)
def test_operator_called_directly(call, words) -> None:
    """The operators trust nobody: a wrong shape would be an out-of-bounds read."""
    with pytest.raises(RuntimeError, match=re.escape(f"pyfast_dpo::{words[0]}")) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
