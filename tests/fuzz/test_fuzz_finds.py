"""The fuzzer finds what it is there for: planted faults, each with the words that say what was wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fuzz import on_logits, operators_products
from fuzz.case import Fault
from fuzz.draw import Draw
from fuzz.play import make, play
from fuzz.run import Fuzzer, Report, preloaded

from pyfast_dpo.logprobs import logits as on_logits_of_the_package

HERE = Path(__file__).resolve().parent
honest = on_logits_of_the_package.operators.seq_logp


def off_by_a_thousandth(*arguments):
    sequences, tokens, *rest = honest(*arguments)
    return sequences + 1e-3, tokens + 1e-3, *rest


def refuses_without_a_name(*arguments):
    raise RuntimeError("something went wrong")


def writes_to_what_it_reads(logits, *arguments):
    results = honest(logits, *arguments)
    if logits.numel():
        logits.detach().view(-1)[0].add_(1) if logits.is_contiguous() else None
    return results


def depends_on_threads(*arguments):
    sequences, tokens, *rest = honest(*arguments)
    nudge = 1 - torch.finfo(torch.float32).eps * (torch.get_num_threads() - 1)
    return sequences * nudge, tokens * nudge, *rest


def hides_nan(*arguments):
    return tuple(result.nan_to_num(0.0) for result in honest(*arguments))


PLANTED = {  # in the kernel behind token_logps and sequence_logps
    "a value off by a thousandth": (off_by_a_thousandth, "worst of"),
    "an error without names": (refuses_without_a_name, "refused what fits"),
    "an input that is written to": (writes_to_what_it_reads, "was changed"),
    "bits that depend on threads": (depends_on_threads, "other bits"),
    "NaN hidden by a number": (hides_nan, "truth nan"),
}
CALLS = 300  # some of them with two and five threads


def found(subjects) -> list[str]:
    faults = []
    for index in range(CALLS):
        try:
            play(5, index, subjects)
        except Fault as fault:
            faults.append(str(fault))
    torch.set_num_threads(1)
    return faults


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, monkeypatch) -> None:
    fault, words = PLANTED[name]
    monkeypatch.setattr(on_logits_of_the_package.operators, "seq_logp", fault)
    faults = found([on_logits.logps])
    assert any(words in text for text in faults), faults[:3]


def test_without_it_nothing_is_found() -> None:
    assert found([on_logits.logps]) == []


def test_a_call_that_fits_nothing_and_is_accepted_is_found(monkeypatch) -> None:
    """An operator that takes any arguments as if they fitted."""

    def accepts(name, arguments, judge, written=()):
        case = original(name, arguments, judge, written)
        case.run = lambda **given: [torch.zeros(3, 3)]
        return case

    original = operators_products.operator
    monkeypatch.setattr(operators_products, "operator", accepts)
    faults = found([operators_products.head_grad_rows])
    assert any("spoiled" in text and "accepted" in text for text in faults)


def test_a_number_and_a_seed_give_the_same_call() -> None:
    subjects = [on_logits.logps, operators_products.linear]
    for index in range(40):
        first, again = (make(9, index, subjects) for _ in range(2))
        assert first[0] == again[0] and first[1].describe() == again[1].describe()
    assert Draw(9, 1).normal((5,)).tolist() != Draw(10, 1).normal((5,)).tolist()


# --- under the sanitizers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if shutil.which("g++") is None or not Path(preloaded("address").split()[0]).is_absolute():
        pytest.skip("g++ with its sanitizers' run-time libraries is not here")
    path = tmp_path_factory.mktemp("planted") / "planted.so"
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC", "-g"]
    subprocess.run(["g++", *flags, str(HERE / "planted.cpp"), "-o", str(path)], check=True)
    return path


SEEN = {  # fault -> what the report of its call says
    "beyond": "heap-buffer-overflow",
    "shift": "shift exponent 40 is too large",
    "value": "sum: worst of 1 elements",
}


@pytest.mark.parametrize("fault", SEEN)
def test_a_sanitizer_s_finding_names_its_call_and_the_others_are_made(
    library, fault, monkeypatch
) -> None:
    monkeypatch.setenv("FUZZ_PLANTED", str(library))
    monkeypatch.setenv("FUZZ_PLANTED_FAULT", fault)
    fuzzer, report = Fuzzer(3, "", "", None), Report()
    fuzzer.environment = {**os.environ, **fuzzer.environment, "LD_PRELOAD": preloaded("address")}
    fuzzer.environment["ASAN_OPTIONS"] = "detect_leaks=0"
    fuzzer.run_lot(0, 12, 60.0, report)
    assert report.calls == 12 and report.faults, "a call was not made, or nothing was found"
    for index, text in report.faults:
        assert SEEN[fault] in text and f"FUZZ_FIRST={index} FUZZ_CALLS=1" in fuzzer.repeat(index)
    once = Report()
    fuzzer.run_lot(report.faults[0][0], 1, 60.0, once)
    assert once.calls == 1 and [i for i, _ in once.faults] == [report.faults[0][0]]
