"""`pyfast-dpo demo`: a real model learns a preference in a few minutes on two CPU cores."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from pyfast_dpo.cli.console import friendly_errors, quiet_transformers
from pyfast_dpo.cli.models import SMOLLM2, resolve_model
from pyfast_dpo.cli.runs import add_table, finish, lora_config
from pyfast_dpo.data import PreparedDataset, load_rows, prepare_pairs
from pyfast_dpo.data.demo_pairs import HELDOUT_FILE, TRAIN_FILE, follows_preference

QUESTION = "Is a bat a bird?"
ANSWER_TOKENS = 40
QUESTIONS_ASKED = 12  # of the held-out ones

# For base models, which have none: enough for one question and one answer.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    methods = ("dpo", "grpo")
    add(
        "method",
        nargs="?",
        choices=methods,
        default="dpo",
        help="from pairs, or from a reward (default: %(default)s)",
    )
    add("--model", default=SMOLLM2, help="name or path of another model (default: %(default)s)")
    add("--output_dir", help="default: runs/demo, or runs/demo-grpo")
    add("--full", action="store_true", help="train all weights instead of a LoRA adapter")
    add("--steps", type=positive_int, default=24, help="default: %(default)s")
    add(
        "--batch_size",
        type=positive_int,
        default=4,
        help="pairs or prompts a step (default: %(default)s)",
    )
    add("--learning_rate", type=positive_float, help="default: 3e-4 for LoRA, 2e-5 with --full")
    add("--beta", type=float, help="pull to the reference; default: 0.1, or 0 for grpo")
    add("--seed", type=int, default=42, help="default: %(default)s")
    add("--heldout", type=positive_int, help="use only the first so many held-out rows")


def run(options: argparse.Namespace) -> int:
    """Trains on the project's own pairs and shows what has changed on questions not trained on."""
    started = time.perf_counter()
    with friendly_errors():
        trainer, tokenizer = _build(options)
        rows = load_rows(HELDOUT_FILE)[: options.heldout]
        heldout = prepare_pairs(rows, tokenizer, name="held-out")
        assert isinstance(heldout, PreparedDataset)  # rows have a length
    from pyfast_dpo.evaluation.heldout import pair_logps, preference_accuracy

    print(heldout.report)
    table = add_table(trainer)
    collator = trainer.data_collator
    questions = [QUESTION, *(row["prompt"][0]["content"] for row in rows[:QUESTIONS_ASKED])]

    print("\nbefore training: held-out pairs and answers ...")
    logps_before = pair_logps(trainer.model, heldout, collator)
    answers_before = answers_of(trainer.model, tokenizer, questions)
    print(f"DPO, {options.steps} steps of {options.batch_size} pairs\n")
    trainer.train()
    print("\nafter training: held-out pairs and answers ...")
    logps_after = pair_logps(trainer.model, heldout, collator)
    answers_after = answers_of(trainer.model, tokenizer, questions)

    report = {
        "options": vars(options),
        "heldout_pairs": len(heldout),
        "heldout_accuracy_before": preference_accuracy(logps_before),
        "heldout_accuracy_after": preference_accuracy(logps_after),
        "heldout_reward_accuracy_after": preference_accuracy(logps_after, logps_before),
        "in_form_before": sum(map(follows_preference, answers_before[1:])),
        "in_form_after": sum(map(follows_preference, answers_after[1:])),
        "answers": list(zip(questions, answers_before, answers_after, strict=True)),
        "seconds_per_step": table.seconds_per_step,
        "seconds_in_all": time.perf_counter() - started,
    }
    print(f"\nQuestion (not in the training data): {QUESTION}")
    print(f"  before: {answers_before[0]} ...\n  after:  {answers_after[0]} ...")
    asked = len(questions) - 1
    lines = (
        ("", "before", "after"),
        (
            "held-out pairs with chosen more likely than rejected",
            f"{report['heldout_accuracy_before']:.1%}",
            f"{report['heldout_accuracy_after']:.1%}",
        ),
        (
            "held-out questions whose answer begins in short",
            f"{report['in_form_before']} of {asked}",
            f"{report['in_form_after']} of {asked}",
        ),
        *(
            (
                f"mean log-prob of the {side} response",
                f"{float(logps_before[:, column].mean()):.1f}",
                f"{float(logps_after[:, column].mean()):.1f}",
            )
            for column, side in enumerate(("chosen", "rejected"))
        ),
    )
    print(f"\n{len(heldout)} held-out pairs, questions not trained on")
    for name, before, after in lines:
        print(f"  {name:<54}{before:>10}{after:>10}")
    print()
    finish(trainer, report, title="pyfast-dpo demo: the answer in short, then the reason")
    print(
        f"{table.seconds_per_step:.2f} s a step, {report['seconds_in_all']:.0f} s in all "
        f"({'all weights' if options.full else 'LoRA'})"
    )
    return 0


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def _build(options: argparse.Namespace) -> tuple[Any, Any]:
    transformers = quiet_transformers("pyfast-dpo demo")
    from pyfast_dpo.trainers import DPOConfig, DPOTrainer

    path = resolve_model(options.model)
    tokenizer = tokenizer_of(options.model, path, transformers)
    config = DPOConfig(
        output_dir=options.output_dir or "runs/demo",
        beta=0.1 if options.beta is None else options.beta,
        learning_rate=options.learning_rate or (2e-5 if options.full else 3e-4),
        per_device_train_batch_size=options.batch_size,
        **short_run(options),
    )
    trainer = DPOTrainer(
        model=path,
        args=config,
        train_dataset=load_rows(TRAIN_FILE),
        processing_class=tokenizer,
        peft_config=None if options.full else lora_config(16),
    )
    return trainer, tokenizer


def tokenizer_of(model: str, path: str, transformers: Any) -> Any:
    """That of the model at `path`, with a chat template in any case."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        print(f"{model} has no chat template; using 'role: content' lines")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def short_run(options: argparse.Namespace) -> dict[str, Any]:
    """Of a config: a line of the table every step, no checkpoints, nobody else told."""
    return {
        "max_steps": options.steps,
        "logging_steps": 1,
        "seed": options.seed,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def answers_of(
    model: Any, tokenizer: Any, questions: Sequence[str], tokens: int = ANSWER_TOKENS
) -> list[str]:
    """The beginning of the model's answer to each question, always taking the most likely token."""
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    tokenizer.padding_side = "left"  # so that all answers begin at the same position
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    output = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [" ".join(answer.split()) for answer in answers]
