"""The recipes of docs/drop_in.md, taken from the page and run against plain torch."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _docs import DOCS, blocks
from torch import Tensor

pytest.importorskip("transformers")
from tiny_models import make_model, make_pairs, make_tokenizer

from pyfast_dpo.data import DataCollatorForPreference, prepare_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = "drop_in.md"
BETA = 0.1


def run(heading: str, **names: Any) -> dict[str, Any]:
    """What the blocks of a section define, executed with the names that they take for granted."""
    namespace: dict[str, Any] = {"__name__": "docs", **names}
    for code in blocks(PAGE, heading):
        exec(compile(code, f"docs/{PAGE}: {heading}", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    tokenizer = make_tokenizer()
    prepared = prepare_pairs(make_pairs(4), tokenizer, max_length=32)
    return DataCollatorForPreference(pad_token_id=1)([prepared[i] for i in range(4)])


def torch_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """`[2P]` by log_softmax and gather."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logps = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    tokens = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (tokens * (labels != -100)).sum(-1)


def torch_dpo(policy: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (policy - reference.detach()).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def expected(batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Loss, and the gradient of the head, of the two tiny models."""
    model = make_model(0)
    loss = torch_dpo(torch_logps(model, batch), torch_logps(make_model(1), batch))
    loss.backward()
    return float(loss.detach()), model.lm_head.weight.grad


def check(loss: Tensor, model: Any, batch: dict[str, Tensor]) -> None:
    truth, gradient = expected(batch)
    assert loss.item() == pytest.approx(truth, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-3, atol=1e-6)


def test_trl():
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from trl.trainer import utils

    namespace = run("TRL")
    try:
        assert utils._ChunkedLogProbFunction is namespace["trl"].LogProbFunction
    finally:
        namespace["trl"].unpatch()


def test_supervised_fine_tuning(batch):
    model = make_model().train()
    truth = model(**batch).loss
    run("Supervised fine-tuning", model=model)
    output = model(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, truth)


def test_a_trainer_of_transformers(batch, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    namespace = run("A Trainer of transformers")
    model, reference = make_model(0), make_model(1)
    # One item is a batch of pairs already: what the collator of the page's user would make.
    trainer = namespace["PairTrainer"](
        model,
        TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, remove_unused_columns=False,
        ),
        train_dataset=[batch, batch],
        eval_dataset=[batch],
        data_collator=lambda items: items[0],
        ref_model=reference,
        beta=BETA,
    )  # fmt: skip
    check(trainer.compute_loss(model, dict(batch)), model, batch)
    model.zero_grad()
    truth = expected(batch)[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(truth, rel=1e-4)
    trainer.train()
    # the mean over the accumulated batches, neither divided twice nor summed
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [pytest.approx(truth, rel=1e-4)]


def test_a_trainer_of_transformers_without_logits(batch):
    model = make_model(0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    reference = torch_logps(make_model(1), batch).detach().float()
    loss = run("A Trainer of transformers")["pair_loss"](model, inputs, batch["labels"], reference)
    check(loss, model, batch)


@pytest.mark.parametrize("average", [False, True])
def test_the_hand_written_loops_log_probs(batch, average):
    logps = run("A hand-written loop")["_get_batch_logps"]
    model = make_model()
    ours = logps(model(batch["input_ids"]).logits, batch["labels"], average_log_prob=average)
    truth = torch_logps(model, batch | {"attention_mask": None})
    if average:
        truth = truth / (batch["labels"][:, 1:] != -100).sum(-1)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, lambda x: -F.logsigmoid(BETA * x)),
        ({"label_smoothing": 0.2}, lambda x: -0.8 * F.logsigmoid(BETA * x) - 0.2 * F.logsigmoid(-BETA * x)),
        ({"ipo": True}, lambda x: (x - 1 / (2 * BETA)) ** 2),
        ({"reference_free": True}, lambda x: -F.logsigmoid(BETA * x)),
    ],
    ids=lambda value: "-".join(value) or "sigmoid" if isinstance(value, dict) else "",
)  # fmt: skip
def test_the_hand_written_loops_losses(options, loss):
    function = run("A hand-written loop")["preference_loss"]
    policy, reference = torch.randn(2, 5), torch.randn(2, 5)
    losses, chosen_rewards, rejected_rewards = function(*policy, *reference, BETA, **options)
    ratios = policy - (0 if options.get("reference_free") else reference)
    torch.testing.assert_close(losses, loss(ratios[0] - ratios[1]))
    torch.testing.assert_close(chosen_rewards, BETA * ratios[0])
    torch.testing.assert_close(rejected_rewards, BETA * ratios[1])


def lightning_or_its_stand_in(monkeypatch) -> bool:
    """Without Lightning its module is a torch module with a `log`: the training step runs all the same."""
    try:
        import lightning  # noqa: F401

        return True
    except ImportError:
        stand_in: Any = ModuleType("lightning")
        stand_in.LightningModule = type(
            "LightningModule", (torch.nn.Module,), {"log": lambda self, name, value: None}
        )
        monkeypatch.setitem(sys.modules, "lightning", stand_in)
        return False


def test_a_lightning_module(batch, monkeypatch, tmp_path):
    real = lightning_or_its_stand_in(monkeypatch)
    namespace = run("A Lightning module")
    model = make_model(0)
    module = namespace["PairModule"](model, make_model(1), BETA, learning_rate=1e-2)
    module.log = lambda name, value: None
    check(module.training_step(batch, 0), model, batch)
    if not real:
        return
    del module.log
    model.zero_grad()
    trainer = namespace["lightning"].Trainer(
        max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    before = expected(batch)[0]
    trainer.fit(module, torch.utils.data.DataLoader([batch] * 5, batch_size=None))
    module.log = lambda name, value: None
    assert float(module.training_step(batch, 0)) < before


def heads(bias: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (4, 7), generator=generator)
    labels[:, :3] = -100
    draws = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (
            ("hidden", (4, 7, 16)), ("weight", (50, 16)), ("reference_hidden", (4, 7, 16)), ("reference_weight", (50, 16)),
        )
    }  # fmt: skip
    return {**draws, "labels": labels, "beta": BETA}


def test_liger():
    names = heads()
    loss = run("Liger", **names)["loss"]

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = (hidden.double() @ weight.double().T).log_softmax(-1)
        mask = names["labels"] != -100
        picked = tokens.gather(-1, names["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (picked * mask).sum(-1)

    reference = logps(names["reference_hidden"], names["reference_weight"])
    assert float(loss) == pytest.approx(
        float(torch_dpo(logps(names["hidden"], names["weight"]), reference)), rel=1e-5
    )
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger is not installed")
    theirs = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False)(
        names["weight"], names["hidden"], names["labels"], None, names["reference_hidden"], names["reference_weight"]
    )[0]  # fmt: skip
    assert float(loss) == pytest.approx(float(theirs), rel=1e-4)


def test_cce():
    names = heads()
    losses = run("CCE", **names)["losses"]
    logits = names["hidden"] @ names["weight"].T
    truth = F.cross_entropy(logits.flatten(0, 1), names["labels"].flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), truth, rtol=1e-4, atol=1e-5)


def test_links_lead_somewhere():
    text = (DOCS / PAGE).read_text()
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
