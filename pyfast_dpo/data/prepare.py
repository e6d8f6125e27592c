"""From rows to token ids: tokenize, find where the response begins, cut to `max_length`, report every loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pyfast_dpo.data.report import DataReport
from pyfast_dpo.data.rows import (
    PAIR_COLUMNS,
    UNPAIRED_COLUMNS,
    Text,
    UnusableRow,
    check_columns,
    parse_pair,
    parse_unpaired,
)
from pyfast_dpo.ops.extras import require

Example = dict[str, Any]
Ids = np.ndarray  # int32, one dimension: a tenth of the memory of a list of ints
Row = Mapping[str, Any]

SHOW_PROGRESS_FROM = 5000  # rows; fewer are tokenized in a second or two


class PreparedDataset(Dataset[Example]):
    """Tokenized examples with the report of how they came about."""

    def __init__(self, examples: list[Example], report: DataReport) -> None:
        self.examples = examples
        self.report = report

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def tokens(self) -> list[int]:
        """Tokens that every example brings to a batch of shared prompts."""
        return [
            sum(len(ids) for name, ids in example.items() if name.endswith("_ids"))
            for example in self.examples
        ]


class StreamedDataset(IterableDataset[Example]):
    """Tokenizes rows as they are read, for data without a length; `report` counts those of the last pass."""

    def __init__(
        self,
        rows: Iterable[Row],
        examples: Callable[[Iterable[Row], DataReport], Iterator[Example]],
        name: str,
    ) -> None:
        self._rows, self._examples = rows, examples
        self.report = DataReport(name)

    def __iter__(self) -> Iterator[Example]:
        self.report = DataReport(self.report.name)
        worker = get_worker_info()
        rows: Iterable[Row] = self._rows
        if worker is not None:
            rows = islice(rows, worker.id, None, worker.num_workers)
        return self._examples(rows, self.report)


def prepare_pairs(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
) -> PreparedDataset | StreamedDataset:
    """Pairs as token ids.

    Args:
        rows: dicts, a `datasets.Dataset`, or a stream of rows (anything that can be iterated again but has
            no length, such as a `datasets.IterableDataset`), with the columns of `pyfast_dpo.data.rows`.
        tokenizer: a `transformers` tokenizer, with a chat template if the rows are messages. Plain
            responses get its end-of-sequence token appended.
        max_length: the most tokens of prompt + response; responses are cut, prompts never.
        name: of the dataset, for the report.

    Returns:
        Examples `{"prompt_ids", "chosen_ids", "rejected_ids"}` of int32 arrays; `.report` accounts for
        every row. For a stream they are made as they are read.

    Raises:
        ValueError: a missing column, with its row; no usable row; messages without a chat template.
    """

    def examples(rows: Iterable[Row], report: DataReport) -> Iterator[Example]:
        for prompt, chosen, rejected in _tokenized_pairs(rows, tokenizer, max_length, report):
            yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    return _prepared(rows, examples, name, PAIR_COLUMNS)


def prepare_unpaired(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
) -> PreparedDataset | StreamedDataset:
    """Unpaired examples as token ids, each with a completion of another prompt for KTO's KL estimate.

    Args: as `prepare_pairs`. Rows with the columns of pairs become two examples each: chosen with the
        label True, rejected with False.

    Returns:
        Examples `{"prompt_ids", "completion_ids", "label", "KL_completion_ids"}`. `KL_completion_ids` is
        the completion of the next example with a different prompt: fixed here, before any shuffling or
        batching, so that any batch size and order will do.

    Raises:
        ValueError: as `prepare_pairs`; fewer than two different prompts.
    """

    def examples(rows: Iterable[Row], report: DataReport) -> Iterator[Example]:
        for number, row in _numbered(rows, report):
            try:
                if "chosen" in row and "completion" not in row:
                    prompt, chosen, rejected = _tokenized_pair(
                        row, tokenizer, max_length, report, number
                    )
                    completions = [(chosen, True), (rejected, False)]
                else:
                    check_columns([row], UNPAIRED_COLUMNS, first=number)
                    example = parse_unpaired(row)
                    prompt, (completion,) = _tokenize(
                        tokenizer, example.prompt, [example.completion], max_length, report, number
                    )
                    completions = [(completion, example.label)]
            except UnusableRow as reason:
                report.drop(number, str(reason))
                continue
            for completion, label in completions:
                yield {"prompt_ids": prompt, "completion_ids": completion, "label": label}

    return _prepared(
        rows,
        lambda rows, report: _with_mismatched_completions(examples(rows, report)),
        name,
        UNPAIRED_COLUMNS,
    )


def _prepared(
    rows: Iterable[Row],
    examples: Callable[[Iterable[Row], DataReport], Iterator[Example]],
    name: str,
    columns: tuple[str, ...],
) -> PreparedDataset | StreamedDataset:
    if not isinstance(rows, Sized):
        return StreamedDataset(rows, examples, name)
    first = next(iter(rows), None)
    if isinstance(first, Mapping) and "chosen" in first and "completion" not in first:
        columns = PAIR_COLUMNS
    check_columns(rows, columns)  # of all rows, before the work of tokenizing any
    report = DataReport(name)
    prepared = list(examples(rows, report))
    if not prepared:
        raise ValueError(f"dataset: no usable row; {report}")
    return PreparedDataset(prepared, report)


def _tokenized_pairs(
    rows: Iterable[Row], tokenizer: Any, max_length: int | None, report: DataReport
) -> Iterator[tuple[Ids, Ids, Ids]]:
    for number, row in _numbered(rows, report):
        try:
            yield _tokenized_pair(row, tokenizer, max_length, report, number)
        except UnusableRow as reason:
            report.drop(number, str(reason))


def _tokenized_pair(
    row: Row, tokenizer: Any, max_length: int | None, report: DataReport, number: int
) -> tuple[Ids, Ids, Ids]:
    check_columns([row], PAIR_COLUMNS, first=number)
    pair = parse_pair(row)
    prompt, (chosen, rejected) = _tokenize(
        tokenizer, pair.prompt, [pair.chosen, pair.rejected], max_length, report, number
    )
    if np.array_equal(chosen, rejected):
        raise UnusableRow("identical responses after tokenization and truncation")
    return prompt, chosen, rejected


def _numbered(rows: Iterable[Row], report: DataReport) -> Iterator[tuple[int, Row]]:
    tqdm = require("tqdm", "the progress bar").tqdm
    count = len(rows) if isinstance(rows, Sized) else 0
    bar = tqdm(rows, desc=f"tokenizing {report.name}", disable=count < SHOW_PROGRESS_FROM)
    for number, row in enumerate(bar, start=report.total + 1):
        report.total = number
        yield number, row


def _tokenize(
    tokenizer: Any,
    prompt: Text,
    responses: list[Text],
    max_length: int | None,
    report: DataReport,
    number: int,
) -> tuple[Ids, list[Ids]]:
    """Token ids of the prompt and of each response.

    Prompt and response are tokenized together, as the model will see them at inference, and the response
    begins where the tokens of the prompt alone diverge from those of the whole (a token can span the
    border). All responses of a row share one prompt.
    """
    texts = [_render(tokenizer, prompt, None)]
    texts += [_render(tokenizer, prompt, response) for response in responses]
    # A chat template writes its own special tokens.
    encoded = tokenizer(texts, add_special_tokens=isinstance(prompt, str))["input_ids"]
    prompt_ids, *whole = (np.asarray(ids, dtype=np.int32) for ids in encoded)
    border = min(_common_prefix(prompt_ids, ids) for ids in whole)
    if border < len(prompt_ids):
        report.shifted_boundary.append(number)
    if max_length is not None and border >= max_length:
        raise UnusableRow(f"prompt not shorter than max_length {max_length}")
    if max_length is not None and any(len(ids) > max_length for ids in whole):
        report.truncated.append(number)
    response_ids = [ids[border:max_length] for ids in whole]
    if any(len(ids) == 0 for ids in response_ids):
        raise UnusableRow("empty response")
    return prompt_ids[:border], response_ids


def _render(tokenizer: Any, prompt: Text, response: Text | None) -> str:
    """The text of prompt + response; of the prompt alone, ready for the response, if that is None."""
    if isinstance(prompt, list):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "dataset: the rows are chat messages, but the tokenizer has no chat template; "
                "set tokenizer.chat_template or use rows of plain strings"
            )
        messages = prompt if response is None else [*prompt, *response]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )
    if response is None:
        return prompt
    end = tokenizer.eos_token or ""
    text = f"{prompt}{response}"
    return text if text.endswith(end) else text + end


def _common_prefix(first: Ids, second: Ids) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _with_mismatched_completions(examples: Iterable[Example]) -> Iterator[Example]:
    """Adds to every example the completion of the next one with another prompt, from the beginning again
    for the last ones."""
    waiting: list[Example] = []  # examples of one prompt
    first: Example | None = None
    other: Example | None = None  # the first example with another prompt than the first
    for example in examples:
        first = first or example
        if other is None and not np.array_equal(first["prompt_ids"], example["prompt_ids"]):
            other = example
        if waiting and not np.array_equal(waiting[0]["prompt_ids"], example["prompt_ids"]):
            for earlier in waiting:
                yield {**earlier, "KL_completion_ids": example["completion_ids"]}
            waiting = []
        waiting.append(example)
    if first is None:
        return
    if other is None:
        raise ValueError(
            "dataset: KTO estimates KL from completions under other prompts and needs at least two "
            "different prompts, got 1"
        )
    again = other if np.array_equal(waiting[0]["prompt_ids"], first["prompt_ids"]) else first
    for last in waiting:
        yield {**last, "KL_completion_ids": again["completion_ids"]}
