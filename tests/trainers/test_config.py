"""The options: each one a flag, each of TRL's accepted, neutral values of unused ones, copies, what they reach."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import types
import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from option_samples import NO_TEXT, plain, sample
from tiny_models import make_model, make_pairs, make_tokenizer
from trainer_runs import config, dpo_trainer
from transformers import HfArgumentParser, TrainingArguments

from pyfast_dpo.trainers import DPOConfig, DPOTrainer, KTOConfig
from pyfast_dpo.trainers.config import PreferenceConfig

KINDS = [DPOConfig, KTOConfig]
OWN = {
    kind: [
        name
        for each in (PreferenceConfig, kind)
        for name in inspect.get_annotations(each)
        if not name.startswith("_")
    ]
    for kind in KINDS
}
FIELDS = [(k, f.name) for k in KINDS for f in dataclasses.fields(k) if f.name not in NO_TEXT]
NEWER = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # transformers 5.23


def parsers():
    yield pytest.param(HfArgumentParser, id="HfArgumentParser")
    try:
        from trl import TrlParser
    except ImportError:
        TrlParser = None
    yield pytest.param(
        TrlParser,
        id="TrlParser",
        marks=[] if TrlParser else pytest.mark.skip(reason="trl is not installed"),
    )


@functools.cache
def made(parser, kind):
    return parser((kind,))


def parsed(parser, kind, *flags):
    (config,) = made(parser, kind).parse_args_into_dataclasses([*flags])
    return config


def options_of(config, names):
    return {name: getattr(config, name) for name in names}


# Flags -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parser", parsers())
def test_output_dir_is_the_only_flag_that_is_needed(tmp_path, parser, kind):
    folder = str(tmp_path)
    names = [f.name for f in dataclasses.fields(kind)]
    config = options_of(parsed(parser, kind, "--output_dir", folder), names)
    plain = options_of(kind(output_dir=folder), names)
    for name in names:
        assert config[name] == plain[name], name


@pytest.mark.parametrize("parser", parsers())
@pytest.mark.parametrize("kind, name", FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_is_a_flag_whose_value_arrives_with_its_type(parser, kind, name):
    words, value = sample(kind, name)
    arrived = plain(getattr(made(parser, kind).parse_args([f"--{name}", *words]), name))
    assert (arrived, type(arrived)) == (value, type(value))


@pytest.mark.parametrize("kind", KINDS)
def test_help_has_a_text_for_every_option(kind, capsys):
    for name in OWN[kind]:
        text = kind.__dataclass_fields__[name].metadata.get("help", "")
        assert len(text.split()) > 3, name
    with pytest.raises(SystemExit):
        HfArgumentParser((kind,)).parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "strength of the pull to the reference" in shown
    assert "compute each prompt of a batch once and no padding" in shown


def test_help_of_an_inherited_option_stays_that_of_transformers():
    ours = DPOConfig.__dataclass_fields__["train_sampling_strategy"].metadata["help"]
    theirs = TrainingArguments.__dataclass_fields__["train_sampling_strategy"].metadata["help"]
    assert ours == theirs and "batch_rebalance is refused" not in theirs
    assert "help" in TrainingArguments.__dataclass_fields__["learning_rate"].metadata
    assert (
        DPOConfig.__dataclass_fields__["learning_rate"]
        is not TrainingArguments.__dataclass_fields__["learning_rate"]
    )


@pytest.mark.parametrize(
    "flags, options",
    [
        (["--gradient_checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient-checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient_checkpointing", "false"], {"gradient_checkpointing": False}),
        (["--gradient_checkpointing=True"], {"gradient_checkpointing": True}),
        (["--no_gradient_checkpointing"], {"gradient_checkpointing": False}),
        (["--no-gradient-checkpointing"], {"gradient_checkpointing": False}),
        (["--bf16", "--use_cpu"], {"bf16": True}),
        (["--bf16", "True", "--use_cpu"], {"bf16": True}),
        (["--no_bf16"], {"bf16": False}),
        (["--no_shared_prompt"], {"shared_prompt": False}),
        (["--no_disable_dropout"], {"disable_dropout": False}),
        (["--no_remove_unused_columns"], {"remove_unused_columns": False}),
        (["--model_init_kwargs", '{"dtype": "bfloat16", "use_cache": false}'], {"model_init_kwargs": {"dtype": "bfloat16", "use_cache": False}}),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'], {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        (["--chat_template_kwargs", '{"enable_thinking": false}'], {"chat_template_kwargs": {"enable_thinking": False}}),
        (["--liger_kernel_config", '{"rope": false}'], {"liger_kernel_config": {"rope": False}}),
        (["--pad_to_multiple_of", "8"], {"pad_to_multiple_of": 8}),
        (["--pad_to_multiple_of", "None"], {"pad_to_multiple_of": None}),
        (["--lr_scheduler_type", "cosine", "--warmup_steps", "0.1"], {"lr_scheduler_type": "cosine", "warmup_steps": 0.1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parser", parsers())
def test_flags_of_scripts_parse(parser, kind, flags, options):
    config = parsed(parser, kind, *flags)
    assert options_of(config, options) == options


@pytest.mark.parametrize("parser", parsers())
def test_several_losses_on_the_command_line(parser):
    flags = ["--loss_type", "sigmoid", "sft", "--loss_weights", "0.8", "0.2"]
    config = parsed(parser, DPOConfig, *flags)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [0.8, 0.2])
    assert parsed(parser, DPOConfig, "--loss_type", "ipo").loss_type == ["ipo"]


def test_a_switch_says_what_it_does_not_take(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser((DPOConfig,)).parse_args(["--no_bf16", "false"])
    assert "--no_bf16: takes no value, got False" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_yaml_file_of_trl_gives_the_options(tmp_path, kind):
    trl = pytest.importorskip("trl")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "beta: 0.01\nlearning_rate: 5e-7\ngradient_checkpointing: true\ngradient_checkpointing_kwargs:\n"
        "  use_reentrant: false\nmax_length: null\nmodel_init_kwargs:\n  dtype: bfloat16\nbf16: false\n"
        "save_strategy: steps\nreport_to:\n- tensorboard\n- wandb\ndataset_num_proc: 12\n"
    )
    (config,) = trl.TrlParser((kind,)).parse_args_and_config(["--config", str(path), "--beta=0.5"])
    expected = {
        "beta": 0.5, "learning_rate": 5e-7, "gradient_checkpointing": True, "max_length": None,
        "gradient_checkpointing_kwargs": {"use_reentrant": False}, "model_init_kwargs": {"dtype": "bfloat16"},
        "bf16": False, "save_strategy": "steps", "report_to": ["tensorboard", "wandb"], "dataset_num_proc": 12,
    }  # fmt: skip
    assert options_of(config, expected) == expected


# TRL's options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_trl_is_one_of_ours(kind):
    trl = pytest.importorskip("trl")
    theirs = {f.name for f in dataclasses.fields(getattr(trl, kind.__name__))}
    assert theirs <= {f.name for f in dataclasses.fields(kind)}


# Where a default of ours is another one, on purpose; docs/trainers.md has the reasons.
OTHER_DEFAULTS = {
    "gradient_checkpointing",  # as far as memory needs it
    "logging_nan_inf_filter",  # a loss that is not finite is seen
    "train_sampling_strategy",  # KTO shuffles: its mismatched completions do not depend on the order
}


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_trl(kind):
    trl = pytest.importorskip("trl")

    def default(field):
        if (
            field.default is dataclasses.MISSING
            and field.default_factory is not dataclasses.MISSING
        ):
            return field.default_factory()
        return field.default

    ours = {f.name: default(f) for f in dataclasses.fields(kind)}
    theirs = {f.name: default(f) for f in dataclasses.fields(getattr(trl, kind.__name__))}
    different = {name for name in theirs if theirs[name] != ours[name]}
    assert different <= OTHER_DEFAULTS


@pytest.mark.parametrize(
    "options",
    [
        {"truncation_mode": "keep_start"},
        {"dataset_num_proc": 2},
        {"padding_free": True},  # what shared_prompt does
        {"trust_remote_code": True},
        {"activation_offloading": True},  # on a CPU they are there already
        {"pad_token": "<eos>"},
        {"pad_to_multiple_of": "auto"},
        {"train_sampling_strategy": "sequential"},
        {"use_liger_kernel": False, "liger_kernel_config": {"rope": True}},
        {"model_init_kwargs": {"dtype": "auto", "attn_implementation": None}},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_options_of_trl_are_accepted_without_a_word(kind, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(use_cpu=True, **options)


@pytest.mark.parametrize(
    "options, instead",
    [
        ({"padding_free": True, "shared_prompt": False}, "padding_free needs shared_prompt, .* batches are padded"),
        ({"use_liger_kernel": True}, "use_liger_kernel is off, as Liger's kernels need a GPU"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_warning_says_what_happens_instead(kind, options, instead):
    with pytest.warns(UserWarning, match=f"{kind.__name__}: {instead}") as told:
        config = kind(use_cpu=True, **options)
    assert told[0].filename == __file__
    assert not config.use_liger_kernel


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_that_would_change_the_prompt_is_refused(kind):
    with pytest.raises(
        ValueError,
        match=f"{kind.__name__}: truncation_mode must be 'keep_start', got 'keep_end', which",
    ):
        kind(truncation_mode="keep_end")


def on(monkeypatch, device):
    monkeypatch.setattr(PreferenceConfig, "device", property(lambda self: torch.device(device)))


@pytest.mark.parametrize("device, multiple", [("cpu", None), ("cuda", None), ("neuron", 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_pads_only_where_shapes_are_compiled(monkeypatch, kind, device, multiple):
    fake = types.SimpleNamespace(type=device)  # torch knows no neuron here
    monkeypatch.setattr(PreferenceConfig, "device", property(lambda self: fake))
    assert kind(use_cpu=True).pad_to_multiple_of == multiple


@pytest.mark.skipif(not NEWER, reason="transformers 5.23 brought the offloading")
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_activation_offloading_is_that_of_transformers(monkeypatch, kwargs):
    on(monkeypatch, "cuda")
    config = DPOConfig(
        use_cpu=True, activation_offloading=True, gradient_checkpointing_kwargs=kwargs
    )
    assert config.activation_checkpointing_kwargs == {**(kwargs or {}), "offload": True}
    with pytest.warns(UserWarning, match="activation_offloading does nothing: .*is False"):
        DPOConfig(use_cpu=True, activation_offloading=True, gradient_checkpointing=False)


def test_liger_keeps_its_layers_on_a_gpu_and_leaves_the_loss(monkeypatch):
    on(monkeypatch, "cuda")
    with pytest.warns(
        UserWarning, match="use_liger_kernel replaces layers of the model; the loss stays ours"
    ):
        config = DPOConfig(use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert config.use_liger_kernel
    assert config.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "simpo", "cpo_alpha": 0.0},  # the recipe of TRL's page on CPO
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0},
        {"loss_type": "cpo", "simpo_gamma": 0.0},
        {"loss_type": "sigmoid", "cpo_alpha": 0.0, "simpo_gamma": 0.0, "alphapo_alpha": 0.0},
        {"loss_type": "sigmoid", "f_alpha_divergence_coef": 1.0},  # alpha 1 is reverse KL, an earlier default of TRL
        {"loss_type": ["sigmoid"], "loss_weights": [1.0], "label_smoothing": 0.0},
    ],
)  # fmt: skip
def test_neutral_values_of_options_that_a_loss_does_not_use(options):
    plain = {name: options[name] for name in ("loss_type",)}
    assert (
        DPOConfig(use_cpu=True, **options).loss_type == DPOConfig(use_cpu=True, **plain).loss_type
    )


@pytest.mark.parametrize("loss_type", ["ipo", ["ipo"], ("ipo",)])
def test_losses_are_kept_as_a_list(loss_type):
    assert DPOConfig(use_cpu=True, loss_type=loss_type).loss_type == ["ipo"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be positive, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be positive, got 0"),
        ({"dataset_num_proc": 0}, "dataset_num_proc must be None or positive, got 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be finite and not negative, got -0.001"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and not negative, got nan"),
        ({"pad_to_multiple_of": "8x"}, "pad_to_multiple_of must be None, 'auto' or positive, got '8x'"),
        ({"pad_to_multiple_of": "0"}, "pad_to_multiple_of must be None or positive, got 0"),
        ({"truncation_mode": "keep"}, r"truncation_mode must be one of \['keep_start', 'keep_end'\], got 'keep'"),
        ({"model_init_kwargs": "dtype=auto"}, "model_init_kwargs must be a dict, or one as JSON, got 'dtype=auto'"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs must be a dict, or one as JSON"),
        ({"model_init_kwargs": "{'a': 1}"}, """model_init_kwargs must be JSON, got "{'a': 1}": Expecting"""),
        ({"lr_scheduler_kwargs": "{a: 1}"}, "lr_scheduler_kwargs must be JSON, got '{a: 1}'"),
    ],
)  # fmt: skip
def test_bad_values_are_named(kind, options, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(use_cpu=True, **options)


@pytest.mark.parametrize("text, value", [("true", True), ("False", False)])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "bf16"])
def test_text_for_a_switch_is_what_it_says(name, text, value):
    """The alignment handbook's first parser leaves it as text, where every text would be true."""
    assert getattr(KTOConfig(use_cpu=True, **{name: text}), name) is value
    with pytest.raises(
        ValueError, match=f"KTOConfig: {name} must be True, False or None, got 'maybe'"
    ):
        KTOConfig(use_cpu=True, **{name: "maybe"})


# Copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_activation_bytes": 100}, {"gradient_checkpointing": False}, {"pad_token": "<eos>"}],
)
def test_a_copy_of_a_config_is_the_same(kind, options):
    config = kind(use_cpu=True, **options)
    for copy in (dataclasses.replace(config), kind(**config.to_dict())):
        for field in dataclasses.fields(kind):
            if field.name == "hub_token":
                continue  # a secret, which to_dict() hides
            ours, copied = getattr(config, field.name), getattr(copy, field.name)
            if field.name == "accelerator_config":
                ours, copied = (
                    getattr(value, "to_dict", lambda value=value: value)()
                    for value in (ours, copied)
                )
            assert ours == copied, field.name
        assert copy.checkpointing_as_needed == config.checkpointing_as_needed


@pytest.mark.parametrize(
    "name", ["gradient_checkpointing", *(["activation_checkpointing"] if NEWER else [])]
)
@pytest.mark.parametrize("choice", [True, False])
def test_a_copy_with_a_choice_has_that_choice(name, choice):
    copy = dataclasses.replace(DPOConfig(use_cpu=True), **{name: choice})
    assert copy.gradient_checkpointing is choice and not copy.checkpointing_as_needed


def test_the_default_of_gradient_checkpointing_is_true_to_the_trainer():
    config = DPOConfig(use_cpu=True)
    assert config.checkpointing_as_needed and bool(config.gradient_checkpointing)


