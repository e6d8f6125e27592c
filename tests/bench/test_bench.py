"""bench/bench_ops.py runs as its documentation says, and its JSON has every row."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
TRL = "TRL selective_log_softmax"
PEERS = {
    "float32": {"log_softmax + gather", "cross_entropy", TRL},
    "bfloat16": {
        "log_softmax + gather",
        "float() log_softmax + gather",
        "cross_entropy",
        "float() cross_entropy",
        TRL,
    },
}
OURS = "ours: forward + in-place backward"


def run_bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "bench_ops.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    # 4 rows: two a sequence for TRL's layout; 512: whole vectors, bfloat16 pairs seen as float32
    done = run_bench("--quick", "--rounds", 2, "--shapes", "4x512", "--out", out)
    assert done.returncode == 0, done.stderr
    for case in ("[4, 512] float32", "[4, 512] bfloat16"):
        assert f"{case}, " in done.stdout
    return out


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "bench_ops.json").read_text())


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_every_contender_has_its_row(result: dict[str, Any]) -> None:
    assert [case["dtype"] for case in result["cases"]] == ["float32", "bfloat16"]
    for case in result["cases"]:
        expected = {OURS} | PEERS[case["dtype"]] - set(result["skipped"])
        for part in ("peers", "memory", "errors"):
            assert {entry["contender"] for entry in case[part]} == expected, part
        assert len(case["bandwidth"]) == 4


def test_a_skipped_peer_has_its_reason(result: dict[str, Any]) -> None:
    assert set(result["skipped"]) <= {TRL}
    assert all(result["skipped"].values())


def test_numbers_are_finite_and_targets_judged(result: dict[str, Any]) -> None:
    assert all(math.isfinite(number) for number in numbers(result["cases"]))
    for case in result["cases"]:
        judged = case["bandwidth"] + case["peers"]
        for entry in (entry for entry in judged if "ratio" in entry):
            ratio, target = entry["ratio"], entry["target"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert entry.get("ceiling", 1) > 0
            assert entry["reached"] is (None if target is None else ratio["median"] >= target)
        seconds = {entry["contender"]: entry["seconds"] for entry in judged}
        assert all(0 < s["low"] <= s["median"] <= s["high"] for s in seconds.values())


def test_memory_and_error_tell_ours_from_the_peers(result: dict[str, Any]) -> None:
    for case in result["cases"]:
        allocated = {entry["contender"]: entry["allocated"] for entry in case["memory"]}
        errors = {entry["contender"]: entry["max_error"] for entry in case["errors"]}
        # Everyone else allocates at least the gradient; ours the statistics of 4 rows.
        assert 0 < allocated.pop(OURS) <= 4 * 32
        assert min(allocated.values()) >= case["logits_bytes"]
        assert errors[OURS] < 1e-5
    assert errors["log_softmax + gather"] > 1e-3  # the last case is bfloat16, which torch rounds


def test_environment_names_what_figures_depend_on(result: dict[str, Any]) -> None:
    facts = result["environment"]
    assert {"date", "torch", "cpu", "threads", "cpu_kernels_used", "trl"} <= set(facts)
    assert facts["threads"] == 2
    assert str(Path.home()) not in json.dumps(result)


def test_plot_is_written(out: Path) -> None:
    pytest.importorskip("matplotlib")
    header = (out / "bench_ops.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:24])
    assert min(width, height) > 300


@pytest.mark.parametrize("shape", ["3x512", "0x512", "4x0", "512", "4x-1"])
def test_refuses_a_shape_it_cannot_measure(shape: str) -> None:
    sys.path.insert(0, str(BENCH))
    try:
        import bench_ops
    finally:
        sys.path.remove(str(BENCH))
    with pytest.raises(argparse.ArgumentTypeError, match="even number of rows, got"):
        bench_ops.parse_shape(shape)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_operations_in_registers_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were they computed once, or not at all, the floor of bench_linear would be no floor."""
    monkeypatch.syspath_prepend(str(BENCH))
    from peak import load_peak

    spend = load_peak("float32", 1)

    def seconds(operations: float) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            spend(operations)
            times.append(time.perf_counter() - begin)
        return min(times)

    few, many = seconds(1e9), seconds(8e9)
    assert 4 < many / few < 16, (few, many)
    assert many > 8e9 / 1e12, "no core makes 1000 GFLOP/s"
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(RuntimeError, match="/bin/false failed"):
        load_peak("float32", 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_attention_is_measured_and_its_scores_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_attention

    layout = bench_attention.layout_of([(3, 2, 4), (0, 1, 2), (5, 0, 0)])
    seen = 0  # by the masks that torch's attention gets
    for group in layout.groups:
        for number, own in enumerate(group.blocks()):
            keys = own + (group.prompt if number else 0)
            mask = layout.mask(own, keys, None, torch.float32, torch.device("cpu"))
            seen += int((mask == 0).sum())
    assert bench_attention.scores_of(layout) == seen

    monkeypatch.setattr(bench_attention, "CASES", bench_attention.CASES[:1])
    bench_attention.main(["--rounds", "2", "--out", str(tmp_path)])
    (case,) = json.loads((tmp_path / "bench_attention.json").read_text())["cases"]
    ratios = {entry["contender"]: entry["over_ours"]["median"] for entry in case["times"]}
    assert len(ratios) == 4 and ratios["ours"] == 1.0 and min(ratios.values()) > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_layers_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_layers

    from pyfast_dpo.model import linear_layers

    monkeypatch.setattr(linear_layers, "FASTER", False)  # and back after the benchmark has set it
    monkeypatch.setattr(bench_layers, "CASES", bench_layers.CASES[:2])
    bench_layers.main(["--rounds", "2", "--out", str(tmp_path)])
    bare, adapted = json.loads((tmp_path / "bench_layers.json").read_text())["cases"]
    for case in (bare, adapted):
        assert set(case["over_ours"]) == {"torch", "registers alone"}
        assert min(ratio["low"] for ratio in case["over_ours"].values()) > 0
    assert "LoRA" in adapted["case"] and "LoRA" not in bare["case"]
