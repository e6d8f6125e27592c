"""Log-probs of labels from logits, on the CPU: ours against torch, TRL and the memory bandwidth.

    python bench/bench_ops.py [--quick] [--shapes 1024x49152 ...] [--threads 2] [--out bench/results]

Every case (shape, dtype) is measured in one process, all contenders alternating, and told in ratios:

    forward                      `token_logps(logits, labels)` without autograd, as a share of the read
                                 bandwidth that a float32 `sum()` reaches over the same bytes
    forward + in-place backward  `token_logps(..., inplace_backward=True)` and `backward` with a coefficient
                                 a row (as a preference loss sends), as a share of the floor (`sum()` and an
                                 in-place `mul_` over the same bytes) and as a speed-up over the peers

Bytes are those the task needs, whoever does it: read the logits once in the forward pass, read and write
them once in the backward pass. GB/s follow from them, so that a peer which moves more shows fewer. The
peers' gradients are new tensors; ours overwrites the logits, which are restored outside the timed region.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
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
from contenders import (
    DTYPES,
    PEERS,
    Case,
    Peer,
    Workload,
    find_missing,
    log_softmax_gather,
    ours,
    peers_of,
)
from report import (
    QUIET,
    Bar,
    Progress,
    draw_bars,
    figure,
    load_pyplot,
    megabytes,
    noise,
    table,
    timing,
    timing_table,
    verdict,
    write_json,
)

SHAPES = [(1024, 49152), (512, 128256)]  # the tokens of a pair; SmolLM2's and Llama 3's vocabulary
QUICK_SHAPES = [(128, 49152), (64, 128256)]
FORWARD_TARGETS = {"float32": 0.85, "bfloat16": 0.6}  # of the read bandwidth
MEMORY_TARGET = 32  # bytes a row, eight float32 numbers
ERROR_ROWS = 64
ROUNDED = 1e-3  # error of a log-prob from which on the plot says that a peer rounds
FORWARD_COLOR, BOTH_COLOR = "#7d6ba0", "#b9aed0"

READ_FLOOR = "read floor: float32 sum()"
WRITE_FLOOR = "read + write floor: float32 mul_()"
OURS_FORWARD = "ours: forward"
OURS = "ours: forward + in-place backward"


# --- measurements -------------------------------------------------------------------------------


def measure(case: Case, missing: dict[str, str], rounds: int, progress: Progress) -> dict[str, Any]:
    """Everything about one case, ready for JSON."""
    peers = peers_of(case, missing)
    progress.next(f"{case}: memory, errors")
    memory, errors = measure_memory(case, peers), measure_errors(case, peers)
    others = OtherLoad()
    progress.next(f"{case}: bandwidth")
    bandwidth = measure_bandwidth(case, 3 * rounds, progress)  # three times: these are fast
    progress.next(f"{case}: peers")
    against_peers = measure_peers(case, peers, rounds, progress)
    return {
        "case": str(case),
        **dataclasses.asdict(case),
        "logits_bytes": case.logits_bytes,
        "load_of_others": others.share(),
        "bandwidth": bandwidth,
        "peers": against_peers,
        "memory": memory,
        "errors": errors,
    }


def measure_bandwidth(case: Case, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Ours against what the memory allows; the ratio is the share of the floor that is reached."""
    workload = Workload(case)
    contenders = floors(workload)
    contenders |= {OURS_FORWARD: workload.forward, OURS: workload.forward_backward(ours)}
    passes = {READ_FLOOR: 1, WRITE_FLOOR: 2, OURS_FORWARD: 1, OURS: 3}  # over the logits' bytes
    seconds = alternate(contenders, rounds, progress=progress.detail)
    rows = {k: timing(k, seconds[k], passes[k] * case.logits_bytes) for k in contenders}
    read, both = seconds[READ_FLOOR], add(seconds[READ_FLOOR], seconds[WRITE_FLOOR])
    rows[OURS_FORWARD] |= figure(ratios(read, seconds[OURS_FORWARD]), FORWARD_TARGETS[case.dtype])
    rows[OURS] |= figure(ratios(both, seconds[OURS]))
    return list(rows.values())


