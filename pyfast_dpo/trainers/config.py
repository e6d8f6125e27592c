"""Options of the trainers: those of `transformers.TrainingArguments` and these, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from pyfast_dpo._checks import check_beta, check_choice, check_weight
from pyfast_dpo.functional import UNPAIRED_LOSS_NAMES, check_pair_options


@dataclass
class PreferenceConfig(TrainingArguments):
    """What `DPOConfig` and `KTOConfig` share.

    Args:
        learning_rate, logging_steps: as in `TrainingArguments`, with the defaults 1e-6 and 10.
        gradient_checkpointing: by default on. `transformers` calls it `activation_checkpointing` from 5.23
            on; both names work.
        bf16: by default on where a CUDA device supports it, unless `fp16` is set.
        logging_nan_inf_filter: off by default, so that a loss that is not finite is seen in the log.
        beta: > 0, strength of the pull to the reference.
        max_length: the most tokens of prompt + response. Longer responses are cut, rows with longer
            prompts dropped and reported. None for no limit.
        pad_to_multiple_of: round the padded length of a batch up to a multiple of this.
        disable_dropout: set every dropout probability of the policy to 0.
        model_init_kwargs: for `from_pretrained`, when the model is given by name (its default dtype is
            float32).
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool | None = None
    bf16: bool | None = None  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    beta: float = 0.1
    max_length: int | None = 1024
    pad_to_multiple_of: int | None = None
    disable_dropout: bool = True
    model_init_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_beta(name, self.beta)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"{name}: max_length must be None or at least 2 (a prompt and a response token), "
                f"got {self.max_length}"
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"{name}: pad_to_multiple_of must be None or positive, got {self.pad_to_multiple_of}"
            )
        if self.bf16 is None:
            cuda = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = cuda and not self.fp16 and torch.cuda.is_bf16_supported()
        checkpointing = self.gradient_checkpointing is not False
        if not hasattr(self, "activation_checkpointing"):
            self.gradient_checkpointing = checkpointing
        elif self.activation_checkpointing is None:
            self.activation_checkpointing = checkpointing
        super().__post_init__()


@dataclass
class DPOConfig(PreferenceConfig):
    """Options of `DPOTrainer`.

    Args:
        loss_type: "sigmoid" (DPO) or "ipo", which takes log-probs averaged over the tokens.
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences; for "sigmoid" only.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range.
    """

    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_pair_options("DPOConfig", self.loss_type, self.beta, self.label_smoothing)
        super().__post_init__()


@dataclass
class KTOConfig(PreferenceConfig):
    """Options of `KTOTrainer`.

    Args:
        loss_type: "kto".
        desirable_weight, undesirable_weight: >= 0, the weights of the two classes.
        Others: as in `PreferenceConfig` and `transformers.TrainingArguments`.

    Raises:
        ValueError: an option out of its range.
    """

    loss_type: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("KTOConfig", "loss_type", self.loss_type, UNPAIRED_LOSS_NAMES)
        check_weight("KTOConfig", "desirable_weight", self.desirable_weight)
        check_weight("KTOConfig", "undesirable_weight", self.undesirable_weight)
        super().__post_init__()
