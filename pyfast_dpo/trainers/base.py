"""What the trainers share: the model, its reference, the data, the metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction

from pyfast_dpo.data import DataReport, PreparedDataset, StreamedDataset
from pyfast_dpo.layout.batches import Collator, model_inputs, token_counts
from pyfast_dpo.model.activations import KeptActivations
from pyfast_dpo.model.causal_lm import causal_lm_of, check_causal_lm
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.trainers.balancing import balancing_of
from pyfast_dpo.trainers.callbacks import (
    KeepFreedMemory,
    LikelihoodDisplacement,
    SyncReferenceModel,
)
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.reference import (
    as_reference,
    computed_once,
    narrow_linear_layers,
    reference_key,
    with_reference,
)
from pyfast_dpo.trainers.sampling import token_budget_loader

Rows = Iterable[Mapping[str, Any]]  # a list of dicts, a datasets.Dataset, or a stream of rows


class PreferenceTrainer(Trainer):
    """Base of `DPOTrainer` and `KTOTrainer`, which define the data preparation and the loss.

    `kept_activations` tells how many layers keep their activations; None if `gradient_checkpointing` was given.
    """

    config_class: ClassVar[type[PreferenceConfig]]
    signature_columns: ClassVar[tuple[str, ...]]
    reference_columns: ClassVar[tuple[str, ...]]
    args: PreferenceConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: PreTrainedModel | nn.Module | None = None,
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
        if ref_model is not None and ref_model is model:
            raise ValueError(
                f"{name}: ref_model must not be the model itself, which changes as it is trained; "
                "leave it out and the trainer makes the reference"
            )
        if quantization_config is not None and not isinstance(model, str):
            raise ValueError(
                f"{name}: quantization_config is for a model given by name, got {type(model).__name__}"
            )
        if isinstance(model, str):
            init = args.loading_options()
            if quantization_config is not None:
                init["quantization_config"] = quantization_config
            model = load_model(model, init)
        check_causal_lm(name, model)
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
        is_own_copy = ref_model is None
        model, ref_model, self._reference_adapter = with_reference(
            model,
            ref_model,
            peft_config,
            dropout=not args.disable_dropout,
            copied=needs_reference and not args.precompute_ref_log_probs,
        )
        if args.sync_ref_model and ref_model is None:
            raise ValueError(
                f"{name}: sync_ref_model needs a reference model of its own, which an adapter does not have"
            )
        self.data_reports: dict[str, DataReport] = {}  # by name of the dataset
        self._averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self._reference_is_gone = False  # when its log-probs were computed before training
        self._tokens_since_log: list[Tensor] = []
        self._log_time: float | None = None

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
        # The loss is the mean of a micro-batch, so the Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        models = {"model": self._policy} | ({} if ref_model is None else {"ref_model": ref_model})
        self._prepared_models = prepare(
            name,
            models,
            shared_prompt=args.shared_prompt and data_collator is None,
            agreed=self._agreed if args.world_size > 1 else None,
        )
        if self._prepared_models.shared_prompt:
            self.data_collator = shared
        self.ref_model = None
        if ref_model is not None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # in one dtype
            if is_own_copy and (args.bf16 or args.fp16) and not (sharded or args.sync_ref_model):
                narrow_linear_layers(ref_model, torch.bfloat16 if args.bf16 else torch.float16)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if needs_reference and args.precompute_ref_log_probs:
            with self._prepared_models:
                self._precompute_reference(train_dataset, "train")
                for key, dataset in _named(eval_dataset, "eval").items():
                    self._precompute_reference(dataset, key)
            # Without a second model, an adapter's base is still there for other data.
            self._reference_is_gone = ref_model is not None or not hasattr(model, "peft_config")
            self.ref_model = None
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

    # What a loss defines ------------------------------------------------------------------------------

    @staticmethod
    def _needs_reference(args: Any) -> bool:
        raise NotImplementedError

    def _prepare_rows(self, rows: Rows, args: Any, name: str) -> PreparedDataset | StreamedDataset:
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

    def _reference_values(self, inputs: dict[str, Any]) -> Tensor:
        """What the reference says of a batch, `[examples, columns]` in the order of `reference_columns`."""
        raise NotImplementedError

    # Data ---------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, args: PreferenceConfig, name: str) -> Any:
        if dataset is None or isinstance(dataset, PreparedDataset | StreamedDataset | str):
            return dataset
        if isinstance(dataset, Mapping):
            return {key: self._prepared(value, args, key) for key, value in dataset.items()}
        if isinstance(dataset, Iterator):
            raise TypeError(
                f"{type(self).__name__}: {name}_dataset must be readable more than once (a list of dicts, a "
                f"datasets.Dataset or IterableDataset), got {type(dataset).__name__}"
            )
        if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(self).__name__}: {name}_dataset must hold rows (a list of dicts, a "
                f"datasets.Dataset or IterableDataset), got {type(dataset).__name__}"
            )
        prepared = self._prepare_rows(dataset, args, name)
        self.data_reports[name] = prepared.report
        if args.process_index == 0 and isinstance(prepared, PreparedDataset):
            print(prepared.report)
        return prepared

    def _agreed(self, holds: bool) -> bool:
        """Whether it holds on every process."""
        flags = torch.tensor([holds], device=self.args.device, dtype=torch.int32)
        return bool(self.accelerator.gather(flags).all())

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _set_signature_columns_if_needed(self) -> None:
        # The columns that the collator needs: the Trainer drops all others before it.
        self._signature_columns = [*self.signature_columns, *self.reference_columns]  # type: ignore[assignment]

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> Any:
        budget = self.args.max_tokens_per_batch
        if budget is None or not isinstance(dataset, PreparedDataset):
            return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        training = kwargs.get("is_training", False)
        return self.accelerator.prepare(
            token_budget_loader(dataset, budget, self.args, self.data_collator, training)
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(
            dataset, PreparedDataset
        ):
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(batch, lengths=dataset.tokens())
        return super()._get_train_sampler(train_dataset)

    # Reference ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model, without gradient and dropout."""
        self._prepared_models.apply()
        with torch.no_grad():
            if self.ref_model is not None:
                yield self.ref_model
                return
            if self._reference_is_gone:
                raise ValueError(
                    f"{type(self).__name__}: the reference's log-probs were computed before training, and the "
                    "batch has none; give every dataset to the constructor, and let the collator keep the "
                    f"columns {self.reference_columns}"
                )
            unwrapped = self.accelerator.unwrap_model(self._policy)
            with as_reference(self._policy, unwrapped, self._reference_adapter) as model:
                yield model

    def _precompute_reference(self, dataset: Any, name: str) -> None:
        """Adds the reference's log-probs to the examples, from the cache as far as they are there."""
        if dataset is None:
            return
        if not isinstance(dataset, PreparedDataset):
            raise ValueError(
                f"{type(self).__name__}: precompute_ref_log_probs needs a dataset with a length, and the "
                f"{name} dataset is a stream"
            )
        columns = self.reference_columns

        def compute(examples: list[dict[str, Any]]) -> Tensor:
            inputs = self._prepare_inputs(self.data_collator(examples))
            with self.compute_loss_context_manager():
                return self._reference_values(inputs)

        source = self.ref_model if self.ref_model is not None else self._policy
        table = computed_once(
            reference_key(
                self.accelerator.unwrap_model(source),
                dataset.examples,
                f"{columns} {self.args.bf16} {self.args.fp16}",
            ),
            dataset.examples,
            columns,
            self.args.precompute_ref_batch_size or self.args.eval_batch_size,
            compute,
            name=name,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        values = torch.from_numpy(table).nan_to_num(0.0).to(self.args.device)
        values = self.accelerator.reduce(values, "sum").cpu()
        for example, row in zip(dataset.examples, values.tolist(), strict=True):
            example.update(zip(columns, row, strict=True))

    # Loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of the micro-batch; with `return_outputs` also the log-probs and labels behind it."""
        mode = "train" if self._policy.training else "eval"
        metrics = self._averages[mode]
        loss, *outputs = self._loss(model, inputs, metrics)
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
        return result, balancing.coefficient * loss

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the models are as they were, but for their weights."""
        with self._prepared_models:
            return super().train(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._prepared_models:
            return super().predict(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; raw rows are prepared as those of the constructor."""
        prepared = self._prepared(eval_dataset, self.args, metric_key_prefix)
        with self._prepared_models:
            return super().evaluate(prepared, ignore_keys, metric_key_prefix)

    # Metrics ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, which are read from the device here and only here."""
        prefixes = [key.removesuffix("loss") for key in logs if key.endswith("_loss")]
        if "loss" in logs:
            logs.update(self._pop_metrics("train"))
        elif prefixes and prefixes[0] != "train_":  # train_loss is the summary at the end
            metrics = self._pop_metrics("eval")
            logs.update({f"{prefixes[0]}{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _pop_metrics(self, mode: str) -> dict[str, float]:
        metrics = self._averages[mode].pop(lambda totals: self.accelerator.reduce(totals, "sum"))
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        tokens = torch.stack(self._tokens_since_log).sum() if self._tokens_since_log else None
        new = 0 if tokens is None else int(self.accelerator.reduce(tokens, "sum"))
        logged = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
        metrics["num_tokens"] = new + (logged[-1] if logged else 0)
        if mode == "train":
            now = time.perf_counter()
            if self._log_time is not None:
                metrics["tokens_per_second"] = new / (now - self._log_time)
            self._log_time = now
            self._tokens_since_log.clear()
        return metrics


def _named(dataset: Any, name: str) -> dict[str, Any]:
    return dict(dataset) if isinstance(dataset, Mapping) else {name: dataset}


def load_model(name: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by name or path, in float32 unless `init_kwargs` says otherwise."""
    return AutoModelForCausalLM.from_pretrained(
        name, **{"dtype": torch.float32, **(init_kwargs or {})}
    )


def use_pad_token(name: str, tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Lets the tokenizer pad with a token of its vocabulary, here and where it is saved."""
    if token not in tokenizer.get_vocab():
        raise ValueError(f"{name}: pad_token must be a token of the tokenizer, got {token!r}")
    tokenizer.pad_token = token


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token serves as padding, since masks come from lengths."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
