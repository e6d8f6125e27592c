"""KTO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyfast_dpo.data import (
    DataCollatorForUnpairedPreference,
    PreparedDataset,
    SharedPromptCollatorForUnpairedPreference,
    StreamedDataset,
    prepare_unpaired,
)
from pyfast_dpo.layout.batches import Collator, completion_rows, sums
from pyfast_dpo.losses.unpaired import kto_kl, unpaired_loss
from pyfast_dpo.model.projections import Projection
from pyfast_dpo.trainers.base import PreferenceTrainer
from pyfast_dpo.trainers.config import KTOConfig
from pyfast_dpo.trainers.construction import OptionOf, pad_token
from pyfast_dpo.trainers.loaders import Rows
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.steps import MEAN_EXAMPLES

KL_OF_STEP = "kl_of_step"  # in a batch of training: the estimate from all batches of its step


class KTOTrainer(PreferenceTrainer):
    """Trains a causal language model on desirable and undesirable responses with the KTO loss.

    Args: as `DPOTrainer`, but for
        args: a `KTOConfig`.
        data_collator: by default `SharedPromptCollatorForUnpairedPreference`, or, for models that cannot take
            it, `DataCollatorForUnpairedPreference`.
        train_dataset, eval_dataset: rows with `prompt`, `completion`, `label`; pairs become two rows each.
        compute_metrics: receives `predictions = (policy, reference)`, summed log-probs `[N]`, and
            `label_ids`, bool `[N]`.

    The KL estimate of a step comes from the prompts of all of its batches, with completions of other prompts that are
    fixed when the data is prepared: any batch size will do, and shuffling too. A prompt is computed once for
    both, or twice where a step has several batches, whose estimate is computed before their losses.

    Metrics: `kl` (that estimate), and `rewards/*`, `logps/*`, `logits/*`, `entropy`, `lengths/*`, `num_tokens`,
    `tokens_per_second`, `tokens_per_computed_token` as in `DPOTrainer`, where chosen are the desirable
    responses and rejected the undesirable ones.
    """

    config_class = KTOConfig
    signature_columns = (
        "prompt_ids", "completion_ids", "label", "KL_completion_ids", "completion_assistant_mask",
        "KL_completion_assistant_mask",
    )  # fmt: skip
    args: KTOConfig
    _tag_names = ("pyfast_dpo", "kto")
    paper = (
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        "https://arxiv.org/abs/2402.01306",
    )

    # Under TRL's names, as its subclasses read them.
    loss_type: OptionOf[str] = OptionOf("loss_type")
    desirable_weight: OptionOf[float] = OptionOf("desirable_weight")
    undesirable_weight: OptionOf[float] = OptionOf("undesirable_weight")

    @property
    def reference_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_KL_logps")[: 2 if self.args.loss_type == "kto" else 1]

    @staticmethod
    def _needs_reference(args: KTOConfig) -> bool:
        return True

    def _prepare_rows(
        self, rows: Rows, args: KTOConfig, name: str
    ) -> PreparedDataset | StreamedDataset:
        return prepare_unpaired(
            rows,
            self.processing_class,
            max_length=args.max_length,
            name=name,
            chat_template_kwargs=args.template_options(),
            num_proc=args.dataset_num_proc,
        )

    def _collators(
        self, args: KTOConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, Collator]:
        mismatched = args.loss_type == "kto"
        if mismatched and args.gradient_accumulation_steps > 1:
            shared: Collator = MismatchedApart(
                SharedPromptCollatorForUnpairedPreference(args.max_length, False)
            )
        else:
            shared = SharedPromptCollatorForUnpairedPreference(args.max_length, mismatched)
        padded = DataCollatorForUnpairedPreference(
            pad_token(tokenizer, self._tables.vocabulary),
            args.max_length,
            args.padding_multiple,
            mismatched,
        )
        return shared, padded

    def _count_examples(self, batch: dict[str, Any]) -> int:
        return len(batch["label"])

    def _reference_values(self, inputs: dict[str, Any]) -> Tensor:
        if "ref_logps" in inputs:
            return torch.stack([inputs[name] for name in self.reference_columns], dim=1)
        rows, kl_inputs, kl_rows = _mismatched(inputs)
        with self._reference() as model:
            if kl_inputs is None:
                scored = [rows] if kl_rows is None else [rows, kl_rows]
                logps = self._project(
                    model, inputs, lambda p: [p.sequence_logps(each) for each in scored]
                )
            else:
                logps = [
                    self._project(model, inputs, lambda p: p.sequence_logps(rows)),
                    self._project(model, kl_inputs, lambda p: p.sequence_logps(kl_rows)),
                ]
        return torch.stack(logps, dim=1)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.loss_type == "kto" and len(batches) > 1:
            kl = self._kl_of_step(batches)
            for batch in batches:
                batch[KL_OF_STEP] = kl
        return batches, items

    @torch.no_grad()
    def _kl_of_step(self, batches: list[dict[str, Any]]) -> Tensor:
        """The estimate from all batches of a step, which each of their losses needs; keeps what the reference says
        in them."""
        self.model_wrapped.train()
        logps = []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            _, kl_inputs, kl_rows = _mismatched(inputs)
            with self.compute_loss_context_manager():
                policy = self._project(
                    self.model_wrapped,
                    inputs if kl_inputs is None else kl_inputs,
                    lambda p, rows=kl_rows: p.sequence_logps(rows),
                )
                reference = self._reference_values(inputs)
            batch.update(zip(self.reference_columns, reference.T, strict=True))
            logps.append(torch.stack([policy, reference[:, 1]]))
        return self._kl(*torch.cat(logps, dim=1))

    def _kl(self, policy: Tensor, reference: Tensor) -> Tensor:
        """From the log-probs of mismatched completions `[n]`, over all processes, whose n may differ."""
        if self.args.world_size > 1:
            gaps = policy.double() - reference
            total, count = self.accelerator.reduce(
                torch.stack([gaps.sum(), gaps.new_tensor(gaps.numel())]), "sum"
            )
            policy = (total / count).float().view(1)
            reference = torch.zeros_like(policy)
        return kto_kl(policy, reference, clamp=self.args.clamp_kl)

    def _reference_settings(self) -> list[Any]:
        return [*super()._reference_settings(), self.args.loss_type]

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        rows, kl_inputs, kl_rows = _mismatched(inputs)
        desirable = inputs["label"]
        examples = inputs.get(MEAN_EXAMPLES, len(desirable))
        reference = self._reference_values(inputs)

        def kl_of(projection: Projection) -> Tensor | None:
            if kl_rows is None:
                return None
            with torch.no_grad():
                return self._kl(projection.sequence_logps(kl_rows), reference[:, 1])

        def project(projection: Projection, kl: Tensor | None) -> Any:
            kl = kl_of(projection) if kl is None else kl

            def losses_of(logps: Tensor, units: slice) -> Tensor:
                losses = unpaired_loss(
                    logps[0],
                    desirable[units],
                    reference[units, 0],
                    loss_type=self.args.loss_type,
                    kl=kl,
                    beta=self.args.beta,
                    desirable_weight=self.args.desirable_weight,
                    undesirable_weight=self.args.undesirable_weight,
                ).losses
                return losses.sum(dtype=torch.float64) / examples

            return kl, projection.loss(rows, losses_of, group=1)

        kl = inputs.get(KL_OF_STEP)
        if kl is None and kl_inputs is not None:
            with torch.no_grad():
                kl = self._project(model, kl_inputs, kl_of)
        (kl, result), balancing = self._project_balanced(
            model, inputs, lambda p: project(p, kl), metrics
        )
        if kl is not None:
            metrics.add("kl", kl, 1)
        self._add_metrics(
            metrics, rows, result.logps, reference[:, 0], desirable, result.statistics
        )
        return result.loss + balancing, (result.logps, reference[:, 0]), desirable

    def _add_metrics(
        self,
        metrics: MetricAverages,
        rows: Any,
        logps: Tensor,
        reference: Tensor,
        desirable: Tensor,
        statistics: Any,
    ) -> None:
        rewards = self.args.beta * (logps - reference)
        mean_logits = sums(statistics.mean_logits, rows)
        for side, mask in (("chosen", desirable), ("rejected", ~desirable)):
            tokens = (rows.counts * mask).sum()
            metrics.add(f"rewards/{side}", rewards.where(mask, 0.0).sum(), mask.sum())
            metrics.add(f"logps/{side}", logps.where(mask, 0.0).sum(), mask.sum())
            metrics.add(f"logits/{side}", mean_logits.where(mask, 0.0).sum(), tokens)
            metrics.add(f"lengths/{side}", tokens, mask.sum())
        metrics.add("entropy", statistics.entropy.sum(), rows.counts.sum())


def _mismatched(inputs: dict[str, Any]) -> tuple[Any, dict[str, Any] | None, Any]:
    """(scored rows, the batch of the mismatched completions if it is one of its own, their scored rows or
    None if the loss needs none)"""
    rows = completion_rows(inputs)
    if "KL_input_ids" not in inputs:
        kl_rows = completion_rows(inputs, "KL_") if "KL_completion_rows" in inputs else None
        return rows, None, kl_rows
    kl_inputs = {
        name.removeprefix("KL_"): value for name, value in inputs.items() if name.startswith("KL_")
    }
    return rows, kl_inputs, completion_rows(kl_inputs)


@dataclass
class MismatchedApart:
    """Collates the mismatched completions as a batch of their own, under names with the prefix `KL_`.

    Args:
        collate: makes a batch of examples without them.
    """

    collate: Collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        mismatched = [
            {**example, **{n.removeprefix("KL_"): v for n, v in example.items() if n[:3] == "KL_"}}
            for example in examples
        ]
        apart = {f"KL_{name}": value for name, value in self.collate(mismatched).items()}
        return {**self.collate(examples), **apart}
