"""HTTPEngine against a real vLLM on this CPU: versions, log-probs, vLLM's modes of them, GRPO steps. `make test-vllm`.

It serves SmolLM2-135M-Instruct in float32 with LoRA, once for each of vLLM's two kinds of log-probs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from engine_checks import scored
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyfast_dpo.cli.models import smollm2_path
from pyfast_dpo.rollout import Completion, Engine, HTTPEngine, RolloutError, Sampling
from pyfast_dpo.trainers import GRPOConfig, GRPOTrainer

TEXTS = ["The capital of France is", "Once upon a time there was", "def fibonacci(n):"]
# Nats a token between vLLM and one pass of transformers, both in float32. Measured: 2e-5 and 7e-5.
MEAN, MOST = 5e-5, 1e-3


@contextlib.contextmanager
def serving(vllm: Path, model: Path, *options: str) -> Iterator[str]:
    """The URL of a vLLM that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", vllm.parent.parent / "serve.log"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(vllm.parent.parent / "lib" / "libiomp5.so"),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)  # its environment is its own
    command = [
        str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "1024", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16", *options,
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        started = time.monotonic()
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if server.poll() is not None or time.monotonic() - started > 600:
                raise SystemExit(
                    f"vLLM did not start; the end of {log}:\n{log.read_text()[-3000:]}"
                )
            time.sleep(1)
        print(f"vLLM {' '.join(options)} is ready after {time.monotonic() - started:.0f} s")
        yield url
    finally:
        server.terminate()
        server.wait()


def check_log_probs(
    what: str,
    model,
    prompts: list[list[int]],
    groups: list[list[Completion]],
    temperature: float = 1,
) -> None:
    differences = torch.cat(
        [
            (scored(model, prompt, each, temperature) - torch.tensor(each.logprobs)).abs()
            for prompt, group in zip(prompts, groups, strict=True)
            for each in group
        ]
    )
    mean, most = float(differences.mean()), float(differences.max())
    print(f"  {what}: {len(differences)} tokens, nats from ours: mean {mean:.1e}, max {most:.1e}")
    assert mean <= MEAN and most <= MOST


def check_refused(engine: HTTPEngine, prompts: list[list[int]], **options: float) -> None:
    try:
        engine.generate(prompts, 1, Sampling(max_tokens=16, **options))
    except RolloutError as error:
        assert "gives log-probs" in str(error), error
        print(f"  {options}: refused")
    else:
        raise AssertionError(f"{options} must be refused: these log-probs are not the trainer's")


def check_engine(url: str, model, prompts: list[list[int]]) -> None:
    """vLLM's own mode: log-probs at temperature 1, before tokens are left out."""
    engine = HTTPEngine(url)
    sampling = Sampling(max_tokens=32, seed=1)
    groups = engine.generate(prompts, 4, sampling)
    check_log_probs("base", model, prompts, groups)
    assert len({tuple(each.ids) for group in groups for each in group}) == 12, "a seed for each"
    print(f"  a seed repeats: {engine.generate(prompts, 4, sampling) == groups}")
    for options in ({"temperature": 0}, {"top_p": 0.9}):
        written = engine.generate(prompts, 2, Sampling(max_tokens=32, seed=1, **options))
        check_log_probs(str(options), model, prompts, written)
    check_refused(engine, prompts, temperature=0.7)
    stop = groups[0][0].ids[3]
    for group in engine.generate(prompts, 4, Sampling(32, seed=1, stop_token_ids=(stop,))):
        for each in group:
            assert (each.ids[-1] == stop) == (each.finish_reason == "stop")

    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    for version in (1, 2):
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        engine.update_weights(adapted, version)
        groups = engine.generate(prompts, 4, sampling)
        assert {each.version for group in groups for each in group} == {version}
        check_log_probs(f"adapter, version {version}", adapted, prompts, groups)
        with adapted.disable_adapter():
            far = max(
                float((scored(adapted, prompt, each) - torch.tensor(each.logprobs)).abs().max())
                for prompt, group in zip(prompts, groups, strict=True)
                for each in group
            )
        assert far > 0.05, "the base model would have been taken for the adapter"
    engine.close()
    adapted.unload()


def check_processed(url: str, model, prompts: list[list[int]]) -> None:
    """--logprobs-mode processed_logprobs: at any temperature, after tokens are left out."""
    engine = HTTPEngine(url)
    for temperature in (0.7, 1.3):
        sampling = Sampling(max_tokens=32, seed=1, temperature=temperature)
        groups = engine.generate(prompts, 4, sampling)
        check_log_probs(f"temperature {temperature}", model, prompts, groups, temperature)
    check_refused(engine, prompts, top_p=0.9)


class Recorded:
    """An engine, and the versions that it was sent and that answered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.sent, self.answered = engine, [], []

    def generate(self, prompts, n: int, sampling: Sampling) -> list[list[Completion]]:
        groups = self.engine.generate(prompts, n, sampling)
        self.answered.append({each.version for group in groups for each in group})
        return groups

    def update_weights(self, model, version: int) -> None:
        self.engine.update_weights(model, version)
        self.sent.append(version)


def letters(completions: list[str], **_: object) -> list[float]:
    """The share of e among the letters: every group has some variance."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def check_training(url: str, folder: Path, steps: int = 3) -> None:
    """GRPO with LoRA: each step's responses are of that step's weights, and have the log-probs that are trained."""
    engine = HTTPEngine(url)
    recorded = Recorded(engine)
    with tempfile.TemporaryDirectory() as output:
        args = GRPOConfig(
            output, max_steps=steps, num_generations=4, per_device_train_batch_size=12, max_completion_length=32,
            learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            letters,
            args,
            train_dataset=[{"prompt": text} for text in TEXTS],
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            engine=recorded,
        )
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"  GRPO: sent versions {recorded.sent}, answered {recorded.answered}")
    assert recorded.sent == list(range(steps)) and recorded.answered == [{v} for v in range(steps)]
    for step, entry in enumerate(log):
        mean, most = (
            entry[f"sampling/sampling_logp_difference/{what}"] for what in ("mean", "max")
        )
        print(
            f"  GRPO step {step}: reward {entry['reward']:.4f}, loss {entry['loss']:+.4f}, nats from the trainer's: "
            f"mean {mean:.1e}, max {most:.1e}"
        )
        assert mean <= MEAN and most <= MOST
    assert len(log) == steps
    outputs = [each for name, each in trainer.model.named_parameters() if "lora_B" in name]
    assert any(each.any() for each in outputs), "the versions were all the base model"
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--vllm", type=Path, required=True, help="the command, such as .venv-vllm/bin/vllm"
    )
    vllm = parser.parse_args().vllm.absolute()
    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with serving(vllm, folder) as url:
        check_engine(url, model, prompts)
        check_training(url, folder)
    with serving(vllm, folder, "--logprobs-mode", "processed_logprobs") as url:
        check_processed(url, model, prompts)
    print("all held")


if __name__ == "__main__":
    main()
