"""`pyfast-dpo demo grpo`: a real model learns a form from rewards alone, in a few minutes on two CPU cores."""

from __future__ import annotations

import argparse
import time
from typing import Any

from pyfast_dpo.cli.console import friendly_errors, quiet_transformers
from pyfast_dpo.cli.demo import answers_of, short_run, tokenizer_of
from pyfast_dpo.cli.models import resolve_model
from pyfast_dpo.cli.runs import add_table, finish, lora_config
from pyfast_dpo.data import load_rows
from pyfast_dpo.data.demo_pairs import HELDOUT_FILE, TRAIN_FILE
from pyfast_dpo.rewards.ready import short_sentence

REQUEST = "Answer in one short sentence."
GROUP = 8  # responses to a prompt
HELDOUT_GROUP = 4
MOST_TOKENS = 20
HELDOUT = 12  # prompts
SHOWN = 3  # answers before and after


def run(options: argparse.Namespace) -> int:
    """Shows the rewards of sampled answers to questions not trained on, before and after."""
    started = time.perf_counter()
    with friendly_errors():
        trainer = _build(options)
    table = add_table(trainer)
    questions = [row["prompt"][0]["content"] for row in trainer.eval_dataset]

    def answers() -> list[str]:
        """The likeliest ones, to the first questions."""
        return answers_of(trainer.model, trainer.processing_class, questions[:SHOWN], MOST_TOKENS)

    print(f"\nreward: {short_sentence.__doc__}\n")
    before, answers_before = trainer.evaluate(), answers()
    print(
        f"\nGRPO, {options.steps} steps of {options.batch_size} prompts with {GROUP} responses each\n"
    )
    trainer.train()
    after, answers_after = trainer.evaluate(), answers()
    report = {
        "options": vars(options),
        "heldout_prompts": len(questions),
        "heldout_before": before,
        "heldout_after": after,
        "answers": [
            list(row) for row in zip(questions, answers_before, answers_after, strict=False)
        ],
        "seconds_per_step": table.seconds_per_step,
        "seconds_in_all": time.perf_counter() - started,
    }
    for question, old, new in report["answers"]:
        print(f"\n{question}\n  before: {old}\n  after:  {new}")
    print(f"\n{len(questions)} held-out questions, {HELDOUT_GROUP} sampled answers each")
    print(f"  {'':<40}{'before':>10}{'after':>10}")
    for what, name in (
        ("mean reward", "eval_reward"),
        ("tokens of an answer", "eval_completions/mean_length"),
        ("share of answers cut off", "eval_completions/clipped_ratio"),
    ):
        print(f"  {what:<40}{before[name]:>10.2f}{after[name]:>10.2f}")
    print()
    finish(
        trainer, report, title="pyfast-dpo demo grpo: one short sentence, learned from its reward"
    )
    print(f"{table.seconds_per_step:.2f} s a step, {report['seconds_in_all']:.0f} s in all")
    return 0


def _build(options: argparse.Namespace) -> Any:
    transformers = quiet_transformers("pyfast-dpo demo grpo")
    from pyfast_dpo.trainers import GRPOConfig, GRPOTrainer

    path = resolve_model(options.model)
    tokenizer = tokenizer_of(options.model, path, transformers)
    config = GRPOConfig(
        output_dir=options.output_dir or "runs/demo-grpo",
        num_generations=GROUP,
        num_generations_eval=HELDOUT_GROUP,
        max_completion_length=MOST_TOKENS,
        per_device_train_batch_size=GROUP * options.batch_size,
        per_device_eval_batch_size=HELDOUT_GROUP * HELDOUT,
        beta=options.beta or 0.0,
        learning_rate=options.learning_rate or (1e-5 if options.full else 3e-4),
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        **short_run(options),
    )
    return GRPOTrainer(
        model=path,
        reward_funcs=short_sentence,
        args=config,
        train_dataset=_prompts(TRAIN_FILE),
        eval_dataset=_prompts(HELDOUT_FILE)[: options.heldout or HELDOUT],
        processing_class=tokenizer,
        peft_config=None if options.full else lora_config(16),
    )


def _prompts(file: Any) -> list[dict[str, Any]]:
    """The questions of the demonstration's pairs, with the request for a form."""
    questions = [row["prompt"][0]["content"] for row in load_rows(file)]
    return [{"prompt": [{"role": "user", "content": f"{each} {REQUEST}"}]} for each in questions]
