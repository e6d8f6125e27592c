"""A function with faults, for the fuzzer's own tests: the compiled library is named by FUZZ_PLANTED."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import torch
from fuzz.case import Case, check
from fuzz.draw import Draw
from torch import Tensor

FAULTS = ("none", "beyond", "shift", "value")


def planted(draw: Draw) -> Case:
    library = ctypes.CDLL(os.environ["FUZZ_PLANTED"])
    library.planted_sum.restype = ctypes.c_float
    fault = os.environ["FUZZ_PLANTED_FAULT"] if draw.chance(0.2) else "none"
    arguments = {"values": draw.normal((draw.size(33, 1),))}

    def run(values: Tensor) -> Sequence[Tensor]:
        pointer, count = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel())
        total = library.planted_sum(pointer, count, FAULTS.index(fault))
        return [torch.tensor(total + (1e-3 if fault == "value" else 0.0))]

    def judge(given: dict[str, Any], results: Sequence[Tensor]) -> None:
        values = given["values"].double()
        check("sum", results[0], values.sum(), 1e-5 * float(values.abs().sum() + 1e-3))

    return Case("planted_sum", arguments, run, judge, ("values",), only_fits=True)


SUBJECTS = (planted,)
