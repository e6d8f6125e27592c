"""Every instruction set: the numeric tests repeated, agreement among them, and the choice at import.

The choice is made once a process, so each test here starts processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _helpers import (
    DTYPES,
    INF,
    NAN,
    assert_rule,
    bits,
    check_both,
    forward_tolerance,
    gradient_tolerance,
    name_of,
    random_labels,
    random_logits,
    true_gradient,
    true_token_logps,
)
from torch import Tensor

import pyfast_dpo
from pyfast_dpo import token_logps
from pyfast_dpo.ops import _C

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
TESTS = Path(__file__).resolve().parents[1]
VARIABLE = "PYFAST_DPO_CPU_CAPABILITY"
LEVELS = _C.build_facts()["cpu_kernels"]  # what was built, each containing the one before
BEST = _C.best_cpu_capability()
USED = pyfast_dpo.build_info()["cpu_used"]


def run_python(*arguments: str, capability: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
    environment["OMP_NUM_THREADS"] = "1"
    paths = [str(TESTS), str(TESTS / "ops"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if capability is not None:
        environment[VARIABLE] = capability
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=TESTS, env=environment
    )


def skip_where_lacking(level: str) -> None:
    if LEVELS.index(level) > LEVELS.index(BEST):
        pytest.skip(f"this CPU offers up to {BEST}, not {level}")


every_level = pytest.mark.parametrize("level", LEVELS)


NUMERIC_TESTS = [
    "ops/test_seq_logp.py",
    "ops/test_entropy_gradient.py",
    "logprobs/test_linear.py",
    "logprobs/test_linear_statistics.py",
    "layout/test_attention_cpu.py",
    "model/test_linear_layers.py",
    "model/test_gates.py",
    "model/test_norms.py",
]


@every_level
def test_numeric_tests_pass(level) -> None:
    skip_where_lacking(level)
    if level == USED:
        pytest.skip(f"{level} is what this test run itself uses")
    pytest_arguments = ["-m", "pytest", "-q", "-m", "numerics", "-p", "no:cacheprovider"]
    run = run_python(*pytest_arguments, "--tb=short", *NUMERIC_TESTS, capability=level)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    assert " passed" in run.stdout and "failed" not in run.stdout


# --- agreement ------------------------------------------------------------------------------------------------


def tail_cases() -> list[tuple[Tensor, Tensor]]:
    """Every tail of the widest pair of vectors (2 x 16), aligned and one element off, target everywhere."""
    cases = []
    for dtype in DTYPES:
        for vocab in range(1, 66):
            labels = torch.tensor([[0, vocab // 2, vocab - 1]])
            logits = random_logits(1, 3, vocab, dtype=dtype, seed=vocab)
            buffer = torch.full(
                (logits.numel() + 2,), NAN, dtype=dtype
            )  # what lies beside the rows
            cases.append((logits, labels))
            cases.append((buffer[1:-1].view(logits.shape).copy_(logits), labels))
        logits = random_logits(2, 3, 4099, dtype=dtype)
        logits[0, 0, :2100] = -INF
        labels = random_labels(2, 3, vocab=4099)
        labels[0, 0] = 3000
        cases.append((logits, labels))
    return cases


def save_results(file: str) -> None:
    """Runs in the process of one capability."""
    results = []
    for logits, labels in tail_cases():
        leaf = logits.requires_grad_()
        logps = token_logps(leaf, labels, impl="fused")
        (gradient,) = torch.autograd.grad(logps, leaf, torch.full_like(logps, 0.7))
        results.append((logps.detach(), gradient))
    torch.save({"level": pyfast_dpo.build_info()["cpu_used"], "results": results}, file)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By capability that this CPU has."""
    loaded = {}
    for level in LEVELS[: LEVELS.index(BEST) + 1]:
        file = tmp_path_factory.mktemp("capability") / f"{level}.pt"
        code = f"import test_cpu_capability as t; t.save_results({str(file)!r})"
        run = run_python("-c", code, capability=level)
        assert run.returncode == 0, run.stderr[-3000:]
        saved = torch.load(file)
        assert saved["level"] == level, "the variable did not choose the kernels"
        loaded[level] = saved["results"]
    return loaded


