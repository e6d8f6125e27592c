"""What all trainers share: a policy against its reference, made ready for training and as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from pyfast_dpo.data.tables import Tables
from pyfast_dpo.layout.batches import model_inputs
from pyfast_dpo.model.activations import KeptActivations
from pyfast_dpo.model.causal_lm import causal_lm_of
from pyfast_dpo.model.prepare import prepare
from pyfast_dpo.model.tables import position_table, vocabulary_of
from pyfast_dpo.trainers.balancing import Balancing, balancing_of
from pyfast_dpo.trainers.callbacks import KeepFreedMemory, SyncReferenceModel
from pyfast_dpo.trainers.cards import CardTrainer
from pyfast_dpo.trainers.construction import causal_lm, checkpointing_for, use_pad_token
from pyfast_dpo.trainers.logs import LoggingTrainer
from pyfast_dpo.trainers.metrics import MetricAverages
from pyfast_dpo.trainers.options import PolicyConfig
from pyfast_dpo.trainers.reference import narrow_linear_layers, with_reference
from pyfast_dpo.trainers.referenced import ReferencedTrainer
from pyfast_dpo.trainers.steps import MEAN_EXAMPLES, StepTrainer


class Models(NamedTuple):
    """What a trainer starts from."""

    policy: nn.Module
    reference: nn.Module | None  # a model of its own
    reference_is_copy: bool  # of the policy
    args: Any


class PolicyTrainer(CardTrainer, LoggingTrainer, StepTrainer, ReferencedTrainer):
    """A trainer of a causal language model. A subclass calls `_models`, then `Trainer.__init__`, then `_make_ready`.

    `kept_activations` tells how many layers keep their activations; None if `gradient_checkpointing` was given.
    """

    config_class: ClassVar[type[PolicyConfig]]
    args: PolicyConfig
    kept_activations: KeptActivations | None = None
    _balancing: Balancing | None = None
    _tables: Tables  # of the model, which ids and lengths must fit

    @classmethod
    def _checked_args(cls, args: PolicyConfig | None) -> Any:
        if args is None:
            return cls.config_class(output_dir=f"{cls.__name__}-output")
        if not isinstance(args, cls.config_class):
            raise TypeError(
                f"{cls.__name__}: args must be a {cls.config_class.__name__}, got {type(args).__name__}"
            )
        return args

    def _models(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None,
        args: Any,
        processing_class: PreTrainedTokenizerBase | None,
        quantization_config: Any,
        peft_config: Any,
        *,
        needs_reference: bool,
        copied: bool = True,
        max_length: int | None = None,
    ) -> Models:
        """Loads what is given by name, wraps the policy in an adapter, finds its reference.

        Args:
            copied: False if a model without adapters needs no copy.
        """
        name = type(self).__name__
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
        reference_is_copy = ref_model is None
        model, ref_model, self._reference_adapter = with_reference(
            name,
            model,
            ref_model,
            peft_config,
            dropout=not args.disable_dropout,
            needed=needs_reference,
            copied=copied,
        )
        if args.sync_ref_model and ref_model is None:
            raise ValueError(
                f"{name}: sync_ref_model needs a reference model of its own, which an adapter does not have"
            )
        self._tables = Tables(
            vocabulary_of(model),
            None if ref_model is None else vocabulary_of(ref_model),
            position_table(model),
            max_length,
        )
        return Models(model, ref_model, reference_is_copy, args)

    def _make_ready(
        self,
        models: Models,
        shared_prompt: bool,
        further: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        """Finds out how the models can be called and puts the reference beside the policy.

        Args:
            shared_prompt: whether the data come as rows of shared prompts, if the models can take them.
            further: models that are called with the same batches, by the names of their arguments.
        """
        name, args, ref_model = type(self).__name__, self.args, models.reference
        # The mean over the batches of a step is the Trainer's, which divides by their number.
        self.model_accepts_loss_kwargs = False
        add_tags = getattr(self._policy, "add_model_tags", None)
        if add_tags is not None:
            add_tags(list(self._tag_names))
        self.ref_model = None
        called = {"model": self._policy, **further}
        if ref_model is not None:
            called["ref_model"] = ref_model
        self._prepared_models = prepare(
            name,
            called,
            shared_prompt=args.shared_prompt and shared_prompt,
            agreed=self._agreed if args.world_size > 1 else None,
        )
        if ref_model is not None:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # in one dtype
            is_copied = models.reference_is_copy and not (sharded or args.sync_ref_model)
            if is_copied and (args.bf16 or args.fp16):
                narrow_linear_layers(ref_model, torch.bfloat16 if args.bf16 else torch.float16)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if args.sync_ref_model:
            self.add_callback(
                SyncReferenceModel(
                    self._policy,
                    self.accelerator.unwrap_model(self.ref_model),
                    args.ref_model_mixup_alpha,
                    args.ref_model_sync_steps,
                )
            )
        self.add_callback(KeepFreedMemory())
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
