"""`pyfast-dpo demo` in small: a tiny model, few steps, everything it promises to print and write."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

import torch
from tiny_models import make_model, make_pairs, make_tokenizer

from pyfast_dpo.cli import main
from pyfast_dpo.cli.demo import QUESTION
from pyfast_dpo.data import DataCollatorForPreference, demo_pairs, prepare_pairs
from pyfast_dpo.evaluation.heldout import pair_logps, preference_accuracy


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_demo(tmp_path, capsys, flags):
    tokenizer = make_tokenizer()  # without chat template: the demo supplies one
    model = make_model()
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main(["demo", *arguments, "--steps", "3", "--heldout", "9", *flags]) == 0
    printed = capsys.readouterr().out
    for text in (
        "has no chat template", "held-out: kept 9 of 9 rows", "loss: first 0.6931472", QUESTION, "before", "after",
        "chosen more likely than rejected", "answer begins in short", "log-prob of the chosen response", "s a step",
    ):  # fmt: skip
        assert text in printed
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        0 <= report["heldout_accuracy_before"] <= 1 and 0 <= report["heldout_accuracy_after"] <= 1
    )
    assert report["heldout_pairs"] == 9
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        tmp_path / "out" / ("model.safetensors" if flags else "adapter_model.safetensors")
    ).exists()


def test_question_of_the_demo_is_not_in_the_data():
    train, heldout = demo_pairs.pairs()
    assert QUESTION not in [row["prompt"][0]["content"] for row in train + heldout]


@pytest.mark.parametrize(
    "answer, follows",
    [
        ("In short, no. The reason is that it spoils.", True),
        ("In short, 28, or 29 in a leap year. The reason is that it varies.", True),
        ("The answer is no, because it spoils.", False),
        ("In short, no.", True),
        ("Well, in short, no. The reason is that it spoils.", False),  # not at the beginning
    ],
)
def test_preference_is_checkable(answer, follows):
    assert demo_pairs.follows_preference(answer) is follows


def test_heldout_accuracy_is_of_summed_log_probs():
    tokenizer, model = make_tokenizer(), make_model()
    pairs = prepare_pairs(make_pairs(7), tokenizer)
    logps = pair_logps(model, pairs, DataCollatorForPreference(1), batch_size=3)
    alone = pair_logps(model, pairs, DataCollatorForPreference(1), batch_size=1)
    assert logps.shape == (7, 2)
    assert torch.allclose(logps, alone, atol=1e-4)
    scores = torch.tensor([[-3.0, -4.0], [-5.0, -4.0], [-1.0, -1.0], [-1.0, -2.0]])
    assert preference_accuracy(scores) == 0.5
    reference = torch.tensor([[-2.0, -4.0], [-9.0, -4.0], [-1.0, -2.0], [-1.0, -3.0]])
    assert preference_accuracy(scores, reference) == 0.25
