"""DPO and the other losses on pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyfast_dpo.data import (
    DataCollatorForPreference,
    PreparedDataset,
    SharedPromptCollatorForPreference,
    StreamedDataset,
    prepare_pairs,
)
from pyfast_dpo.layout.batches import Collator, completion_rows, sums
from pyfast_dpo.logprobs.linear import FusedLinearLoss
from pyfast_dpo.logprobs.rows import CompletionRows
from pyfast_dpo.losses.pairs import preference_loss
from pyfast_dpo.losses.table import couples_batch, needs_reference
from pyfast_dpo.losses.weighting import ld_row_weights
from pyfast_dpo.model.projections import Projection
from pyfast_dpo.trainers.base import PreferenceTrainer
from pyfast_dpo.trainers.config import DPOConfig
from pyfast_dpo.trainers.construction import OptionOf, pad_token
from pyfast_dpo.trainers.loaders import Rows
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.steps import MEAN_EXAMPLES


class DPOTrainer(PreferenceTrainer):
    """Trains a causal language model on pairs.

    Args:
        model: a model, or a name or path for `from_pretrained`.
        ref_model: the reference; without it, the model as it is now: the base under a LoRA adapter
            (no second copy), else a frozen copy, or none for losses without a reference.
        args: a `DPOConfig`.
        data_collator: by default each prompt once and no padding (`SharedPromptCollatorForPreference`), or,
            for models that cannot take it, `DataCollatorForPreference`. One of your own makes padded batches.
        train_dataset, eval_dataset: rows with `prompt`, `chosen`, `rejected` (see `pyfast_dpo.data.rows`):
            a list, a `datasets.Dataset`, a stream, or a prepared dataset; rows that cannot be used are
            reported and left out.
        processing_class: the tokenizer; by default that of the model.
        compute_metrics: receives `predictions = (policy, reference)`, the summed log-probs `[N, 2]` of
            chosen and rejected responses, and `label_ids`, their numbers of tokens `[N, 2]`.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: for a model given by name.
        peft_config: makes the model a PEFT model, such as `peft.LoraConfig(...)`.

    Metrics: `rewards/chosen`, `rewards/rejected` (beta * (policy - reference), of summed log-probs; the
    reference is 0 for losses without one),
    `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected` (sums over the response),
    `logits/chosen`, `logits/rejected`, `entropy`, `mean_token_accuracy` (means over the response tokens,
    the last over chosen ones), `kl` (estimate of KL(policy || reference) a token, from the responses of the
    data: the mean of e^d - d - 1 with d = (reference - policy) / tokens), `lengths/chosen`,
    `lengths/rejected`, `num_tokens` (seen in training), `tokens_per_second`, `tokens_per_computed_token`
    (below 1: padding; above 1: prompts shared); in evaluation with the prefix `eval_`.
    """

    config_class = DPOConfig
    signature_columns = (
        "prompt_ids", "chosen_ids", "rejected_ids", "chosen_assistant_mask", "rejected_assistant_mask"
    )  # fmt: skip
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    args: DPOConfig
    _tag_names = ("pyfast_dpo", "dpo")
    paper = (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "https://arxiv.org/abs/2305.18290",
    )

    # Under TRL's names, as its subclasses read them; what they set is what the next step uses.
    label_smoothing: OptionOf[float] = OptionOf("label_smoothing")
    f_divergence_type: OptionOf[str] = OptionOf("f_divergence_type")
    f_alpha_divergence_coef: OptionOf[float] = OptionOf("f_alpha_divergence_coef")
    ld_alpha: OptionOf[float | None] = OptionOf("ld_alpha")
    use_weighting: OptionOf[bool] = OptionOf("use_weighting")

    @property
    def loss_types(self) -> list[str]:
        given = self.args.loss_type
        return [given] if isinstance(given, str) else list(given)

    @loss_types.setter
    def loss_types(self, names: list[str]) -> None:
        self.args.loss_type = names

    @property
    def loss_weights(self) -> list[float]:
        return self.args.loss_weights or [1.0] * len(self.loss_types)

    @loss_weights.setter
    def loss_weights(self, weights: list[float] | None) -> None:
        self.args.loss_weights = weights

    @staticmethod
    def _needs_reference(args: DPOConfig) -> bool:
        return needs_reference(args.loss_type)

    def _prepare_rows(
        self, rows: Rows, args: DPOConfig, name: str
    ) -> PreparedDataset | StreamedDataset:
        return prepare_pairs(
            rows,
            self.processing_class,
            max_length=args.max_length,
            name=name,
            chat_template_kwargs=args.template_options(),
            num_proc=args.dataset_num_proc,
        )

    def _collators(
        self, args: DPOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, Collator]:
        padded = DataCollatorForPreference(
            pad_token(tokenizer, self._tables.vocabulary), pad_to_multiple_of=args.padding_multiple
        )
        return SharedPromptCollatorForPreference(), padded

    def _count_examples(self, batch: dict[str, Any]) -> int:
        rows = batch.get("completion_rows")
        return (len(batch["input_ids"]) if rows is None else len(rows.lengths)) // 2

    def _reference_settings(self) -> list[Any]:
        return [*super()._reference_settings(), self.args.ld_alpha]

    def _reference_values(self, inputs: dict[str, Any]) -> Tensor:
        if "ref_chosen_logps" in inputs:
            return torch.stack([inputs[name] for name in self.reference_columns], dim=1)
        rows = completion_rows(inputs)
        weights = self._row_weights(rows)
        with self._reference() as model:
            logps = self._project(
                model, inputs, lambda p: p.sequence_logps(rows, row_weights=weights)
            )
        return torch.stack(logps.chunk(2), dim=1)

    def _row_weights(self, rows: CompletionRows) -> Tensor | None:
        alpha = self.args.ld_alpha
        return (
            None if alpha is None else ld_row_weights(rows.lengths, alpha, device=rows.index.device)
        )

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        rows = completion_rows(inputs)
        if len(rows.lengths) % 2:
            raise ValueError(
                "DPOTrainer: a batch must hold the chosen rows and then as many rejected rows, "
                f"got {len(rows.lengths)} rows"
            )
        pairs = len(rows.lengths) // 2
        examples = inputs.get(MEAN_EXAMPLES, pairs)
        lengths = torch.stack(rows.counts.chunk(2), dim=1)
        reference = (
            self._reference_values(inputs)
            if self._needs_reference(self.args)
            else torch.zeros_like(lengths, dtype=torch.float32)
        )
        coupled = couples_batch(self.args.loss_type)
        row_weights = self._row_weights(rows)

        def pair_losses(logps: Tensor, units: slice, pair_weights: Tensor | None = None) -> Tensor:
            units = slice(0, pairs) if coupled else units
            losses = preference_loss(
                *logps.view(2, -1),
                *reference[units].T,
                chosen_lengths=lengths[units, 0],
                rejected_lengths=lengths[units, 1],
                **self.args.loss_options(),
            ).losses
            if pair_weights is not None:
                losses = losses * pair_weights[units]
            # In float64 the mean of equal losses is that loss, to the last bit.
            return losses.sum(dtype=torch.float64) / examples

        def project(projection: Projection) -> FusedLinearLoss:
            weights = _wpo_weights(projection, rows) if self.args.use_weighting else None
            return projection.loss(
                rows,
                partial(pair_losses, pair_weights=weights),
                group=None if coupled else 2,
                row_weights=row_weights,
            )

        result, balancing = self._project_balanced(model, inputs, project, metrics)
        logps = torch.stack(result.logps.chunk(2), dim=1)
        self._add_metrics(metrics, rows, logps, reference, lengths, result.statistics)
        return result.loss + balancing, (logps, reference), lengths

    def _add_metrics(
        self,
        metrics: MetricAverages,
        rows: Any,
        logps: Tensor,
        reference: Tensor,
        lengths: Tensor,
        statistics: Any,
    ) -> None:
        """From log-probs and lengths `[P, 2]` and statistics of the scored rows."""
        pairs = logps.shape[0]
        rewards = self.args.beta * (logps - reference)
        metrics.add("rewards/accuracies", (rewards[:, 0] > rewards[:, 1]).sum(), pairs)
        if self._needs_reference(self.args):
            distance = (reference - logps) / lengths.clamp(min=1)
            metrics.add("kl", (distance.expm1() - distance).sum(), 2 * pairs)
        mean_logits = torch.stack(sums(statistics.mean_logits, rows).chunk(2), dim=1)
        for column, side in enumerate(("chosen", "rejected")):
            tokens = lengths[:, column].sum()
            metrics.add(f"rewards/{side}", rewards[:, column].sum(), pairs)
            metrics.add(f"logps/{side}", logps[:, column].sum(), pairs)
            metrics.add(f"logits/{side}", mean_logits[:, column].sum(), tokens)
            metrics.add(f"lengths/{side}", tokens, pairs)
        hits = sums(statistics.is_top1, rows)[:pairs].sum()
        metrics.add("mean_token_accuracy", hits, lengths[:, 0].sum())
        metrics.add("entropy", statistics.entropy.sum(), lengths.sum())


@torch.no_grad()
def _wpo_weights(projection: Projection, rows: CompletionRows) -> Tensor:
    """`[P]`: `pyfast_dpo.wpo_weights` of both responses of a pair, from sums over their tokens."""
    measured = projection.loss(rows, lambda logps, units: logps.sum())
    assert measured.statistics is not None
    gaps = measured.logps - sums(measured.statistics.log_sum_sq_probs, rows)
    chosen, rejected = (gaps / rows.counts.clamp(min=1)).exp().chunk(2)
    return chosen * rejected
