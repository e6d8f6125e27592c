"""Twenty seconds of `make fuzz` on the usual build: the first calls of every instruction set that this CPU has."""

from __future__ import annotations

import pytest
from fuzz.play import subjects
from fuzz.run import LOT, Fuzzer, Report

SECONDS = 20.0
SEED = 22  # one whose calls have all been made under the sanitizers


@pytest.fixture(scope="module")
def report() -> Report:
    fuzzer, report = Fuzzer(SEED, "", "", None), Report()
    for number in range(len(fuzzer.levels)):
        # A lot starts in a few seconds, which are not calls.
        fuzzer.run_lot(number * LOT, 4000, SECONDS / len(fuzzer.levels), report)
    return report


def test_no_call_of_the_slice_finds_a_fault(report, capsys) -> None:
    found = "\n".join(f"call {index}: {text}" for index, text in report.faults)
    assert not report.faults, found
    with capsys.disabled():  # what the slice covered
        shares = ", ".join(
            f"{name} {count}" for name, count in sorted(report.by_capability.items())
        )
        refused = sum(n for name, n in report.counts.items() if name.endswith("refused"))
        print(
            f" [fuzz: {report.calls} calls ({shares}), {refused} of them refused by name] ", end=""
        )


def test_the_slice_reaches_every_instruction_set_and_most_subjects(report) -> None:
    assert set(report.by_capability) == set(Fuzzer(SEED, "", "", None).levels)
    assert sum(report.counts.values()) == report.calls
    if report.calls < 1000:
        pytest.skip(f"a busy machine: {report.calls} calls in {SECONDS:g} seconds")
    names = {subject.__name__ for subject in subjects()}
    assert {name for name in names if report.counts[f"{name} right"] == 0} == set()
    refused = {name for name in names if report.counts[f"{name} refused"] > 0}
    assert names - refused <= {"packed"}, "called by our own code alone"
