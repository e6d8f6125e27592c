"""Options of every trainer of a policy: those of `transformers.TrainingArguments` and these, checked at construction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from pyfast_dpo.ops.checks import check_weight
from pyfast_dpo.trainers.flags import Switch, bool_of, check_json, documented, number_or_none

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


@documented
@dataclass
class PolicyConfig(TrainingArguments):
    """What the options of all trainers share.

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
        shared_prompt: compute each prompt of a batch once and no padding, where the model can take it.
            False: one padded row a sequence.
        pad_to_multiple_of: round the padded length of a batch up to a multiple of this; for padded batches.
            "auto": 128 on AWS Neuron, none elsewhere.
        pad_token: a token of the vocabulary that the tokenizer pads with, instead of its own.
        chat_template_kwargs: options of the chat template for all rows, such as `{"enable_thinking": false}`; those
            in a row's own column of this name come first; on the command line as JSON.
        disable_dropout: set every dropout probability of the policy to 0.
        router_aux_loss_coef: weight of the loss that balances the experts of a mixture of experts; None for
            the model's own, 0 for none.
        model_init_kwargs: for `from_pretrained`, when the model is given by name (its default dtype is
            float32); on the command line as JSON. Its `revision` holds for the tokenizer too.
        trust_remote_code: allow models and tokenizers given by name to bring code of their own.
        sync_ref_model: move the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO).
        ref_model_mixup_alpha: in (0, 1], how far: reference = alpha policy + (1 - alpha) reference.
        ref_model_sync_steps: after how many steps each time.
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
    shared_prompt: bool = True
    pad_to_multiple_of: int | str | None = "auto"
    pad_token: str | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    trust_remote_code: bool = False
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
        check_weight(name, "learning_rate", self.learning_rate)
        check_positive_options(self, AT_LEAST_ONE)
        check_positive_options(self, ("pad_to_multiple_of",), or_none=True)
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
        if self.use_liger_kernel and on_cpu:
            warn_of(
                self,
                "use_liger_kernel is off, as Liger's kernels need a GPU; no logits matrix is made anyway",
            )
            self.use_liger_kernel = False
        elif self.use_liger_kernel:
            warn_of(
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
            warn_of(self, "activation_offloading does nothing: it needs transformers 5.23 or later")
        elif not self.activation_checkpointing:
            warn_of(
                self,
                "activation_offloading does nothing: it moves what layers keep that are computed again, and "
                "gradient_checkpointing is False",
            )
        else:
            setattr(self, option, {**(getattr(self, option) or {}), "offload": True})


def warn_of(config: PolicyConfig, text: str) -> None:
    warnings.warn(f"{type(config).__name__}: {text}", stacklevel=6)  # where the config is made


def check_positive_options(
    config: PolicyConfig, options: tuple[str, ...], *, or_none: bool = False
) -> None:
    """Raises ValueError for an option below 1."""
    for option in options:
        value = getattr(config, option)
        if or_none and value in (None, "auto"):
            continue
        if not isinstance(value, int) or value < 1:
            unless = "None or " if or_none else ""
            raise ValueError(
                f"{type(config).__name__}: {option} must be {unless}positive, got {value!r}"
            )
