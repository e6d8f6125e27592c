"""KTO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyfast_dpo.data import (
    DataCollatorForUnpairedPreference,
    PreparedDataset,
    prepare_unpaired,
)
from pyfast_dpo.functional import kto_kl, kto_loss, mean_of_losses
from pyfast_dpo.trainers.base import PreferenceTrainer, Rows, pad_token
from pyfast_dpo.trainers.config import KTOConfig, PreferenceConfig
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.scoring import score_responses


class KTOTrainer(PreferenceTrainer):
    """Trains a causal language model on desirable and undesirable responses with the KTO loss.

    Args: as `DPOTrainer`, but for
        args: a `KTOConfig`.
        data_collator: default `DataCollatorForUnpairedPreference`.
        train_dataset, eval_dataset: rows with `prompt`, `completion`, `label`; pairs become two rows each.
        compute_metrics: receives `predictions = (policy, reference)`, summed log-probs `[N]`, and
            `label_ids`, bool `[N]`.

    The KL estimate of every batch comes from its prompts with completions of other prompts, fixed when the
    data is prepared: any batch size will do, and shuffling too.

    Metrics: `kl`, and `rewards/*`, `logps/*`, `logits/*`, `entropy`, `num_tokens` as in `DPOTrainer`, where
    chosen are the desirable responses and rejected the undesirable ones.
    """

    config_class = KTOConfig
    signature_columns = ("prompt_ids", "completion_ids", "label", "KL_completion_ids")
    args: KTOConfig

    def _prepare_rows(self, rows: Rows, args: PreferenceConfig, name: str) -> PreparedDataset:
        return prepare_unpaired(rows, self.processing_class, max_length=args.max_length, name=name)

    def _default_collator(
        self, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return DataCollatorForUnpairedPreference(
            pad_token(tokenizer), args.max_length, args.pad_to_multiple_of
        )

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        kl_inputs = {
            name.removeprefix("KL_"): rows
            for name, rows in inputs.items()
            if name.startswith("KL_")
        }
        with self._reference() as reference_model:
            reference = score_responses(reference_model, inputs)
            reference_kl = score_responses(reference_model, kl_inputs)
        with torch.no_grad():
            policy_kl = score_responses(model, kl_inputs)
        policy = score_responses(model, inputs, statistics=True)

        gather = self.accelerator.gather
        kl = kto_kl(gather(policy_kl.logps), gather(reference_kl.logps))
        desirable = inputs["label"]
        losses = kto_loss(
            policy.logps,
            desirable,
            reference.logps,
            kl=kl,
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
        ).losses

        logps = policy.logps.detach()
        rewards = self.args.beta * (logps - reference.logps)
        assert policy.statistics is not None
        for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
            tokens = (policy.lengths * mask).sum()
            metrics.add(f"rewards/{side}", rewards.where(mask, 0.0).sum(), mask.sum())
            metrics.add(f"logps/{side}", logps.where(mask, 0.0).sum(), mask.sum())
            mean_logits = policy.statistics.mean_logits.where(mask, 0.0)
            metrics.add(f"logits/{side}", mean_logits.sum(), tokens)
        metrics.add("kl", kl, 1)
        metrics.add("entropy", policy.statistics.entropy.sum(), policy.lengths.sum())
        return mean_of_losses(losses), (logps, reference.logps), desirable
