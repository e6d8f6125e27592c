"""`pyfast-dpo doctor`: the facts for a bug report."""

from __future__ import annotations

import platform
import sys

import torch

from pyfast_dpo import __version__, build_info
from pyfast_dpo.ops.extras import OPTIONAL_PACKAGES, installed_version


def run() -> int:
    print(report())
    return 0


def report() -> str:
    """One fact a line, ready to paste."""
    build = build_info()
    cuda = "none, CPU only"
    if build["cuda"]:
        cuda = f"for {build['cuda_architectures']}, CUDA runtime {build['cuda_runtime']} (static)"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "pyfast_dpo": __version__,
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "torch": f"{build['torch']} (CUDA {build['torch_cuda'] or 'none'})",
        "torch threads": str(torch.get_num_threads()),
        "built with": f"torch {build['torch_at_build']}, compiler {build['compiler']}",
        "CPU kernels built": _joined(build["cpu_kernels"]),
        "CPU offers": build["cpu_available"],
        "CPU kernels used": build["cpu_used"]
        + (
            f" (PYFAST_DPO_CPU_CAPABILITY={build['cpu_override']})" if build["cpu_override"] else ""
        ),
        "CUDA kernels built": cuda,
        "CUDA devices": ", ".join(devices) or "none",
        "CUDA kernels used": "yes" if build["cuda_usable"] else "no",
    }
    facts |= {name: installed_version(name) or "not installed" for name in OPTIONAL_PACKAGES}
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
