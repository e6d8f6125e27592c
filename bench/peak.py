"""How fast this CPU multiplies and adds with nothing but registers: peak.cpp, compiled for it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.cpp")


def load_peak(dtype: str, threads: int) -> Callable[[float], object]:
    """A function that spends a number of operations (a multiply-add is two) on so many threads together.

    Raises:
        RuntimeError: no compiler, or no instruction for the dtype on this CPU.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    flags = ["-O2", "-std=c++17", "-march=native", "-ffp-contract=fast", "-pthread", "-shared", "-fPIC"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "peak.so")
        built = subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", library], capture_output=True, text=True
        )
        if built.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {built.stderr.strip()}")
        spend = ctypes.CDLL(library).spend
    spend.argtypes, spend.restype = [ctypes.c_double, ctypes.c_int, ctypes.c_bool], ctypes.c_bool
    half = dtype == "bfloat16"
    if not spend(1e6, threads, half):
        raise RuntimeError(f"this CPU has no multiply-add of {dtype}")
    return lambda operations: spend(operations, threads, half)
