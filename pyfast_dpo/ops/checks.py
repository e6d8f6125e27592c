"""Checks of what users pass: every message names the function, the argument, what was expected and given."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from pyfast_dpo.ops.dtypes import LOGITS_DTYPES


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(
            f"{function}: {name} must be a dense tensor, got {value.layout} {describe(value)}"
        )


def check_flags(function: str, **flags: object) -> None:
    """True or False: what is merely true, such as a string, would mean one thing here and another there."""
    for name, value in flags.items():
        if type(value) is not bool:
            raise TypeError(f"{function}: {name} must be True or False, got {describe(value)}")


def check_label_options(
    function: str, shift: object, ignore_index: object, validate: object = None
) -> None:
    check_flags(function, shift=shift, **({} if validate is None else {"validate": validate}))
    if type(ignore_index) is not int:
        raise TypeError(f"{function}: ignore_index must be an int, got {describe(ignore_index)}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{function}: ignore_index must be within int64, got {ignore_index}")


def check_logits_and_labels(
    function: str, logits: Tensor, labels: Tensor, name: str = "logits"
) -> None:
    """`name` is what the function calls its logits."""
    check_tensor(function, name, logits)
    check_tensor(function, "labels", labels)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{function}: {name} must be float64, float32, bfloat16 or float16, got {describe(logits)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{function}: labels must be int64, got {describe(labels)}")
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(
            f"{function}: {name} must have shape [..., T, V] with V >= 1, got {describe(logits)}"
        )
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"{function}: labels must have the shape of {name} without the vocabulary, "
            f"{list(logits.shape[:-1])}, got {describe(labels)}"
        )
    check_same_device(function, name, logits, "labels", labels)


def check_same_device(
    function: str, first_name: str, first: Tensor, second_name: str, second: Tensor
) -> None:
    if first.device != second.device:
        raise ValueError(
            f"{function}: {second_name} must be on the device of {first_name}, {first.device}, "
            f"got {describe(second)}"
        )


def check_labels_in_range(
    function: str, labels: Tensor, vocab: int, ignore_index: int, shift: bool = False
) -> None:
    """Reads the labels (a device synchronization on CUDA) and raises for the first one outside [0, vocab).

    With `shift` no position scores the first label, which may be anything, as for the kernels.
    """
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if shift:
        bad[..., :1] = False
    if bool(bad.any()):
        index = [int(i) for i in bad.nonzero()[0]]
        raise ValueError(
            f"{function}: labels must be in [0, {vocab}) or ignore_index ({ignore_index}), "
            f"got {int(labels[tuple(index)])} at {index} ({int(bad.sum())} such labels in all)"
        )


def check_per_sequence(function: str, count: int, like: Tensor, **tensors: Tensor | None) -> None:
    """One floating-point number a sequence, on the device of `like`."""
    for name, value in tensors.items():
        if value is None:
            continue
        check_tensor(function, name, value)
        if not value.is_floating_point():
            raise TypeError(f"{function}: {name} must be floating point, got {describe(value)}")
        if value.shape != (count,):
            raise ValueError(f"{function}: {name} must have shape [{count}], got {describe(value)}")
        if value.device != like.device:
            raise ValueError(f"{function}: {name} must be on {like.device}, got {describe(value)}")


def check_constants(function: str, **tensors: Tensor | None) -> None:
    """Reference values are constants: a gradient for them is not computed, so it must not be expected."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{function}: {name} requires grad, but the reference is a constant of the loss; "
                f"compute it under torch.no_grad() or pass {name}.detach()"
            )


def check_number(function: str, name: str, value: object) -> None:
    """A tensor is refused too: its gradient would be lost."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a number, got {describe(value)}")
    if isinstance(value, int) and not -(2**53) <= value <= 2**53:
        raise ValueError(f"{function}: {name} must be a float or an int within 2^53, got {value}")


def check_finite(function: str, name: str, value: float) -> None:
    check_number(function, name, value)
    most = torch.finfo(torch.float32).max  # kernels compute in it
    if not -most <= value <= most:
        raise ValueError(f"{function}: {name} must be finite, got {value}")


def check_positive(function: str, name: str, value: float) -> None:
    """Positive and finite in float32 as well, in which kernels and half types compute."""
    check_number(function, name, value)
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(f"{function}: {name} must be positive and finite, got {value}")


def check_beta(function: str, beta: float) -> None:
    check_positive(function, "beta", beta)


def check_label_smoothing(function: str, label_smoothing: float) -> None:
    check_number(function, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{function}: label_smoothing must be in [0, 0.5), got {label_smoothing}")


def check_weight(function: str, name: str, weight: float) -> None:
    check_number(function, name, weight)
    if not 0 <= weight <= torch.finfo(torch.float32).max:  # in which losses are computed
        raise ValueError(f"{function}: {name} must be finite and not negative, got {weight}")


def check_unpaired_options(
    function: str,
    count: int,
    like: Tensor,
    is_desirable: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> None:
    check_tensor(function, "is_desirable", is_desirable)
    check_beta(function, beta)
    check_weight(function, "desirable_weight", desirable_weight)
    check_weight(function, "undesirable_weight", undesirable_weight)
    if is_desirable.dtype != torch.bool:
        raise TypeError(f"{function}: is_desirable must be bool, got {describe(is_desirable)}")
    if is_desirable.shape != (count,):
        raise ValueError(
            f"{function}: is_desirable must have shape [{count}], got {describe(is_desirable)}"
        )
    if is_desirable.device != like.device:
        raise ValueError(
            f"{function}: is_desirable must be on {like.device}, got {describe(is_desirable)}"
        )
    if not isinstance(kl, Tensor):
        check_finite(function, "kl", kl)
        if abs(kl) > torch.finfo(torch.float32).max:
            raise ValueError(f"{function}: kl must be within float32, got {kl}")
    elif kl.numel() != 1 or kl.layout != torch.strided:
        raise ValueError(f"{function}: kl must be one number, got {describe(kl)}")
    else:
        check_constants(function, kl=kl)


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {list(choices)}, got {value!r}")
