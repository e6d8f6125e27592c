"""Gradient checkpointing as far as memory needs it: the same training, and as many layers kept as a budget allows."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from model_families import MODELS, make
from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import config, dpo_trainer, lora, train_log
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from pyfast_dpo.model import activations
from pyfast_dpo.model.activations import KeptActivations
from pyfast_dpo.trainers import DPOConfig, KTOConfig

LAYERS = 4
HUGE = 1 << 60
LIKE = [{"prompt": "a b c", "chosen": f" {x} e", "rejected": f" {x} i"} for x in "dfghjklm"]
ARGS = SimpleNamespace(deepspeed_plugin=None)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def trainer_of(tmp_path, tokenizer, model=None, rows=LIKE, **options):
    """Gradient checkpointing at its default, unless the options say otherwise."""
    defaults = {
        "gradient_checkpointing": None, "max_steps": 3, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    model = make_model(layers=LAYERS) if model is None else model
    return dpo_trainer(tmp_path, tokenizer, model, rows=rows, **{**defaults, **options})


def passes_of_steps(trainer):
    """Trains, and counts for each step how often every layer was computed: 2 if recomputed."""
    counts = []

    class Step(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            counts.append([0] * LAYERS)

    def count(index):
        def hook(module, inputs):
            counts[-1][index] += 1

        return hook

    # Of a part: recomputing calls the layer's forward, not its hooks.
    for index, layer in enumerate(trainer.model.model.layers):
        layer.mlp.register_forward_pre_hook(count(index))
    trainer.add_callback(Step())
    trainer.train()
    return counts


def layer_bytes(trainer):
    """What a layer keeps of a batch of `LIKE`, as measured."""
    examples = trainer.train_dataset.examples[: trainer.args.per_device_train_batch_size]
    tokens = trainer.data_collator(examples)["input_ids"].numel()
    return trainer.kept_activations.bytes_per_token * tokens


# The same training ---------------------------------------------------------------------------------------

ALL_KEPT = {"gradient_checkpointing": False}
SAME = [
    ({"gradient_checkpointing": True}, "all recomputed"),
    ({}, "budget by the weights and what is free"),
    ({"max_activation_bytes": 0}, "all recomputed, nothing measured"),
    ({"max_activation_bytes": 40_000}, "some kept: a layer keeps 12 to 25 KB"),
    ({"max_activation_bytes": HUGE}, "all kept from the second step on"),
    ({"max_activation_bytes": 40_000, "gradient_accumulation_steps": 2}, "two passes a step"),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "recomputed by a backward in the backward"),
    ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "half of the layers are never recomputed"),
]  # fmt: skip


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("options", [row[0] for row in SAME], ids=[row[1] for row in SAME])
def test_training_has_the_same_bits_whichever_layers_are_kept(
    tmp_path, tokenizer, options, adapter
):
    runs = []
    for each in ({**options, **ALL_KEPT, "max_activation_bytes": None}, options):
        trainer = trainer_of(
            tmp_path, tokenizer, rows=make_pairs(), peft_config=lora() if adapter else None, **each
        )
        log = [(entry["loss"], entry["grad_norm"]) for entry in train_log(trainer)]
        runs.append((log, trainer.model.state_dict()))
    (kept_log, kept), (log, state) = runs
    assert log == kept_log
    assert log[0] != log[-1]
    for name, value in kept.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", MODELS)
def test_every_family_trains_to_the_same_bits(tmp_path, tokenizer, name):
    runs = []
    for options in (ALL_KEPT, {"max_activation_bytes": HUGE}):
        trainer = trainer_of(tmp_path, tokenizer, make(name), **options)
        runs.append([entry["loss"] for entry in train_log(trainer)])
    assert trainer.kept_activations.layers_kept == 2
    assert runs[0] == runs[1]


# How many are kept ---------------------------------------------------------------------------------------

KEPT = [
    (0.0, 0, 0, "none, and none to be measured"),
    (0.99, 1, 0, "not enough for one"),
    (1.0, 1, 1, "exactly one"),
    (2.5, 1, 2, "a part of a layer is not kept"),
    (4.0, 1, 4, "all"),
    (1e9, 1, 4, "no more than there are"),
]


@pytest.mark.parametrize(
    "layers, first, later", [row[:3] for row in KEPT], ids=[row[3] for row in KEPT]
)
def test_a_budget_keeps_as_many_of_the_last_layers_as_it_pays_for(
    tmp_path, tokenizer, layers, first, later
):
    measuring = trainer_of(tmp_path, tokenizer, max_steps=1)
    measuring.train()
    budget = int(layers * layer_bytes(measuring))
    trainer = trainer_of(tmp_path, tokenizer, max_activation_bytes=budget)
    expected = [[2] * (LAYERS - kept) + [1] * kept for kept in (first, later, later)]
    assert passes_of_steps(trainer) == expected
    assert trainer.kept_activations.layers_kept == later


DEFAULT = [
    (HUGE, lambda weights, layer: weights // layer, "by the gradients"),
    (
        3.9,
        lambda weights, layer: 1,
        "by half of what is free: 1.95 layers, where the gradients pay for 2",
    ),
    (0, lambda weights, layer: 0, "nothing is free"),
]


@pytest.mark.parametrize(
    "free, kept", [row[:2] for row in DEFAULT], ids=[row[2] for row in DEFAULT]
)
def test_without_a_number_the_budget_is_the_gradients_or_half_of_what_is_free(
    tmp_path, tokenizer, monkeypatch, free, kept
):
    trainer = trainer_of(tmp_path, tokenizer, per_device_train_batch_size=8)
    weights = sum(p.numel() * 4 for p in trainer.model.parameters())
    monkeypatch.setattr(activations, "_free_bytes", lambda device: int(free * layer_bytes(trainer)))
    trainer.train()
    assert weights // layer_bytes(trainer) == 2  # so that the rows differ
    assert trainer.kept_activations.layers_kept == kept(weights, layer_bytes(trainer))


def test_where_few_weights_are_trained_the_budget_is_one_and_a_half_times_the_others(monkeypatch):
    monkeypatch.setattr(activations, "_free_bytes", lambda device: HUGE)
    model = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
    layer = (64 + 8) * 4
    assert activations._default_budget(model) == 2 * layer
    model[0].bias.requires_grad_(False)
    assert activations._default_budget(model) == 2 * layer - 8 * 4
    model[1].requires_grad_(False)
    assert activations._default_budget(model) == (layer + 8 * 4) * 3 // 2


def test_free_memory_is_that_of_the_machine():
    import psutil

    free = activations._free_bytes(torch.device("cpu"))
    assert 0 < free < psutil.virtual_memory().total


def test_longer_batches_keep_fewer_layers(tmp_path, tokenizer):
    # Tokens of the steps. The budget is 48: the second step has those that were measured.
    rows = [
        {"prompt": "a " * (n - 6), "chosen": " e i", "rejected": " x z"}
        for n in (12, 12, 15, 22, 40)
    ]
    options = {"max_steps": 5, "per_device_train_batch_size": 1, "max_length": 64}
    kept = []

    class Step(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            kept.append(trainer.kept_activations.layers_kept)

    measuring = trainer_of(tmp_path, tokenizer, rows=rows, **{**options, "max_steps": 1})
    measuring.train()
    budget = measuring.kept_activations.bytes_per_token * 12 * 4
    trainer = trainer_of(tmp_path, tokenizer, rows=rows, max_activation_bytes=budget, **options)
    trainer.add_callback(Step())
    trainer.train()
    assert kept == [1, 4, 3, 2, 1]


# What is measured ----------------------------------------------------------------------------------------


class Layer(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, hidden, scale=None):
        # Saved: the input and the weights, which are not the layer's own; then `up`, 8 wide; `scale`, an input;
        # the scaled sines, 8 wide, by two operations; what exp makes, 3 wide.
        up = self.up(hidden)
        sines = up.sin() * scale
        exponentials = (self.down(sines) * sines.view(-1, 8)[:, :4])[:, :3].exp()
        return hidden + exponentials.sum(-1, keepdim=True)


class Layers(nn.Module):
    def __init__(self, count=LAYERS):
        super().__init__()
        self.wrapped = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(count))})
        for layer in self.wrapped["layers"]:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = recompute

    def forward(self, hidden):
        scale = torch.full((len(hidden), 8), 2.0)
        for layer in self.wrapped["layers"]:
            hidden = layer(hidden, scale=scale)
        return hidden


def recompute(forward, *args):
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False)


def begun(max_bytes=None):
    model = Layers().train()
    kept = KeptActivations(max_bytes)
    kept.on_train_begin(ARGS, None, None, model=model)
    return model, kept


def test_a_layer_is_measured_by_what_it_alone_keeps():
    model, kept = begun()
    model(torch.randn(10, 4))
    # the product saves also the down projection, 4 wide
    assert kept.bytes_per_token == 4 * (8 + 8 + 4 + 3)
    model(torch.randn(1000, 4))
    assert kept.bytes_per_token == 4 * (8 + 8 + 4 + 3)


def test_a_pass_without_gradients_changes_nothing():
    """KTO's mismatched completions go through the policy in training mode, without gradients."""
    model, kept = begun(HUGE)
    with torch.no_grad():
        model(torch.randn(10, 4))
    assert kept.layers_kept == kept.bytes_per_token == 0


