"""The losses on NumPy arrays, without torch tensors: for learners, for checks by hand, for data pipelines.

The same kernels as the torch operators, on the CPU. Gradients are those of the returned mean loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyfast_dpo import _C, _ops
from pyfast_dpo._checks import check_beta, check_label_smoothing, check_weight

FloatArray = NDArray[np.floating[Any]]

_IGNORED = -100  # label of a position that is not scored; masked positions take it


class PairResult(NamedTuple):
    """Result of `dpo_loss` and `ipo_loss`."""

    loss: float  # mean over the pairs, 0 for P = 0
    metrics: dict[str, float]  # means over the pairs, by TRL's names
    grad_policy_chosen: FloatArray  # [P] d loss / d policy_chosen_logp
    grad_policy_rejected: FloatArray  # [P]


class UnpairedResult(NamedTuple):
    """Result of `kto_loss`."""

    loss: float  # mean over the rows, 0 for N = 0
    metrics: dict[str, float]
    grad_policy: FloatArray  # [N] d loss / d policy_logp


def compute_sequence_logprob(logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike) -> FloatArray:
    """Summed log-probability of the tokens where the mask is true.

    Args:
        logits: `[B, T, V]` or `[T, V]`, float64, float32 or float16; position t scores `tokens[t]`.
        tokens: `[B, T]` or `[T]` integers in [0, V) wherever the mask is true.
        mask: the shape of tokens, bool or 0 and 1.

    Returns:
        `[B]`, or a 0-d array for `[T, V]`: float32, float64 for float64 logits; 0 where the mask is empty.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, mask values; a token out of range.
    """
    name = "compute_sequence_logprob"
    z, ids, scored = np.asarray(logits), np.asarray(tokens), np.asarray(mask)
    if z.dtype.newbyteorder("=") not in (np.float64, np.float32, np.float16):
        raise TypeError(f"{name}: logits must be float64, float32 or float16, got {_describe(z)}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: tokens must be integers, got {_describe(ids)}")
    if z.ndim not in (2, 3) or z.shape[-1] == 0:
        raise ValueError(
            f"{name}: logits must be [B, T, V] or [T, V] with V >= 1, got {_describe(z)}"
        )
    if ids.shape != z.shape[:-1]:
        raise ValueError(
            f"{name}: tokens must have shape {list(z.shape[:-1])}, got {_describe(ids)}"
        )
    if scored.shape != ids.shape:
        raise ValueError(f"{name}: mask must have shape {list(ids.shape)}, got {_describe(scored)}")
    if scored.dtype != np.bool_ and not np.isin(scored, (0, 1)).all():
        raise ValueError(f"{name}: mask must hold bool or 0 and 1, got {_describe(scored)}")
    scored = scored.astype(np.bool_)
    bad = scored & ((ids < 0) | (ids >= z.shape[-1]))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}: tokens must be in [0, {z.shape[-1]}) where the mask is true, "
            f"got {int(ids[index])} at {list(index)} ({int(bad.sum())} such tokens in all)"
        )
    rows = z if z.ndim == 3 else z[None]
    # Kernels read native, aligned rows in place, whatever the strides of the leading dimensions.
    readable = rows.dtype.isnative and rows.flags.aligned and rows.strides[-1] == rows.itemsize
    if not readable:
        rows = np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("="))
    labels = np.where(scored, ids.astype(np.int64), _IGNORED).reshape(rows.shape[:-1])
    return _C.sequence_logps(rows, np.ascontiguousarray(labels)).reshape(z.shape[:-2])


def dpo_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike,
    ref_rejected_logp: ArrayLike,
    beta: float = 0.1,
    *,
    label_smoothing: float = 0.0,
) -> PairResult:
    """DPO (Rafailov et al. 2023, eq. 7); with `label_smoothing` in [0, 0.5) cDPO (Mitchell 2023).

    Args:
        policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp: `[P]` summed log-probs.
        beta: > 0.

    Returns:
        `(loss, metrics, grad_policy_chosen, grad_policy_rejected)`; metrics are rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen and logps/rejected.
    """
    check_label_smoothing("dpo_loss", label_smoothing)
    logps = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return _pair_loss("dpo_loss", "sigmoid", logps, beta, label_smoothing)


def ipo_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike,
    ref_rejected_logp: ArrayLike,
    beta: float = 0.1,
) -> PairResult:
    """IPO (Azar et al. 2023, eq. 17): length-averaged log-probs by the authors' reading, sums by the paper.

    Args and returns: as `dpo_loss`.
    """
    logps = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return _pair_loss("ipo_loss", "ipo", logps, beta, 0.0)


def kto_loss(
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike,
    beta: float = 0.1,
    *,
    kl: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedResult:
    """KTO (Ethayarajh et al. 2024, eq. 8) of unpaired responses.

    Args:
        policy_logp, ref_logp: `[N]` summed log-probs.
        is_desirable: `[N]` bool.
        kl: the estimate of KL(policy || reference), a constant >= 0.
        beta: > 0; weights: >= 0.

    Returns:
        `(loss, metrics, grad_policy)`; metrics are rewards/chosen, rewards/rejected, rewards/margins,
        logps/chosen and logps/rejected, of the desirable and of the undesirable rows, and kl.
    """
    name = "kto_loss"
    check_beta(name, beta)
    check_weight(name, "desirable_weight", desirable_weight)
    check_weight(name, "undesirable_weight", undesirable_weight)
    check_weight(name, "kl", kl)
    policy, reference = _logp_arrays(name, ("policy_logp", "ref_logp"), (policy_logp, ref_logp))
    desirable = np.asarray(is_desirable)
    if desirable.dtype != np.bool_:
        raise TypeError(f"{name}: is_desirable must be bool, got {_describe(desirable)}")
    if desirable.shape != policy.shape:
        raise ValueError(
            f"{name}: is_desirable must have shape {list(policy.shape)}, got {_describe(desirable)}"
        )
    losses, rewards, gradient = _C.unpaired_loss(
        policy,
        reference,
        np.ascontiguousarray(desirable),
        float(kl),
        _ops.UNPAIRED_LOSS_NAMES[0],
        float(beta),
        float(desirable_weight),
        float(undesirable_weight),
    )
    metrics = {
        **_metrics(rewards[desirable], rewards[~desirable], policy[desirable], policy[~desirable]),
        "kl": float(kl),
    }
    return UnpairedResult(_mean(losses), metrics, gradient / max(len(policy), 1))


def _pair_loss(
    function: str, loss: str, logps: tuple[ArrayLike, ...], beta: float, label_smoothing: float
) -> PairResult:
    check_beta(function, beta)
    names = ("policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    arrays = _logp_arrays(function, names, logps)
    losses, chosen_rewards, rejected_rewards, d_chosen, d_rejected = _C.pair_loss(
        arrays[0], arrays[1], arrays[2], arrays[3], loss, float(beta), float(label_smoothing)
    )
    metrics = _metrics(chosen_rewards, rejected_rewards, arrays[0], arrays[1])
    metrics["rewards/accuracies"] = _mean(chosen_rewards > rejected_rewards)
    pairs = max(len(losses), 1)
    return PairResult(_mean(losses), metrics, d_chosen / pairs, d_rejected / pairs)


def _metrics(
    chosen_rewards: FloatArray,
    rejected_rewards: FloatArray,
    chosen: FloatArray,
    rejected: FloatArray,
) -> dict[str, float]:
    return {
        "rewards/chosen": _mean(chosen_rewards),
        "rewards/rejected": _mean(rejected_rewards),
        "rewards/margins": _mean(chosen_rewards) - _mean(rejected_rewards),
        "logps/chosen": _mean(chosen),
        "logps/rejected": _mean(rejected),
    }


def _mean(values: NDArray[Any]) -> float:
    """In float64, from the first value on: the mean of equal values is exactly that value; 0 for nothing."""
    if values.size == 0:
        return 0.0
    wide = values.astype(np.float64)
    return float(wide[0] + (wide - wide[0]).mean())


def _logp_arrays(
    function: str, names: tuple[str, ...], values: tuple[ArrayLike, ...]
) -> list[FloatArray]:
    """One-dimensional arrays of equal length: float64 when any is wider than float32, else float32."""
    arrays = [np.asarray(value) for value in values]
    for name, array in zip(names, arrays, strict=True):
        if not np.issubdtype(array.dtype, np.floating) and not np.issubdtype(
            array.dtype, np.integer
        ):
            raise TypeError(f"{function}: {name} must be floating point, got {_describe(array)}")
        if array.ndim != 1 or array.shape != arrays[0].shape:
            raise ValueError(
                f"{function}: {name} must be one-dimensional, as long as {names[0]}, got {_describe(array)}"
            )
    narrow = all(array.dtype in (np.float32, np.float16) for array in arrays)
    dtype = np.float32 if narrow else np.float64
    return [np.ascontiguousarray(array, dtype=dtype) for array in arrays]


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
