"""What the trainers on fixed data share: how they are built, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.layout.batches import Collator, token_counts
from pyfast_dpo.trainers.callbacks import LikelihoodDisplacement
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.construction import OptionOf
from pyfast_dpo.trainers.loaders import DatasetTrainer, Rows, named_datasets
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.policy import PolicyTrainer
from pyfast_dpo.trainers.referenced import PrecomputingTrainer


class PreferenceTrainer(PolicyTrainer, DatasetTrainer, PrecomputingTrainer):
    """Base of `DPOTrainer` and `KTOTrainer`, which define the data preparation and the loss."""

    config_class: ClassVar[type[PreferenceConfig]]
    args: PreferenceConfig
    beta: OptionOf[float] = OptionOf("beta")
    precompute_ref_logps: OptionOf[bool] = OptionOf("precompute_ref_log_probs")

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Collator | None = None,
        train_dataset: Rows | PreparedDataset | None = None,
        eval_dataset: Rows | PreparedDataset | dict[str, Rows | PreparedDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        name = type(self).__name__
        args = self._checked_args(args)
        needs_reference = self._needs_reference(args)
        if ref_model is not None and not needs_reference:
            raise ValueError(
                f"{name}: ref_model is given, but loss_type {cast(Any, args).loss_type!r} has no reference"
            )
        models = self._models(
            model,
            ref_model,
            args,
            processing_class,
            quantization_config,
            peft_config,
            needs_reference=needs_reference,
            copied=not args.precompute_ref_log_probs,
            max_length=args.max_length,
        )
        args = models.args
        self._reported = {}
        train_dataset = self._prepared(train_dataset, args, "train")
        eval_dataset = self._prepared(eval_dataset, args, "eval")
        shared, padded = self._collators(args, cast(Any, self.processing_class))
        super().__init__(
            model=models.policy,
            args=args,
            data_collator=data_collator or padded,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._make_ready(models, shared_prompt=data_collator is None)
        if self._prepared_models.shared_prompt:
            self.data_collator = shared
        if needs_reference and args.precompute_ref_log_probs:
            with self._prepared_models:
                self._precompute_reference(train_dataset, "train")
                for key, dataset in named_datasets(eval_dataset, "eval").items():
                    self._precompute_reference(dataset, key)
            self._put_reference_away()
        self.add_callback(LikelihoodDisplacement(args.beta))

    # What a loss defines ------------------------------------------------------------------------------

    @staticmethod
    def _needs_reference(args: Any) -> bool:
        raise NotImplementedError

    def _collators(
        self, args: Any, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Collator, Collator]:
        """(for shared prompts, padded)"""
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """(loss, (policy log-probs, reference log-probs), labels); adds to the metrics."""
        raise NotImplementedError

    # Loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch; with `return_outputs` also the log-probs and labels behind it.

        A batch of training holds the mean number of examples of its step's batches (`steps.py`), which then
        stands for its own, so that the mean over the batches is that over the examples of the step."""
        mode = "train" if self._policy.training else "eval"
        metrics = self._averages[mode]
        loss, *outputs = self._loss(model, inputs, metrics)
        if mode == "eval":
            # The Trainer's own mean is one over batches, whatever their sizes.
            examples = self._count_examples(inputs)
            metrics.add("loss", loss.double() * examples, examples)
        tokens, computed = token_counts(inputs)
        metrics.add("tokens_per_computed_token", tokens, computed)
        if mode == "train":
            self._tokens_since_log.append(tokens)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Evaluation without logits: `compute_metrics` receives `predictions = (policy, reference)`
        log-probs and `label_ids`, as the trainer's docstring says."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, (logps, labels) = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, logps, labels)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; raw rows are prepared as those of the constructor."""
        prepared = self._prepared(eval_dataset, self.args, metric_key_prefix)
        self._clear_metrics("eval")
        with self._prepared_models:
            return super().evaluate(prepared, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As `Trainer.predict`, of raw or prepared rows: `predictions` and `label_ids` are those of
        `compute_metrics`; `metrics` those of an evaluation."""
        prepared = self._prepared(test_dataset, self.args, metric_key_prefix)
        self._clear_metrics("eval")
        with self._prepared_models:
            output = super().predict(prepared, ignore_keys, metric_key_prefix)
        assert output.metrics is not None
        for name, value in self._pop_metrics("eval").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output
