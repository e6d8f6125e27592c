"""`pyfast-dpo grpo` and kin, and `demo grpo`, in small: what they promise to print and write, what they say to mistakes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from canned_engine import make_prompts
from tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer

from pyfast_dpo.cli import main
from pyfast_dpo.cli.online import parse

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("online")
    model = make_model()
    model.config.max_position_embeddings = 512
    model.save_pretrained(path / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(path / "model")
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in make_prompts()]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "method, flags", [("grpo", ["--full"]), ("rloo", []), ("ppo", ["--num_ppo_epochs", "2"])]
)
def test_a_command_leaves_model_metrics_and_curves(method, flags, folder, tmp_path, capsys) -> None:
    status = main(
        [method, "--model", str(folder / "model"), "--data", str(folder / "prompts.jsonl"), "--reward", "distinct_words",
         "short_sentence", "--output_dir", str(tmp_path), "--steps", "2", "--num_generations", "2",
         "--max-completion-length", "6", "--eval_data", str(folder / "prompts.jsonl"), *flags]
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    assert "reward" in printed and "eval after step 2" in printed
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert {"reward", "rewards/distinct_words/mean"} <= report["history"][0].keys()
    assert report["options"]["reward"] == ["distinct_words", "short_sentence"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = "model.safetensors" if "--full" in flags else "adapter_model.safetensors"
    assert (tmp_path / saved).exists() and (tmp_path / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--model is needed"),
        (["--model", "m", "--data", "d"], "--reward is needed"),
        (["--model", "m", "--data", "d", "--reward", "shrt"], "there are short_sentence"),
        (["--model", "m", "--data", "d", "--reward", "short_sentence", "--lambda", "2"], "--lambda is not an option"),
        (["--model", "m", "--data", "d", "--reward", "short_sentence", "--temperature", "0"], "temperature must be positive"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_in_one_line(flags, words) -> None:
    with pytest.raises(SystemExit, match=words):
        main(["grpo", *flags])


def test_a_batch_is_four_groups_and_the_learning_rate_that_of_the_adapter() -> None:
    flags = ["--model", "m", "--data", "d", "--reward", "short_sentence"]
    _, config = parse("grpo", flags)
    assert config.per_device_train_batch_size == 32 and config.learning_rate == 1e-4
    _, config = parse("rloo", [*flags, "--full", "--batch-size", "6"])
    assert config.per_device_train_batch_size == 6 and config.learning_rate == 1e-6


def test_the_demonstration_of_grpo(folder, tmp_path, capsys) -> None:
    status = main(
        ["demo", "grpo", "--model", str(folder / "model"), "--output_dir", str(tmp_path), "--steps", "2", "--batch_size", "1",
         "--heldout", "3"]
    )  # fmt: skip
    assert status == 0
    printed = capsys.readouterr().out
    for text in (
        "before",
        "after",
        "mean reward",
        "share of answers cut off",
        "3 held-out questions",
        "s a step",
    ):
        assert text in printed
    assert (tmp_path / "curves.png").exists()
