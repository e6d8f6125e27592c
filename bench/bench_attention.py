"""One layer's attention over a batch of real pairs, forward and backward: our CPU kernel, torch's, registers alone.

    python bench/bench_attention.py [--rounds 15] [--threads 2] [--out bench/results]

The same pairs in three layouts: a row of shared prompts by our kernel; that row by torch's attention, one call
a response; and a padded row a sequence, one call with the mask of its padding, as trainers do. "registers alone"
spends the multiply-adds of the scores that exist, in the dtype of the inputs, without memory or exponentials.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_linear import TOKENS
from common import Prepare, Work, alternate_with_floor, environment, ratios, spread
from peak import load_peak
from report import Progress, noise, table, write_json
from torch import Tensor

from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.attention_cpu import attend_on_cpu
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout

OURS, FLOOR = "ours", "registers alone"
PLAIN = Scores(None, 0.0, None, None)
# Products a score takes part in: scores, outputs; and backward scores again, their gradient, three gradients.
PRODUCTS = 7
REPEATS = 20  # of the floor at a time


class Case(NamedTuple):
    title: str
    heads: int
    key_heads: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.title}, {self.dtype}"


CASES = [
    Case(*shape, dtype)
    for shape in (("SmolLM2-135M", 9, 3, 64), ("Llama 3.2 1B", 32, 8, 64))
    for dtype in ("float32", "bfloat16")
]


def layout_of(tokens: list[tuple[int, int, int]]) -> SharedPromptLayout:
    return SharedPromptLayout(tuple(Group(p, (chosen, rejected)) for p, chosen, rejected in tokens))


def scores_of(layout: SharedPromptLayout) -> int:
    """(query, key) places that a head computes."""
    return sum(
        own * (own + 1) // 2 + own * prompt for _, own, _, prompt in layout.blocks().tolist()
    )


def contenders(case: Case) -> dict[str, Prepare]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    layout = layout_of(TOKENS)
    lengths = torch.tensor([p + r for p, *responses in TOKENS for r in responses])
    padded = int(lengths.max())
    seen = torch.arange(padded) < lengths[:, None]  # [S, L]
    mask = seen[:, None, None, :] & torch.ones(padded, padded, dtype=torch.bool).tril()
    mask |= torch.eye(padded, dtype=torch.bool)  # a query of padding sees itself

    def prepare(attend: Any, rows: int, length: int) -> Prepare:
        def make() -> Work:
            heads = (case.heads, case.key_heads, case.key_heads)
            leaves = [
                torch.randn(rows, length, count, case.width).to(dtype).transpose(1, 2).requires_grad_()
                for count in heads
            ]  # fmt: skip
            gradient = torch.randn(rows, length, case.heads, case.width).to(dtype)
            return lambda: torch.autograd.grad(attend(*leaves), leaves, gradient)

        return make

    def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2)

    operations = 2.0 * PRODUCTS * scores_of(layout) * case.heads * case.width
    spend = load_peak(case.dtype, torch.get_num_threads())
    return {
        OURS: prepare(lambda *qkv: attend_on_cpu(*qkv, layout, PLAIN), 1, layout.tokens),
        "torch, one call a response": prepare(
            lambda *qkv: attend_by_blocks(*qkv, layout, PLAIN), 1, layout.tokens
        ),
        "torch, padded rows": prepare(padded_attention, len(lengths), padded),
        FLOOR: lambda: lambda: spend(REPEATS * operations),
    }


def measure(case: Case, rounds: int, progress: Progress) -> dict[str, Any]:
    progress.next(str(case))
    seconds, load = alternate_with_floor(
        partial(contenders, case), FLOOR, REPEATS, rounds, progress=progress.detail
    )
    return {
        "case": str(case),
        "tokens": TOKENS,
        "load_of_others": load,
        "times": [
            {
                "contender": name,
                "seconds": spread(values)._asdict(),
                "over_ours": ratios(values, seconds[OURS])._asdict(),
            }
            for name, values in seconds.items()
        ],
    }


def report(result: dict[str, Any]) -> str:
    rows = [
        [
            entry["contender"],
            "{median:.2f} ({low:.2f}..{high:.2f})".format(**entry["over_ours"]),
            f"{entry['seconds']['median'] * 1e3:.1f} ms",
        ]
        for entry in result["times"]
    ]
    lines = [f"\n{result['case']}", *noise(result["load_of_others"])]
    return "\n".join(
        [*lines, table(["attention, forward + backward", "time / ours", "median"], rows)]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = environment()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    progress, results = Progress(len(CASES)), []
    for case in CASES:
        results.append(measure(case, options.rounds, progress))
        progress.done()
        print(report(results[-1]), flush=True)
    write_json(options.out / "bench_attention.json", {"environment": facts, "cases": results})


if __name__ == "__main__":
    main()
