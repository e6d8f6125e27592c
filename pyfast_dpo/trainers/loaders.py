"""From rows to batches: what a trainer accepts as a dataset, and the loaders of prepared ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from transformers import Trainer

from pyfast_dpo.data import DataReport, PreparedDataset, StreamedDataset
from pyfast_dpo.data.tables import Tables, check_tables
from pyfast_dpo.trainers.config import PreferenceConfig
from pyfast_dpo.trainers.sampling import GroupedByLength, order_seed, token_budget_loader

Rows = Iterable[Mapping[str, Any]]  # a list of dicts, a datasets.Dataset, or a stream of rows


class DatasetTrainer(Trainer):
    """A `Trainer` that takes raw rows; a subclass says how they are prepared."""

    signature_columns: ClassVar[tuple[str, ...]]
    reference_columns: ClassVar[tuple[str, ...]]
    args: PreferenceConfig
    _tables: Tables
    _reported: dict[str, DataReport | StreamedDataset]  # a stream's report grows as it is read

    @property
    def data_reports(self) -> dict[str, DataReport]:
        """What became of the rows of every dataset, by its name; of a stream, in its last pass."""
        return {
            name: source.report if isinstance(source, StreamedDataset) else source
            for name, source in self._reported.items()
        }

    def _prepare_rows(self, rows: Rows, args: Any, name: str) -> PreparedDataset | StreamedDataset:
        raise NotImplementedError

    def _prepared(self, dataset: Any, args: PreferenceConfig, name: str) -> Any:
        """The dataset as token ids; what is prepared already, or nothing, stays as it is."""
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, PreparedDataset | StreamedDataset):
            return self._fitting(dataset)
        if isinstance(dataset, Mapping) and name == "train":
            splits = list(dataset)
            raise TypeError(
                f"{type(self).__name__}: train_dataset must be one dataset, got a {type(dataset).__name__} of "
                f"{splits}; give one of them, such as "
                f"train_dataset=dataset[{'train' if 'train' in splits else next(iter(splits), 'train')!r}]"
            )
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
        self._fitting(prepared)
        if isinstance(prepared, StreamedDataset):
            self._reported[name] = prepared
            return prepared
        self._reported[name] = prepared.report
        if args.process_index == 0:
            print(prepared.report)
        return prepared

    def _fitting(
        self, prepared: PreparedDataset | StreamedDataset
    ) -> PreparedDataset | StreamedDataset:
        """The same dataset, its ids and lengths checked against the model's tables; those of a stream will be."""
        if isinstance(prepared, StreamedDataset):
            prepared.tables = self._tables
        else:
            check_tables(prepared, self._tables)
        return prepared

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
            return GroupedByLength(batch, dataset.tokens(), order_seed(self.args))
        return super()._get_train_sampler(train_dataset)


def named_datasets(dataset: Any, name: str) -> dict[str, Any]:
    """Evaluation datasets by name, whether one or several were given."""
    return dict(dataset) if isinstance(dataset, Mapping) else {name: dataset}
