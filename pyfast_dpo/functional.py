"""Log-probs of labels from logits, and losses on log-probs.

Labels follow `torch.nn.functional.cross_entropy`: `labels[b, t]` is the target of position t of the same
tensor, `ignore_index` is not scored. Results are float32 whatever the dtype of the logits (float64 for
float64). `impl="fused"` runs the compiled kernels, `impl="torch"` the same function in plain
differentiable torch (`reference.py`), `impl="auto"` the kernels wherever they exist.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyfast_dpo import _ops, reference
from pyfast_dpo._checks import (
    check_beta,
    check_choice,
    check_constants,
    check_label_smoothing,
    check_labels_in_range,
    check_logits_and_labels,
    check_per_sequence,
    check_tensor,
    check_unpaired_options,
    describe,
)

Impl = Literal["auto", "fused", "torch"]

PAIR_LOSS_NAMES = _ops.PAIR_LOSS_NAMES
UNPAIRED_LOSS_NAMES = _ops.UNPAIRED_LOSS_NAMES


class PreferenceLoss(NamedTuple):
    """Result of `preference_loss`; rewards carry no gradient."""

    losses: Tensor  # [P]
    chosen_rewards: Tensor  # [P] beta * (policy - reference)
    rejected_rewards: Tensor  # [P]


class UnpairedLoss(NamedTuple):
    """Result of `kto_loss`; rewards carry no gradient."""

    losses: Tensor  # [N]
    rewards: Tensor  # [N] beta * (policy - reference)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every label.

    Args:
        logits: `[..., T, V]`, float64, float32, bfloat16 or float16. Strided rows (such as
            `logits[:, :-1]`) are read in place; only a last dimension that is not contiguous is copied.
        labels: `[..., T]` int64 in [0, V) or `ignore_index`.
        shift: the Hugging Face layout, where position t scores label t + 1; the last position scores nothing.
        inplace_backward: the backward pass writes the gradient over the logits and so needs no memory of
            their size. They must not be used after that; a second backward pass raises. Under
            `torch.compile` the gradient is a new tensor.
        validate: check that the labels are in range and raise ValueError. By default on the CPU only:
            on CUDA the check waits for the device, and without it the row of such a label becomes NaN.
        impl: "auto", "fused" or "torch".

    Returns:
        `[..., T]` float32 (float64 for float64 logits), never above 0; 0 where the label is ignored, -inf for
        a label whose logit is -inf, NaN in a row with NaN or +inf or with nothing but -inf.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices; a label out of range.
    """
    return _seq_logp(
        "token_logps", logits, labels, shift, ignore_index, False, inplace_backward, validate, impl
    )[1]


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every sequence: the sum, or with `average` the mean, over its scored positions.

    Args: as `token_logps`, for logits `[B, T, V]` and labels `[B, T]`.

    Returns:
        `[B]` float32 (float64 for float64 logits); 0 for a sequence without scored positions.
    """
    return _seq_logp(
        "sequence_logps",
        logits,
        labels,
        shift,
        ignore_index,
        average,
        inplace_backward,
        validate,
        impl,
    )[0]


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> PreferenceLoss:
    """Loss of every pair from the log-probs of its two responses.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[P]` floating point. For "ipo" the averages over the
            tokens by the authors' reading, or the sums by the letter of the paper.
        reference_chosen_logps, reference_rejected_logps: `[P]`, constants; both or neither (a uniform
            reference, log-prob 0).
        loss_type: "sigmoid" (DPO, Rafailov et al. 2023, eq. 7) or "ipo" (Azar et al. 2023, eq. 17).
        beta: > 0, strength of the pull to the reference.
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences (cDPO, Mitchell 2023);
            for "sigmoid" only.

    Returns:
        `PreferenceLoss(losses, chosen_rewards, rejected_rewards)`, each `[P]`, float32 (float64 when an
        input is float64).
    """
    name = "preference_loss"
    check_tensor(name, "policy_chosen_logps", policy_chosen_logps)
    check_tensor(name, "policy_rejected_logps", policy_rejected_logps)
    check_pair_options(name, loss_type, beta, label_smoothing)
    if policy_chosen_logps.dim() != 1:
        raise ValueError(
            f"{name}: policy_chosen_logps must have shape [P], got {describe(policy_chosen_logps)}"
        )
    check_per_sequence(
        name,
        policy_chosen_logps.shape[0],
        policy_chosen_logps,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    if (reference_chosen_logps is None) != (reference_rejected_logps is None):
        raise ValueError(
            f"{name}: pass both reference_chosen_logps and reference_rejected_logps, or neither"
        )
    check_constants(
        name,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    inputs = _to_statistics_dtype(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = inputs
    assert policy_chosen is not None and policy_rejected is not None
    if use_kernels_for(name, impl, policy_chosen):
        return PreferenceLoss(
            *_ops.pair_loss(*inputs, loss_type, float(beta), float(label_smoothing))
        )
    chosen = policy_chosen if reference_chosen is None else policy_chosen - reference_chosen
    rejected = (
        policy_rejected if reference_rejected is None else policy_rejected - reference_rejected
    )
    losses = reference.PAIR_LOSSES[loss_type](chosen, rejected, beta, label_smoothing)
    return PreferenceLoss(losses, beta * chosen.detach(), beta * rejected.detach())


def kto_loss(
    policy_logps: Tensor,
    is_desirable: Tensor,
    reference_logps: Tensor | None = None,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    impl: Impl = "auto",
) -> UnpairedLoss:
    """KTO loss (Ethayarajh et al. 2024, eq. 8) of every unpaired response.

    Args:
        policy_logps: `[N]` floating point, sums over the completion.
        is_desirable: `[N]` bool.
        reference_logps: `[N]`, constants.
        kl: one number, a constant: the estimate of KL(policy || reference), see `kto_kl`.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0, the weights of the two classes.

    Returns:
        `UnpairedLoss(losses, rewards)`, each `[N]`, float32 (float64 when an input is float64).
    """
    name = "kto_loss"
    check_tensor(name, "policy_logps", policy_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"{name}: policy_logps must have shape [N], got {describe(policy_logps)}")
    check_per_sequence(
        name,
        policy_logps.shape[0],
        policy_logps,
        policy_logps=policy_logps,
        reference_logps=reference_logps,
    )
    check_unpaired_options(
        name,
        policy_logps.shape[0],
        policy_logps,
        is_desirable,
        kl,
        beta,
        desirable_weight,
        undesirable_weight,
    )
    check_constants(name, reference_logps=reference_logps)
    policy, reference_values = _to_statistics_dtype(policy_logps, reference_logps)
    assert policy is not None
    kl = kl.detach().to(policy).reshape(1) if isinstance(kl, Tensor) else policy.new_full((1,), kl)
    weights = (float(beta), float(desirable_weight), float(undesirable_weight))
    if use_kernels_for(name, impl, policy):
        return UnpairedLoss(
            *_ops.unpaired_loss(policy, reference_values, is_desirable, kl, "kto", *weights)
        )
    logratios = policy if reference_values is None else policy - reference_values
    losses = reference.UNPAIRED_LOSSES["kto"](logratios, is_desirable, kl, *weights)
    return UnpairedLoss(losses, beta * logratios.detach())


def kto_kl(policy_kl_logps: Tensor, reference_kl_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference) from mismatched prompt-completion pairs.

    Args:
        policy_kl_logps, reference_kl_logps: `[M]` log-probs of completions under prompts that they do not
            belong to (Ethayarajh et al. 2024, section 4.1).

    Returns:
        A scalar without gradient, float32 (float64 when an input is float64): the mean log-ratio, not
        below 0; 0 for M = 0.
    """
    check_tensor("kto_kl", "policy_kl_logps", policy_kl_logps)
    check_tensor("kto_kl", "reference_kl_logps", reference_kl_logps)
    check_per_sequence(
        "kto_kl",
        policy_kl_logps.numel(),
        policy_kl_logps,
        policy_kl_logps=policy_kl_logps,
        reference_kl_logps=reference_kl_logps,
    )
    policy, reference_values = _to_statistics_dtype(
        policy_kl_logps.detach(), reference_kl_logps.detach()
    )
    assert policy is not None and reference_values is not None
    return mean_of_losses(policy - reference_values).clamp(min=0)


def mean_of_losses(losses: Tensor) -> Tensor:
    """Mean over `[N]`, 0 for N = 0.

    Summed in float64: the mean of equal numbers is that number, so that policy == reference gives ln 2
    bit for bit whatever the number of pairs.
    """
    return (losses.sum(dtype=torch.float64) / max(losses.shape[0], 1)).to(losses.dtype)


def check_pair_options(function: str, loss_type: str, beta: float, label_smoothing: float) -> None:
    check_choice(function, "loss_type", loss_type, PAIR_LOSS_NAMES)
    check_beta(function, beta)
    check_label_smoothing(function, label_smoothing)
    if label_smoothing != 0 and loss_type != "sigmoid":
        raise ValueError(
            f"{function}: label_smoothing is defined for loss_type 'sigmoid' only, "
            f"got {label_smoothing} with {loss_type!r}"
        )


def _to_statistics_dtype(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if double else torch.float32
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def use_kernels_for(function: str, impl: Impl, like: Tensor) -> bool:
    check_choice(function, "impl", impl, ("auto", "fused", "torch"))
    if impl == "torch":
        return False
    available = _ops.has_kernels(like.device.type)
    if impl == "fused" and not available:
        raise ValueError(
            f"{function}: impl='fused' has no kernels for device {like.device} in this build; "
            "use impl='auto' or impl='torch'"
        )
    return available


def _seq_logp(
    function: str,
    logits: Tensor,
    labels: Tensor,
    shift: bool,
    ignore_index: int,
    average: bool,
    inplace_backward: bool,
    validate: bool | None,
    impl: Impl,
    logits_name: str = "logits",
) -> tuple[Tensor, Tensor]:
    """Checks, then (sequence log-probs [B], token log-probs with the shape of labels)."""
    check_logits_and_labels(function, logits, labels, logits_name)
    if function == "sequence_logps" and logits.dim() != 3:
        raise ValueError(f"{function}: logits must have shape [B, T, V], got {describe(logits)}")
    use_kernels = use_kernels_for(function, impl, logits)
    compiling = torch.compiler.is_compiling()
    if validate is None:
        validate = logits.device.type == "cpu" and not compiling
    # On the CPU the operator checks its labels itself; this check costs a small batch more than the operator.
    if validate and not (use_kernels and logits.device.type == "cpu"):
        check_labels_in_range(function, labels, logits.shape[-1], ignore_index)
    if not use_kernels:
        if inplace_backward:
            raise ValueError(f"{function}: inplace_backward needs the kernels, not impl='torch'")
        return reference.seq_logp(logits, labels, ignore_index, shift, average)
    if inplace_backward and not compiling:
        _check_inplace(function, logits, logits_name)
    shape = labels.shape
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    elif logits.dim() > 3:
        logits, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    arguments = (logits, labels, ignore_index, shift, average, inplace_backward and not compiling)
    if compiling:
        sequences, tokens, *_ = _ops.seq_logp(*arguments)
    else:
        try:
            sequences, tokens, *_ = _ops.seq_logp(*arguments)
        except RuntimeError:
            check_labels_in_range(function, labels.view(shape), logits.shape[-1], ignore_index)
            raise
    return sequences, tokens.reshape(shape)


def _check_inplace(function: str, logits: Tensor, name: str) -> None:
    """Each element must own its memory, and the kernels must be able to write through its strides."""
    strides = [s for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1]
    sizes = [n for n in logits.shape if n > 1]
    spans = sorted(zip(strides, sizes, strict=True))
    overlapping = any(outer[0] < inner[0] * inner[1] for inner, outer in itertools.pairwise(spans))
    if 0 in strides or overlapping or logits.stride(-1) != 1 or logits.dim() > 3:
        raise ValueError(
            f"{function}: inplace_backward needs {name} [B, T, V] or [T, V] whose elements do not share "
            f"memory and whose last dimension is contiguous, got {describe(logits)} with strides "
            f"{list(logits.stride())}"
        )
