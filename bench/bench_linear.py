"""DPO from hidden states and the lm_head's weight, forward and backward: ours, bare products, peers.

    python bench/bench_linear.py [--quick] [--threads 2] [--rounds 5] [--case TEXT] [--out bench/results]

One padded batch [chosen; rejected] with the token counts of real preference data; the loss and the gradients
of the hidden states and (unless frozen) of the weight. Everybody gets the same batch: who projects prompt and
padding too pays for it. The floor is three `torch.mm` of the completion rows in the inputs' dtype: what the
mathematics asks for, without any softmax, at the speed of torch's own products. "registers alone" spends as many
operations without any memory: what no product by multiply-adds can be faster than (AMX is another instruction).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    OtherLoad,
    PeakMemory,
    Prepare,
    Spread,
    alternate,
    environment,
    in_fresh_process,
    peak_memory,
    ratios,
    start_fork_server,
)
from peak import load_peak
from report import Bar, Progress, draw_bars, load_pyplot, megabytes, noise, table, write_json
from torch import Tensor

import pyfast_dpo

# Tokens of prompt, chosen, rejected: the first rows of HH-RLHF helpful-base (test) with SmolLM2's tokenizer.
TOKENS = [(43, 46, 180), (124, 72, 67), (123, 123, 34), (203, 41, 27)]
BETA = 0.1
FLOOR = "three torch.mm of the completion rows"
PEAK = "their operations in registers alone"
OURS, FROZEN = "ours", "ours, frozen head"
FILE = "bench_linear.json"


class Case(NamedTuple):
    hidden: int
    vocab: int
    pairs: int
    dtype: str

    def __str__(self) -> str:
        return f"H={self.hidden}, V={self.vocab}, {self.dtype}, {self.pairs} pairs"


CASES = [
    Case(hidden, vocab, pairs, dtype)
    for hidden, vocab, pairs in ((576, 49152, 4), (2048, 128256, 1))
    for dtype in ("float32", "bfloat16")
]
QUICK = [Case(64, 4096, 2, dtype) for dtype in ("float32", "bfloat16")]


class Batch(NamedTuple):
    hidden: Tensor  # [2P, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [2P, T], -100 on prompt and padding; of the same position
    reference: Tensor  # [2P]


def make_batch(case: Case) -> Batch:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    rows = [(p, c) for p, c, _ in TOKENS[: case.pairs]] + [
        (p, r) for p, _, r in TOKENS[: case.pairs]
    ]
    length = max(prompt + response for prompt, response in rows)
    labels = torch.full((len(rows), length), -100)
    for row, (prompt, response) in enumerate(rows):
        labels[row, prompt : prompt + response] = torch.randint(0, case.vocab, (response,))
    hidden = torch.randn(len(rows), length, case.hidden).to(dtype)
    weight = (torch.randn(case.vocab, case.hidden) * 3 / case.hidden**0.5).to(dtype)
    return Batch(hidden, weight, labels, torch.full((len(rows),), -100.0))


# --- contenders: the loss from a batch ----------------------------------------------------------

Loss = Callable[[Batch], Tensor]


def ours(batch: Batch) -> Tensor:
    return pyfast_dpo.fused_linear_dpo_loss(
        batch.hidden, batch.weight, batch.labels, reference_logps=batch.reference, beta=BETA
    ).loss


def by_hand(batch: Batch) -> Tensor:
    return dpo(by_hand_tokens(batch), batch)


def by_hand_tokens(batch: Batch) -> Tensor:
    """The best that a person writes: completion rows only, float32 log-softmax."""
    mask = batch.labels != -100
    logits = batch.hidden[mask] @ batch.weight.T
    scored = logits.float().log_softmax(-1).gather(-1, batch.labels[mask][:, None])[:, 0]
    return torch.zeros(batch.labels.shape).masked_scatter(mask, scored)


def trl_head(batch: Batch) -> Tensor:
    return dpo(trl_tokens(batch), batch)


def trl_tokens(batch: Batch) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = batch.hidden.flatten(0, 1)  # all of them, as TRL does without Triton
    tokens = ChunkedLogProbFunction.apply(
        rows, batch.weight, None, batch.labels.clamp(min=0).flatten(), 1.0, 32768, None, 1.0, ()
    )[0]
    return tokens.view(batch.labels.shape).masked_fill(batch.labels == -100, 0.0)


def liger(batch: Batch) -> Tensor:
    return liger_outputs(batch)[0]


def liger_outputs(batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    # Without its compilation, which takes minutes here, and without a reference: it takes no log-probs.
    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=False, use_ref_model=False)
    return loss(batch.weight, batch.hidden, batch.labels)


def dpo(tokens: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = (tokens.float().sum(-1) - batch.reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


PEERS: dict[str, Loss] = {
    "by hand: h[mask] @ W.T, float32 log_softmax": by_hand,
    "TRL ChunkedLogProbFunction": trl_head,
    "Liger LigerFusedLinearDPOLoss (not compiled, no reference)": liger,
}


def forward_backward(batch: Batch, loss: Loss, trainable: bool = True) -> Prepare:
    def prepare() -> Callable[[], object]:
        leaves = batch._replace(
            hidden=batch.hidden.detach().requires_grad_(),
            weight=batch.weight.detach().requires_grad_(trainable),
        )

        def work() -> None:
            leaves.hidden.grad = leaves.weight.grad = None  # as an optimizer leaves them
            loss(leaves).backward()

        return work

    return prepare


def three_products(batch: Batch) -> Prepare:
    rows = batch.hidden[batch.labels != -100]
    gradient = torch.randn(rows.shape[0], batch.weight.shape[0]).to(rows.dtype)

    def work() -> None:
        rows @ batch.weight.T
        gradient @ batch.weight
        gradient.T @ rows

    return lambda: work


def find_missing(peers: dict[str, Loss]) -> dict[str, str]:
    """Peers that cannot run here, with the reason."""
    missing = {}
    batch = make_batch(Case(8, 16, 1, "float32"))
    for name, loss in peers.items():
        try:
            loss(batch)
        except ImportError as error:
            missing[name] = str(error)
    return missing


# --- measurements -------------------------------------------------------------------------------


def measure(case: Case, peers: dict[str, Loss], rounds: int, progress: Progress) -> dict[str, Any]:
    batch = make_batch(case)
    progress.next(f"{case}: memory")
    memory = {
        name: in_fresh_process(
            memory_of, case, loss, name != FROZEN, torch.get_num_threads()
        )._asdict()
        for name, loss in {OURS: ours, FROZEN: ours, **peers}.items()
    }
    rows = int((batch.labels != -100).sum())
    flops = 6 * rows * case.hidden * case.vocab
    contenders = {
        FLOOR: three_products(batch),
        OURS: forward_backward(batch, ours),
        FROZEN: forward_backward(batch, ours, trainable=False),
        **{name: forward_backward(batch, loss) for name, loss in peers.items()},
    }
    progress.next(f"{case}: times")
    try:
        spend = load_peak(case.dtype, torch.get_num_threads())
        contenders[PEAK] = lambda: lambda: spend(flops)
    except RuntimeError as error:
        print(f"skipped: {PEAK} ({error})")
    others = OtherLoad()
    seconds = alternate(contenders, rounds, progress=progress.detail)
    return {
        "case": str(case),
        **case._asdict(),
        "completion_rows": rows,
        "padded_rows": batch.labels.numel(),
        "weight_gradient_bytes": 4 * case.vocab * case.hidden,
        "load_of_others": others.share(),
        "memory": memory,
        "times": [
            {
                "contender": name,
                "useful_gflops": flops / sorted(values)[len(values) // 2] / 1e9,
                "over_floor": ratios(values, seconds[FLOOR])._asdict(),
                "over_ours": ratios(values, seconds[OURS])._asdict(),
            }
            for name, values in seconds.items()
        ],
    }


def memory_of(case: Case, loss: Loss, trainable: bool, threads: int) -> PeakMemory:
    torch.set_num_threads(threads)
    forward_backward(make_batch(Case(8, 16, 1, case.dtype)), loss)()()  # loads code, starts threads
    return peak_memory(forward_backward(make_batch(case), loss, trainable))


def report(result: dict[str, Any]) -> str:
    lines = [
        f"\n{result['case']}: {result['completion_rows']} completion rows of {result['padded_rows']} padded, "
        f"float32 gradient of the weight {megabytes(result['weight_gradient_bytes'])}"
    ]
    lines += noise(result["load_of_others"])
    rows = []
    for entry in result["times"]:
        memory = result["memory"].get(entry["contender"])
        rows.append(
            [
                entry["contender"],
                *("{median:.2f} ({low:.2f}..{high:.2f})".format(**entry[k]) for k in ("over_floor", "over_ours")),
                f"{entry['useful_gflops']:.0f}",
                megabytes(memory["allocated"]) if memory else "",
            ]
        )  # fmt: skip
    header = ["forward + backward", "time / floor", "time / ours", "useful GFLOP/s", "extra memory"]
    return "\n".join([*lines, table(header, rows)])


def draw(content: dict[str, Any], path: Path) -> bool:
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    colors = {FLOOR: "0.6", PEAK: "0.8", OURS: "#7d6ba0", FROZEN: "#b9aed0"}
    bars = [
        Bar(result["case"], entry["contender"], Spread(**entry["over_floor"]), colors.get(entry["contender"], "#d9a441"), None)
        for result in content["cases"]
        for entry in result["times"]
    ]  # fmt: skip
    page, axes = pyplot.subplots(figsize=(11, 1.2 + 0.27 * len(bars)), layout="constrained")
    draw_bars(axes, bars, number="{:.2f}")
    facts = content["environment"]
    axes.set_title(
        "DPO loss from hidden states, forward + backward: time over three bare products (less is better)",
        fontsize=10, loc="left",
    )  # fmt: skip
    page.supxlabel(
        f"{facts['cpu']}, {facts['threads']} threads, {facts['cpu_kernels_used']}, torch {facts['torch']}",
        fontsize=8, color="0.3",
    )  # fmt: skip
    page.savefig(path, dpi=150)
    pyplot.close(page)
    return True


def main(arguments: list[str] | None = None) -> None:
    run_cases(__doc__, arguments, FILE, PEERS, 2, measure, report, draw)


def run_cases(
    doc: str | None,
    arguments: list[str] | None,
    file: str,
    everybody: dict[str, Loss],
    stages: int,
    measure_case: Callable[[Case, dict[str, Loss], int, Progress], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    picture: Callable[[dict[str, Any], Path], bool],
) -> None:
    """The command line of a benchmark over these cases: measures, prints, writes JSON and a PNG.

    Args:
        stages: how often `measure_case` tells its progress.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape: not a claim")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 3")
    parser.add_argument(
        "--case", default="", help="only cases whose name has this in it, such as V=49152, bfloat16"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    start_fork_server(["torch", "pyfast_dpo"])
    torch.set_num_threads(options.threads)
    cases, rounds = (QUICK, 3) if options.quick else (CASES, 5)
    chosen = [case for case in cases if options.case in str(case)]
    path = options.out / file
    kept = read_cases(path) if options.case else {}
    progress = Progress(stages * len(chosen))
    facts, missing = environment(), find_missing(everybody)
    peers = {name: loss for name, loss in everybody.items() if name not in missing}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    for name, reason in missing.items():
        print(f"skipped: {name} ({reason})")
    for case in chosen:
        kept[str(case)] = measure_case(case, peers, options.rounds or rounds, progress)
        progress.done()
        print(show(kept[str(case)]), flush=True)
    results = [kept[str(case)] for case in cases if str(case) in kept]
    content = {"environment": facts, "quick": options.quick, "skipped": missing, "cases": results}
    write_json(path, content)
    picture(content, path.with_suffix(".png"))
    print(f"written: {path}")


def read_cases(path: Path) -> dict[str, dict[str, Any]]:
    """Earlier results, which a run of some of the cases keeps."""
    return (
        {case["case"]: case for case in json.loads(path.read_text())["cases"]}
        if path.exists()
        else {}
    )


if __name__ == "__main__":
    main()
