"""The binary: what it needs, what it must not need, and which instructions stand where."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyfast_dpo

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = sorted(ROOT.glob("build/*/*.o"))

needs_objects = pytest.mark.skipif(
    not OBJECTS or shutil.which("objdump") is None,
    reason="needs the object files of a build in this tree, and objdump",
)
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")


def binary() -> str:
    spec = importlib.util.find_spec("pyfast_dpo.ops._C")
    assert spec is not None and spec.origin is not None
    return spec.origin


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_readelf
def test_binary_needs_torch_and_libc_only_so_that_one_wheel_serves_cpu_and_cuda():
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", run("readelf", "-d", binary())))
    allowed = {
        "libtorch.so",
        "libtorch_cpu.so",
        "libc10.so",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        # Part of libc since glibc 2.34, separate before; the static CUDA runtime asks for them.
        "libdl.so.2",
        "librt.so.1",
        "libpthread.so.0",
        "ld-linux-x86-64.so.2",
    }
    assert needed <= allowed, f"unexpected: {sorted(needed - allowed)}"
    assert "libtorch.so" in needed, "without it the CUDA stream symbol is not found on CUDA torch"


@needs_readelf
def test_cuda_stream_symbol_is_weak_so_that_cpu_only_torch_can_load_the_binary():
    lines = run("readelf", "--dyn-syms", "-W", binary()).splitlines()
    stream = [line for line in lines if "aoti_torch_get_current_cuda_stream" in line]
    assert len(stream) == 1 and " WEAK " in stream[0] and " UND " in stream[0], stream


@needs_readelf
def test_binary_exports_its_module_init_only():
    lines = run("readelf", "--dyn-syms", "-W", binary()).splitlines()
    exported = [
        line.split()[-1]
        for line in lines
        if re.search(r"\b(GLOBAL|WEAK|UNIQUE)\b", line) and " UND " not in line
    ]
    own = [name for name in exported if "PyInit" in name]
    assert own == ["PyInit__C"]
    leaked = [name for name in exported if "cuda" in name.lower() or "pyfast_dpo" in name]
    assert not leaked, leaked


# Registers that only the wider instruction sets name.
AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
AVX = re.compile(r"%ymm")


def offending_lines(path: Path, pattern: re.Pattern[str]) -> list[str]:
    return [line for line in run("objdump", "-d", str(path)).splitlines() if pattern.search(line)]


@needs_objects
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_wide_instructions_stand_in_their_own_objects_only(path):
    if "kernels_avx512" in path.name or "kernels_amx" in path.name:
        assert offending_lines(path, AVX512), "the AVX-512 object holds no AVX-512 instruction"
        return
    assert not offending_lines(path, AVX512)[:5]
    if "kernels_avx2" not in path.name:
        assert not offending_lines(path, AVX)[:5]


@needs_objects
@pytest.mark.parametrize(
    "name", ["kernels_avx2.cpp", "kernels_avx512.cpp", "kernels_avx512_bf16.cpp", "kernels_amx.cpp"]
)
def test_wide_objects_share_no_function_that_the_linker_could_pick_for_everyone(name):
    (path,) = [p for p in OBJECTS if name in p.name]
    weak = [
        line for line in run("nm", "-C", str(path)).splitlines() if re.match(r"\S+ [VWu] ", line)
    ]
    assert not weak, weak


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env | environment
    )


def test_import_needs_no_nvcc_no_gpu_and_no_wide_instructions():
    result = python(
        "import pyfast_dpo, sys; print(pyfast_dpo.build_info()['cpu_used']);"
        "assert not {'transformers', 'datasets', 'matplotlib'} & set(sys.modules)",
        PATH="/nonexistent",
        CUDA_VISIBLE_DEVICES="",
        PYFAST_DPO_CPU_CAPABILITY="generic",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "generic"


def test_build_info_says_what_was_built_and_what_is_used():
    info = pyfast_dpo.build_info()
    assert info["cpu_used"] in info["cpu_kernels"]
    assert info["cuda"] == bool(info["cuda_architectures"]) == bool(info["cuda_runtime"])


def test_cuda_kernels_are_in_the_binary_when_nvcc_is_there():
    if os.environ.get("PYFAST_DPO_CUDA") == "0":
        pytest.skip("PYFAST_DPO_CUDA=0 asked for a build without CUDA")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    assert pyfast_dpo.build_info()["cuda"]
