"""TRL's own trainers with and without the patch: same losses and metrics, nearer to float64 in bfloat16."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
from datasets import Dataset
from tiny_models import make_model, make_pairs, make_tokenizer
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer import utils

from pyfast_dpo.integrations import trl as drop_in

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # TRL's own: experimental trainers, renamed options
]
if utils._ChunkedLogProbFunction is None:
    pytest.skip("this TRL computes nothing on the CPU to compare with", allow_module_level=True)

PAIRS = make_pairs(16)
PROMPTS = Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS])
UNPAIRED = Dataset.from_list(
    [
        {"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
        for i, p in enumerate(PAIRS)
    ]
)  # fmt: skip
EXAMPLES = Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS])
TRIPLES = Dataset.from_list([{**pair, "reference": pair["chosen"]} for pair in PAIRS])
PAIRS = Dataset.from_list(PAIRS)
GENERATION = {"max_length": None, "max_completion_length": 6, "num_generations": 4}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[Path]:
    """Two models on disk, the policy and its reference: TRL reads their configuration there."""
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    for seed, folder in enumerate(folders):
        make_model(seed).save_pretrained(folder)
    return folders


@pytest.fixture(autouse=True)
def unpatched():
    yield
    drop_in.unpatch()


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def build(
    kind, settings, checkpoints, tmp_path, data, reference=False, dtype=torch.float32, **options
):
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 32,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    chosen = {k: v for k, v in {**defaults, **options}.items() if v is not None}
    extra = {"ref_model": load(checkpoints[1], dtype)} if reference else {}
    if kind in (GRPOTrainer, RLOOTrainer):
        extra["reward_funcs"] = lambda completions, **rest: [float(len(c)) for c in completions]
    torch.manual_seed(0)  # generation draws from it
    return kind(
        load(checkpoints[0], dtype),
        args=settings(**chosen),
        train_dataset=data,
        processing_class=make_tokenizer(),
        **extra,
    )


def experimental(name: str):
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


# What each trainer needs; those that generate sample the same tokens as long as the log-probs agree.
TRAINERS = {
    "dpo": lambda: (DPOTrainer, DPOConfig, PAIRS, {"reference": True}),
    # its statistics: WPO weighs by the sum of squared probabilities
    "dpo, weighted": lambda: (DPOTrainer, DPOConfig, PAIRS, {"reference": True, "use_weighting": True}),
    "kto": lambda: (KTOTrainer, KTOConfig, UNPAIRED, {"reference": True}),
    "sft": lambda: (SFTTrainer, SFTConfig, EXAMPLES, {}),
    # the only one whose loss differentiates the entropy
    "grpo": lambda: (GRPOTrainer, GRPOConfig, PROMPTS, {**GENERATION, "beta": 0.1, "entropy_coef": 0.01}),
    "rloo": lambda: (RLOOTrainer, RLOOConfig, PROMPTS, GENERATION),
    "cpo": lambda: (*experimental("CPO"), PAIRS, {}),
    "orpo": lambda: (*experimental("ORPO"), PAIRS, {}),
    "tpo": lambda: (*experimental("TPO"), TRIPLES, {}),
}  # fmt: skip


@contextlib.contextmanager
def counted(monkeypatch):
    """How often the functions that stand in TRL's place are asked, and how many rows they score."""
    asked: list[int] = []
    apply, tokens = drop_in.LogProbFunction.apply, drop_in.token_logps

    def from_hidden(hidden, weight, bias, targets, *rest):
        asked.append(targets.numel())
        return apply(hidden, weight, bias, targets, *rest)

    def from_logits(logits, labels):
        asked.append(labels.numel())
        return tokens(logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(drop_in.LogProbFunction, "apply", staticmethod(from_hidden))
        patch.setattr(drop_in, "token_logps", from_logits)
        yield asked


def history(trainer) -> list[dict[str, float]]:
    trainer.train()
    clock = ("runtime", "per_second", "step_time", "total_flos")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in clock)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_logs_the_same_losses_and_metrics(name, checkpoints, tmp_path, monkeypatch):
    kind, settings, data, options = TRAINERS[name]()
    before = history(build(kind, settings, checkpoints, tmp_path, data, **options))
    with counted(monkeypatch) as asked, drop_in.patched():
        after = history(build(kind, settings, checkpoints, tmp_path, data, **options))
    assert len(asked) >= 2, f"{name} computed its log-probs elsewhere"
    assert [set(entry) for entry in before] == [set(entry) for entry in after]
    for old, new in zip(before, after, strict=True):
        for key, value in old.items():
            assert new[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, value, new[key])


