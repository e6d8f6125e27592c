"""bench_gpu.py and gpu_check.py without a GPU: a GPU may be at hand for half an hour only, and then they must work."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
NAMES = (
    "bench_gpu", "gpu_check", "gpu_contenders", "gpu_heads", "gpu_measure", "gpu_plot", "gpu_predict", "gpu_runner",
    "gpu_training", "sass",
)  # fmt: skip


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


WORKLOADS = 6  # of the rehearsal's groups below
QUICK = ["logits", "head", "attention"]  # without training, which needs peers, and what compiles


def rehearse(modules, keep, groups=QUICK, budget_s: float = 60) -> str:
    bench = modules["bench_gpu"]
    measuring = modules["gpu_measure"].Bench(modules["gpu_measure"].Cpu(), repeats=2)
    return bench.run(measuring, bench.REHEARSAL, groups, budget_s, keep)


def test_rehearsal_measures_every_workload(modules, without_peers) -> None:
    rows: list = []
    assert rehearse(modules, rows.extend) == ""
    assert len({row.workload for row in rows}) == WORKLOADS
    for row in rows:
        if row.note:
            assert row.contestant.split()[0].strip(",") in ("TRL", "Liger", "QuACK", "CCE"), row
            assert "ModuleNotFoundError" in row.note
        else:
            assert row.median_ms > 0 and row.rounds == 2, row
            if not row.workload.startswith("attention"):
                assert row.of_floor_low <= row.of_floor <= row.of_floor_high, row
                assert row.of_floor > 0 and row.needed_bytes > 0, row
    floors = [row for row in rows if row.contestant == modules["gpu_measure"].FLOOR]
    assert len(floors) == WORKLOADS - 1 and all(row.of_floor == 1 for row in floors)
    text = modules["gpu_measure"].table(rows)
    assert all(row.contestant in text for row in rows)


def test_one_workload_that_fails_does_not_lose_the_others(
    modules, without_peers, monkeypatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(modules["bench_gpu"], "dpo_step", broken)
    rows: list = []
    assert "out of luck" in rehearse(modules, rows.extend)
    assert len({row.workload for row in rows}) == WORKLOADS - 1


def test_peers_are_measured_where_ours_fails_and_the_failure_is_told(
    modules, without_peers, monkeypatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(modules["gpu_heads"].pyfast_dpo, "fused_linear_loss", broken)
    rows: list = []
    assert "no such kernel" in rehearse(modules, rows.extend, ["head"])
    by_name = {row.contestant: row for row in rows}
    assert by_name["torch eager"].median_ms > 0 and by_name["pyfast_dpo"].note


def test_no_new_workload_when_the_time_is_over(modules, without_peers) -> None:
    rows: list = []
    left = rehearse(modules, rows.extend, budget_s=-1)
    assert rows == [] and len(left.split("; ")) == WORKLOADS


def test_five_rounds_are_measured_however_short_the_time(modules) -> None:
    measure = modules["gpu_measure"]
    rows = {"floor": measure.Row("work", "floor"), "ours": measure.Row("work", "ours")}
    bench = measure.Bench(measure.Cpu(), repeats=50, seconds=-1)
    bench.measure(rows, {name: lambda: time.sleep(1e-4) for name in rows}, "ours")
    assert rows["ours"].rounds == measure.FEWEST_ROUNDS and 0 < rows["ours"].of_floor < 10


def test_training_steps_of_both_trainers(modules) -> None:
    """TRL's is a row with a reason where TRL is not installed; ours must run."""
    for name in ("transformers", "accelerate", "datasets"):
        pytest.importorskip(name)
    shape = modules["bench_gpu"].REHEARSAL.model
    ours, trl = modules["gpu_training"].training_step(modules["gpu_measure"].Cpu(), shape, None)
    assert ours.note == "" and ours.median_ms > 0
    assert ours.rounds == 2 * (shape.steps - shape.skipped)
    assert trl.median_ms > 0 or "ModuleNotFoundError" in trl.note