@every_level
def test_tails_and_misaligned_rows_follow_the_accuracy_rule(level, results) -> None:
    skip_where_lacking(level)
    for (logits, labels), (logps, gradient) in zip(tail_cases(), results[level], strict=True):
        what = f"{level}, {name_of(logits.dtype)}, V {logits.shape[-1]}"
        truth = true_token_logps(logits, labels)
        tolerance = forward_tolerance(logits.dtype, truth)
        assert_rule(f"token_logps of {what}", logps, truth, truth, tolerance)
        coefficient = torch.full_like(truth, 0.7)
        truth = true_gradient(logits, labels, coefficient)
        tolerance = gradient_tolerance(logits, truth, coefficient)
        assert_rule(f"gradient of {what}", gradient, truth, truth, tolerance)


@every_level
def test_alignment_does_not_change_a_bit(level, results) -> None:
    skip_where_lacking(level)
    cases = tail_cases()
    compared = 0
    for i in range(len(cases) - 1):
        if cases[i][0].shape != cases[i + 1][0].shape or cases[i][0].dtype != cases[i + 1][0].dtype:
            continue
        for aligned, misaligned in zip(results[level][i], results[level][i + 1], strict=True):
            assert torch.equal(bits(aligned), bits(misaligned)), cases[i][0].shape
        compared += 1
    assert compared == 65 * len(DTYPES)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_instruction_sets_agree_within_rounding(level, results) -> None:
    """Twice the tolerance that each has against the truth; float64 is the same code everywhere."""
    skip_where_lacking(level)
    for case, generic, other in zip(tail_cases(), results["generic"], results[level], strict=True):
        logits = case[0]
        if logits.dtype == torch.float64:
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(generic, other, strict=True))
            continue
        what = f"{level} and generic, {name_of(logits.dtype)}, V {logits.shape[-1]}"
        tolerance = 2 * forward_tolerance(logits.dtype, generic[0].double())
        assert_rule(f"token_logps of {what}", other[0], generic[0], generic[0], tolerance)
        coefficient = torch.full_like(generic[0], 0.7)
        tolerance = 2 * gradient_tolerance(logits, generic[1].double(), coefficient)
        assert_rule(f"gradient of {what}", other[1], generic[1], generic[1], tolerance)


def test_tail_cases_follow_the_rule_in_this_process() -> None:
    """The same table by whatever this run uses, against torch's own result."""
    for logits, labels in tail_cases():
        check_both(logits, labels)


# --- the choice -----------------------------------------------------------------------------------------------

PRINT_USED = "import pyfast_dpo; print(pyfast_dpo.build_info()['cpu_used'])"


def test_best_capability_is_used_by_default() -> None:
    for unset in (None, ""):
        run = run_python("-c", PRINT_USED, capability=unset)
        assert run.stdout.strip() == BEST, run.stderr


@pytest.mark.parametrize("capability", ["sse9", "AVX2", "avx2 "])
def test_unknown_capability_is_an_import_error_that_gives_the_choices(capability) -> None:
    run = run_python("-c", PRINT_USED, capability=capability)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pyfast_dpo: PYFAST_DPO_CPU_CAPABILITY"), run.stderr
    for word in (*LEVELS, repr(capability), repr(BEST)):
        assert word in last, f"{word} is not in: {last}"


@pytest.mark.skipif(BEST == LEVELS[-1], reason=f"this CPU has every capability, up to {BEST}")
def test_capability_that_the_cpu_lacks_is_an_import_error() -> None:
    run = run_python("-c", PRINT_USED, capability=LEVELS[-1])
    assert run.returncode != 0 and "ImportError" in run.stderr and BEST in run.stderr
