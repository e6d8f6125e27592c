"""What this installation was built with and what it uses on this machine."""

from __future__ import annotations

import os
from typing import Any

import torch

from pyfast_dpo.ops import _C, operators


def build_info() -> dict[str, Any]:
    """Facts for a bug report: what was built, what this CPU offers, what is used.

    Returns:
        A dict with `torch_at_build`, `torch`, `compiler`, `cpu_kernels` (built), `cpu_available` (the best
        this CPU offers), `cpu_used`, `cpu_override` (PYFAST_DPO_CPU_CAPABILITY or None), `cuda` (kernels
        built), `cuda_architectures`, `cuda_runtime` (linked statically, "" without), `torch_cuda` (None
        for a CPU-only torch), `cuda_usable` (kernels built and a device present).
    """
    facts: dict[str, Any] = dict(_C.build_facts())
    runtime = facts["cuda_runtime"]
    facts["cuda_runtime"] = f"{runtime // 1000}.{runtime % 1000 // 10}" if runtime else ""
    return {
        **facts,
        "torch": torch.__version__,
        "cpu_available": _C.best_cpu_capability(),
        "cpu_used": _C.cpu_capability(),
        "cpu_override": os.environ.get("PYFAST_DPO_CPU_CAPABILITY") or None,
        "torch_cuda": torch.version.cuda,
        "cuda_usable": operators.has_kernels("cuda") and torch.cuda.is_available(),
    }
