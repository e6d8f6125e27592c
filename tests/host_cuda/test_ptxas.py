"""What ptxas says of the kernels: registers below a bound that keeps the planned occupancy, and no spills."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")

# Registers a thread; 65536 a multiprocessor. Patterns over demangled names; the first that fits holds.
BOUNDS = [
    (r"slice_kernel<double>", 128),  # 2 blocks of 256: doubles take two registers each
    (r"slice_kernel<", 64),  # 4 blocks of 256 threads: 64 KiB in flight
    (r"sequence_kernel<", 128),  # 1 block of 512
    (r"backward_kernel<double", 128),  # 2 blocks of 256
    (r"backward_kernel<", 80),  # 3 blocks of 256
    (
        r"(pair|unpaired|policy|gae)_kernel<",
        96,
    ),  # a few hundred threads in all; float64 takes up to 90
    (r"row_statistics_kernel<double>", 128),  # 1 block of 512
    (r"row_statistics_kernel<", 64),  # 2 blocks of 512
    (r"", 64),  # a kernel that nobody has planned for
]

if NVCC is None:
    pytest.skip("nvcc is not on PATH", allow_module_level=True)


def architectures() -> list[int]:
    """80 and 90, what most users have, and the newest that this nvcc knows."""
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {int(number) for number in re.findall(r"compute_(\d+)", listed.stdout)}
    return sorted(({80, 90} & known) | {max(known)})


def compile_one(source: Path, architecture: int) -> dict[str, Any]:
    """ptxas' figures of one file, kept in build/ until a source, a flag or nvcc changes."""
    flags = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256("".join([*flags, version]).encode())
    for path in [source, *sorted([*CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.*h")])]:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "ptxas"
    kept = folder / f"{source.stem}.sm_{architecture}.{digest.hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    command = [NVCC, *flags, f"-I{CSRC}", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    text = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True).stdout
    found = re.findall(
        r"Compiling entry function '(.+?)' for .*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    result = {
        "warnings": [line for line in text.splitlines() if "warning" in line],
        "kernels": {
            re.sub(r"\(anonymous namespace\)::|pyfast_dpo::(cuda::)?|^void |\(.*\)$", "", name): [
                int(number) for number in numbers
            ]
            for name, *numbers in found
        },
    }
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(kept)
    return result


@pytest.fixture(scope="module")
def figures() -> dict[int, dict[str, list[int]]]:
    jobs = [(source, architecture) for architecture in architectures() for source in SOURCES]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda job: compile_one(*job), jobs))
    by_architecture: dict[int, dict[str, list[int]]] = {}
    for (_, architecture), result in zip(jobs, results, strict=True):
        assert not result["warnings"], result["warnings"]
        by_architecture.setdefault(architecture, {}).update(result["kernels"])
    return by_architecture


@pytest.mark.parametrize("architecture", architectures(), ids=lambda number: f"sm_{number}")
def test_registers_and_spills(figures: dict[int, dict[str, list[int]]], architecture: int) -> None:
    kernels = figures[architecture]
    globals_in_sources = sum(path.read_text().count("__global__") for path in SOURCES)
    assert len(kernels) >= globals_in_sources, sorted(kernels)
    faults = []
    for name, (stack, stores, loads, registers) in sorted(kernels.items()):
        bound = next(bound for pattern, bound in BOUNDS if re.search(pattern, name))
        if stack or stores or loads:
            faults.append(f"{name}: {stack} bytes of stack, {stores} and {loads} spilled")
        if registers > bound:
            faults.append(f"{name}: {registers} registers, planned {bound}")
    assert not faults, "\n".join(faults)
