"""Whole training steps: our trainers and TRL's on the same real batches, as whole processes in turn.

    python bench/bench_train.py [--case NAME ...] [--rounds 2] [--steps 4] [--data ../shared/data]

Each process loads the model, prepares the data and takes a few steps, the same rows in the same order. A step
is timed from its first micro-batch to the end of the optimizer's; the first two steps of a process touch new memory and do
not count. Memory is the peak of the whole process, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import OtherLoad, Spread, ratios
from report import Bar, Progress, draw_bars, load_pyplot, megabytes, table
from workers import OURS, RESULT, TRL, in_turn, main, peak_of_process


class Case(NamedTuple):
    title: str
    data: str
    trainer: str  # "DPO" or "KTO"
    options: dict[str, Any]
    lora: bool
    speed_target: float
    memory_target: float | None  # ours over TRL's


CASES = {
    "float32": Case("HH pairs, all weights, float32", "hh_helpful_base_test.chat.jsonl", "DPO", {}, False, 5, 1 / 3),
    "no_checkpointing": Case("the same without gradient checkpointing", "hh_helpful_base_test.chat.jsonl", "DPO", {"gradient_checkpointing": False}, False, 5, 1 / 3),
    "lora": Case("HH pairs, LoRA, float32", "hh_helpful_base_test.chat.jsonl", "DPO", {}, True, 5, 1 / 4),
    "bfloat16": Case("HH pairs, all weights, bfloat16 autocast", "hh_helpful_base_test.chat.jsonl", "DPO", {"bf16": True}, False, 5, None),
    "short_prompts": Case("QA pairs, 5 a short prompt, float32", "fgrlhf_qa_pairs.jsonl", "DPO", {}, False, 2, None),
    "kto": Case("QA responses, KTO, float32", "fgrlhf_qa_kto.jsonl", "KTO", {}, False, 3, None),
}  # fmt: skip
BATCH, MAX_LENGTH, WARMUP = 4, 512, 2


# --- one process ------------------------------------------------------------------------------------


def work(who: str, name: str, steps: int, data: Path, model_path: str) -> None:
    """Trains and prints the result as JSON."""
    if who == OURS:
        from pyfast_dpo import trainers
    else:
        import trl as trainers
    import datasets
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    case = CASES[name]
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    lines = (data / case.data).read_text().splitlines()
    stride = len(lines) // (BATCH * steps)  # batches of neighbours from all over the file
    lines = [lines[BATCH * stride * i + j] for i in range(steps) for j in range(BATCH)]
    columns = ("prompt", "chosen", "rejected") if case.trainer == "DPO" else ("prompt", "completion", "label")  # fmt: skip
    rows = [{column: json.loads(line)[column] for column in columns} for line in lines]
    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    config = getattr(trainers, f"{case.trainer}Config")(
        output_dir=tempfile.mkdtemp(), max_length=MAX_LENGTH, per_device_train_batch_size=BATCH,
        max_steps=steps, logging_steps=1, learning_rate=1e-5, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", report_to=[], save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True, **{"bf16": False, **case.options},
    )  # fmt: skip

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    trainer = getattr(trainers, f"{case.trainer}Trainer")(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, peft_config=peft_config, callbacks=[Clock()],
    )  # fmt: skip
    inside = _time_inside(trainer) if who == OURS else None
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "seconds": Clock.seconds,
        "losses": [entry["loss"] for entry in log],
        "gradient_norms": [entry["grad_norm"] for entry in log],
        "peak_memory": peak_of_process(),
        "outside_model_loss_optimizer": None if inside is None else 1 - sum(inside) / sum(Clock.seconds),
    }  # fmt: skip
    print(RESULT + json.dumps(result))


def _time_inside(trainer: Any) -> list[float]:
    """Seconds in the model's and the reference's calls (the loss is computed inside), backward passes and
    optimizer steps: what is left of a step is the trainer's own."""
    seconds: list[float] = []

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    trainer._project = timed(trainer._project)
    trainer.accelerator.backward = timed(trainer.accelerator.backward)
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        optimizer.step = timed(optimizer.step)
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.accelerator.clip_grad_norm_ = timed(trainer.accelerator.clip_grad_norm_)
    return seconds


# --- all of them ------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    case, others = CASES[name], OtherLoad()
    runs = in_turn(__file__, name, options, progress)
    steps = {
        who: [s for r in results for s in r["seconds"][WARMUP:]] for who, results in runs.items()
    }
    memory = {who: [r["peak_memory"] for r in results] for who, results in runs.items()}
    ours, trl = runs[OURS][0], runs[TRL][0]
    return {
        "case": name,
        **case._asdict(),
        "load_of_others": others.share(),
        "median_seconds": {who: statistics.median(values) for who, values in steps.items()},
        "speed_up": ratios(steps[TRL], steps[OURS])._asdict(),
        "peak_memory": {who: statistics.median(values) for who, values in memory.items()},
        "memory_ratio": ratios(memory[OURS], memory[TRL])._asdict(),
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)
        ),
        "losses": {OURS: ours["losses"], TRL: trl["losses"]},
        "outside_model_loss_optimizer": statistics.median(
            r["outside_model_loss_optimizer"] for r in runs[OURS]
        ),
    }


def report(results: list[dict[str, Any]]) -> str:
    header = ["batch 4, max_length 512", "times TRL's speed", "target", "memory", "of TRL's", "target", "loss difference", "own overhead"]  # fmt: skip
    rows = [
        [
            result["title"],
            "{median:.2f} ({low:.2f}..{high:.2f})".format(**result["speed_up"]),
            f"{result['speed_target']:.0f}",
            megabytes(result["peak_memory"][OURS]),
            f"{result['memory_ratio']['median']:.2f}",
            f"{result['memory_target']:.2f}" if result["memory_target"] else "",
            f"{result['largest_loss_difference']:.1e}",
            f"{result['outside_model_loss_optimizer']:.1%}",
        ]
        for result in results
    ]
    return table(header, rows)


def draw(content: dict[str, Any], path: Path) -> bool:
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    results = content["cases"]
    page, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(12, 1.6 + 0.62 * len(results)), layout="constrained", sharey=False
    )
    draw_bars(
        speed,
        [Bar(r["title"], "", Spread(**r["speed_up"]), "#7d6ba0", r["speed_target"]) for r in results],
        number="{:.1f}x",
    )  # fmt: skip
    speed.set_title("Steps a second over TRL 1.16 (stroke: target)", fontsize=10, loc="left")
    draw_bars(
        memory,
        [Bar(r["title"], "", Spread(**r["memory_ratio"]), "#5a9a68", r["memory_target"]) for r in results],
        number="{:.2f}",
    )  # fmt: skip
    memory.set_title("Peak memory of the process over TRL's", fontsize=10, loc="left")
    facts = content["environment"]
    page.supxlabel(
        f"SmolLM2-135M, batch {BATCH}, max_length {MAX_LENGTH}; {facts['cpu']}, {facts['threads']} threads, "
        f"torch {facts['torch']}",
        fontsize=8, color="0.3",
    )  # fmt: skip
    page.savefig(path, dpi=150)
    pyplot.close(page)
    return True


if __name__ == "__main__":
    steps = 6, "of each process, the first two not counted"
    main(__doc__ or "", CASES, steps, work, measure, report, draw, "bench_train")
