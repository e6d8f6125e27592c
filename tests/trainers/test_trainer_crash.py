"""Runs that are killed at random moments, or find no room on the disk, lose nothing: resumed, they have the same bits.

`make test-crash` kills at 20 moments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TESTS = Path(__file__).parents[1]
MOMENTS = int(os.environ.get("PYFAST_DPO_CRASH_MOMENTS", "4"))
SEED = int(os.environ.get("PYFAST_DPO_CRASH_SEED", "1"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    done = subprocess.run(
        [sys.executable, str(TESTS / "crash_run.py"), str(folder), str(MOMENTS), str(SEED)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    errors = "\n".join(path.read_text() for path in folder.glob("*/error.txt"))
    assert done.returncode == 0, errors + done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(report):
    assert len(report["kills"]) == MOMENTS
    assert any(kill["ended"] == signal.SIGKILL for kill in report["kills"])
    for number, kill in enumerate(report["kills"]):
        assert kill["result"] == report["truths"][kill["kind"]], (
            number,
            kill["kill_at"],
            kill["there"],
        )


def test_a_full_disk_ends_a_run_by_name_and_leaves_the_checkpoints_before_it(report):
    """The limit on the length of files comes with the third step, whose checkpoint cannot be written."""
    for full in report["full"]:
        message = full["message"]
        assert message.startswith("DPOTrainer: "), full
        assert "checkpoint-3 could not be written" in message and "MiB are free" in message, full
        there = {name for name in full["there"] if name.startswith(("checkpoint", "_"))}
        assert there == {"checkpoint-1", "checkpoint-2"}, full
        assert full["result"] == report["truths"][1], full


def test_a_cache_without_room_ends_the_computing_by_name_and_keeps_what_it_has(report):
    full = report["full_cache"]
    assert "precompute_ref_log_probs: the cache" in full["message"], full
    assert full["result"] == report["truths"][0]
