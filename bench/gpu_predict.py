"""What the kernels on logits must do on a GPU, counted and not measured: bytes, and instructions as they are built.
(The head's products and bytes: gpu_count.py.)

A pass takes at least as long as its bytes need at the memory's rate, as its instructions need to be issued, and
as its exponentials need in their pipe. The largest of the three is the bound; where that is the bytes, the
kernel can be as fast as a copy. No latency, launch or scheduling is in these numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sass import CSRC, Loop, disassemble, loops

ARCHITECTURE = 90
ROUND = (
    1024  # vectors that a block of the forward pass takes at a time: kRound in seq_logp_forward.cu
)


@dataclass(frozen=True)
class Gpu:
    """SXM boards: NVIDIA's figures for memory, multiprocessors and dense bf16; the clock is an assumption, that
    of boards under load, below the 1.98 GHz that they may reach."""

    name: str
    bytes_per_s: float
    processors: int = 132
    hertz: float = 1.755e9
    lanes: int = 128  # thread instructions a cycle and multiprocessor
    exponential_lanes: int = 16


GPUS = [Gpu("H100 SXM", 3.35e12), Gpu("H200 SXM", 4.8e12)]

# Passes: name -> (kernel, lanes of a 16-byte load, bytes an element). Element of the logits.
PASSES = {
    "forward, bf16": ("slice_kernel<BFloat16>", 8, 2),
    "forward, fp16": ("slice_kernel<Float16>", 8, 2),
    "forward, fp32": ("slice_kernel<float>", 4, 4),
    "backward, bf16": ("backward_kernel<BFloat16, BFloat16>", 8, 4),
    "backward, fp32": ("backward_kernel<float, float>", 4, 8),
    "backward, fp32 to bf16": ("backward_kernel<float, BFloat16>", 4, 6),
}


@dataclass
class Prediction:
    gpu: str
    pass_: str
    bytes_per_element: float
    instructions_per_element: float
    exponentials_per_element: float
    bytes_ps: float  # picoseconds an element, for the whole GPU
    issue_ps: float
    exponentials_ps: float

    @property
    def bound(self) -> str:
        times = {
            "bytes": self.bytes_ps,
            "issue": self.issue_ps,
            "exponentials": self.exponentials_ps,
        }
        return max(times, key=lambda name: times[name])


def of_pass(gpu: Gpu, name: str, loop: Loop) -> Prediction:
    _, lanes, size = PASSES[name]
    elements = loop.elements(lanes)
    instructions, exponentials = loop.instructions / elements, loop.exponentials / elements
    cycles = gpu.processors * gpu.hertz
    return Prediction(
        gpu.name,
        name,
        size,
        instructions,
        exponentials,
        size / gpu.bytes_per_s * 1e12,
        instructions / (cycles * gpu.lanes) * 1e12,
        exponentials / (cycles * gpu.exponential_lanes) * 1e12,
    )


def predict(plan: Any) -> dict[str, Any]:
    found: dict[str, Loop] = {}
    for name in ("seq_logp_forward.cu", "seq_logp_backward.cu"):
        found |= loops(disassemble(Path(CSRC) / "cuda" / name, ARCHITECTURE))
    passes = [
        of_pass(gpu, name, found[kernel]) for gpu in GPUS for name, (kernel, _, _) in PASSES.items()
    ]
    by_name = {(p.gpu, p.pass_): p for p in passes}
    lines = [
        f"Counted for sm_{ARCHITECTURE}, not measured. Picoseconds an element on the whole GPU:"
    ]
    lines.append(f"{'':34}{'bytes':>6}{'instr.':>8}{'bytes':>8}{'issue':>8}{'exp':>8}  bound by")
    for p in passes:
        lines.append(
            f"{p.gpu + ', ' + p.pass_:34}{p.bytes_per_element:6.0f}{p.instructions_per_element:8.2f}"
            f"{p.bytes_ps:8.3f}{p.issue_ps:8.3f}{p.exponentials_ps:8.3f}  {p.bound}"
        )
    lines.append(
        "\nLower bounds from logits, bf16 (ms): the larger of bytes, issue and exponentials"
    )
    workloads = []
    for gpu in GPUS:
        for (batch, length, vocab), _, _ in plan.logits:
            count = batch * length * vocab
            vectors = -(-vocab // 8)  # a round that is not full costs as much as one that is
            rounds = -(-vectors // ROUND) * ROUND / vectors
            forward, backward = (
                by_name[gpu.name, f"{way}, bf16"] for way in ("forward", "backward")
            )
            once = max(forward.bytes_ps, rounds * max(forward.issue_ps, forward.exponentials_ps))
            again = max(backward.bytes_ps, backward.issue_ps, backward.exponentials_ps)
            forward_ms, both = count * once / 1e9, count * (once + again) / 1e9
            workloads.append(
                {
                    "gpu": gpu.name,
                    "rows": batch * length,
                    "vocab": vocab,
                    "forward_ms": forward_ms,
                    "forward_backward_ms": both,
                    "forward_bytes": 2 * count,
                    "forward_backward_bytes": 6 * count,
                }
            )
            lines.append(
                f"{gpu.name}, [{batch * length}, {vocab}]: forward {forward_ms:.3f}, "
                f"forward + backward in place {both:.3f}"
            )
    return {
        "table": "\n".join(lines),
        "what": f"counted from the SASS of sm_{ARCHITECTURE} and the shapes, not measured on a GPU",
        "assumptions": [asdict(gpu) for gpu in GPUS],
        "loops": [asdict(found[kernel]) for kernel, _, _ in PASSES.values()],
        "passes": [{**asdict(p), "bound": p.bound} for p in passes],
        "from_logits": workloads,
    }
