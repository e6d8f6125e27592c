"""bench_gpu.py and gpu_check.py without a GPU: a GPU may be at hand for half an hour only, and then they must work."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = ("bench_gpu", "gpu_check", "gpu_contenders", "gpu_predict", "sass")


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:
        return {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def without_peers(modules, monkeypatch) -> None:
    """Their imports take longer than everything else here."""

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(modules["gpu_contenders"].importlib, "import_module", missing)


def test_rehearsal_measures_every_workload(modules, without_peers) -> None:
    bench = modules["bench_gpu"]
    rows, left = bench.run(bench.Cpu(), bench.REHEARSAL, repeats=2, budget_s=60)
    assert left == ""
    assert len({row.workload for row in rows}) == 5
    for row in rows:
        if row.note:
            assert row.contestant.split()[0] in ("TRL", "Liger", "QuACK"), row
            assert "ModuleNotFoundError" in row.note
        else:
            assert row.median_ms > 0 and row.of_floor > 0 and row.needed_bytes > 0, row
    floors = [row for row in rows if row.contestant == bench.FLOOR]
    assert len(floors) == 5 and all(row.of_floor == 1 for row in floors)
    text = bench.table(rows)
    assert all(row.contestant in text for row in rows)


def test_one_workload_that_fails_does_not_lose_the_others(
    modules, without_peers, monkeypatch
) -> None:
    bench = modules["bench_gpu"]

    def broken(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench.Bench, "dpo_step", broken)
    rows, left = bench.run(bench.Cpu(), bench.REHEARSAL, repeats=2, budget_s=60)
    assert "out of luck" in left and len({row.workload for row in rows}) == 4


def figures(modules) -> dict:
    row = modules["bench_gpu"].Row
    rows = [
        row("work a, forward", "floor", 8, of_floor=1.0),
        row("work b", "TRL", 8, note="missing"),
    ]
    rows += [row("work a, forward", "pyfast_dpo", 8, target=0.9, of_floor=0.8)]
    rows += [row("work c", "floor", 8, 9, of_floor=1.0)]
    return {"device": "none", "torch": "0", "rows": [vars(one) for one in rows]}


def test_plot(modules, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert modules["gpu_check"].plot(figures(modules), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


REPORT = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1"></testsuite></testsuites>"""


def test_counts_of_a_report(modules, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert modules["gpu_check"].counts(tmp_path / "report.xml") == (
        2,
        "2 passed, 2 failed, 1 skipped",
    )


@pytest.mark.parametrize("broken", [None, "build", "device_tests"])
def test_check_keeps_what_it_has(modules, tmp_path: Path, monkeypatch, broken: str | None) -> None:
    """After every step; a failed build ends it, a failed test does not, and both end in a failure."""
    module = modules["gpu_check"]

    def step(name: str):
        return lambda self, *rest: module.Step(name, module.FAILED if name == broken else "ok")

    for name in ("build", "device_tests", "sanitizer"):
        monkeypatch.setattr(module.Check, name, step(name))

    def benchmark(self, path: Path):
        path.write_text(json.dumps(figures(modules)))
        return module.Step("benchmark", "ok"), "a table"

    monkeypatch.setattr(module.Check, "benchmark", benchmark)
    check = module.Check(tmp_path, rehearse=True, deadline=time.monotonic() + 60)
    status = module.perform(check, tmp_path)
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert status == (0 if broken is None else 1)
    assert len(kept["steps"]) == (1 if broken == "build" else 5)
    assert len(kept["rows"]) == (0 if broken == "build" else 4)


def test_a_step_is_stopped_in_time(modules, tmp_path: Path) -> None:
    check = modules["gpu_check"].Check(tmp_path, rehearse=True, deadline=time.monotonic() - 1)
    command = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"]
    status, output, seconds = check.run(command, 100, tmp_path, {})
    assert status == 124 and "so far" in output and seconds < 20
    assert check.run(["/no/such/program"], 5, tmp_path, {})[0] == 127


SASS = """
.text._Z1k:
.L_x_1:
        /*0000*/                   ISETP.GE P0, PT, R1, R2, PT ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0060*/                   IADD3 R1, R1, R1, RZ ;
.L_x_3:
        /*0070*/                   MUFU.EX2 R4, R4 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
"""


def test_path_through_the_inner_loop(modules) -> None:
    """The rare branch (one load) is not on it, nor what follows the loop."""
    (loop,) = modules["sass"].loops(SASS).values()
    assert (loop.instructions, loop.loads, loop.stores, loop.exponentials) == (7, 2, 0, 1)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_predictions_of_the_kernels(modules) -> None:
    """Every pass that is predicted has a kernel, and is bound by memory on the GPUs that are planned for."""
    if modules["sass"].find_tool("nvdisasm") is None:
        pytest.skip("nvdisasm was not found")
    result = modules["gpu_predict"].predict(modules["bench_gpu"].PLAN)
    assert {p["pass_"] for p in result["passes"]} == {*modules["gpu_predict"].PASSES}
    assert all(p["bound"] == "bytes" for p in result["passes"]), result["table"]
    assert all(loop["loads"] == 4 for loop in result["loops"]), result["loops"]


def test_kept_predictions_are_labelled_as_counted() -> None:
    kept = json.loads((BENCH / "results" / "gpu_prediction.json").read_text())
    assert "not measured" in kept["what"]
