"""The DPO loss from hidden states by everybody: time, extra memory and error, on the same batches.

    python bench/bench_libs.py [--quick] [--threads 2] [--rounds 5] [--case TEXT] [--out bench/results]

Ours, TRL's head, Liger, CCE, torch as most people write it, and the best that a person writes by hand; a peer that is
not installed is skipped by name (`pip install trl liger-kernel cut-cross-entropy triton`). Batches, contenders and
timing are those of bench_linear.py, with the token counts of real preference data. The error is the largest of a
sequence's log-prob against float64 from the same inputs, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_linear import (
    FLOOR,
    FROZEN,
    OURS,
    PEERS,
    Batch,
    Case,
    Loss,
    by_hand_tokens,
    dpo,
    liger_outputs,
    make_batch,
    measure,
    report,
    run_cases,
    trl_tokens,
)
from common import Spread
from report import Bar, Progress, draw_bars, load_pyplot, table
from torch import Tensor

import pyfast_dpo

FILE = "bench_libs.json"
BY_HAND, TRL, LIGER = PEERS
TORCH = "torch: logits of all positions, float32 cross_entropy"
CCE = "CCE linear_cross_entropy (torch_compile)"
COLORS = {FLOOR: "0.6", OURS: "#7d6ba0", FROZEN: "#b9aed0"}


def torch_tokens(batch: Batch) -> Tensor:
    logits = (batch.hidden @ batch.weight.T).float()
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return -losses.view(batch.labels.shape)


def torch_all(batch: Batch) -> Tensor:
    return dpo(torch_tokens(batch), batch)


def cce_tokens(batch: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Its Triton kernels need a GPU; this is what it offers without one. It keeps the completion rows too.
    return -linear_cross_entropy(
        batch.hidden, batch.weight, batch.labels, reduction="none", impl="torch_compile"
    )


def cce(batch: Batch) -> Tensor:
    return dpo(cce_tokens(batch), batch)


EVERYBODY: dict[str, Loss] = {**PEERS, CCE: cce, TORCH: torch_all}


# --- error ----------------------------------------------------------------------------------------


def our_logps(batch: Batch) -> Tensor:
    return pyfast_dpo.linear_sequence_logps(batch.hidden, batch.weight, batch.labels)


def liger_logps(batch: Batch) -> Tensor:
    chosen, rejected = liger_outputs(batch)[1][:2]
    return torch.cat([chosen, rejected])


SEQUENCES: dict[str, Callable[[Batch], Tensor]] = {
    OURS: our_logps,
    BY_HAND: lambda batch: by_hand_tokens(batch).sum(-1),
    TRL: lambda batch: trl_tokens(batch).sum(-1),
    LIGER: liger_logps,
    CCE: lambda batch: cce_tokens(batch).sum(-1),
    TORCH: lambda batch: torch_tokens(batch).sum(-1),
}


@torch.no_grad()
def errors(case: Case, missing: Collection[str]) -> dict[str, float]:
    """Largest error of a sequence's log-prob, in nats; of the stated functions, summed in their own dtype."""
    batch = make_batch(case)
    truth = by_rows_in_float64(batch)
    return {
        name: float((logps(batch).double() - truth).abs().max())
        for name, logps in SEQUENCES.items()
        if name not in missing
    }


def by_rows_in_float64(batch: Batch) -> Tensor:
    weight = batch.weight.double()
    sums = []
    for hidden, labels in zip(batch.hidden, batch.labels, strict=True):
        scored = labels != -100
        logps = (hidden[scored].double() @ weight.T).log_softmax(-1)
        sums.append(logps.gather(-1, labels[scored].unsqueeze(-1)).sum())
    return torch.stack(sums)


def error_table(found: dict[str, float]) -> str:
    rows = [[name, f"{error:.1e}"] for name, error in found.items()]
    return table(["log-prob of a sequence", "largest error, nats"], rows)


# --- picture --------------------------------------------------------------------------------------


def draw(content: dict[str, Any], path: Path) -> bool:
    pyplot = load_pyplot()
    if pyplot is None:
        return False

    def bar(result: dict[str, Any], name: str, value: Spread) -> Bar:
        return Bar(result["case"], name, value, COLORS.get(name, "#d9a441"), None)

    def point(value: float) -> Spread:
        return Spread(value, value, value)

    cases = content["cases"]
    panels = {
        "Time over three bare products": (
            "{:.2f}",
            [bar(r, e["contender"], Spread(**e["over_floor"])) for r in cases for e in r["times"]],
        ),
        "Extra memory, MB": (
            "{:.0f}",
            [bar(r, n, point(m["allocated"] / 1e6)) for r in cases for n, m in r["memory"].items()],
        ),
        "Largest error of a sequence's log-prob, nats": (
            "{:.1g}",
            [bar(r, n, point(e)) for r in cases for n, e in r["errors"].items()],
        ),
    }
    height = 1.4 + 0.27 * max(len(bars) for _, bars in panels.values())
    page, axes = pyplot.subplots(1, len(panels), figsize=(24, height), layout="constrained")
    for axis, (title, (number, bars)) in zip(axes, panels.items(), strict=True):
        draw_bars(axis, bars, number=number)
        axis.set_title(f"{title} (less is better)", fontsize=10, loc="left")
    facts = content["environment"]
    page.suptitle("DPO loss from hidden states, forward + backward", fontsize=12)
    page.supxlabel(
        f"{facts['cpu']}, {facts['threads']} threads, {facts['cpu_kernels_used']}, torch {facts['torch']}, "
        f"TRL {facts['trl']}",
        fontsize=8, color="0.3",
    )  # fmt: skip
    page.savefig(path, dpi=100)
    pyplot.close(page)
    return True


def main(arguments: list[str] | None = None) -> None:
    def measure_case(
        case: Case, peers: dict[str, Loss], rounds: int, progress: Progress
    ) -> dict[str, Any]:
        result = measure(case, peers, rounds, progress)
        progress.next(f"{case}: error")
        return result | {"errors": errors(case, EVERYBODY.keys() - peers.keys())}

    def show(result: dict[str, Any]) -> str:
        return f"{report(result)}\n\n{error_table(result['errors'])}"

    run_cases(__doc__, arguments, FILE, EVERYBODY, 3, measure_case, show, draw)


if __name__ == "__main__":
    main()
