"""One call of the fuzzer from its number: drawn, made, judged, and compared with itself by other threads."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzz.case import Case, Fault, same_values, shown, verdict
from fuzz.draw import Draw

ROOMS = (
    "operators_rows", "operators_products", "on_attention", "on_logits", "on_hidden", "on_logps", "on_arrays",
)  # fmt: skip


def subjects() -> list[Callable[[Draw], Case]]:
    rooms = ("planted",) if "FUZZ_PLANTED" in os.environ else ROOMS
    return [s for room in rooms for s in importlib.import_module(f"fuzz.{room}").SUBJECTS]


def make(
    seed: int, index: int, choices: Sequence[Callable[[Draw], Case]]
) -> tuple[str, Case, int, bool]:
    """(subject, call, threads, whether it is to be repeated by one thread)"""
    draw = Draw(seed, index)
    subject = draw.pick(choices)
    # the same for some calls in a row: to make other threads takes longer than most calls
    threads = (1, 1, 1, 2, 1, 5)[index // 25 % 6]
    again, spoil = draw.chance(0.2), draw.chance(0.4)
    case = subject(draw)
    if spoil:
        case.spoil(draw)
    return subject.__name__, case, threads, again and threads > 1


def play(seed: int, index: int, choices: Sequence[Callable[[Draw], Case]]) -> tuple[str, str]:
    """(subject, "right" or "refused"). Raises Fault with the call's description."""
    name, case, threads, again = make(seed, index, choices)
    try:
        torch.set_num_threads(threads)
        outcome, results = verdict(case)
        if again and outcome == "right" and case.same_bits and not case.spoiled:
            torch.set_num_threads(1)
            _, other, _, _ = make(seed, index, choices)
            _check_bits(results, other.run(**other.arguments), threads)
    except Fault as fault:
        described = make(seed, index, choices)[1].describe()  # this one may have been written to
        raise Fault(f"{name}: {described}\n  threads {threads}: {fault}") from fault
    return name, outcome


def _check_bits(results: Sequence[Any], others: Sequence[Any], threads: int) -> None:
    for number, (ours, other) in enumerate(zip(results, others, strict=True)):
        if not same_values(ours, other):
            raise Fault(
                f"result {number}, {shown(ours)}, has other bits with {threads} threads than with one"
            )