# What options do elsewhere ---------------------------------------------------------------------------------

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own_of_the_tests"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model_with_code(tmp_path, monkeypatch):
    """A model and a tokenizer whose classes lie beside their files."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    folder = tmp_path / "model_with_code"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    for name, changes in (
        ("config.json", {"model_type": "own_of_the_tests", "auto_map": classes}),
        ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}),
    ):  # fmt: skip
        held = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**held, **changes}))
    return str(folder)


def test_trust_remote_code_is_for_model_and_tokenizer(tmp_path, model_with_code):
    def trainer(**options):
        return DPOTrainer(
            model_with_code,
            args=config(DPOConfig, tmp_path, max_steps=1, **options),
            train_dataset=make_pairs(),
        )

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        trainer()
    for options in (
        {"trust_remote_code": True},
        {"model_init_kwargs": {"trust_remote_code": True}},
    ):
        trusted = trainer(**options)
        assert type(trusted.model).__name__ == "OwnForCausalLM"
        assert type(trusted.processing_class).__name__ == "OwnTokenizer"
    trusted.train()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"model_init_kwargs": {"revision": "v2", "dtype": "auto"}}, {"trust_remote_code": False, "revision": "v2"}),
        ({"model_init_kwargs": {"trust_remote_code": True}}, {"trust_remote_code": True}),
    ],
)  # fmt: skip
def test_the_tokenizer_comes_from_the_revision_of_the_model(options, expected):
    assert KTOConfig(use_cpu=True, **options).tokenizer_options() == expected


def test_pad_token_is_that_of_the_tokenizer_and_of_the_padding(tmp_path):
    tokenizer = make_tokenizer()
    trainer = dpo_trainer(tmp_path, tokenizer, pad_token="z", shared_prompt=False, max_steps=1)
    letter = tokenizer.convert_tokens_to_ids("z")
    assert (tokenizer.pad_token, trainer.data_collator.pad_token_id) == ("z", letter)
    with pytest.raises(
        ValueError, match="DPOTrainer: pad_token must be a token of the tokenizer, got 'zz'"
    ):
        dpo_trainer(tmp_path, make_tokenizer(), pad_token="zz")
