"""A trainer with a reference: the model that it is, or log-probs that were computed before training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from pyfast_dpo.data import PreparedDataset
from pyfast_dpo.model.prepare import PreparedModels
from pyfast_dpo.trainers.adapters import is_adapted
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.options import PolicyConfig
from pyfast_dpo.trainers.precomputed import computed_once, reference_key
from pyfast_dpo.trainers.reference import as_reference


class ReferencedTrainer(Trainer):
    """A `Trainer` whose policy is held against a reference.

    Attributes:
        ref_model: the reference model; None if it is the policy without its adapter, or was the policy before
            its training, or is not needed.
    """

    reference_columns: ClassVar[tuple[str, ...]] = ()
    args: PolicyConfig
    ref_model: nn.Module | None
    _prepared_models: PreparedModels
    _reference_adapter: str | None = None  # kept as the reference
    _reference_is_gone: bool = False  # it was the policy, which has been trained since
    _reference_is_away: bool = False  # in the memory of the CPU

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model, without gradient and dropout."""
        self._prepared_models.apply()
        with torch.no_grad():
            if self.ref_model is not None:
                if self._reference_is_away:
                    self.ref_model.to(self.args.device)
                    self._reference_is_away = False
                yield self.ref_model
                return
            if self._reference_is_gone:
                raise ValueError(
                    f"{type(self).__name__}: this dataset has no log-probs of the reference, which was the model "
                    "before its training: with precompute_ref_log_probs they were computed then, for the datasets "
                    "of the constructor, and no copy was kept. Give the dataset to the constructor, or a ref_model, "
                    "or set precompute_ref_log_probs=False; a collator of your own must pass on the columns "
                    f"{self.reference_columns}"
                )
            unwrapped = self.accelerator.unwrap_model(self._policy)
            with as_reference(self._policy, unwrapped, self._reference_adapter) as model:
                yield model

    def _train_away_from_reference(self) -> None:
        """Says that the policy moves from here on, so that it is no longer its own reference."""
        self._reference_is_gone = self.ref_model is None and not is_adapted(self._policy)

    def _put_reference_away(self) -> None:
        """Leaves the device's memory to training; it comes back for a dataset without its log-probs."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        quantized = getattr(self.ref_model, "is_quantized", False)
        if self.ref_model is not None and not sharded and not quantized:
            self.ref_model.to("cpu")
            self._reference_is_away = True


class PrecomputingTrainer(ReferencedTrainer):
    """One that can compute the reference's log-probs of fixed data once, before training."""

    args: PreferenceConfig

    def _reference_values(self, inputs: dict[str, Any]) -> Tensor:
        """What the reference says of a batch, `[examples, columns]` in the order of `reference_columns`."""
        raise NotImplementedError

    def _reference_settings(self) -> list[Any]:
        """What the reference's log-probs depend on beside its weights and the token ids."""
        layout = type(getattr(self.data_collator, "collate", self.data_collator)).__name__
        return [self.reference_columns, layout, self.args.bf16, self.args.fp16]

    def _precompute_reference(self, dataset: Any, name: str) -> None:
        """Adds the reference's log-probs to the examples, from the cache as far as they are there."""
        if dataset is None:
            return
        if not isinstance(dataset, PreparedDataset):
            raise ValueError(
                f"{type(self).__name__}: precompute_ref_log_probs is not supported with an IterableDataset, and the "
                f"{name} dataset is one (a stream without a length); use a datasets.Dataset or a list, or set "
                "precompute_ref_log_probs=False"
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
                self._reference_adapter,
                dataset.examples,
                repr(self._reference_settings()),
            ),
            dataset.examples,
            columns,
            self.args.precompute_ref_batch_size or self.args.eval_batch_size,
            compute,
            name=name,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        values = self.accelerator.reduce(torch.from_numpy(table).to(self.args.device), "sum").cpu()
        for column, logps in zip(columns, values.T.tolist(), strict=True):
            dataset.set_column(column, logps)