def test_a_trainer_that_exists_already_changes_over_and_back(checkpoints, tmp_path, monkeypatch):
    trainer = build(DPOTrainer, DPOConfig, checkpoints, tmp_path, PAIRS, reference=True)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    with counted(monkeypatch) as asked:
        with drop_in.patched():
            ours = trainer.compute_loss(trainer.model, batch)
        assert asked == [int(batch["completion_mask"].sum())] * 2, (
            "policy and reference, completions only"
        )
        trainer.compute_loss(trainer.model, batch)
        assert len(asked) == 2, "still asked after the patch was undone"
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_bfloat16_models_come_nearer_to_float64(checkpoints, tmp_path):
    """Log-probs of whole sequences, and the gradient of the head, of one batch."""
    trainer = build(
        DPOTrainer, DPOConfig, checkpoints, tmp_path, PAIRS, reference=True, dtype=torch.bfloat16
    )
    batch = next(iter(trainer.get_train_dataloader()))
    hidden: list[Tensor] = []
    trainer.model.model.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state.detach())
    )

    def measure() -> tuple[Tensor, Tensor]:
        trainer.model.zero_grad()
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        output = trainer.model(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, fused_lm_head=True
        )  # fmt: skip
        logps = output.log_probs.double().sum(1)
        logps.sum().backward()
        return logps.detach(), trainer.model.lm_head.weight.grad.double()

    theirs = measure()
    with drop_in.patched():
        ours = measure()
    assert torch.equal(*hidden), "the body of the model gave different hidden states"
    weight = trainer.model.lm_head.weight.detach().double().requires_grad_()
    mask = batch["completion_mask"][:, 1:] == 1
    logits = hidden[0][:, :-1].double() @ weight.T
    tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    logps = (tokens * mask).sum(1)
    logps.sum().backward()
    error = [(x - logps.detach()).abs().max().item() for x in (ours[0], theirs[0])]
    assert error[0] < 1e-5 and error[0] < 0.01 * error[1], f"ours, TRL: {error}"
    # The gradient is bfloat16 itself, and its rounding is most of either error.
    wrong = [(x - weight.grad).norm().item() for x in (ours[1], theirs[1])]
    assert wrong[0] <= 1.05 * wrong[1], f"gradient of the head, ours, TRL: {wrong}"


# --- the function in TRL's place ----------------------------------------------------------------------

ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ACTIVATIONS = {  # temperature, softcap, logit_scale, bias
    "plain": (1.0, None, 1.0, False),
    "bias and temperature": (0.7, None, 1.0, True),
    "scale (Cohere)": (1.0, None, 0.0625, False),
    "soft-cap, then temperature (Gemma 2 in GRPO)": (0.7, 3.0, 1.0, False),
    "all": (1.3, 3.0, 2.0, True),
}


def head_inputs(dtype: torch.dtype, bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 16), (50, 16)] + [(50,)] * bias
    tensors: list[Tensor | None] = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    ]
    return tensors + [None] * (3 - len(tensors))


def outputs_and_gradients(function, leaves, options, trainable: bool = True):
    temperature, softcap, scale, _ = options
    targets = torch.arange(9) * 5
    leaves[1].requires_grad_(trainable)
    result = function(*leaves, targets, temperature, 32768, softcap, scale, ALL)
    # a loss that needs both gradients
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(
        (result[0] * torch.arange(9)).sum() + 3 * result[1].sum(), wanted
    )
    return [t.detach().double() for t in result], [g.double() for g in gradients]


def true_head(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, outputs):
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    logps = z.log_softmax(-1)
    return (
        logps.gather(-1, targets[:, None])[:, 0],
        -(logps.exp() * logps).sum(-1),
        (2 * logps).logsumexp(-1),
        z.mean(-1),
        z.argmax(-1) == targets,
    )


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable head", "frozen head"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_head_agrees_with_float64_at_least_as_well_as_trl(dtype, name, trainable):
    options = ACTIVATIONS[name]
    leaves = head_inputs(dtype, options[3] and trainable)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    truth = outputs_and_gradients(true_head, wide, options, trainable)
    theirs = outputs_and_gradients(utils._ChunkedLogProbFunction.apply, leaves, options, trainable)
    with drop_in.patched():
        ours = outputs_and_gradients(
            utils._ChunkedLogProbFunction.apply, leaves, options, trainable
        )
    for kind, parts in (("output", zip(ours[0], theirs[0], truth[0], strict=True)),
                        ("gradient", zip(ours[1], theirs[1], truth[1], strict=True))):  # fmt: skip
        for i, (own, peer, exact) in enumerate(parts):
            error, peers = ((value - exact).abs().max().item() for value in (own, peer))
            allowed = (
                1e-5 if kind == "output" else 4 * torch.finfo(dtype).eps * exact.abs().max().item()
            )
            assert error <= peers + allowed, f"{kind} {i}: ours off by {error}, TRL by {peers}"
            if kind == "output":
                assert error <= 1e-4, f"output {i}: off by {error}"


def test_a_gradient_under_autocast_is_not_rounded_to_bfloat16():
    """TRL's default: float32 parameters, products in bfloat16."""
    hidden, weight, _ = head_inputs(torch.float32, False)

    def gradient(function, hidden, weight):
        logps = function(hidden, weight, None, torch.arange(9) * 5, 1.0, 32768, None, 1.0, ())[0]
        return torch.autograd.grad(logps.sum(), weight)[0]

    narrow = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    truth = gradient(true_head, *narrow)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradient(utils._ChunkedLogProbFunction.apply, hidden, weight)
        with drop_in.patched():
            ours = gradient(utils._ChunkedLogProbFunction.apply, hidden, weight)
    assert (ours != ours.bfloat16()).float().mean() > 0.9
    error, peers = ((value - truth).norm().item() for value in (ours, theirs))
    assert error < peers, f"ours off by {error}, TRL by {peers}"


