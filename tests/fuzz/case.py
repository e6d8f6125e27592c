"""A call, what may come of it, and the verdict: right by the rule, refused by name, or a fault."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _helpers import assert_rule
from fuzz.draw import Draw
from torch import Tensor

REFUSALS = (ValueError, TypeError)
# The dispatcher refuses types and devices before any of our code runs, in its own classes of errors.
REFUSALS_OF_OPERATORS = (RuntimeError, ValueError, TypeError, NotImplementedError)


class Fault(AssertionError):
    """What the fuzzer reports."""


@dataclass
class Case:
    """One call: `run(**arguments)` gives tensors, which `judge(arguments, results)` holds against the truth."""

    name: str  # of the function, as its messages say it
    arguments: dict[str, Any]
    run: Callable[..., Sequence[Any]]
    judge: Callable[[dict[str, Any], Sequence[Any]], None]
    names: Sequence[
        str
    ] = ()  # what a refusal must name one of; of the function's parameters by default
    operator: bool = False
    written: Sequence[str] = ()  # arguments that the call may change
    spoiled: Sequence[str] = ()
    may_refuse: bool = False  # also with arguments that were not spoiled
    same_bits: bool = True  # for any number of threads
    only_fits: bool = False  # called by our own code alone: no arguments that do not fit

    def spoil(self, draw: Draw) -> None:
        """One argument, sometimes two, replaced by something that mostly does not fit."""
        if self.only_fits:
            return
        chosen = draw.random.sample(
            list(self.arguments), min(len(self.arguments), 1 + draw.chance(0.15))
        )
        for name in chosen:
            self.arguments[name] = draw.spoiled(self.arguments[name])
        self.spoiled = chosen

    def describe(self) -> str:
        given = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({given})" + (
            f" spoiled: {', '.join(self.spoiled)}" if self.spoiled else ""
        )


def public(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    judge: Callable[..., None],
    run: Callable[..., Sequence[Any]] | None = None,
    **options: Any,
) -> Case:
    """Of a public function; `run` by default calls it and lists what it returns."""
    names = [*parameters(function), *arguments]
    return Case(function.__name__, arguments, run or (lambda **a: tensors_of(function(**a))), judge, names,
                **options)  # fmt: skip


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    named = inspect.signature(inspect.unwrap(function)).parameters.values()
    return tuple(p.name for p in named if p.kind is not p.VAR_KEYWORD)


def operator(
    name: str, arguments: dict[str, Any], judge: Callable[..., None], written: Sequence[str] = ()
) -> Case:
    """Of an operator of the schema, called directly. What it writes comes after what it returns."""

    def run(**given: Any) -> Sequence[Any]:
        returned = tensors_of(getattr(torch.ops.pyfast_dpo, name)(**given))
        return [*returned, *(given[n] for n in written)]

    return Case(f"pyfast_dpo::{name}", arguments, run, judge, list(arguments), True, written)


def tensors_of(value: Any) -> list[Any]:
    """The tensors, arrays and numbers of a result, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [] if value is None else [value]


# --- verdict --------------------------------------------------------------------------------------------


def verdict(case: Case) -> tuple[str, Sequence[Any]]:
    """("right" or "refused", results). Raises Fault for anything else."""
    before = {name: kept(value) for name, value in case.arguments.items()}
    try:
        results = case.run(**case.arguments)
    except Exception as error:
        _check_refusal(case, error)
        _check_unwritten(case, before)
        return "refused", []
    if any(isinstance(v, Tensor) and v.is_meta for v in case.arguments.values()):
        if not all(isinstance(r, Tensor) and r.is_meta for r in results):
            raise Fault("an argument on meta, and results that are elsewhere")
        return "right", []
    try:
        case.judge(before, results)
    except AssertionError as error:
        raise Fault(str(error)) from error
    except Exception as error:
        if case.spoiled:
            raise Fault(
                f"accepted, but the reference says {type(error).__name__}: {error}"
            ) from error
        raise
    _check_unwritten(case, before)
    return "right", results


def _check_refusal(case: Case, error: Exception) -> None:
    allowed = REFUSALS_OF_OPERATORS if case.operator else REFUSALS
    text = f"{type(error).__name__}: {error}"
    if not case.spoiled and not case.may_refuse:
        raise Fault(f"refused what fits: {text}") from error
    if type(error) not in allowed:
        raise Fault(f"refused by another class of error: {text}") from error
    if case.name not in str(error):
        raise Fault(f"refused without the function's name: {text}") from error
    if not case.operator and not any(name in str(error) for name in case.names):
        raise Fault(f"refused without an argument's name: {text}") from error


def _check_unwritten(case: Case, before: dict[str, Any]) -> None:
    for name, value in case.arguments.items():
        if name in case.written or case.arguments.get("inplace_backward") is True:
            continue
        if not isinstance(value, (Tensor, np.ndarray)):
            continue
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            continue
        if any(may_share(value, case.arguments[w]) for w in case.written):
            continue
        if not same_values(value, before[name]):
            raise Fault(f"{name} was changed")


def may_share(a: Any, b: Any) -> bool:
    if not all(
        isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta for t in (a, b)
    ):
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def kept(value: Any) -> Any:
    """As it was before the call, with the strides it has; one memory for elements that shared it."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def same_values(a: Any, b: Any) -> bool:
    """NaN equals NaN, and 0 differs from -0 in tensors."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        a, b = (t.detach().resolve_neg().resolve_conj().reshape(-1) for t in (a, b))
        a, b = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
        return torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return bool(a == b) or (a != a and b != b)


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        strides = list(value.stride()) if value.layout == torch.strided else value.layout
        return f"{str(value.dtype)[6:]}{list(value.shape)} strides {strides} {value.device}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype}{list(value.shape)} strides {value.strides}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


# --- comparisons ----------------------------------------------------------------------------------------


def check(
    what: str, ours: Any, truth: Tensor, tolerance: Tensor | float, peer: Tensor | None = None
) -> None:
    """The rule of tests/_helpers.py; a truth beyond the range of our dtype is what that dtype makes of it."""
    assert isinstance(ours, Tensor), f"{what}: {type(ours).__name__}"
    truth = truth.detach()
    narrowed = truth.to(ours.dtype).double()
    truth = torch.where(narrowed.isfinite(), truth.double(), narrowed)
    assert_rule(what, ours, truth if peer is None else peer, truth, tolerance)
