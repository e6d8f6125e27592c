"""`pyfast-dpo demo grpo`: a real model learns a form from rewards alone, in a few minutes on two CPU cores."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from pyfast_dpo.cli.console import friendly_errors, quiet_transformers
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
    questions = [row["prompt"] for row in trainer.eval_dataset]
    print(f"\nreward: {short_sentence.__doc__}\n")
    before, answers_before = trainer.evaluate(), _answers(trainer, questions)
    print(
        f"\nGRPO, {options.steps} steps of {options.batch_size} prompts with {GROUP} responses each\n"
    )
    trainer.train()
    after, answers_after = trainer.evaluate(), _answers(trainer, questions)
    report = {
        "options": vars(options),
        "heldout_prompts": len(questions),
        "heldout_before": before,
        "heldout_after": after,
        "answers": [
            [question[0]["content"], *pair]
            for question, *pair in zip(questions, answers_before, answers_after, strict=False)
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
    from pyfast_dpo.cli.demo import PLAIN_CHAT_TEMPLATE
    from pyfast_dpo.trainers import GRPOConfig, GRPOTrainer

    path = resolve_model(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        print(f"{options.model} has no chat template; using 'role: content' lines")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
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
        max_steps=options.steps,
        logging_steps=1,
        seed=options.seed,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
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


def _answers(trainer: Any, questions: list[Any]) -> list[str]:
    """The likeliest answers to the first questions."""
    from pyfast_dpo.rollout import Sampling, TransformersEngine

    tokenizer = trainer.processing_class
    engine = TransformersEngine(trainer.accelerator.unwrap_model(trainer.model))
    prompts = [
        tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False)
        for each in questions[:SHOWN]
    ]
    groups = engine.generate(prompts, 1, Sampling(max_tokens=MOST_TOKENS, temperature=0))
    return [tokenizer.decode(group[0].ids, skip_special_tokens=True) for group in groups]
