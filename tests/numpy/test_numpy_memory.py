"""Arrays as they lie in memory, values that are no numbers, and what is no array at all."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from pyfast_dpo import numpy as functions
from pyfast_dpo import reward_loss as torch_reward_loss
from pyfast_dpo.ops import _C

LOGPS = [np.array([-1.0, -2.5, -3.0]) * k for k in (1.0, 1.5, 0.9, 1.2)]


def misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_misaligned_arrays_have_the_values_of_aligned_ones(dtype) -> None:
    """A contiguous array need not be aligned, and kernels read whole elements: a sanitizer says whether."""
    logps = [a.astype(dtype) for a in LOGPS]
    for ours, expected in zip(
        functions.dpo_loss(*map(misaligned, logps)), functions.dpo_loss(*logps), strict=True
    ):
        assert np.all(ours == expected) if isinstance(ours, np.ndarray) else ours == expected
    desirable = np.array([True, False, True])
    ours = functions.unpaired_loss(misaligned(logps[0]), desirable, kl=0.1)
    assert ours.loss == functions.unpaired_loss(logps[0], desirable, kl=0.1).loss


BAD_LOGITS = {
    "byte-swapped": np.zeros((1, 2, 4), ">f4"),
    "misaligned": misaligned(np.zeros((1, 2, 4), np.float32)),
    "no vocabulary": np.zeros((1, 2, 0), np.float32),
    "integers": np.zeros((1, 2, 4), np.int64),
    "a matrix": np.zeros((2, 4), np.float32),
}


@pytest.mark.parametrize("name", BAD_LOGITS)
def test_the_compiled_function_reads_no_bytes_as_other_numbers(name) -> None:
    """It was the wrapper's business alone: byte-swapped logits were read as they are."""
    with pytest.raises((TypeError, ValueError), match=r"sequence_logps: logits[ a-z]* must be"):
        _C.sequence_logps(BAD_LOGITS[name], np.zeros((1, 2), np.int64))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 4)])
def test_arrays_without_elements_may_have_any_strides(shape) -> None:
    logits = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0, 0, 0))
    tokens = np.zeros(shape[:2], np.int64)
    assert functions.compute_sequence_logprob(logits, tokens).tolist() == [0.0] * shape[0]


def test_the_mean_of_an_infinite_loss_and_others_is_infinite() -> None:
    """Differences from an infinite first value were NaN."""
    chosen, rejected = np.array([-math.inf, -1.0]), np.array([-1.0, -1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = functions.reward_loss(chosen, rejected)
    theirs = torch_reward_loss(torch.tensor(chosen), torch.tensor(rejected)).mean()
    assert result.loss == math.inf == float(theirs)


BAD = [
    ("dpo_loss", lambda: functions.dpo_loss(*LOGPS[:1], None, *LOGPS[2:]), "policy_rejected_logp"),
    ("reward_loss", lambda: functions.reward_loss(LOGPS[0], None), "rejected"),
    ("unpaired_loss", lambda: functions.unpaired_loss(None, [True], kl=0.1), "policy_logp"),
    ("dpo_loss", lambda: functions.dpo_loss([[1.0], [1.0, 2.0]], *LOGPS[1:]), "policy_chosen_logp"),
    ("compute_sequence_logprob", lambda: functions.compute_sequence_logprob([[[1.0], [1, 2]]], [[0]]), "logits"),
    ("compute_sequence_logprob", lambda: functions.compute_sequence_logprob(torch.zeros(1, 2, 3, device="meta"), [[0, 0]]), "logits"),
    ("dpo_loss", lambda: functions.dpo_loss(*LOGPS, beta=2**64), "beta"),
    ("reward_loss", lambda: functions.reward_loss(*LOGPS[:2], center_rewards_coefficient=2**64), "center_rewards_coefficient"),
]  # fmt: skip


@pytest.mark.parametrize("name, call, argument", BAD)
def test_what_is_no_array_is_refused_by_name(name, call, argument) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: {argument} must be"):
        call()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_compiled_losses_refuse_misaligned_arrays(place) -> None:
    arrays = [a.copy() for a in LOGPS[:3]] + [LOGPS[3]]
    arrays[place] = misaligned(arrays[place])
    options = ("sigmoid", 0.1, 0.0, 0.05, 0.0, "reverse_kl", 0.5, False)
    with pytest.raises(ValueError, match="arrays must be aligned"):
        _C.pair_loss(*arrays, None, None, None, None, *options)
    with pytest.raises(ValueError, match="must be aligned"):
        _C.sequence_logps(np.zeros((1, 2, 4), np.float32), misaligned(np.zeros((1, 2), np.int64)))
