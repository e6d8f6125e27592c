"""What the kernels must do on a GPU, counted and not measured: bytes, FLOPs, and instructions of the built kernels.

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
    flops: float = 750e12  # what large cuBLAS products reach, published: 728 to 791 of 989


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


def linear_step(
    gpu: Gpu, shape: tuple[int, int, int, int], chunk_bytes: int, frozen: bool
) -> dict[str, Any]:
    """Time of the bare products, and of what else is moved between them, if nothing overlaps."""
    sequences, length, width, vocab = shape
    rows = sequences * length
    chunks = -(-rows // (chunk_bytes // (4 * vocab)))
    products = (2 if frozen else 3) * 2 * rows * width * vocab
    # Logits in float32, not in a half type, 2; read by the log-sum-exp, 4; read for the gradient, 4, which is
    # written as a half, 2. The products that read it do so in the floor too.
    logits = rows * vocab * (2 + 4 + 4 + 2)
    # The weight's gradient: those of the logits gathered, 2 + 2, and multiplied 2 H rows at a time; the
    # product in float32, written and read, 8; a total of earlier products read and written, 8; the floor's
    # own product wrote 2, as the last one here does.
    products_of_many = -(-rows // (2 * width))
    gathered = 0 if frozen else rows * vocab * 4
    accumulate = 0 if frozen else vocab * width * (8 + (products_of_many - 1) * 16)
    product_ms = products / gpu.flops * 1e3
    moved_ms = (logits + gathered + accumulate) / gpu.bytes_per_s * 1e3
    return {
        "gpu": gpu.name,
        "frozen": frozen,
        "chunk_mib": chunk_bytes >> 20,
        "chunks": chunks,
        "tflop": products / 1e12,
        "logits_gb": logits / 1e9,
        "weight_gradient_gb": (gathered + accumulate) / 1e9,
        "products_ms": product_ms,
        "moved_ms": moved_ms,
        "over_products": (product_ms + moved_ms) / product_ms,
    }


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
    lines.append(
        "\nFrom hidden states: products at 750 TFLOP/s, and what else moves if nothing overlaps"
    )
    linear = [
        linear_step(gpu, plan.linear[0], chunk, frozen)
        for gpu in GPUS
        for frozen in (False, True)
        for chunk in (256 << 20, *plan.chunks)
    ]
    for step in linear:
        lines.append(
            f"{step['gpu']}, {'frozen' if step['frozen'] else 'trainable'}, chunks of {step['chunk_mib']} MiB "
            f"({step['chunks']}): {step['tflop']:.1f} TFLOP {step['products_ms']:.1f} ms; logits "
            f"{step['logits_gb']:.1f} GB + weight gradient {step['weight_gradient_gb']:.1f} GB "
            f"{step['moved_ms']:.1f} ms; {step['over_products']:.2f} x the products"
        )
    return {
        "table": "\n".join(lines),
        "what": f"counted from the SASS of sm_{ARCHITECTURE} and the shapes, not measured on a GPU",
        "assumptions": [asdict(gpu) for gpu in GPUS],
        "loops": [asdict(found[kernel]) for kernel, _, _ in PASSES.values()],
        "passes": [{**asdict(p), "bound": p.bound} for p in passes],
        "from_logits": workloads,
        "from_hidden": linear,
    }
