"""DPO and IPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyfast_dpo.data import DataCollatorForPreference, PreparedDataset, prepare_pairs
from pyfast_dpo.functional import mean_of_losses, preference_loss
from pyfast_dpo.trainers.base import PreferenceTrainer, Rows, pad_token
from pyfast_dpo.trainers.config import DPOConfig, PreferenceConfig
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.scoring import score_responses


class DPOTrainer(PreferenceTrainer):
    """Trains a causal language model on pairs with the DPO or the IPO loss.

    Args:
        model: a model, or a name or path for `from_pretrained`.
        ref_model: the reference; without it, the model as it is now: the base under a LoRA adapter
            (no second copy), else a frozen copy.
        args: a `DPOConfig`.
        data_collator: default `DataCollatorForPreference`.
        train_dataset, eval_dataset: rows with `prompt`, `chosen`, `rejected` (see `pyfast_dpo.data.rows`)
            or a prepared dataset; rows that cannot be used are reported and left out.
        processing_class: the tokenizer; by default that of the model.
        compute_metrics: receives `predictions = (policy, reference)`, the summed log-probs `[N, 2]` of
            chosen and rejected responses, and `label_ids`, their numbers of tokens `[N, 2]`.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: makes the model a PEFT model, such as `peft.LoraConfig(...)`.

    Metrics: `rewards/chosen`, `rewards/rejected` (beta * (policy - reference), of summed log-probs),
    `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected` (sums over the response),
    `logits/chosen`, `logits/rejected`, `entropy`, `mean_token_accuracy` (means over the response tokens,
    the last over chosen ones), `num_tokens` (seen in training); in evaluation with the prefix `eval_`.
    """

    config_class = DPOConfig
    signature_columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    args: DPOConfig

    def _prepare_rows(self, rows: Rows, args: PreferenceConfig, name: str) -> PreparedDataset:
        return prepare_pairs(rows, self.processing_class, max_length=args.max_length, name=name)

    def _default_collator(
        self, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return DataCollatorForPreference(pad_token(tokenizer), args.pad_to_multiple_of)

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        rows = inputs["labels"].shape[0]
        if rows % 2:
            raise ValueError(
                "DPOTrainer: a batch must hold the chosen rows and then as many rejected rows, "
                f"got {rows} rows"
            )
        with self._reference() as reference_model:
            reference = score_responses(reference_model, inputs)
        policy = score_responses(model, inputs, statistics=True)

        average = self.args.loss_type == "ipo"
        policy_logps = policy.logps / policy.lengths if average else policy.logps
        reference_logps = reference.logps / policy.lengths if average else reference.logps
        losses = preference_loss(
            *policy_logps.chunk(2),
            *reference_logps.chunk(2),
            loss_type=self.args.loss_type,
            beta=self.args.beta,
            label_smoothing=self.args.label_smoothing,
        ).losses

        assert policy.statistics is not None
        logps = policy.logps.detach()
        rewards = self.args.beta * (logps - reference.logps)
        chosen, rejected = rewards.chunk(2)
        metrics.add("rewards/accuracies", (chosen > rejected).sum(), rows // 2)
        for side, of in (("chosen", slice(None, rows // 2)), ("rejected", slice(rows // 2, None))):
            tokens = policy.lengths[of].sum()
            metrics.add(f"rewards/{side}", rewards[of].sum(), rows // 2)
            metrics.add(f"logps/{side}", logps[of].sum(), rows // 2)
            metrics.add(f"logits/{side}", policy.statistics.mean_logits[of].sum(), tokens)
            if side == "chosen":
                metrics.add("mean_token_accuracy", policy.statistics.top1_hits[of].sum(), tokens)
        metrics.add("entropy", policy.statistics.entropy.sum(), policy.lengths.sum())

        def columns(stacked: Tensor) -> Tensor:
            return torch.stack(stacked.chunk(2), dim=1)

        predictions = (columns(logps), columns(reference.logps))
        return mean_of_losses(losses), predictions, columns(policy.lengths)
