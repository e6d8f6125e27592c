"""Options of the trainers: those of `transformers.TrainingArguments` and these, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from pyfast_dpo.losses.table import check_pair_options, couples_batch
from pyfast_dpo.losses.weighting import ld_row_weights
from pyfast_dpo.ops.checks import check_beta, check_choice, check_weight

KTO_LOSSES = ("kto", "apo_zero_unpaired")


@dataclass
class PreferenceConfig(TrainingArguments):
    """What `DPOConfig` and `KTOConfig` share.

    Args:
        learning_rate, logging_steps: as in `TrainingArguments`, with the defaults 1e-6 and 10.
        gradient_checkpointing: by default as far as memory needs it: the last layers keep their activations
            for the backward pass as `max_activation_bytes` says, the others are computed again. True: every
            layer is computed again. False: none. `transformers` calls it `activation_checkpointing` from
            5.23 on; both names work.
        max_activation_bytes: >= 0, the bytes of activations, on each device, that the layers may keep, from
            the second step on; the first keeps and measures one layer, unless this is 0. None: as many as
            the gradients take on the device, or one and a half times the frozen weights' if that is more (LoRA), and at
            most half of what is free after the first step. Not together with `gradient_checkpointing`.
            Compiled models and DeepSpeed recompute every layer.
        checkpointing_as_needed: no option, but whether `gradient_checkpointing` was left at its default.
        bf16: by default on where a CUDA device supports it, unless `fp16` is set.
        logging_nan_inf_filter: off by default, so that a loss that is not finite is seen in the log.
        beta: > 0, strength of the pull to the reference.
        max_length: the most tokens of prompt + response. Longer responses are cut, rows with longer
            prompts dropped and reported. None for no limit.
        shared_prompt: compute each prompt of a batch once and no padding, where the model can take it.
            False: one padded row a sequence.
        train_sampling_strategy: as in `TrainingArguments`, where "group_by_length" counts the tokens that a
            row brings, prompt once; "batch_rebalance" is refused.
        max_tokens_per_batch: fill batches by this number of computed tokens (each prompt once) instead of
            by `per_device_train_batch_size`; the loss is the mean over the examples of a batch, so fuller
            batches give each of theirs less weight.
        pad_to_multiple_of: round the padded length of a batch up to a multiple of this; for padded batches.
        disable_dropout: set every dropout probability of the policy to 0.
        router_aux_loss_coef: weight of the loss that balances the experts of a mixture of experts; None for
            the model's own, 0 for none.
        model_init_kwargs: for `from_pretrained`, when the model is given by name (its default dtype is
            float32).
        precompute_ref_log_probs: compute the reference's log-probs once, before training, and keep no
            second model. They are cached by data and weights; a run that was stopped goes on where it was.
        precompute_ref_batch_size: examples at a time, by default `per_device_eval_batch_size`.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: every so many steps move the reference
            towards the policy, reference = alpha policy + (1 - alpha) reference (TR-DPO).
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool | None = None
    max_activation_bytes: int | None = None
    checkpointing_as_needed: bool = field(init=False, default=False)
    bf16: bool | None = None  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    beta: float = 0.1
    max_length: int | None = 1024
    shared_prompt: bool = True
    max_tokens_per_batch: int | None = None
    pad_to_multiple_of: int | None = None
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None
    model_init_kwargs: dict[str, Any] | None = None
    precompute_ref_log_probs: bool = False
    precompute_ref_batch_size: int | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_beta(name, self.beta)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"{name}: max_length must be None or at least 2 (a prompt and a response token), "
                f"got {self.max_length}"
            )
        for option in ("pad_to_multiple_of", "max_tokens_per_batch", "precompute_ref_batch_size"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {option} must be None or positive, got {value}")
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
        if self.ref_model_sync_steps < 1:
            raise ValueError(
                f"{name}: ref_model_sync_steps must be positive, got {self.ref_model_sync_steps}"
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
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        option = "gradient_checkpointing"
        if hasattr(self, "activation_checkpointing"):
            option = "activation_checkpointing"
            if self.activation_checkpointing is None:
                self.activation_checkpointing = self.gradient_checkpointing
        given = getattr(self, option)
        if given is not None and self.max_activation_bytes is not None:
            raise ValueError(
                f"{name}: max_activation_bytes says how far {option} goes, which must then be None, "
                f"got {self.max_activation_bytes} with {given}"
            )
        self.checkpointing_as_needed = given is None
        setattr(self, option, given is not False)
        if self.accelerator_config is None:
            # Rows of shared prompts cannot be cut among processes, so each collates its own batches.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()


@dataclass
class DPOConfig(PreferenceConfig):
    """Options of `DPOTrainer`.

    Args:
        loss_type: a name, or a list of names, of the pair losses of `pyfast_dpo.preference_loss`.
        loss_weights, label_smoothing, f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma,
            alphapo_alpha, cpo_alpha, rpo_alpha: as there.
        ld_alpha: in [0, 1], the weight of a response's tokens beyond the length of the other one
            (`pyfast_dpo.ld_row_weights`); None for 1.
        use_weighting: weigh pairs by the policy's own probability of the responses (WPO,
            `pyfast_dpo.wpo_weights`); costs one more product of the lm_head.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    loss_type: str | list[str] = "sigmoid"
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
        super().__post_init__()

    def loss_options(self) -> dict[str, Any]:
        """The options of `preference_loss`."""
        names = [f.name for f in fields(DPOConfig) if f.name not in _NOT_OF_THE_LOSS]
        return {name: getattr(self, name) for name in ("beta", *names)}


@dataclass
class KTOConfig(PreferenceConfig):
    """Options of `KTOTrainer`.

    Args:
        loss_type: "kto" or "apo_zero_unpaired", of `pyfast_dpo.unpaired_loss`.
        desirable_weight, undesirable_weight: >= 0, the weights of the two classes.
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