def test_a_batch_without_completions_has_a_gradient_of_zero():
    hidden, weight, _ = head_inputs(torch.float32, False)
    with drop_in.patched():
        outputs = utils._ChunkedLogProbFunction.apply(
            hidden[:0], weight, None, torch.empty(0, dtype=torch.int64), 1.0, 0, None, 1.0, ALL
        )
    assert all(output.shape == (0,) for output in outputs)
    assert torch.autograd.grad(outputs[0].sum(), weight)[0].eq(0).all()


def test_the_backward_pass_gathers_a_weight_that_zero3_has_sharded(monkeypatch):
    gathered = []
    monkeypatch.setattr(
        utils,
        "maybe_gather_lm_head_ctx",
        lambda *params: (gathered.append(params), contextlib.nullcontext())[1],
    )
    hidden, weight, _ = head_inputs(torch.float32, False)
    with drop_in.patched():
        logps = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.arange(9), 1.0, 0, None, 1.0, ()
        )[0]
        assert not gathered, "the forward pass runs inside the caller's own context"
        logps.sum().backward()
    assert gathered[0][0] is weight


# --- log-probs from logits ----------------------------------------------------------------------------

FROM_LOGITS = {
    "one token a row": ((2, 3), {}),
    "temperature": ((2, 3), {"temperature": 0.5}),
    "masked rows": ((2, 3), {"row_mask": torch.tensor([[1, 0, 1], [0, 0, 1]])}),
    "several tokens a row: TRL's own": ((2, 3, 4), {}),
}


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_selective_log_softmax_takes_what_trl_takes(name):
    shape, options = FROM_LOGITS[name]
    logits, index = torch.randn(2, 3, 20), torch.randint(0, 20, shape)
    theirs = utils.selective_log_softmax(logits, index, **options)
    with drop_in.patched():
        assert utils.selective_log_softmax is drop_in.selective_log_softmax
        ours = utils.selective_log_softmax(logits, index, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- on and off ---------------------------------------------------------------------------------------


def namespaces() -> dict[str, object]:
    """Every name that the patch may touch, in every module of TRL that is loaded."""
    names = (drop_in.HEAD, drop_in.COMPACT, drop_in.FROM_LOGITS)
    return {
        f"{module}.{name}": value
        for module, content in list(sys.modules.items())
        if module.split(".")[0] == "trl"
        for name, value in list(vars(content).items())
        if name in names
    }


def test_undoing_leaves_every_namespace_as_it_was():
    for module in ("cpo", "orpo"):
        importlib.import_module(f"trl.experimental.{module}")
    before = namespaces()
    drop_in.patch()
    drop_in.patch()  # the second does nothing
    changed = {name for name, value in namespaces().items() if value is not before.get(name)}
    assert "trl.experimental.cpo.cpo_trainer.selective_log_softmax" in changed
    assert "trl.trainer.utils._ChunkedLogProbFunction" in changed
    assert "trl.kernels.chunked_logprob._use_triton" not in changed, "TRL's other kernels ask it"
    with drop_in.patched():
        pass
    assert utils._ChunkedLogProbFunction is drop_in.LogProbFunction, (
        "the block undid an earlier patch"
    )
    sys.modules.pop("trl.experimental.sdft.loss_utils", None)
    late = importlib.import_module("trl.experimental.sdft.loss_utils")
    assert late.selective_log_softmax is drop_in.selective_log_softmax
    drop_in.unpatch()
    drop_in.unpatch()
    after = namespaces()
    assert {name: after[name] for name in before} == before
    assert drop_in.selective_log_softmax not in after.values()


def test_an_unknown_version_is_refused_by_name(monkeypatch):
    import trl

    monkeypatch.setattr(trl, "__version__", "1.99.0")
    before = namespaces()
    with pytest.raises(
        RuntimeError, match=r"TRL 1\.15, 1\.16, found 1\.99\.0; nothing was patched"
    ):
        drop_in.patch()
    assert namespaces() == before


def test_a_known_version_without_the_hook_is_refused(monkeypatch):
    monkeypatch.delattr(utils, drop_in.HEAD)
    with pytest.raises(RuntimeError, match="without _ChunkedLogProbFunction"):
        drop_in.patch()


def test_without_trl_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL 1\.15 or 1\.16 \(pip install trl\)"):
        drop_in.patch()


def test_a_device_without_kernels_keeps_trls_functions(monkeypatch):
    hidden, weight, _ = head_inputs(torch.float32, False)
    arguments = (hidden, weight, None, torch.arange(9), 1.0, 32768, None, 1.0, ALL)
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with drop_in.patched():
        monkeypatch.setattr(drop_in.operators, "has_kernels", lambda device: False)
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
        assert not utils._use_triton(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert math.isfinite(float(ours[0].sum()))
