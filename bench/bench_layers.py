"""One float32 linear layer over a row of real pairs, forward and backward: our products, torch's, registers alone;
trained itself, and frozen under a LoRA adapter.

    python bench/bench_layers.py [--rounds 15] [--threads 2] [--out bench/results]
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_linear import TOKENS
from common import Prepare, alternate_with_floor, environment, ratios, spread
from peak import load_peak
from report import Progress, noise, table, write_json
from torch import nn

from pyfast_dpo.model.allocator import use_arena

OURS, TORCH, FLOOR = "ours", "torch", "registers alone"
RANK = 16
REPEATS = 10  # of the floor at a time


class Case(NamedTuple):
    inputs: int
    outputs: int
    adapter: bool

    def __str__(self) -> str:
        return f"{self.inputs} -> {self.outputs}" + (f", LoRA of rank {RANK}" if self.adapter else "")  # fmt: skip


SIZES = [(576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192), (8192, 2048)]
CASES = [Case(*size, adapter) for size in SIZES for adapter in (False, True)]


def layer_of(case: Case) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(case.inputs, case.outputs, bias=False))
    if not case.adapter:
        return layer
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=["0"], init_lora_weights=False)
    return get_peft_model(layer, config)  # type: ignore[arg-type]


def contenders(case: Case) -> dict[str, Prepare]:
    from pyfast_dpo.model import linear_layers

    linear_layers.FASTER = True  # measured wherever this runs
    tokens = sum(map(sum, TOKENS))
    torchs = layer_of(case)
    ours = copy.deepcopy(torchs)
    linear_layers.use_own_products(ours)

    def prepare(layer: nn.Module) -> Prepare:
        def make() -> Any:
            inputs = torch.randn(tokens, case.inputs, requires_grad=True)
            gradient = torch.randn(tokens, case.outputs)
            leaves = [inputs, *(p for p in layer.parameters() if p.requires_grad)]
            return lambda: torch.autograd.grad(layer(inputs), leaves, gradient)

        return make

    product = 2.0 * tokens * case.inputs * case.outputs
    # a frozen layer has two of three; the adapter two forward and four backward, of low rank
    of_adapter = 6.0 * tokens * RANK * (case.inputs + case.outputs)
    operations = 2 * product + of_adapter if case.adapter else 3 * product
    spend = load_peak("float32", torch.get_num_threads())
    return {OURS: prepare(ours), TORCH: prepare(torchs), FLOOR: lambda: lambda: spend(REPEATS * operations)}  # fmt: skip


def measure(case: Case, rounds: int, progress: Progress) -> dict[str, Any]:
    progress.next(str(case))
    seconds, load = alternate_with_floor(
        partial(contenders, case), FLOOR, REPEATS, rounds, progress=progress.detail
    )
    return {
        "case": str(case),
        "tokens": sum(map(sum, TOKENS)),
        "load_of_others": load,
        "seconds": {name: spread(values)._asdict() for name, values in seconds.items()},
        "over_ours": {
            name: ratios(seconds[name], seconds[OURS])._asdict() for name in (TORCH, FLOOR)
        },
    }


def report(results: list[dict[str, Any]]) -> str:
    spreads = "{median:.2f} ({low:.2f}..{high:.2f})"
    rows = [
        [r["case"], *(spreads.format(**r["over_ours"][name]) for name in (TORCH, FLOOR))]
        for r in results
    ]
    lines = noise(max(r["load_of_others"] or 0.0 for r in results))
    return "\n".join([*lines, table(["layer", "torch / ours", "registers alone / ours"], rows)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    use_arena()  # as in training
    facts = environment()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    progress = Progress(len(CASES))
    results = [measure(case, options.rounds, progress) for case in CASES]
    progress.done()
    print(report(results))
    write_json(options.out / "bench_layers.json", {"environment": facts, "cases": results})


if __name__ == "__main__":
    main()
