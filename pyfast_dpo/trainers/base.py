"""What the trainers on fixed data share: how they are built, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.data.tables import Tables
from pyfast_dpo.layout.batches import Collator, model_inputs, token_counts
from pyfast_dpo.model.activations import KeptActivations
from pyfast_dpo.model.causal_lm import causal_lm_of
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.model.tables import position_table, vocabulary_of
from pyfast_dpo.trainers.balancing import balancing_of
from pyfast_dpo.trainers.callbacks import (
    KeepFreedMemory,
    LikelihoodDisplacement,
    SyncReferenceModel,
)
from pyfast_dpo.trainers.cards import CardTrainer
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.construction import OptionOf, causal_lm, checkpointing_for, use_pad_token
from pyfast_dpo.trainers.loaders import DatasetTrainer, Rows, named_datasets
from pyfast_dpo.trainers.logs import LoggingTrainer
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.reference import narrow_linear_layers, with_reference
from pyfast_dpo.trainers.referenced import ReferencedTrainer
from pyfast_dpo.trainers.steps import MEAN_EXAMPLES, StepTrainer


class PreferenceTrainer(
    CardTrainer, LoggingTrainer, StepTrainer, DatasetTrainer, ReferencedTrainer
):
    """Base of `DPOTrainer` and `KTOTrainer`, which define the data preparation and the loss.

    `kept_activations` tells how many layers keep their activations; None if `gradient_checkpointing` was given.
    """

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
        if args is None:
            args = self.config_class(output_dir=f"{name}-output")
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"{name}: args must be a {self.config_class.__name__}, got {type(args).__name__}"
            )
        needs_reference = self._needs_reference(args)
        if ref_model is not None and not needs_reference:
            raise ValueError(
                f"{name}: ref_model is given, but loss_type {cast(Any, args).loss_type!r} has no reference"
            )
        if ref_model is not None and ref_model is model and not isinstance(model, str):
            raise ValueError(
                f"{name}: ref_model must not be the model itself, which changes as it is trained; "
                "leave it out and the trainer makes the reference"
            )
        model = causal_lm(name, model, args.loading_options(), quantization_config)
        if isinstance(ref_model, str):
            ref_model = causal_lm(name, ref_model, args.loading_options(), None)
        args = checkpointing_for(causal_lm_of(model), args)
        self._balancing = balancing_of(name, causal_lm_of(model), args.router_aux_loss_coef)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                cast(Any, model).config._name_or_path, **args.tokenizer_options()
            )
        if args.pad_token is not None:
            use_pad_token(name, processing_class, args.pad_token)
        self.processing_class = processing_class

        # Before the adapter draws its weights, so that a run is the same each time.
        set_seed(args.seed)
        ref_model_is_copy = ref_model is None
        model, ref_model, self._reference_adapter = with_reference(
            name,
            model,
            ref_model,
            peft_config,
            dropout=not args.disable_dropout,
            needed=needs_reference,
            copied=not args.precompute_ref_log_probs,
        )
        if args.sync_ref_model and ref_model is None:
            raise ValueError(
                f"{name}: sync_ref_model needs a reference model of its own, which an adapter does not have"
            )
        self._reported = {}
        self._tables = Tables(
            vocabulary_of(model),
            None if ref_model is None else vocabulary_of(ref_model),
            position_table(model),
            args.max_length,
        )
        train_dataset = self._prepared(train_dataset, args, "train")
        eval_dataset = self._prepared(eval_dataset, args, "eval")
        shared, padded = self._collators(args, processing_class)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or padded,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The mean over the batches of a step is the Trainer's, which divides by their number.
        self.model_accepts_loss_kwargs = False
        add_tags = getattr(self._policy, "add_model_tags", None)
        if add_tags is not None:
            add_tags(list(self._tag_names))
        self.ref_model = None
        models = {"model": self._policy} | ({} if ref_model is None else {"ref_model": ref_model})
        self._prepared_models = prepare(
            name,
            models,
            shared_prompt=args.shared_prompt and data_collator is None,
            agreed=self._agreed if args.world_size > 1 else None,
        )
        if self._prepared_models.shared_prompt:
            self.data_collator = shared
        if ref_model is not None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # in one dtype
            is_copied = ref_model_is_copy and not (sharded or args.sync_ref_model)
            if is_copied and (args.bf16 or args.fp16):
                narrow_linear_layers(ref_model, torch.bfloat16 if args.bf16 else torch.float16)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if needs_reference and args.precompute_ref_log_probs:
            with self._prepared_models:
                self._precompute_reference(train_dataset, "train")
                for key, dataset in named_datasets(eval_dataset, "eval").items():
                    self._precompute_reference(dataset, key)
            self._put_reference_away()
        if args.sync_ref_model:
            self.add_callback(
                SyncReferenceModel(
                    self._policy,
                    self.accelerator.unwrap_model(self.ref_model),
                    args.ref_model_mixup_alpha,
                    args.ref_model_sync_steps,
                )
            )
        self.add_callback(LikelihoodDisplacement(args.beta))
        self.add_callback(KeepFreedMemory())
        self.kept_activations: KeptActivations | None = None
        if args.checkpointing_as_needed:
            self.kept_activations = KeptActivations(args.max_activation_bytes)
            self.add_callback(self.kept_activations)

    def _agreed(self, holds: bool) -> bool:
        """Whether it holds on every process."""
        flags = torch.tensor([holds], device=self.args.device, dtype=torch.int32)
        return bool(self.accelerator.gather(flags).all())

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the loss that balances a mixture of experts is added."""
        return self._balancing is not None

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

    # Training -----------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; goes on from a checkpoint to the same bits. Afterwards the models are as they were,
        but for their weights.

        Raises:
            ValueError: no train_dataset; no parameter to train; a checkpoint that cannot be resumed from.
            OSError: a checkpoint could not be written.
        """
        name = type(self).__name__
        if self.train_dataset is None:
            raise ValueError(f"{name}: train() needs a train_dataset, and the constructor got none")
        if not any(p.requires_grad for p in self._policy.parameters()):
            raise ValueError(
                f"{name}: train() needs a parameter with requires_grad=True, and the model has none: everything is "
                "frozen (an adapter is loaded for training by PeftModel.from_pretrained(..., is_trainable=True))"
            )
        self._train_away_from_reference()
        try:
            with self._prepared_models:
                return super().train(*args, **kwargs)
        finally:  # callbacks hear of the end of training, but not of an error
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, KeptActivations | KeepFreedMemory):
                    callback.on_train_end(self.args, self.state, self.control)

    def _moving_models(self) -> dict[str, nn.Module]:
        return {"reference": cast(nn.Module, self.ref_model)} if self.args.sync_ref_model else {}

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

    def _project(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        project: Callable[..., Any],
        **options: Any,
    ) -> Any:
        """What `project` makes of the model's projection of a batch (`model/projections.py`)."""
        self._prepared_models.apply()
        return model(**model_inputs(inputs), project=project, **options)

    def _project_balanced(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        project: Callable[..., Any],
        metrics: MetricAverages,
    ) -> tuple[Any, Tensor | float]:
        """The same for the policy's loss, and what a mixture of experts adds to it; adds to the metrics."""
        balancing = self._balancing
        if balancing is None:
            return self._project(model, inputs, project), 0.0
        result, loss = self._project(
            model,
            inputs,
            lambda projection: (project(projection), balancing.loss(projection, inputs)),
            output_router_logits=True,
        )
        metrics.add("aux_loss", loss, 1)
        share = self._count_examples(inputs) / inputs.get(
            MEAN_EXAMPLES, self._count_examples(inputs)
        )
        return result, balancing.coefficient * share * loss

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
