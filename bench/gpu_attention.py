"""One layer's attention over a row of shared prompts on a GPU: one call, a call a response, padded rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_linear import TOKENS
from gpu_measure import Bench, Row
from torch import Tensor

from pyfast_dpo.layout.attention_blocks import Scores, attend_by_blocks
from pyfast_dpo.layout.attention_varlen import attend_at_once
from pyfast_dpo.layout.shared_prompt import Group, SharedPromptLayout

PLAIN = Scores(None, 0.0, None, None)


class Heads(NamedTuple):
    query: int
    key: int
    width: int
    pairs: int


def attention(bench: Bench, heads: Heads) -> list[Row]:
    """Forward and backward; the pairs have the token counts of real preference data, again and again."""
    tokens = [TOKENS[i % len(TOKENS)] for i in range(heads.pairs)]
    layout = SharedPromptLayout(tuple(Group(p, (c, r)) for p, c, r in tokens))
    lengths = torch.tensor([p + n for p, *responses in tokens for n in responses])
    padded = int(lengths.max())
    seen = torch.arange(padded) < lengths[:, None]  # [S, L]
    mask = seen[:, None, None, :] & torch.ones(padded, padded, dtype=torch.bool).tril()
    mask |= torch.eye(padded, dtype=torch.bool)  # a query of padding sees itself
    mask = mask.to(bench.device.name)

    def leaves(rows: int, length: int) -> list[Tensor]:
        return [
            bench.normal(rows, length, count, heads.width).transpose(1, 2).requires_grad_()
            for count in (heads.query, heads.key, heads.key)
        ]

    def step(attend: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    def padded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2)

    def of_rows(attend: Callable[..., Tensor], rows: int, length: int) -> Callable[[], Any]:
        gradient = bench.normal(rows, length, heads.query, heads.width)
        return partial(step, attend, leaves(rows, length), gradient)

    # torch has its kernel for sequences of any lengths on GPUs alone.
    at_once = attend_at_once if bench.device.name == "cuda" else attend_by_blocks
    ours = "pyfast_dpo, one call"
    runs = {
        ours: of_rows(lambda *qkv: at_once(*qkv, layout, PLAIN), 1, layout.tokens),
        "a call a response": of_rows(
            lambda *qkv: attend_by_blocks(*qkv, layout, PLAIN), 1, layout.tokens
        ),
        "padded rows": of_rows(padded_attention, len(lengths), padded),
    }
    workload = (
        f"attention, {heads.query}/{heads.key} heads of {heads.width}, {heads.pairs} pairs "
        f"({layout.tokens} tokens), forward + backward"
    )
    return bench.measure({name: Row(workload, name) for name in runs}, runs, ours)
