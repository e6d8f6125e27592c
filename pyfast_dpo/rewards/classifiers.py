"""A sequence classifier as a reward: the logit of prompt and response."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyfast_dpo.ops.extras import require

BATCH = 16  # sequences of like length at a time


class RewardClassifier:
    """Called as a reward function.

    Args:
        model: an `AutoModelForSequenceClassification` with one label, or its name or path.
        processing_class: its tokenizer; by default that of its name.
        name: of who asks, for errors.

    Raises:
        ValueError: another number of labels.
    """

    def __init__(self, model: str | nn.Module, processing_class: Any, name: str) -> None:
        transformers = require("transformers", "a reward model")
        classifier: Any = model
        if isinstance(model, str):
            classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=1, dtype=torch.float32
            )
        config: Any = classifier.config
        if getattr(config, "num_labels", 1) != 1:
            raise ValueError(
                f"{name}: a reward model must have one label, got {config.num_labels} of {type(classifier).__name__}"
            )
        self.model: Any = classifier.requires_grad_(False).eval()
        self.name = (
            str(config._name_or_path).rstrip("/").split("/")[-1] or type(classifier).__name__
        )
        self.tokenizer = processing_class or transformers.AutoTokenizer.from_pretrained(
            config._name_or_path
        )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The logit is read at the last token that is no padding.
        config.pad_token_id = self.tokenizer.pad_token_id

    def to(self, device: Any) -> None:
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **others: Any) -> list[float]:
        texts = [
            prompt + completion
            if isinstance(prompt, str)
            else self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        special = not texts or isinstance(prompts[0], str)  # a chat template writes its own
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rewards = [0.0] * len(texts)
        device = next(self.model.parameters()).device
        for first in range(0, len(order), BATCH):
            part = order[first : first + BATCH]
            inputs = self.tokenizer(
                [texts[i] for i in part], return_tensors="pt", padding=True, padding_side="right",
                add_special_tokens=special, return_token_type_ids=False,
            ).to(device)  # fmt: skip
            logits = self.model(**inputs).logits[:, 0].float().tolist()
            for i, logit in zip(part, logits, strict=True):
                rewards[i] = logit
        return rewards
