"""From hidden states and the lm_head's weight to log-probs and losses, without a logits matrix.

Only scored positions are projected: prompt and padding never reach the lm_head. Logits exist for one chunk
of whole pairs at a time, in float32 whatever the inputs, within `max_chunk_bytes`. With a trainable head a
loss costs three matrix products of the scored rows, with a frozen head (LoRA) two, the reference one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfast_dpo import reference
from pyfast_dpo._checks import (
    LOGITS_DTYPES,
    check_constants,
    check_labels_in_range,
    check_per_sequence,
    check_same_device,
    check_tensor,
    check_unpaired_options,
    describe,
)
from pyfast_dpo._head import Head
from pyfast_dpo._linear import LinearLogps, LinearLoss, UnitLoss, Units
from pyfast_dpo.functional import (
    Impl,
    check_pair_options,
    kto_loss,
    mean_of_losses,
    preference_loss,
    use_kernels_for,
)
from pyfast_dpo.fused import FusedPreferenceLoss, FusedUnpairedLoss, fused_dpo_loss, fused_kto_loss

CHUNK_BYTES = 64 * 2**20


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = CHUNK_BYTES,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every label under logits = softcap * tanh(logit_scale (hidden W^T + bias) / softcap).

    Args:
        hidden: `[..., T, H]`, float64, float32, bfloat16 or float16.
        weight: `[V, H]`, in the dtype and on the device of hidden; bias: `[V]`.
        labels: `[..., T]` int64 in [0, V) or `ignore_index`; shift: as in `token_logps`.
        logit_scale, softcap: what the model does to its logits; softcap None: nothing.
        max_chunk_bytes: bound of the float32 logits that exist at a time.
        validate, impl: as in `token_logps`.

    Returns:
        `[..., T]` float32 (float64 for float64 inputs); 0 where the label is ignored.

    Raises:
        TypeError, ValueError: wrong types, dtypes, shapes, devices; sharded or quantized weights; a budget
        too small for one row of logits.
    """
    name = "linear_token_logps"
    head = _checked_head(name, hidden, weight, labels, bias, logit_scale, softcap)
    if not use_kernels_for(name, impl, hidden):
        return reference.seq_logp(_torch_logits(hidden, head), labels, ignore_index, shift, False)[
            1
        ]
    hidden, head = _under_autocast(hidden, head)
    _validate(name, labels, head, ignore_index, validate)
    flat_labels = reference.shifted_labels(labels, ignore_index) if shift else labels
    index = (flat_labels.flatten() != ignore_index).nonzero().squeeze(1)
    scored = LinearLogps.apply(
        hidden.reshape(-1, hidden.shape[-1])[index],
        head.weight,
        head.bias,
        flat_labels.flatten()[index],
        (head.logit_scale, head.softcap),
        _rows_in_budget(name, max_chunk_bytes, head),
    )
    tokens = scored.new_zeros(labels.numel()).index_put((index,), scored)
    return tokens.view(labels.shape)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    average: bool = False,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = CHUNK_BYTES,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of every sequence: the sum, or with `average` the mean, over its scored positions.

    Args: as `linear_token_logps`, for hidden `[B, T, H]` and labels `[B, T]`.

    Returns:
        `[B]` float32 (float64 for float64 inputs); 0 for a sequence without scored positions.
    """
    tokens = linear_token_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        shift=shift,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        max_chunk_bytes=max_chunk_bytes,
        validate=validate,
        impl=impl,
    )
    sums = tokens.sum(-1, dtype=torch.float64)
    if average:
        targets = reference.shifted_labels(labels, ignore_index) if shift else labels
        sums = sums / (targets != ignore_index).sum(-1).clamp(min=1)
    return sums.to(tokens.dtype)


def fused_linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reference_logps: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    average: bool | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = CHUNK_BYTES,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedPreferenceLoss:
    """`fused_dpo_loss` from hidden states: P pairs stacked as rows 0..P-1 chosen, P..2P-1 rejected.

    Args:
        hidden: `[2P, T, H]`; weight: `[V, H]`; labels: `[2P, T]`; bias: `[V]`; as in `linear_token_logps`.
        reference_logps: `[2P]` log-probs of the reference model, summed or averaged as those of the policy;
            or
        reference_hidden: `[2P, T, H']`, its hidden states, with `reference_weight` `[V, H']` and
            `reference_bias` (by default the policy's own weight and bias, detached).
        beta, loss_type, label_smoothing, average: as in `fused_dpo_loss`.

    Returns:
        `FusedPreferenceLoss`. Double backward raises; use impl="torch" for it.
    """
    name = "fused_linear_dpo_loss"
    check_pair_options(name, loss_type, beta, label_smoothing)
    head = _checked_head(name, hidden, weight, labels, bias, logit_scale, softcap)
    if hidden.dim() != 3 or hidden.shape[0] % 2:
        raise ValueError(
            f"{name}: hidden must have shape [2P, T, H], chosen rows first, then as many rejected rows, "
            f"got {describe(hidden)}"
        )
    if average is None:
        average = loss_type == "ipo"
    options: dict[str, Any] = {
        "average": average,
        "shift": shift,
        "ignore_index": ignore_index,
        "impl": impl,
    }
    head_options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "max_chunk_bytes": max_chunk_bytes,
    }
    reference_values = _reference_logps(
        name, head, labels, reference_logps, reference_hidden, reference_weight, reference_bias,
        {**options, **head_options, "validate": validate},
    )  # fmt: skip
    if not use_kernels_for(name, impl, hidden):
        return fused_dpo_loss(
            _torch_logits(hidden, head),
            labels,
            reference_logps=reference_values,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            validate=validate,
            **options,
        )
    pairs = hidden.shape[0] // 2

    def unit_loss(logps: Tensor, first: int, last: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        chosen, rejected = logps[0::2], logps[1::2]
        result = preference_loss(
            chosen,
            rejected,
            None if reference_values is None else reference_values[first:last],
            None if reference_values is None else reference_values[pairs + first : pairs + last],
            loss_type=loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
        )
        return result.losses.sum() / pairs, (
            chosen, rejected, result.chosen_rewards, result.rejected_rewards, result.losses,
        )  # fmt: skip

    order = torch.arange(2 * pairs, device=labels.device).view(2, pairs).T.flatten()
    loss, _, chosen, rejected, chosen_rewards, rejected_rewards, losses = _loss_of_units(
        name, hidden, head, labels, order, 2, unit_loss, 5, average, shift, ignore_index, max_chunk_bytes, validate
    )  # fmt: skip
    return FusedPreferenceLoss(loss, chosen, rejected, chosen_rewards, rejected_rewards, losses)


def fused_linear_ipo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, average: bool = True, **options: Any
) -> FusedPreferenceLoss:
    """`fused_linear_dpo_loss` with `loss_type="ipo"`, on length-averaged log-probs; the same options."""
    return fused_linear_dpo_loss(
        hidden, weight, labels, loss_type="ipo", average=average, **options
    )


def fused_linear_kto_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor | float,
    reference_logps: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    bias: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    shift: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_chunk_bytes: int = CHUNK_BYTES,
    validate: bool | None = None,
    impl: Impl = "auto",
) -> FusedUnpairedLoss:
    """`fused_kto_loss` from hidden states `[N, T, H]`; the other arguments as in `fused_linear_dpo_loss`."""
    name = "fused_linear_kto_loss"
    head = _checked_head(name, hidden, weight, labels, bias, logit_scale, softcap)
    if hidden.dim() != 3:
        raise ValueError(f"{name}: hidden must have shape [N, T, H], got {describe(hidden)}")
    check_unpaired_options(
        name, hidden.shape[0], hidden, is_desirable, kl, beta, desirable_weight, undesirable_weight
    )
    options: dict[str, Any] = {"shift": shift, "ignore_index": ignore_index, "impl": impl}
    head_options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "max_chunk_bytes": max_chunk_bytes,
    }
    reference_values = _reference_logps(
        name, head, labels, reference_logps, reference_hidden, reference_weight, reference_bias,
        {**options, **head_options, "average": False, "validate": validate},
    )  # fmt: skip
    loss_options: dict[str, Any] = {
        "kl": kl,
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    if not use_kernels_for(name, impl, hidden):
        return fused_kto_loss(
            _torch_logits(hidden, head),
            labels,
            is_desirable,
            reference_logps=reference_values,
            validate=validate,
            **loss_options,
            **options,
        )
    count = hidden.shape[0]

    def unit_loss(logps: Tensor, first: int, last: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        result = kto_loss(
            logps,
            is_desirable[first:last],
            None if reference_values is None else reference_values[first:last],
            **loss_options,
        )
        return result.losses.sum() / count, (result.rewards, result.losses)

    loss, logps, rewards, losses = _loss_of_units(
        name, hidden, head, labels, None, 1, unit_loss, 2, False, shift, ignore_index, max_chunk_bytes, validate
    )  # fmt: skip
    return FusedUnpairedLoss(loss, logps, rewards, losses)


def _loss_of_units(
    function: str,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    order: Tensor | None,
    sequences: int,
    unit_loss: UnitLoss,
    outputs: int,
    average: bool,
    shift: bool,
    ignore_index: int,
    max_chunk_bytes: int,
    validate: bool | None,
) -> tuple[Tensor, ...]:
    """(loss, log-probs in unit order, the outputs of unit_loss); the last of them are the losses."""
    hidden, head = _under_autocast(hidden, head)
    max_rows = _rows_in_budget(function, max_chunk_bytes, head)
    _validate(function, labels, head, ignore_index, validate)
    targets = reference.shifted_labels(labels, ignore_index) if shift else labels
    if order is None:
        order = torch.arange(labels.shape[0], device=labels.device)
    scored = targets[order] != ignore_index
    sequence, position = scored.nonzero(as_tuple=True)
    index = order[sequence] * labels.shape[1] + position
    # On CUDA these two, the number of rows above and their division here, wait for the device.
    units = Units(scored.sum(1).tolist(), sequences, average, max_rows)
    if not units.lengths:
        empty = hidden.new_zeros(0, dtype=reference.statistics_dtype(hidden.dtype))
        return (hidden.sum() * 0).to(empty.dtype), *(empty for _ in range(outputs + 1))
    loss, *columns = LinearLoss.apply(
        hidden.reshape(-1, hidden.shape[-1])[index],
        head.weight,
        head.bias,
        targets.flatten()[index],
        (head.logit_scale, head.softcap),
        units,
        unit_loss,
    )
    # The value as every other path computes it, so that equal losses have their own value as the mean.
    return loss + (mean_of_losses(columns[-1]) - loss.detach()), *columns


def _reference_logps(
    function: str,
    head: Head,
    labels: Tensor,
    logps: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """The reference's log-probs `[rows]` from whichever of the two forms was given."""
    if logps is not None and hidden is not None:
        raise ValueError(f"{function}: pass reference_logps or reference_hidden, not both")
    if hidden is not None:
        check_tensor(function, "reference_hidden", hidden)
    check_per_sequence(function, labels.shape[0], labels, reference_logps=logps)
    check_constants(function, reference_logps=logps, reference_hidden=hidden)
    if hidden is None:
        return logps
    if weight is None:
        weight, bias = head.weight, head.bias
    with torch.no_grad():
        return linear_sequence_logps(hidden, weight, labels, bias=bias, **options)


def _checked_head(
    function: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> Head:
    for name, value in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        check_tensor(function, name, value)
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{function}: weight is a sharded DTensor; pass weight.full_tensor(), or compute the loss inside "
            "the lm_head's own forward, where FSDP has gathered it"
        )
    if hidden.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{function}: hidden must be float64, float32, bfloat16 or float16, got {describe(hidden)}"
        )
    if not weight.is_floating_point():
        raise TypeError(
            f"{function}: weight must be floating point; dequantize a quantized lm_head first, "
            f"got {describe(weight)}"
        )
    autocast = torch.is_autocast_enabled(hidden.device.type)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    for name, value in parameters.items():
        check_tensor(function, name, value)
        if value.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{function}: {name} must have the dtype of hidden, {hidden.dtype}, got {describe(value)}"
            )
        check_same_device(function, "hidden", hidden, name, value)
    if (
        hidden.dim() < 2
        or weight.dim() != 2
        or weight.shape[1] != hidden.shape[-1]
        or 0 in weight.shape
    ):
        raise ValueError(
            f"{function}: hidden must have shape [..., T, H] and weight [V, H] with V, H >= 1, "
            f"got {describe(hidden)} and {describe(weight)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{function}: bias must have shape [{weight.shape[0]}], got {describe(bias)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{function}: labels must be int64, got {describe(labels)}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{function}: labels must have shape {list(hidden.shape[:-1])}, got {describe(labels)}"
        )
    check_same_device(function, "hidden", hidden, "labels", labels)
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{function}: softcap must be positive and finite or None, got {softcap}")
    if not 0 < logit_scale < float("inf"):
        raise ValueError(f"{function}: logit_scale must be positive and finite, got {logit_scale}")
    return Head(weight, bias, float(logit_scale), None if softcap is None else float(softcap))


def _under_autocast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """What autocast would do to a linear layer's inputs; the gradients come back in their own dtypes."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, head
    dtype = torch.get_autocast_dtype(device)
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), head._replace(weight=head.weight.to(dtype), bias=bias)


def _validate(
    function: str, labels: Tensor, head: Head, ignore_index: int, validate: bool | None
) -> None:
    if validate or (validate is None and labels.device.type == "cpu"):
        check_labels_in_range(function, labels, head.weight.shape[0], ignore_index)


def _rows_in_budget(function: str, max_chunk_bytes: int, head: Head) -> int:
    row = head.weight.shape[0] * (8 if head.weight.dtype == torch.float64 else 4)
    if max_chunk_bytes < row:
        raise ValueError(
            f"{function}: max_chunk_bytes must hold one row of logits, {row} bytes, got {max_chunk_bytes}"
        )
    return max_chunk_bytes // row


def _torch_logits(hidden: Tensor, head: Head) -> Tensor:
    """The whole matrix, differentiable to any order: impl="torch"."""
    wide = reference.statistics_dtype(hidden.dtype)
    logits = torch.nn.functional.linear(
        hidden.to(wide), head.weight.to(wide), None if head.bias is None else head.bias.to(wide)
    )
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