def measure_peers(
    case: Case, peers: dict[str, Peer], rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """Ours against the peers, forward and backward; the ratio is the speed-up of ours over the peer.

    The floor runs in the same rounds: the peer's time over it is the most that any kernel could reach.
    """
    workload = Workload(case)
    contenders = {OURS: workload.forward_backward(ours)}
    contenders |= {name: workload.forward_backward(p.function) for name, p in peers.items()}
    seconds = alternate(contenders | floors(workload), rounds, progress=progress.detail)
    floor = add(seconds[READ_FLOOR], seconds[WRITE_FLOOR])
    rows = [timing(name, seconds[name], 3 * case.logits_bytes) for name in contenders]
    for row in rows[1:]:
        target = peers[row["contender"]].targets[case.dtype]
        row |= figure(ratios(seconds[row["contender"]], seconds[OURS]), target)
        row["ceiling"] = ratios(seconds[row["contender"]], floor).median
    return rows


def floors(workload: Workload) -> dict[str, Prepare]:
    """Reading the logits once; reading and writing them once."""
    return {
        READ_FLOOR: workload.floor(torch.sum),
        WRITE_FLOOR: workload.floor(lambda numbers: numbers.mul_(1.0)),
    }


def add(a: list[float], b: list[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def measure_memory(case: Case, peers: dict[str, Peer]) -> list[dict[str, Any]]:
    """Peak memory of forward + backward above the logits and labels, each contender in its process."""
    result = []
    for name in (OURS, *peers):
        peak = in_fresh_process(memory_of, case, name, torch.get_num_threads())
        target = MEMORY_TARGET if name == OURS else None
        per_row = peak.allocated / case.rows
        result.append(
            {
                "contender": name,
                **peak._asdict(),
                "allocated_per_row": per_row,
                "target": target,
                "reached": None if target is None else per_row <= target,
            }
        )
    return result


def memory_of(case: Case, name: str, threads: int) -> PeakMemory:
    torch.set_num_threads(threads)
    function = ours if name == OURS else PEERS[name].function
    small = Workload(dataclasses.replace(case, rows=2))
    small.forward_backward(function)()()  # loads code and starts threads
    return peak_memory(Workload(case).forward_backward(function))


def measure_errors(case: Case, peers: dict[str, Peer]) -> list[dict[str, Any]]:
    """Largest error of a token's log-prob against float64 of the same logits: who rounds."""
    workload = Workload(dataclasses.replace(case, rows=min(case.rows, ERROR_ROWS)))
    logits, labels = workload.source, workload.labels
    truth = log_softmax_gather(logits.double(), labels)
    functions = {OURS: ours} | {name: peer.function for name, peer in peers.items()}
    return [
        {"contender": name, "max_error": (f(logits, labels) - truth).abs().max().item()}
        for name, f in functions.items()
    ]


# --- report -------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The readable tables of one case."""
    parts = [f"{result['case']}, {megabytes(result['logits_bytes'])} of logits"]
    parts += noise(result["load_of_others"])
    parts.append(timing_table("share of the floor", "{:.3f}", result["bandwidth"]))
    parts.append(timing_table("speed-up over", "{:.2f}x", result["peers"]))
    parts.append(memory_table(result))
    return "\n" + "\n\n".join(parts) + "\n"


def memory_table(result: dict[str, Any]) -> str:
    header = ["extra memory; error of a log-prob", "tensors", "bytes a row", "of the logits"]
    header += ["process grew by", "max error", "target", ""]
    errors = {entry["contender"]: entry["max_error"] for entry in result["errors"]}
    rows = [
        [
            entry["contender"],
            megabytes(entry["allocated"]),
            f"{entry['allocated_per_row']:.0f}",
            f"{entry['allocated'] / result['logits_bytes']:.2f}x",
            "unknown" if entry["resident"] is None else megabytes(entry["resident"]),
            f"{errors[entry['contender']]:.1e}",
            f"<= {entry['target']} B a row" if entry["target"] else "",
            verdict(entry["reached"]),
        ]
        for entry in result["memory"]
    ]
    return table(header, rows)


def draw(content: dict[str, Any], path: Path) -> bool:
    """Speed-up over the peers, and share of the memory bandwidth."""
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    results, facts = content["cases"], content["environment"]
    speedups, shares = [], []
    for result in results:
        rounding = {e["contender"] for e in result["errors"] if e["max_error"] > ROUNDED}
        for entry in (e for e in result["peers"] if "ratio" in e):
            name, ratio = entry["contender"], Spread(**entry["ratio"])
            label = name + " *" * (name in rounding)
            limits = entry["target"], entry["ceiling"]
            speedups.append(Bar(result["case"], label, ratio, PEERS[name].color, *limits))
        for entry in (e for e in result["bandwidth"] if "ratio" in e):
            name, ratio = entry["contender"].removeprefix("ours: "), Spread(**entry["ratio"])
            color = FORWARD_COLOR if entry["contender"] == OURS_FORWARD else BOTH_COLOR
            shares.append(Bar(result["case"], name, ratio, color, entry["target"]))
    height = 1.2 + 0.24 * (len(speedups) + 2 * len(results))
    page, (left, right) = pyplot.subplots(1, 2, figsize=(13, height), layout="constrained")
    draw_bars(left, speedups, number="{:.1f}x")
    left.set_title("forward + in-place backward: times faster than", fontsize=10, loc="left")
    draw_bars(right, shares, number="{:.2f}")
    right.set_title("share of the floor: the bare memory traffic", fontsize=10, loc="left")
    note = (
        "black stroke: target; diamond: what a kernel at the memory floor would reach; whisker: quartiles; "
        f"*: log-probs rounded to bfloat16\n{facts['cpu']}, "
        f"{facts['threads']} threads, {facts['cpu_kernels_used']}, torch {facts['torch']}"
    )
    busiest = max(result["load_of_others"] or 0 for result in results)
    if busiest > QUIET:
        note += f"; others used up to {busiest:.0%} of the CPUs: no claim"
    page.supxlabel(note, fontsize=8, color="0.3")
    page.savefig(path, dpi=150)
    pyplot.close(page)
    return True


# --- command line -------------------------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, vocab = text.partition("x")
    if not (rows.isdigit() and vocab.isdigit() and int(rows) % 2 == 0 < int(rows) * int(vocab)):
        raise argparse.ArgumentTypeError(f"ROWSxVOCAB with an even number of rows, got {text!r}")
    return int(rows), int(vocab)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, 3 rounds: not a claim")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="ROWSxVOCAB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="default 9, with --quick 3")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    start_fork_server(["torch", "pyfast_dpo", "trl.trainer.utils"])
    torch.set_num_threads(options.threads)
    rounds = options.rounds or (3 if options.quick else 9)
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    cases = [Case(rows, vocab, dtype) for rows, vocab in shapes for dtype in DTYPES]
    progress = Progress(3 * len(cases))

    facts = environment()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    missing = find_missing()
    for name, reason in missing.items():
        print(f"skipped: {name} ({reason})")
    results = []
    for case in cases:
        results.append(measure(case, missing, rounds, progress))
        progress.done()
        print(report(results[-1]), flush=True)
    content = {
        "environment": facts,
        "quick": options.quick,
        "rounds": rounds,
        "skipped": missing,
        "cases": results,
    }
    write_json(options.out / "bench_ops.json", content)
    drawn = draw(content, options.out / "bench_ops.png")
    print(f"written: {options.out}/bench_ops.json" + (", bench_ops.png" if drawn else ""))
    if not drawn:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
