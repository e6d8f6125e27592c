"""The stand-in catches the mistakes that it is there for, and nvcc compiles what it runs."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from host_cuda import harness
from host_cuda.harness import HostCuda


@pytest.fixture(scope="module")
def library() -> HostCuda:
    return HostCuda(harness.build())


FAULTS = {  # enum Fault of faulty.cu, in its order; None: the result is wrong, but no error is raised
    "none": "",
    "missing barrier": None,
    "divergent barrier": "32 of 64 threads wait at a barrier, 32 have ended",
    "different barriers": "threads wait at different barriers",
    "partial shuffle": "not reached by all lanes of its warp",
    "read past the end": "access outside its memory",
    "write past the end": "access outside its memory",
    "write before the start": "access outside its memory",
    "misaligned vector": "misaligned vector",
    "shared memory past its end": "shared memory written",
}


@pytest.mark.parametrize("order", harness.ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_stand_in_catches(library: HostCuda, fault: str, order: str) -> None:
    library.set_order(order, 3)
    values = library.copy(torch.arange(64, dtype=torch.float32))
    from_start = fault == "write before the start"
    out = library.full((64,), torch.float32, from_start=from_start)
    arguments = (values.data_ptr(), out.data_ptr())
    code = library.lib.pfd_faulty(*map(ctypes.c_void_p, arguments), [*FAULTS].index(fault))
    message = library.lib.pfd_error_string(code).decode()
    if FAULTS[fault]:
        assert code != 0 and FAULTS[fault] in message
    else:
        assert code == 0, message
        assert torch.equal(out, values.flip(0)) == (fault == "none")


def test_mirror_of_the_parameters(library: HostCuda) -> None:
    sizes = (ctypes.c_int64 * 8)()
    library.lib.pfd_sizes(sizes)
    mirrors = (
        harness.SeqLogpParams,
        harness.SeqLogpBackwardParams,
        harness.PairLossParams,
        harness.UnpairedLossParams,
        harness.RowStatisticsParams,
        harness.PolicyLossParams,
        harness.GaeParams,
        harness.ScaleParams,
    )
    assert [*sizes] == [ctypes.sizeof(mirror) for mirror in mirrors]


def defined_symbols(objects: list[Path]) -> set[str]:
    lines = harness.run(["nm", "-C", "--defined-only", *map(str, objects)]).splitlines()
    names = {line.split(" ", 2)[2] for line in lines if " T " in line}
    return {name for name in names if name.startswith("pyfast_dpo::cuda::")}


def test_build_without_cuda_has_the_same_symbols(tmp_path: Path) -> None:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{harness.CSRC}", "-c"]
    without = tmp_path / "not_built.o"
    harness.run(["g++", *flags, str(harness.CSRC / "cuda/not_built.cpp"), "-o", str(without)])
    # Kernels and shared memory are what a build without CUDA has no need of.
    assert defined_symbols([without]) == {
        name
        for name in defined_symbols([harness.build()])
        if not re.search(r"_kernel\b|launch_kernel|block_scratch", name)
    }


def test_every_kernel_has_run(library: HostCuda, request: pytest.FixtureRequest) -> None:
    """No kernel in the tree is unexecuted. (Launches are counted over the whole session.)"""
    tests = harness.ROOT / "tests"
    needed = {p.name for p in tests.rglob("test_*.py") if "HostCuda(harness.build" in p.read_text()}
    missing = needed - {item.path.name for item in request.session.items}
    if missing or request.config.option.keyword:
        pytest.skip(f"needs the tests of {sorted(missing) or 'every file'} in the same session")
    kernels, launched = library.kernels()
    assert len(kernels) >= 20 and kernels == launched, sorted(kernels - launched)
