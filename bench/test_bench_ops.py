"""The contenders of bench_ops.py under pytest-benchmark, on one small case a dtype: `pytest bench`.

For a quick look while a kernel changes; the figures that count come from bench_ops.py, where contenders
alternate.
"""

from __future__ import annotations

import pytest
import torch
from contenders import DTYPES, PEERS, Case, Workload, find_missing, ours

from pyfast_dpo import token_logps

pytest.importorskip("pytest_benchmark")

ROWS, VOCAB = 64, 49152  # 12.6 MB in float32: a few milliseconds a call
FUNCTIONS = {"ours": ours} | {name: peer.function for name, peer in PEERS.items()}
CALLS = [
    pytest.param(dtype, name, id=f"{dtype}-{name}")
    for dtype in DTYPES
    for name in FUNCTIONS
    if name == "ours" or dtype in PEERS[name].targets
]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(benchmark, dtype: str) -> None:
    workload = Workload(Case(ROWS, VOCAB, dtype))
    benchmark.group = f"forward, {dtype}"
    benchmark.pedantic(
        lambda work: work(), setup=lambda: ((workload.forward(),), {}), rounds=7, warmup_rounds=1
    )
    assert torch.isfinite(token_logps(workload.source, workload.labels)).all()


@pytest.mark.parametrize("dtype, name", CALLS)
def test_forward_backward(benchmark, dtype: str, name: str) -> None:
    if reason := find_missing().get(name):
        pytest.skip(reason)
    prepare = Workload(Case(ROWS, VOCAB, dtype)).forward_backward(FUNCTIONS[name])
    benchmark.group = f"forward + backward, {dtype}"
    benchmark.pedantic(
        lambda work: work(), setup=lambda: ((prepare(),), {}), rounds=7, warmup_rounds=1
    )
