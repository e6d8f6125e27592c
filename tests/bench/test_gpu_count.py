"""What the head would do on a GPU, held: a fourth product, a matrix that is copied, a pass too many show here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
# (products, H100, H200) at most.
HELD = {
    "8192 rows, trainable": (3, 1.12, 1.09),
    "8192 rows, trainable, statistics": (3, 1.16, 1.12),
    "8192 rows, trainable, 128 MiB": (3, 1.16, 1.09),
    "8192 rows, frozen": (2, 1.18, 1.13),
    "8192 rows, frozen, statistics": (2, 1.24, 1.17),
    "1024 rows, trainable": (3, 1.12, 1.09),
    "200 rows, trainable": (3.3, 1.12, 1.18),
    "200 rows, frozen": (2.3, 1.17, 1.26),
    "8192 rows, a loss of the whole batch": (3, 1.12, 1.09),
    "8192 rows, one pair": (3, 1.12, 1.09),
    "32768 rows, trainable": (3, 1.13, 1.10),
    "1024 rows, V = 128257": (3, 1.12, 1.09),
    "policy: 8192 rows, trainable": (3, 1.12, 1.09),
    "policy: 8192 rows, trainable, statistics": (3, 1.16, 1.12),
    "policy: 8192 rows, entropy bonus": (3, 1.16, 1.12),
    "policy: 8192 rows, frozen": (2, 1.17, 1.12),
    "policy: 8192 rows, ratio of the sequence": (3, 1.12, 1.09),
    "policy: 8192 rows, that ratio and a bonus": (3, 1.16, 1.12),
    "policy: 32768 rows, trainable": (3, 1.13, 1.10),
    "policy: 200 rows, trainable": (3.3, 1.12, 1.18),
}


@pytest.fixture(scope="module")
def counting() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("gpu_count")
    finally:
        sys.path.remove(str(BENCH))


def test_every_case_is_held(counting) -> None:
    assert [case.title for case in counting.CASES] == list(HELD)


@pytest.mark.parametrize("title", HELD)
def test_products_and_time_stay_within_what_is_held(counting, title: str) -> None:
    result = counting.measure(next(case for case in counting.CASES if case.title == title))
    products, *ratios = HELD[title]
    least = 2 if "frozen" in title else 3
    assert least - 1e-6 <= result.products <= products + 1e-6
    for ratio, allowed in zip(result.over_bare.values(), ratios, strict=True):
        assert 1 < ratio <= allowed, counting.line(result)


def test_a_product_too_many_and_a_copy_of_the_gradients_are_seen(counting, monkeypatch) -> None:
    """The count is of what runs: with a second product of rows, and a copy of what waits."""
    from pyfast_dpo.logprobs.gpu_head import GpuHead

    plain = GpuHead.take_rows

    def wasteful(self):
        self.kept.clone()
        self._multiply_rows()
        self.of_rows.pop()
        return plain(self)

    case = counting.CASES[0]
    before = counting.measure(case)
    monkeypatch.setattr(GpuHead, "take_rows", wasteful)
    after = counting.measure(case)
    assert after.products == pytest.approx(before.products + 1)
    assert after.over_bare["H100"] > before.over_bare["H100"] + 0.35


def test_views_and_shapes_cost_nothing_and_a_copy_reads_and_writes(counting) -> None:
    tensor = torch.empty(6, 4, device="meta")  # 96 bytes
    with counting.Counter() as counter:
        tensor[1:].T.unsqueeze(0)
        torch.empty_like(tensor)
        tensor.new_empty(3)
    assert sum(work.bytes for work in counter.others) == 0
    with counting.Counter() as counter:
        tensor.clone()
    assert sum(work.bytes for work in counter.others) == 192


def test_the_kept_table_is_what_is_counted(counting) -> None:
    kept = json.loads((BENCH / "results" / "gpu_count.json").read_text())
    assert "not measured" in kept["what"]
    counted = {case.title: counting.measure(case) for case in counting.CASES}
    assert [entry["case"] for entry in kept["cases"]] == list(counted)
    for entry in kept["cases"]:
        assert entry["over_bare"] == pytest.approx(counted[entry["case"]].over_bare, abs=0.005)
