"""Whole GRPO steps: our trainer and TRL's on the same prompts, as whole processes in turn.

    python bench/bench_grpo.py [--case NAME ...] [--rounds 2] [--steps 5] [--data ../shared/data]

Each process loads the model and takes a few steps of two prompts with eight responses each, sampled anew by each
trainer's own engine: the same prompts, not the same responses. A step is what lies between two ends of the optimizer's; the
update is the step without the engine's time. The first step of a process does not count. Memory is the peak of the
whole process, Python and libraries included.
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

GROUPS, GROUP, MOST, WARMUP = 2, 8, 48, 1


class Case(NamedTuple):
    title: str
    prompts: tuple[int, int]  # tokens of a prompt, from and below
    lora: bool
    update_target: float
    step_target: float
    memory_target: float


CASES = {
    "hh": Case("HH prompts of 82 to 283 tokens", (82, 284), False, 6, 5, 0.25),
    "long": Case("HH prompts of 400 to 480 tokens", (400, 481), False, 8, 5, 0.25),
    "lora": Case("HH prompts of 82 to 283 tokens, LoRA", (82, 284), True, 6, 5, 0.25),
}


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
    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    peft_config = None
    if case.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip
    config = trainers.GRPOConfig(
        output_dir=tempfile.mkdtemp(), num_generations=GROUP, max_completion_length=MOST,
        per_device_train_batch_size=GROUPS * GROUP, max_steps=steps, logging_steps=1, learning_rate=1e-6,
        lr_scheduler_type="constant", shuffle_dataset=False, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, use_cpu=True, bf16=False,
    )  # fmt: skip
    writing: list[float] = []

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    trainer = trainers.GRPOTrainer(
        model=model, reward_funcs=capitals, args=config, peft_config=peft_config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(prompts(tokenizer, case, steps, data)), callbacks=[Clock()],
    )  # fmt: skip
    owner, method = (trainer._writer, "write") if who == OURS else (trainer, "_generate")
    write = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return write(*args, **kwargs)
        finally:
            writing.append(time.perf_counter() - start)

    setattr(owner, method, timed)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = [b - a for a, b in zip(Clock.ends, Clock.ends[1:], strict=False)]
    result = {
        "seconds": seconds,
        "writing": writing[1:],
        "tokens": [entry["completions/mean_length"] * GROUPS * GROUP for entry in log[1:]],
        "peak_memory": peak_of_process(),
        "logp_difference": max(
            (e.get("sampling/sampling_logp_difference/max", 0.0) for e in log), default=0.0
        ),
    }
    print(RESULT + json.dumps(result))


def capitals(completions: list[Any], **others: Any) -> list[float]:
    """The share of capital letters: groups have variance, and nothing is computed for it."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sum(c.isupper() for c in text) / max(1, len(text)) for text in texts]


def prompts(tokenizer: Any, case: Case, steps: int, data: Path) -> list[dict[str, Any]]:
    """As many different prompts of the case's length as the steps take, from all over the file."""
    found = []
    for line in (data / "hh_helpful_base_test.chat.jsonl").read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        length = len(ids["input_ids"] if hasattr(ids, "keys") else ids)
        if case.prompts[0] <= length < case.prompts[1]:
            found.append({"prompt": prompt})
    stride = len(found) // (GROUPS * steps)
    if stride == 0:
        raise ValueError(
            f"bench_grpo: {data} has {len(found)} prompts of {case.prompts[0]} to {case.prompts[1] - 1} tokens, "
            f"{steps} steps need {GROUPS * steps}"
        )
    return found[::stride][: GROUPS * steps]


# --- all of them ------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    case, others = CASES[name], OtherLoad()
    runs = in_turn(__file__, name, options, progress)

    def of_steps(who: str, value: Any) -> list[float]:
        """By step, the same prompts in every run."""
        return [v for r in runs[who] for v in map(value, r["seconds"], r["writing"])]

    parts = {
        "step": lambda step, writing: step,
        "update": lambda step, writing: step - writing,
        "writing": lambda step, writing: writing,
    }
    memory = {who: [r["peak_memory"] for r in results] for who, results in runs.items()}
    tokens = {who: [t for r in results for t in r["tokens"]] for who, results in runs.items()}
    speeds = {
        part: ratios(of_steps(TRL, value), of_steps(OURS, value))._asdict()
        for part, value in parts.items()
    }  # fmt: skip
    return {
        "case": name,
        **case._asdict(),
        "load_of_others": others.share(),
        "median_seconds": {
            who: {part: statistics.median(of_steps(who, value)) for part, value in parts.items()} for who in runs
        },
        "speed_up": speeds,
        "mean_tokens": {who: statistics.mean(values) for who, values in tokens.items()},
        "peak_memory": {who: statistics.median(values) for who, values in memory.items()},
        "memory_ratio": ratios(memory[OURS], memory[TRL])._asdict(),
        "largest_logp_difference": max(r["logp_difference"] for r in runs[OURS]),
    }  # fmt: skip


def report(results: list[dict[str, Any]]) -> str:
    header = ["2 prompts x 8 responses of at most 48 tokens", "update", "target", "step", "target", "rollout", "memory", "of TRL's", "target"]  # fmt: skip

    def times(result: dict[str, Any], part: str) -> str:
        return "{median:.2f} ({low:.2f}..{high:.2f})".format(**result["speed_up"][part])

    rows = [
        [
            result["title"], times(result, "update"), f"{result['update_target']:.0f}", times(result, "step"),
            f"{result['step_target']:.0f}", times(result, "writing"), megabytes(result["peak_memory"][OURS]),
            f"{result['memory_ratio']['median']:.2f}", f"{result['memory_target']:.2f}",
        ]
        for result in results
    ]  # fmt: skip
    return table(header, rows)


def draw(content: dict[str, Any], path: Path) -> bool:
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    results = content["cases"]
    page, axes = pyplot.subplots(
        1, 3, figsize=(15, 1.6 + 0.62 * len(results)), layout="constrained"
    )
    panels = (
        ("Updates a second over TRL 1.16 (stroke: target)", "update", "update_target"),
        ("Whole steps a second over TRL 1.16, rollout included", "step", "step_target"),
    )
    for axis, (title, part, target) in zip(axes, panels, strict=False):
        draw_bars(
            axis,
            [Bar(r["title"], "", Spread(**r["speed_up"][part]), "#7d6ba0", r[target]) for r in results],
            number="{:.1f}x",
        )  # fmt: skip
        axis.set_title(title, fontsize=10, loc="left")
    draw_bars(
        axes[2],
        [Bar(r["title"], "", Spread(**r["memory_ratio"]), "#5a9a68", r["memory_target"]) for r in results],
        number="{:.2f}",
    )  # fmt: skip
    axes[2].set_title("Peak memory of the process over TRL's", fontsize=10, loc="left")
    facts = content["environment"]
    page.supxlabel(
        f"SmolLM2-135M, float32, {GROUPS} prompts x {GROUP} responses of at most {MOST} tokens; {facts['cpu']}, "
        f"{facts['threads']} threads, torch {facts['torch']}",
        fontsize=8, color="0.3",
    )  # fmt: skip
    page.savefig(path, dpi=150)
    pyplot.close(page)
    return True


if __name__ == "__main__":
    steps = 5, "of each process, the first not counted"
    main(__doc__ or "", CASES, steps, work, measure, report, draw, "bench_grpo")
