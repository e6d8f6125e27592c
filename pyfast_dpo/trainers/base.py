"""What the trainers share: the model, its reference, the data, the metrics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transformers.trainer_utils import EvalPrediction

from pyfast_dpo.data import DataReport, PreparedDataset
from pyfast_dpo.diagnostics.extras import require
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.metrics import MetricAverages

Rows = Sequence[Mapping[str, Any]]  # or a datasets.Dataset, which is one in all but name
REFERENCE_ADAPTER = "reference"


class PreferenceTrainer(Trainer):
    """Base of `DPOTrainer` and `KTOTrainer`, which define the data preparation and the loss."""

    config_class: ClassVar[type[PreferenceConfig]]
    signature_columns: ClassVar[tuple[str, ...]]
    args: PreferenceConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: PreTrainedModel | nn.Module | None = None,
        args: PreferenceConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]] | None = None,
        train_dataset: Rows | PreparedDataset | None = None,
        eval_dataset: Rows | PreparedDataset | dict[str, Rows | PreparedDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        name = type(self).__name__
        if args is None:
            args = self.config_class(output_dir=f"{name}-output")
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"{name}: args must be a {self.config_class.__name__}, got {type(args).__name__}"
            )
        if isinstance(model, str):
            model = load_model(model, args.model_init_kwargs)
        if ref_model is model:
            raise ValueError(
                f"{name}: ref_model must not be the model itself, which changes as it is trained; "
                "leave it out and the trainer makes the reference"
            )
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(cast(Any, model).config._name_or_path)
        self.processing_class = processing_class

        # Before the adapter draws its weights, so that a run is the same each time.
        set_seed(args.seed)
        model, ref_model, self._reference_adapter = _with_reference(
            model, ref_model, peft_config, args.disable_dropout
        )
        self.data_reports: dict[str, DataReport] = {}  # by name of the dataset
        self._averages = {"train": MetricAverages(), "eval": MetricAverages()}
        self._train_tokens = 0
        self._tokens_since_log: list[Tensor] = []

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self._default_collator(args, processing_class),
            train_dataset=self._prepared(train_dataset, args, "train"),
            eval_dataset=self._prepared(eval_dataset, args, "eval"),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is the mean of a micro-batch, so the Trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.ref_model = (
            None
            if ref_model is None
            else self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        )

    # What a loss defines ------------------------------------------------------------------------------

    def _prepare_rows(self, rows: Rows, args: PreferenceConfig, name: str) -> PreparedDataset:
        raise NotImplementedError

    def _default_collator(
        self, args: PreferenceConfig, tokenizer: PreTrainedTokenizerBase
    ) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], metrics: MetricAverages
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """(loss, (policy log-probs, reference log-probs), labels); adds to the metrics."""
        raise NotImplementedError

    # Data ---------------------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, args: PreferenceConfig, name: str) -> Any:
        if dataset is None or isinstance(dataset, PreparedDataset | str):
            return dataset
        if isinstance(dataset, Mapping):
            return {key: self._prepared(value, args, key) for key, value in dataset.items()}
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"{type(self).__name__}: {name}_dataset must have a length and an order (a list of "
                f"dicts, a datasets.Dataset), got {type(dataset).__name__}"
            )
        prepared = self._prepare_rows(dataset, args, name)
        self.data_reports[name] = prepared.report
        if args.process_index == 0:
            print(prepared.report)
        return prepared

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _set_signature_columns_if_needed(self) -> None:
        # The columns that the collator needs: the Trainer drops all others before it.
        self._signature_columns = list(self.signature_columns)  # type: ignore[assignment]

    # Reference ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model, without gradient and dropout."""
        with torch.no_grad():
            if self.ref_model is not None:
                yield self.ref_model
                return
            model = self._policy
            unwrapped = self.accelerator.unwrap_model(model)
            was_training = model.training
            model.eval()
            try:
                with (
                    unwrapped.disable_adapter()
                    if self._reference_adapter is None
                    else _adapter_in_use(unwrapped, self._reference_adapter)
                ):
                    yield model
            finally:
                model.train(was_training)

    # Loss ---------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of the micro-batch; with `return_outputs` also the log-probs and labels behind it."""
        mode = "train" if self._policy.training else "eval"
        loss, *outputs = self._loss(model, inputs, self._averages[mode])
        if mode == "train":
            self._tokens_since_log.append(inputs["attention_mask"].sum())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
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
        if self._tokens_since_log:
            tokens = torch.stack(self._tokens_since_log).sum()
            self._train_tokens += int(self.accelerator.reduce(tokens, "sum"))
            self._tokens_since_log.clear()
        metrics["num_tokens"] = self._train_tokens
        return metrics


def load_model(name: str, init_kwargs: dict[str, Any] | None = None) -> PreTrainedModel:
    """A causal language model by name or path, in float32 unless `init_kwargs` says otherwise."""
    return AutoModelForCausalLM.from_pretrained(
        name, **{"dtype": torch.float32, **(init_kwargs or {})}
    )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of `nn.Dropout` modules and of attributes such as
    `attention_dropout`, which attention functions read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def _with_reference(
    model: nn.Module, ref_model: nn.Module | None, peft_config: Any, without_dropout: bool
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """(policy, reference model or None, adapter that serves as the reference or None).

    A new adapter's reference is the base model under it. An adapter that came with the model may be
    trained, so its present state is kept as a second, frozen adapter. Everything else needs a second model.
    """
    reference_adapter = None
    has_adapter = hasattr(model, "peft_config")
    if peft_config is not None:
        if has_adapter:
            raise ValueError(
                "peft_config: the model already has an adapter; merge it first (merge_and_unload()) "
                "or leave peft_config out to train that adapter on"
            )
        model = require("peft", "peft_config").get_peft_model(model, peft_config)
    elif has_adapter and ref_model is None:
        reference_adapter = _copy_adapter(model)
    if without_dropout:
        disable_dropout(model)
    if ref_model is None and not hasattr(model, "peft_config"):
        ref_model = copy.deepcopy(model)
    if ref_model is not None:
        ref_model.requires_grad_(False).eval()
    return model, ref_model, reference_adapter


@contextlib.contextmanager
def _adapter_in_use(model: Any, name: str) -> Iterator[None]:
    active = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def _copy_adapter(model: Any) -> str:
    active = model.active_adapter
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[active])
    state = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in state.items():
            if f".{REFERENCE_ADAPTER}." in name:
                parameter.copy_(state[name.replace(f".{REFERENCE_ADAPTER}.", f".{active}.")])
                parameter.requires_grad_(False)
    model.set_adapter(active)
    return REFERENCE_ADAPTER


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token serves as padding, since masks come from lengths."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
