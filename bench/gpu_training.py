"""Whole DPO training steps on a GPU: our trainer and TRL's on the same pairs, a random Llama in bfloat16."""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
from typing import Any, NamedTuple

import torch
from bench_linear import TOKENS
from common import ratios
from gpu_measure import MIB, Cpu, Cuda, Row, reason

OURS, TRL = "pyfast_dpo", "TRL"
MODULES = {OURS: "pyfast_dpo.trainers", TRL: "trl"}
WORDS = 500


class ModelShape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocab: int
    pairs: int  # of a step
    steps: int
    skipped: int  # of these, at the start


def make_model(shape: ModelShape, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_tokenizer() -> Any:
    """Every number below WORDS is a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *map(str, range(WORDS))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def make_pairs(count: int) -> list[dict[str, str]]:
    """The token counts of real preference data, again and again; other words each time."""
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> str:
        return " ".join(map(str, torch.randint(WORDS, (tokens,), generator=generator).tolist()))

    return [
        {"prompt": text(prompt), "chosen": " " + text(chosen), "rejected": " " + text(rejected)}
        for prompt, chosen, rejected in (TOKENS[i % len(TOKENS)] for i in range(count))
    ]


def step_times(
    who: str, device: Cuda | Cpu, shape: ModelShape, checkpointing: bool | None
) -> tuple[list[float], float]:
    """Milliseconds of the steps that count, and the peak of device memory in MiB."""
    trainers = importlib.import_module(MODULES[who])
    from datasets import Dataset
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            device.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            device.synchronize()
            times.append((time.perf_counter() - self.start) * 1e3)

    options: dict[str, Any] = {}
    if checkpointing is not None:
        options["gradient_checkpointing"] = checkpointing
    with tempfile.TemporaryDirectory() as folder:
        config = trainers.DPOConfig(
            output_dir=folder, per_device_train_batch_size=shape.pairs, max_steps=shape.steps,
            learning_rate=1e-6, lr_scheduler_type="constant", logging_steps=shape.steps,
            train_sampling_strategy="sequential", report_to=[], save_strategy="no", disable_tqdm=True,
            bf16=True, use_cpu=device.name == "cpu", **options,
        )  # fmt: skip
        if device.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer = trainers.DPOTrainer(
            model=make_model(shape, device.name), ref_model=make_model(shape, device.name), args=config,
            train_dataset=Dataset.from_list(make_pairs(shape.pairs * shape.steps)),
            processing_class=make_tokenizer(), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / MIB if device.name == "cuda" else float("nan")
    return times[shape.skipped :], peak


def training_step(device: Cuda | Cpu, shape: ModelShape, checkpointing: bool | None) -> list[Row]:
    """Twice each in turns; `checkpointing` None: as either trainer does by itself. Memory is the whole peak."""
    how = {None: "defaults", False: "no gradient checkpointing", True: "gradient checkpointing"}
    parameters = sum(p.numel() for p in make_model(shape, "meta").parameters())
    workload = (
        f"DPO training step, Llama of {parameters / 1e9:.2f}e9 bf16, {shape.pairs} pairs, "
        f"{how[checkpointing]}"
    )
    rows = {who: Row(workload, who) for who in MODULES}
    times: dict[str, list[float]] = {who: [] for who in MODULES}
    for who in (OURS, TRL, TRL, OURS):
        if rows[who].note:
            continue
        try:
            samples, rows[who].extra_mib = step_times(who, device, shape, checkpointing)
            times[who] += samples
        except Exception as error:
            rows[who].note = reason(error)
        gc.collect()  # a trainer is part of cycles
        device.clear()
    for who, samples in times.items():
        if samples:
            rows[who].fill(samples)
            rows[who].times_ours = (
                ratios(samples, times[OURS]).median if times[OURS] else float("nan")
            )
    return list(rows.values())
