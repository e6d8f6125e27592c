"""Options of the trainers: those of `transformers.TrainingArguments` and these, checked at construction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from pyfast_dpo.losses.table import check_pair_options, couples_batch, loss_names
from pyfast_dpo.losses.weighting import ld_row_weights
from pyfast_dpo.ops.checks import check_beta, check_choice, check_weight
from pyfast_dpo.trainers.flags import Switch, bool_of, check_json, documented, number_or_none

KTO_LOSSES = ("kto", "apo_zero_unpaired")
AS_NEEDED = "as needed"  # what gradient checkpointing is by default: true to the Trainer, and copies keep it
# Names of one option, the newer first: transformers 5.23 renamed it and lets its own name win.
CHECKPOINTING = [
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
]
NEURON_MULTIPLE = 128  # as TRL

AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "ref_model_sync_steps",
)
NONE_OR_AT_LEAST_ONE = (
    "pad_to_multiple_of",
    "max_tokens_per_batch",
    "precompute_ref_batch_size",
    "dataset_num_proc",
)


@documented
@dataclass
class PreferenceConfig(TrainingArguments):
    """What `DPOConfig` and `KTOConfig` share.

    Args:
        learning_rate: of the optimizer at its highest.
        logging_steps: log every so many steps; below 1, a share of all steps.
        gradient_checkpointing: by default as far as memory needs it: the last layers keep their activations
            for the backward pass as `max_activation_bytes` says, the others are computed again. True: every
            layer is computed again. False: none. `transformers` calls it `activation_checkpointing` from
            5.23 on; both names work.
        max_activation_bytes: >= 0, the bytes of activations, on each device, that the layers may keep, from
            the second step on; the first keeps and measures one layer, unless this is 0. None: as many as
            the gradients take on the device, or one and a half times the frozen weights' if that is more (LoRA), and at
            most half of what is free after the first step. Not together with `gradient_checkpointing`.
            Compiled models and DeepSpeed recompute every layer.
        activation_offloading: layers that are computed again keep their input in the memory of the host
            (`offload` of `activation_checkpointing_kwargs`, transformers 5.23). Nothing to do on a CPU.
        bf16: bfloat16 autocast, by default where a CUDA device supports it, unless `fp16` is set.
        logging_nan_inf_filter: off by default, so that a loss that is not finite is seen in the log.
        use_liger_kernel: Liger's layers on a GPU, without its loss, whose place ours takes; off on a CPU.
        liger_kernel_config: which of Liger's kernels, as in `TrainingArguments`.
        beta: > 0, strength of the pull to the reference.
        max_length: the most tokens of prompt + response. Longer responses are cut, rows with longer
            prompts dropped and reported. None for no limit.
        truncation_mode: "keep_start": the end of the response is cut.
        shared_prompt: compute each prompt of a batch once and no padding, where the model can take it.
            False: one padded row a sequence.
        padding_free: what `shared_prompt` does; there is nothing to add to it.
        max_tokens_per_batch: fill batches by this number of computed tokens (each prompt once) instead of
            by `per_device_train_batch_size`; the loss is the mean over the examples of all batches of a step.
        pad_to_multiple_of: round the padded length of a batch up to a multiple of this; for padded batches.
            "auto": 128 on AWS Neuron, none elsewhere.
        pad_token: a token of the vocabulary that the tokenizer pads with, instead of its own.
        dataset_num_proc: processes that tokenize the data; by default this one alone.
        chat_template_kwargs: options of the chat template for all rows, such as `{"enable_thinking": false}`; those
            in a row's own column of this name come first; on the command line as JSON.
        disable_dropout: set every dropout probability of the policy to 0.
        router_aux_loss_coef: weight of the loss that balances the experts of a mixture of experts; None for
            the model's own, 0 for none.
        model_init_kwargs: for `from_pretrained`, when the model is given by name (its default dtype is
            float32); on the command line as JSON. Its `revision` holds for the tokenizer too.
        trust_remote_code: allow models and tokenizers given by name to bring code of their own.
        precompute_ref_log_probs: compute the reference's log-probs once, before training, and keep no
            second model. They are cached by data and weights; a run that was stopped goes on where it was.
        precompute_ref_batch_size: examples at a time, by default `per_device_eval_batch_size`.
        sync_ref_model: move the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO).
        ref_model_mixup_alpha: in (0, 1], how far: reference = alpha policy + (1 - alpha) reference.
        ref_model_sync_steps: after how many steps each time.
        train_sampling_strategy: as in `TrainingArguments`, where "group_by_length" counts the tokens that a
            row brings, prompt once; "batch_rebalance" is refused.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as the Trainer declares it
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "liger_kernel_config",
    ]

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool | None = field(default=None, metadata={"action": Switch})
    max_activation_bytes: int | None = None
    activation_offloading: bool = False
    bf16: bool | None = field(default=None, metadata={"action": Switch})  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    use_liger_kernel: bool = False
    liger_kernel_config: dict[str, Any] | str | None = None  # type: ignore[assignment]
    beta: float = 0.1
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    shared_prompt: bool = True
    padding_free: bool = False
    max_tokens_per_batch: int | None = None
    pad_to_multiple_of: int | str | None = "auto"
    pad_token: str | None = None
    dataset_num_proc: int | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        self._read_text()
        self._check()
        self._choose_checkpointing()
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.accelerator_config is None:
            # Rows of shared prompts cannot be cut among processes, so each collates its own batches.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        self.loading_options(), self.template_options()  # checks them
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = NEURON_MULTIPLE if self.device.type == "neuron" else None
        self._say_what_happens_instead()

    @property
    def checkpointing_as_needed(self) -> bool:
        """Whether gradient checkpointing was left at its default."""
        return getattr(self, CHECKPOINTING[0]) == AS_NEEDED

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as the number that it became."""
        assert not isinstance(self.pad_to_multiple_of, str)
        return self.pad_to_multiple_of

    def to_dict(self) -> dict[str, Any]:
        """As that of `TrainingArguments`, which takes every `*_token` for a secret."""
        return {**super().to_dict(), "pad_token": self.pad_token}

    def loading_options(self) -> dict[str, Any]:
        """For `from_pretrained` of a model given by name."""
        return {"trust_remote_code": self.trust_remote_code, **self._dict("model_init_kwargs")}

    def template_options(self) -> dict[str, Any]:
        """For the chat template, of all rows."""
        return self._dict("chat_template_kwargs")

    def _dict(self, option: str) -> dict[str, Any]:
        given = getattr(self, option)
        if not isinstance(given, dict | None):  # JSON is a dict once the config is made
            raise ValueError(
                f"{type(self).__name__}: {option} must be a dict, or one as JSON, got {given!r}"
            )
        return given or {}

    def tokenizer_options(self) -> dict[str, Any]:
        """For `from_pretrained` of the tokenizer of such a model."""
        options = self.loading_options()
        return {
            name: options[name] for name in ("trust_remote_code", "revision") if name in options
        }

    def _read_text(self) -> None:
        name = type(self).__name__
        for option in self._VALID_DICT_FIELDS:
            check_json(name, option, getattr(self, option))
        for option in (*CHECKPOINTING, "bf16"):
            value = getattr(self, option)
            if isinstance(value, str) and value != AS_NEEDED:
                setattr(self, option, bool_of(name, option, value))
        if isinstance(self.pad_to_multiple_of, str) and self.pad_to_multiple_of != "auto":
            self.pad_to_multiple_of = number_or_none(
                name, "pad_to_multiple_of", self.pad_to_multiple_of
            )

    def _check(self) -> None:
        name = type(self).__name__
        check_beta(name, self.beta)
        check_weight(name, "learning_rate", self.learning_rate)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"{name}: max_length must be None or at least 2 (a prompt and a response token), "
                f"got {self.max_length}"
            )
        for option in (*AT_LEAST_ONE, *NONE_OR_AT_LEAST_ONE):
            value = getattr(self, option)
            if value not in (None, "auto") and value < 1:
                unless = "None or " if option in NONE_OR_AT_LEAST_ONE else ""
                raise ValueError(f"{name}: {option} must be {unless}positive, got {value}")
        if self.router_aux_loss_coef is not None:
            check_weight(name, "router_aux_loss_coef", self.router_aux_loss_coef)
        if self.max_activation_bytes is not None and self.max_activation_bytes < 0:
            raise ValueError(
                f"{name}: max_activation_bytes must be None or not negative, got {self.max_activation_bytes}"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"{name}: ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                f"{name}: sync_ref_model changes the reference, which precompute_ref_log_probs computes "
                "only once; choose one"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                f"{name}: train_sampling_strategy must be 'random', 'sequential' or 'group_by_length', got "
                "'batch_rebalance', which balances padding; max_tokens_per_batch balances tokens"
            )
        check_choice(name, "truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        if self.truncation_mode == "keep_end":
            raise ValueError(
                f"{name}: truncation_mode must be 'keep_start', got 'keep_end', which cuts the prompt of the "
                "longer response shorter than the other's, so that the two no longer answer the same; "
                "shorten prompts in the data"
            )

    def _choose_checkpointing(self) -> None:
        choices = (getattr(self, option) for option in CHECKPOINTING)
        given = next((choice for choice in choices if choice not in (None, AS_NEEDED)), None)
        if given is not None and self.max_activation_bytes is not None:
            raise ValueError(
                f"{type(self).__name__}: max_activation_bytes says how far {CHECKPOINTING[0]} goes, which "
                f"must then be None, got {self.max_activation_bytes} with {given}"
            )
        setattr(self, CHECKPOINTING[0], AS_NEEDED if given is None else given)

    def _say_what_happens_instead(self) -> None:
        """Warns of options that change no result and do here something else than in TRL."""
        on_cpu = self.device.type == "cpu"
        if self.padding_free and not self.shared_prompt:
            _warn(self, "padding_free needs shared_prompt, which is False: batches are padded")
        if self.use_liger_kernel and on_cpu:
            _warn(
                self,
                "use_liger_kernel is off, as Liger's kernels need a GPU; no logits matrix is made anyway",
            )
            self.use_liger_kernel = False
        elif self.use_liger_kernel:
            _warn(
                self,
                "use_liger_kernel replaces layers of the model; the loss stays ours, which makes no logits matrix",
            )
            given = self.liger_kernel_config
            self.liger_kernel_config = {
                **(given if isinstance(given, dict) else {}),
                "fused_linear_cross_entropy": False,
            }
        if self.activation_offloading and not on_cpu:
            self._offload()

    def _offload(self) -> None:
        option = f"{CHECKPOINTING[0]}_kwargs"
        if CHECKPOINTING[0] == "gradient_checkpointing":
            _warn(self, "activation_offloading does nothing: it needs transformers 5.23 or later")
        elif not self.activation_checkpointing:
            _warn(
                self,
                "activation_offloading does nothing: it moves what layers keep that are computed again, and "
                "gradient_checkpointing is False",
            )
        else:
            setattr(self, option, {**(getattr(self, option) or {}), "offload": True})


def _warn(config: PreferenceConfig, text: str) -> None:
    warnings.warn(f"{type(config).__name__}: {text}", stacklevel=6)  # where the config is made


@documented
@dataclass
class DPOConfig(PreferenceConfig):
    """Options of `DPOTrainer`.

    Args:
        loss_type: one or several of the pair losses of `pyfast_dpo.preference_loss`, such as sigmoid, ipo,
            simpo; kept as a list.
        loss_weights: of several losses, one number each, 1 by default.
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences ("sigmoid" is then cDPO).
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: the alpha of "alpha_divergence".
        discopop_tau: > 0, temperature of "discopop".
        simpo_gamma: target margin of "simpo" and "alphapo", in units of the reward.
        alphapo_alpha: shape of the reward of "alphapo"; 0 is "simpo".
        cpo_alpha: weight of the chosen response's "sft" loss in "cpo".
        rpo_alpha: weight of an "sft" loss added to whatever the losses are (RPO).
        ld_alpha: in [0, 1], the weight of a response's tokens beyond the length of the other one
            (`pyfast_dpo.ld_row_weights`); None for 1.
        use_weighting: weigh pairs by the policy's own probability of the responses (WPO,
            `pyfast_dpo.wpo_weights`); costs one more product of the lm_head.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    loss_type: str | list[str] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    cpo_alpha: float = 1.0
    rpo_alpha: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False

    def __post_init__(self) -> None:
        check_pair_options("DPOConfig", **self.loss_options())
        if self.ld_alpha is not None:
            ld_row_weights((), self.ld_alpha)  # checks it
        if self.use_weighting and couples_batch(self.loss_type):
            raise ValueError(
                f"DPOConfig: use_weighting weighs pairs, which loss_type {self.loss_type!r} sorts apart"
            )
        self.loss_type = list(loss_names(self.loss_type))
        super().__post_init__()

    def loss_options(self) -> dict[str, Any]:
        """The options of `preference_loss`."""
        names = [f.name for f in fields(DPOConfig) if f.name not in _NOT_OF_THE_LOSS]
        return {name: getattr(self, name) for name in ("beta", *names)}


@documented
@dataclass
class KTOConfig(PreferenceConfig):
    """Options of `KTOTrainer`.

    Args:
        loss_type: "kto" or "apo_zero_unpaired", of `pyfast_dpo.unpaired_loss`.
        desirable_weight: >= 0, of desirable responses in the loss.
        undesirable_weight: >= 0, of undesirable responses in the loss.
        clamp_kl: the KL estimate not below 0, as in the authors' code.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range.
    """

    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    clamp_kl: bool = True

    def __post_init__(self) -> None:
        check_choice("KTOConfig", "loss_type", self.loss_type, KTO_LOSSES)
        check_weight("KTOConfig", "desirable_weight", self.desirable_weight)
        check_weight("KTOConfig", "undesirable_weight", self.undesirable_weight)
        super().__post_init__()


_NOT_OF_THE_LOSS = {f.name for f in fields(PreferenceConfig)} | {"ld_alpha", "use_weighting"}
