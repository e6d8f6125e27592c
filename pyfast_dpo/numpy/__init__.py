"""The losses on NumPy arrays, without torch tensors: for learners, for checks by hand, for data pipelines.

The same kernels as the torch operators, on the CPU. Gradients are those of the returned mean loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyfast_dpo.losses.table import (
    UNPAIRED_LOSSES,
    LossType,
    PairTerm,
    check_pair_options,
    check_unpaired_constants,
)
from pyfast_dpo.ops import _C
from pyfast_dpo.ops.checks import check_beta, check_finite, check_weight

FloatArray = NDArray[np.floating[Any]]

_IGNORED = -100  # label of a position that is not scored; masked positions take it


class PairResult(NamedTuple):
    """Result of `preference_loss`, `dpo_loss`, `ipo_loss` and `reward_loss`."""

    loss: float  # mean over the pairs, 0 for P = 0
    metrics: dict[str, float]  # means over the pairs, by TRL's names
    grad_policy_chosen: FloatArray  # [P] d loss / d policy_chosen_logp
    grad_policy_rejected: FloatArray  # [P]


class UnpairedResult(NamedTuple):
    """Result of `unpaired_loss` and `kto_loss`."""

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


def preference_loss(
    policy_chosen_logp: ArrayLike,
    policy_rejected_logp: ArrayLike,
    ref_chosen_logp: ArrayLike | None = None,
    ref_rejected_logp: ArrayLike | None = None,
    beta: float = 0.1,
    *,
    loss_type: LossType = "sigmoid",
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
    margins: ArrayLike | None = None,
    bco_shift: float | None = None,
    **options: Any,
) -> PairResult:
    """Any loss of `pyfast_dpo.preference_loss`, or a weighted sum of them, by the same names and options.

    Args:
        policy_chosen_logp, policy_rejected_logp: `[P]` log-probs.
        ref_chosen_logp, ref_rejected_logp: `[P]`, both or neither (a uniform reference).
        beta: > 0.
        loss_type: a name or a sequence of names; options: loss_weights, label_smoothing,
            f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma, alphapo_alpha,
            cpo_alpha and rpo_alpha.
        chosen_lengths, rejected_lengths: `[P]` numbers of tokens, for losses of averages.
        margins: `[P]`, in units of the reward.
        bco_shift: for "bco_pair".

    Returns:
        `(loss, metrics, grad_policy_chosen, grad_policy_rejected)`; metrics are rewards/chosen,
        rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen and logps/rejected.
    """
    return _pair_loss(
        "preference_loss",
        (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp),
        (chosen_lengths, rejected_lengths, margins),
        bco_shift,
        loss_type=loss_type,
        beta=beta,
        **options,
    )


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
        As `preference_loss`.
    """
    logps = (policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    return _pair_loss("dpo_loss", logps, beta=beta, label_smoothing=label_smoothing)


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
    return _pair_loss("ipo_loss", logps, loss_type="ipo", beta=beta)


def unpaired_loss(
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike | None = None,
    beta: float = 0.1,
    *,
    loss_type: str = "kto",
    kl: float | None = None,
    bco_shift: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedResult:
    """Any loss of `pyfast_dpo.unpaired_loss`, by the same names: "kto", "apo_zero_unpaired" or "bco".

    Args:
        policy_logp, ref_logp: `[N]` summed log-probs.
        is_desirable: `[N]` bool.
        beta: > 0; weights: >= 0.
        kl: for "kto": the estimate of KL(policy || reference), a constant >= 0.
        bco_shift: for "bco": the reward around which it separates, 0 by default.

    Returns:
        `(loss, metrics, grad_policy)`; metrics are rewards/chosen, rewards/rejected, rewards/margins,
        logps/chosen and logps/rejected, of the desirable and of the undesirable rows, and kl for "kto".
    """
    return _unpaired_loss(
        "unpaired_loss", policy_logp, is_desirable, ref_logp, beta, loss_type, kl, bco_shift,
        desirable_weight, undesirable_weight,
    )  # fmt: skip


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
    """`unpaired_loss` with `loss_type="kto"` (Ethayarajh et al. 2024, eq. 8)."""
    return _unpaired_loss(
        "kto_loss", policy_logp, is_desirable, ref_logp, beta, "kto", kl, None,
        desirable_weight, undesirable_weight,
    )  # fmt: skip


def reward_loss(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    margins: ArrayLike | None = None,
    center_rewards_coefficient: float = 0.0,
) -> PairResult:
    """Bradley-Terry loss of a reward model's scores `[P]`, as `pyfast_dpo.reward_loss`.

    Returns:
        `(loss, metrics, grad_chosen, grad_rejected)`; metrics are rewards/chosen, rewards/rejected,
        rewards/accuracies and rewards/margins.
    """
    name = "reward_loss"
    check_weight(name, "center_rewards_coefficient", center_rewards_coefficient)
    names = ("chosen_rewards", "rejected_rewards", "margins")
    arrays = _arrays(name, names, (chosen_rewards, rejected_rewards, margins))
    chosen, rejected, margin_values = arrays
    assert chosen is not None and rejected is not None
    (term,) = check_pair_options(name, "sigmoid", 1.0)
    inputs = (chosen, rejected, None, None, None, None, margin_values, None)
    losses, _, _, *slopes = _C.pair_loss(*inputs, *term.formula_options())
    total = chosen + rejected
    losses = losses + center_rewards_coefficient * total**2
    pairs = max(len(losses), 1)
    grads = [(slope + 2 * center_rewards_coefficient * total) / pairs for slope in slopes]
    return PairResult(_mean(losses), _reward_metrics(chosen, rejected), grads[0], grads[1])


def _unpaired_loss(
    name: str,
    policy_logp: ArrayLike,
    is_desirable: ArrayLike,
    ref_logp: ArrayLike | None,
    beta: float,
    loss_type: str,
    kl: float | None,
    bco_shift: float | None,
    desirable_weight: float,
    undesirable_weight: float,
) -> UnpairedResult:
    check_unpaired_constants(name, loss_type, kl, bco_shift)
    check_beta(name, beta)
    check_weight(name, "desirable_weight", desirable_weight)
    check_weight(name, "undesirable_weight", undesirable_weight)
    if kl is not None:
        check_weight(name, "kl", kl)
    if bco_shift is not None:
        check_finite(name, "bco_shift", bco_shift)
    policy, reference = _arrays(name, ("policy_logp", "ref_logp"), (policy_logp, ref_logp))
    assert policy is not None
    desirable = np.asarray(is_desirable)
    if desirable.dtype != np.bool_:
        raise TypeError(f"{name}: is_desirable must be bool, got {_describe(desirable)}")
    if desirable.shape != policy.shape:
        raise ValueError(
            f"{name}: is_desirable must have shape {list(policy.shape)}, got {_describe(desirable)}"
        )
    center = float(kl or 0.0) if bco_shift is None else bco_shift / beta
    losses, rewards, gradient = _C.unpaired_loss(
        policy,
        reference,
        np.ascontiguousarray(desirable),
        center,
        UNPAIRED_LOSSES[loss_type].formula,
        float(beta),
        float(desirable_weight),
        float(undesirable_weight),
    )
    metrics = _metrics(
        rewards[desirable], rewards[~desirable], policy[desirable], policy[~desirable]
    )
    if kl is not None:
        metrics["kl"] = float(kl)
    return UnpairedResult(_mean(losses), metrics, gradient / max(len(policy), 1))


def _pair_loss(
    function: str,
    logps: tuple[ArrayLike | None, ...],
    rest: tuple[ArrayLike | None, ...] = (None, None, None),
    bco_shift: float | None = None,
    *,
    loss_type: LossType = "sigmoid",
    beta: float,
    **options: Any,
) -> PairResult:
    terms = check_pair_options(
        function, loss_type, beta, margins=rest[2], bco_shift=bco_shift, **options
    )
    names = (
        "policy_chosen_logp", "policy_rejected_logp", "ref_chosen_logp", "ref_rejected_logp",
        "chosen_lengths", "rejected_lengths", "margins",
    )  # fmt: skip
    arrays = _arrays(function, names, (*logps, *rest))
    for first, second in ((2, 3), (4, 5)):
        if (arrays[first] is None) != (arrays[second] is None):
            raise ValueError(
                f"{function}: pass both {names[first]} and {names[second]}, or neither"
            )
    chosen, rejected, ref_chosen, ref_rejected = arrays[:4]
    assert chosen is not None and rejected is not None
    shift = None
    if bco_shift is not None:
        check_finite(function, "bco_shift", bco_shift)
        shift = np.full(1, bco_shift, chosen.dtype)
    losses, d_chosen, d_rejected = np.zeros((3, len(chosen)), chosen.dtype)
    for term in terms:
        values, slope_chosen, slope_rejected = _loss_of_term(term, [*arrays, shift])
        losses = losses + term.weight * values
        d_chosen = d_chosen + term.weight * slope_chosen
        d_rejected = d_rejected + term.weight * slope_rejected
    chosen_rewards = beta * (chosen if ref_chosen is None else chosen - ref_chosen)
    rejected_rewards = beta * (rejected if ref_rejected is None else rejected - ref_rejected)
    metrics = _metrics(chosen_rewards, rejected_rewards, chosen, rejected)
    metrics.update(_reward_metrics(chosen_rewards, rejected_rewards))
    pairs = max(len(losses), 1)
    return PairResult(_mean(losses), metrics, d_chosen / pairs, d_rejected / pairs)


def _loss_of_term(
    term: PairTerm, inputs: list[FloatArray | None]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(losses, d losses / d chosen, d losses / d rejected) of one loss; inputs as the kernel's."""
    spec = term.spec
    chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths = inputs[:6]
    margins, shift = inputs[6:]
    assert chosen is not None and rejected is not None
    if spec.sorts is not None:
        # as in losses/pairs.py: quantiles of one distribution against those of the other
        plain = term._replace(spec=spec._replace(sorts=None))
        zero = np.zeros_like(chosen)
        ref_chosen, ref_rejected = (zero if r is None else r for r in (ref_chosen, ref_rejected))
        if spec.sorts == "pairs":
            first, second = chosen - rejected, ref_chosen - ref_rejected
        else:
            first, second = chosen - ref_chosen, rejected - ref_rejected
        orders = [np.argsort(values, kind="stable") for values in (first, second)]
        quantiles = [first[orders[0]], second[orders[1]]]
        losses, *slopes = _loss_of_term(plain, [*quantiles, None, None, None, None, None, None])
        back = [np.argsort(order, kind="stable") for order in orders]
        d_first, d_second = slopes[0][back[0]], slopes[1][back[1]]
        return losses[back[0]], d_first, -d_first if spec.sorts == "pairs" else d_second
    losses, _, _, d_chosen, d_rejected = _C.pair_loss(
        chosen,
        rejected,
        ref_chosen if spec.reference else None,
        ref_rejected if spec.reference else None,
        chosen_lengths if spec.averages else None,
        rejected_lengths if spec.averages else None,
        margins if "margins" in spec.options else None,
        shift if "bco_shift" in spec.options else None,
        *term.formula_options(),
    )
    return losses, d_chosen, d_rejected


def _reward_metrics(chosen: FloatArray, rejected: FloatArray) -> dict[str, float]:
    return {
        "rewards/chosen": _mean(chosen),
        "rewards/rejected": _mean(rejected),
        "rewards/accuracies": _mean(chosen > rejected),
        "rewards/margins": _mean(chosen) - _mean(rejected),
    }


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


def _arrays(
    function: str, names: tuple[str, ...], values: tuple[ArrayLike | None, ...]
) -> list[FloatArray | None]:
    """One-dimensional arrays of equal length: float64 when any is wider than float32, else float32. Integers
    beside floating-point arrays (lengths) leave the dtype as it is."""
    arrays = [None if value is None else np.asarray(value) for value in values]
    first = arrays[0]
    assert first is not None
    dtypes = []
    for name, array in zip(names, arrays, strict=True):
        if array is None:
            continue
        floating = np.issubdtype(array.dtype, np.floating)
        if not floating and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{function}: {name} must be floating point, got {_describe(array)}")
        if array.ndim != 1 or array.shape != first.shape:
            raise ValueError(
                f"{function}: {name} must be one-dimensional, as long as {names[0]}, got {_describe(array)}"
            )
        if floating or not name.endswith("_lengths"):
            dtypes.append(array.dtype)
    dtype = np.float32 if all(d in (np.float32, np.float16) for d in dtypes) else np.float64
    return [None if a is None else np.ascontiguousarray(a, dtype=dtype) for a in arrays]


def _describe(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
