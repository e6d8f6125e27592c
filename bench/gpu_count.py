"""What a step of the head would do on a GPU, counted without one: products, bytes, and the time they must take.

    python bench/gpu_count.py [--json FILE]

The step runs on meta tensors, which have shapes and no memory. A product costs the larger of its operations at 750
TFLOP/s and its bytes; any other operation its bytes, each tensor once: at 3.0 and 4.3 TB/s, the copies that were
measured on an H100 and an H200. No launch latency, nothing overlaps. Ratios are to the bare products of the same rows
with logits in the inputs' dtype: three, two with a frozen head.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyfast_dpo import CompletionRows, fused_linear_policy_loss
from pyfast_dpo.logprobs import gpu_head
from pyfast_dpo.logprobs.linear_checks import CHUNK_BYTES
from pyfast_dpo.logprobs.linear_loss import LinearLoss
from pyfast_dpo.logprobs.plan import Plan
from pyfast_dpo.logprobs.unit_losses import LossOptions
from pyfast_dpo.ops import dispatch, operators

FLOPS = 750e12
GPUS = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second
WIDTH, VOCAB = 4096, 128256


class Work(NamedTuple):
    flops: float
    bytes: float

    def seconds(self, bandwidth: float) -> float:
        return max(self.flops / FLOPS, self.bytes / bandwidth)


class Case(NamedTuple):
    title: str
    rows: int
    pairs: int
    trainable: bool = True
    statistics: bool = False
    group: int | None = 2
    vocab: int = VOCAB
    budget: int = CHUNK_BYTES["cuda"]
    policy: dict[str, Any] | None = None  # a policy loss, each pair two sequences


BONUS = {"entropy_coef": 0.01, "entropy_normalizer": 8192.0}
SEQUENCE = {"level": "sequence"}
CASES = [
    Case("8192 rows, trainable", 8192, 8),
    Case("8192 rows, trainable, statistics", 8192, 8, statistics=True),
    Case("8192 rows, trainable, 128 MiB", 8192, 8, budget=128 << 20),
    Case("8192 rows, frozen", 8192, 8, trainable=False),
    Case("8192 rows, frozen, statistics", 8192, 8, trainable=False, statistics=True),
    Case("1024 rows, trainable", 1024, 2),
    Case("200 rows, trainable", 200, 2),
    Case("200 rows, frozen", 200, 2, trainable=False),
    Case("8192 rows, a loss of the whole batch", 8192, 8, group=None),
    Case("8192 rows, one pair", 8192, 1),
    Case("32768 rows, trainable", 32768, 32),
    Case("1024 rows, V = 128257", 1024, 2, vocab=128257),
    Case("policy: 8192 rows, trainable", 8192, 8, policy={}),
    Case("policy: 8192 rows, trainable, statistics", 8192, 8, statistics=True, policy={}),
    Case("policy: 8192 rows, entropy bonus", 8192, 8, policy=BONUS),
    Case("policy: 8192 rows, frozen", 8192, 8, trainable=False, policy={}),
    Case("policy: 8192 rows, ratio of the sequence", 8192, 8, policy=SEQUENCE),
    Case("policy: 8192 rows, that ratio and a bonus", 8192, 8, policy=BONUS | SEQUENCE),
    Case("policy: 32768 rows, trainable", 32768, 32, policy={}),
    Case("policy: 200 rows, trainable", 200, 2, policy={}),
]


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Counter(TorchDispatchMode):
    """Operations that are not products: the bytes of their tensors, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Work] = []
        self.others: list[Work] = []

    def product(self, left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> None:
        flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        moved = size_of(left, right, *([out, out] if accumulate else [out]))
        self.products.append(Work(flops, moved))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.__name__.split(".")[0]
        if name == "index_select":  # reads as much as it writes
            self.others.append(Work(0.0, 2 * size_of(result)))
        elif name.startswith("new_") or name.endswith(
            "_like"
        ):  # knows of another tensor no more than its shape
            written = 0 if "empty" in name else size_of(result)
            self.others.append(Work(0.0, written))
        elif not function.is_view and name != "empty":
            leaves = tree_leaves((arguments, options or {}, result))
            touched = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
            self.others.append(Work(0.0, size_of(*touched.values())))
        return result

    def seconds(self, bandwidth: float) -> float:
        return sum(work.seconds(bandwidth) for work in (*self.products, *self.others))


@contextmanager
def as_on_gpu(counter: Counter) -> Iterator[None]:
    with (
        mock.patch.object(dispatch, "on_gpu", lambda tensor: True),
        mock.patch.object(operators, "has_kernels", lambda device_type: True),
        mock.patch.object(gpu_head, "product", counter.product),
        counter,
    ):
        yield


def count(case: Case) -> Counter:
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    hidden = torch.empty(case.rows, WIDTH, **meta, requires_grad=True)
    weight = torch.empty(case.vocab, WIDTH, **meta, requires_grad=case.trainable)
    index = torch.empty(case.rows, device="meta", dtype=torch.int64)
    lengths = (case.rows // (2 * case.pairs),) * (2 * case.pairs)
    counts = torch.empty(len(lengths), device="meta", dtype=torch.int64)
    rows, counter = CompletionRows(index, index, counts, lengths), Counter()
    if case.policy is not None:
        one_a_token = torch.empty(case.rows, device="meta")
        one_a_sequence = torch.empty(len(lengths), device="meta")
        with as_on_gpu(counter):
            fused_linear_policy_loss(
                hidden, weight, rows=rows, advantages=one_a_sequence, old_logps=one_a_token, normalizer=1.0,
                statistics=case.statistics, max_chunk_bytes=case.budget, impl="fused", **case.policy,
            )  # fmt: skip
        return counter
    group = 2 * case.pairs if case.group is None else case.group
    plan = Plan(rows, group, case.budget // (4 * case.vocab))

    def losses(logps: Tensor, units: slice) -> Tensor:
        return F.softplus(logps.sum(0)).sum()

    with as_on_gpu(counter):
        options = LossOptions(plan, None, False, case.statistics, losses)
        LinearLoss.apply(hidden, weight, None, (1.0, None), options)
    return counter


def bare_products(case: Case) -> list[Work]:
    flops = 2.0 * case.rows * WIDTH * case.vocab
    states, weight, logits = (
        2.0 * m * n for m, n in ((case.rows, WIDTH), (case.vocab, WIDTH), (case.rows, case.vocab))
    )
    return [Work(flops, states + weight + logits)] * (3 if case.trainable else 2)


class Result(NamedTuple):
    case: str
    products: float  # of all the rows
    over_bare: dict[str, float]  # by GPU


def measure(case: Case) -> Result:
    counter, bare = count(case), bare_products(case)
    return Result(
        case.title,
        sum(work.flops for work in counter.products) / bare[0].flops,
        {
            gpu: counter.seconds(bandwidth) / sum(work.seconds(bandwidth) for work in bare)
            for gpu, bandwidth in GPUS.items()
        },
    )


def line(result: Result) -> str:
    ratios = " | ".join(f"{ratio:5.2f}" for ratio in result.over_bare.values())
    return f"{result.case:40} | {result.products:8.2f} | {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{'case':40} | products | {' | '.join(f'{gpu:>5}' for gpu in GPUS)}")
    results = []
    for case in CASES:
        results.append(measure(case))
        print(line(results[-1]), flush=True)
    if options.json:
        content = {
            "what": "counted, not measured on a GPU",
            "cases": [r._asdict() for r in results],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
