"""Memory that one training step frees is there for the next, and the system has it back afterwards."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pyfast_dpo import _allocator

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")

# Large tensors come and go, as in a step; prints the page faults of the tenth time and the memory held after the end.
PROGRAM = """
import resource, torch
from pyfast_dpo._allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = held()
end = keep_freed_memory() if {keep} else (lambda: None)
for _ in range(10):
    first = faults()
    tensors = [torch.zeros(20_000_000) for _ in range(3)]
    del tensors
    last = faults()
kept = held() - before
end()
print(last - first, kept, held() - before)
"""


def run(keep, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return map(int, done.stdout.split())


@glibc
def test_freed_memory_serves_again_and_is_given_back_at_the_end():
    faults, kept, after = run(True)
    assert faults < 100
    assert kept > 200e6 and after < 40e6
    faults, kept, _ = run(False)
    assert faults > 200, "without, every step gets its pages anew"
    assert kept < 40e6


@glibc
def test_what_the_user_has_set_stays():
    faults, kept, _ = run(True, MALLOC_MMAP_MAX_="65536")
    assert faults > 200 and kept < 40e6


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    _allocator.keep_freed_memory()()


@pytest.mark.parametrize("device, expected", [("cpu", ["begin", "end"]), ("cuda", [])])
def test_training_on_the_cpu_begins_and_ends_it_once(monkeypatch, device, expected):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pyfast_dpo.trainers import callbacks

    calls = []

    def begin():
        calls.append("begin")
        return lambda: calls.append("end")

    monkeypatch.setattr(callbacks, "keep_freed_memory", begin)
    callback = callbacks.KeepFreedMemory()
    args = SimpleNamespace(device=torch.device(device))
    for _ in range(2):  # as auto_find_batch_size does
        callback.on_train_begin(args, None, None)
    for _ in range(2):
        callback.on_train_end(args, None, None)
    assert calls == expected