def figures(modules) -> dict:
    row = modules["gpu_measure"].Row
    rows = [
        row("work a, forward", "floor", 8, of_floor=1.0),
        row("work b", "TRL", 8, note="missing"),
        row("work a, forward", "pyfast_dpo", 8, target=0.9, of_floor=0.8),
        row("work c", "floor", 8, 9, of_floor=1.0),
        row("work d, without a floor", "pyfast_dpo", median_ms=1.0),
    ]
    return {"device": "none", "torch": "0", "rows": [vars(one) for one in rows]}


def test_plot(modules, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert modules["gpu_plot"].plot(figures(modules), tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert not modules["gpu_plot"].plot({"rows": []}, tmp_path / "none.png")


def test_figures_are_written_after_every_workload_and_those_of_others_kept(
    modules, tmp_path: Path
) -> None:
    bench, row = modules["bench_gpu"], modules["gpu_measure"].Row
    path = tmp_path / "gpu.json"
    figures = bench.Figures(path, {"device": "none"})
    figures.add([row("a", "ours", median_ms=1.0)])
    assert [r["workload"] for r in json.loads(path.read_text())["rows"]] == ["a"]
    figures.add([row("b", "ours", median_ms=2.0)])
    bench.Figures(path, {"device": "none"}).add([row("a", "ours", median_ms=3.0)])
    kept = {r["workload"]: r["median_ms"] for r in json.loads(path.read_text())["rows"]}
    assert kept == {"a": 3.0, "b": 2.0}


# --- the runner ---------------------------------------------------------------------------------------


def runner_of(modules, tmp_path: Path, seconds: float = 60):
    return modules["gpu_runner"].Runner(tmp_path, tmp_path / "log.txt", time.monotonic() + seconds)


def test_a_step_is_stopped_in_time_with_all_that_it_started(modules, tmp_path: Path) -> None:
    """A child that lives on would hold the device, and the output."""
    script = (
        "import subprocess, sys, time; print('so far', flush=True)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    runner = runner_of(modules, tmp_path)
    status, output, seconds = runner.run([sys.executable, "-c", script], 3)
    assert status == 124 and "so far" in output and 2 < seconds < 20
    child = int(output.split("child")[1].split()[0])
    for _ in range(50):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the child of a stopped command lives on")
    assert runner.run(["/no/such/program"], 5)[0] == 127


def test_no_step_passes_the_deadline(modules, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    status, _, seconds = runner_of(modules, tmp_path, -1).run(command, 100)
    assert status == 124 and seconds < 20


def test_output_is_in_the_log_while_the_command_runs(modules, tmp_path: Path) -> None:
    """So that it is there whoever is killed."""
    log = tmp_path / "log.txt"
    script = f"print('early', flush=True); print(open({str(log)!r}).read().count('early'), 'seen')"
    _, output, _ = runner_of(modules, tmp_path).run([sys.executable, "-c", script], 30)
    assert "3 seen" in output  # twice in the command itself, and printed


REPORT = """<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1">
<testcase name="test_good"/><testcase name="test_bad[1]"><failure/></testcase><testcase name="test_worse"><error/></testcase>
</testsuite></testsuites>"""


def test_reports_are_joined_and_name_the_first_failure(modules, tmp_path: Path) -> None:
    runner = modules["gpu_runner"]
    (tmp_path / "report.xml").write_text(REPORT)
    reports = runner.Reports(tmp_path / "all.xml")
    assert reports.add(tmp_path / "none.xml") is None
    suite = reports.add(tmp_path / "report.xml")
    assert runner.counts(suite) == (2, "2 passed, 2 failed, 1 skipped")
    assert runner.first_failure(suite) == "test_bad[1]"
    reports.add(tmp_path / "report.xml")
    assert (tmp_path / "all.xml").read_text().count("<testsuite ") == 2


# --- gpu_check ----------------------------------------------------------------------------------------


def check_of(modules, tmp_path: Path, seconds: float = 60):
    runner = runner_of(modules, tmp_path, seconds)
    return modules["gpu_check"].Check(runner, tmp_path, rehearse=True, installed=False)


@pytest.mark.parametrize("before", [None, "/peers/site"])
def test_the_built_package_comes_before_what_pythonpath_had(
    modules, tmp_path: Path, monkeypatch, before: str | None
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONPATH", before)
    script = "import sys; print([p for p in sys.path if p][:2])"
    _, output, _ = check_of(modules, tmp_path).runner.run([sys.executable, "-c", script], 30)
    assert str(tmp_path) in output.split(",")[0]
    assert before is None or before in output.split(",")[1]


def fake_steps(modules, monkeypatch, broken: str | None, order: list[str]) -> None:
    module = modules["gpu_check"]

    def step(name: str):
        def run(self, *rest):
            told = f"{name} {rest[0]}" if rest and isinstance(rest[0], str) else name
            order.append(told)
            return module.Step(told, module.FAILED if name == broken else "ok")

        return run

    for name in ("build", "smoke", "figures", "profile", "sanitizer"):
        monkeypatch.setattr(module.Check, name, step(name))
    monkeypatch.setattr(
        module.Check, "device_tests", lambda self, file: iter([step("device_tests")(self)])
    )


@pytest.mark.parametrize("broken", [None, "build", "device_tests", "figures"])
def test_check_keeps_what_it_has(modules, tmp_path: Path, monkeypatch, broken: str | None) -> None:
    """After every step; a failed build ends it, another failure does not, and each makes the check fail."""
    module, order = modules["gpu_check"], []
    fake_steps(modules, monkeypatch, broken, order)
    assert module.perform(check_of(modules, tmp_path)) == (0 if broken is None else 1)
    kept = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [step["name"] for step in kept["steps"]] == order
    if broken == "build":
        assert order == ["build"]
        return
    firsts = [order.index(name) for name in ("smoke", "figures logits", "figures head")]
    firsts += [order.index(name) for name in ("figures training", "device_tests", "profile")]
    assert firsts == sorted(firsts) and order[-1].startswith("sanitizer")


def test_check_ends_when_its_time_is_over(modules, tmp_path: Path, monkeypatch) -> None:
    order: list[str] = []
    fake_steps(modules, monkeypatch, None, order)
    modules["gpu_check"].perform(check_of(modules, tmp_path, -1))
    assert order == ["build"]


def test_first_failure_runs_again_with_blocking_launches(modules, tmp_path: Path) -> None:
    file = tmp_path / "test_cuda_device_false.py"
    file.write_text(
        "import os\ndef test_good(): pass\n"
        "def test_bad(): assert False, os.environ.get('CUDA_LAUNCH_BLOCKING')\n"
        "def test_other(): assert False\n"
    )
    check = check_of(modules, tmp_path)
    first, again = check.device_tests(file)
    assert first.result == modules["gpu_check"].FAILED and first.detail.startswith(
        "1 passed, 2 failed"
    )
    assert again.detail.startswith("0 passed, 1 failed") and "test_bad" in again.name
    log = check.runner.log.read_text()
    assert "AssertionError: None" in log and "AssertionError: 1" in log


def test_a_file_that_crashes_is_a_failure_and_runs_again(modules, tmp_path: Path) -> None:
    file = tmp_path / "test_cuda_device_crash.py"
    file.write_text("import os\ndef test_crash(): os.abort()\n")
    first, again = check_of(modules, tmp_path).device_tests(file)
    assert first.result == again.result == modules["gpu_check"].FAILED
    assert first.detail == "no report"


def test_a_killed_check_leaves_steps_and_figures(tmp_path: Path) -> None:
    """The rehearsal itself, ended in the middle of its figures."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCH / "gpu_check.py"), "--rehearse", "--installed"]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.DEVNULL, start_new_session=True
    )
    end = time.monotonic() + 120
    while not (out / "gpu.json").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = json.loads((out / "gpu_check.json").read_text())["steps"]
    assert [step["result"] for step in steps] == ["ok"]  # the smoke test
    assert json.loads((out / "gpu.json").read_text())["rows"]
    assert "bench_gpu.py" in (out / "gpu_log.txt").read_text()


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