def test_what_was_kept_is_freed_without_a_backward_pass():
    model, kept = begun(HUGE)
    model(torch.randn(10, 4))
    kept.on_step_end(ARGS, None, None, model=model)

    def tensors():
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    gc.collect()
    gc.disable()  # by reference counts alone, as between two steps
    try:
        before = tensors()
        model(torch.randn(10, 4))
        assert kept.layers_kept == LAYERS
        assert tensors() == before
    finally:
        gc.enable()


def test_nothing_grows_from_step_to_step(tmp_path, tokenizer):
    counts = []

    class Step(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            gc.collect()
            counts.append(sum(type(each) is torch.Tensor for each in gc.get_objects()))

    trainer = trainer_of(
        tmp_path, tokenizer, max_steps=6, max_activation_bytes=HUGE, logging_steps=100
    )
    trainer.add_callback(Step())
    trainer.train()
    growth = [after - before for before, after in itertools.pairwise(counts)]
    # Metrics that wait for the next log are about ten; the measured layer alone saves more than fifty.
    assert max(growth) < 30


# The model's own functions -------------------------------------------------------------------------------


def functions(model):
    return [layer._gradient_checkpointing_func for layer in model.wrapped["layers"]]


def test_layers_get_their_own_function_back_and_are_wrapped_once():
    model, kept = begun()
    kept.on_train_begin(ARGS, None, None, model=model)  # as auto_find_batch_size does
    assert all(each.args[-1] is recompute for each in functions(model))
    kept.on_train_end(ARGS, None, None)
    assert all(each is recompute for each in functions(model))


def test_a_second_training_measures_anew(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, max_activation_bytes=HUGE)
    trainer.train()
    assert passes_of_steps(trainer)[:2] == [[2] * (LAYERS - 1) + [1], [1] * LAYERS]


def test_deepspeed_and_compiled_models_recompute_every_layer():
    model = Layers().train()
    kept = KeptActivations(HUGE)
    kept.on_train_begin(SimpleNamespace(deepspeed_plugin=object()), None, None, model=model)
    assert all(each is recompute for each in functions(model))
    kept.on_train_begin(ARGS, None, None, model=model)
    hidden = torch.randn(10, 4)
    torch.compile(model, backend="aot_eager", fullgraph=True)(hidden).sum().backward()
    assert kept.layers_kept == kept.bytes_per_token == 0


def test_a_model_without_such_layers_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    kept = KeptActivations(None)
    kept.on_train_begin(ARGS, None, None, model=model)
    model(torch.randn(2, 4)).sum().backward()
    kept.on_step_end(ARGS, None, None, model=model)
    assert kept.layers_kept == 0


# Options -------------------------------------------------------------------------------------------------

NEWER = "activation_checkpointing" in DPOConfig.__dataclass_fields__  # transformers 5.23
NAMES = ["gradient_checkpointing", *(["activation_checkpointing"] if NEWER else [])]


@pytest.mark.parametrize("given, as_needed", [(None, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_default_chooses_layers(tmp_path, tokenizer, name, given, as_needed):
    trainer = trainer_of(tmp_path, tokenizer, **{name: given})
    assert (trainer.kept_activations is not None) == as_needed
    assert bool(getattr(trainer.args, name)) is (given is not False)


@pytest.mark.parametrize("kind", [DPOConfig, KTOConfig])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [True, False])
def test_a_budget_and_a_choice_of_all_or_none_do_not_go_together(tmp_path, kind, name, given):
    message = f"{kind.__name__}: max_activation_bytes says how far .*checkpointing goes.* got 5 with {given}"
    options = {"gradient_checkpointing": None, name: given, "max_activation_bytes": 5}
    with pytest.raises(ValueError, match=message):
        config(kind, tmp_path, **options)


def test_a_negative_budget_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="DPOConfig: max_activation_bytes must be None or not negative, got -1"
    ):
        config(DPOConfig, tmp_path, gradient_checkpointing=None, max_activation_bytes=-1)
