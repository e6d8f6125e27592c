"""Where the device tests run: on a GPU, or, where there is none, on the CPU as a rehearsal.

A rehearsal shows that a test does what it says before a GPU is at hand; what only a device has is skipped.
"""

from __future__ import annotations

import pytest
import torch

import pyfast_dpo

REHEARSAL = not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
device_only = pytest.mark.skipif(REHEARSAL, reason="torch sees no CUDA device")

if not REHEARSAL and not pyfast_dpo.build_info()["cuda"]:
    pytest.skip("this build of pyfast_dpo has no CUDA kernels", allow_module_level=True)


def skip_if_slow_here(elements: int) -> None:
    if REHEARSAL and elements > 250_000:
        pytest.skip("large: on a CUDA device only")
