"""From rows to examples of token ids, with an account of every row."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np

from pyfast_dpo.data.messages import UnusableRow, template_options, without_none
from pyfast_dpo.data.prepared import Example, PreparedDataset
from pyfast_dpo.data.report import DataReport
from pyfast_dpo.data.rows import (
    PAIR_COLUMNS,
    UNPAIRED_COLUMNS,
    check_columns,
    is_pair,
    parse_pair,
    parse_unpaired,
)
from pyfast_dpo.data.streams import StreamedDataset, is_of_datasets
from pyfast_dpo.data.tokenization import TextTokenizer, Tokenized
from pyfast_dpo.layout.padded_collators import MASK_SUFFIX
from pyfast_dpo.ops.extras import require

Row = Mapping[str, Any]
Numbered = tuple[int, Example]  # with the number of its row
Finish = Callable[[Iterable[Numbered]], Iterator[Numbered]]  # what examples get from one another

SHOW_PROGRESS_FROM = 5000  # rows; fewer are tokenized in a second or two
ROWS_OF_A_TASK = 256  # of a process of `num_proc`
USELESS_ROWS = 1000  # at the beginning of a stream, after which there is no hope
REASON_LENGTH = 200  # characters of another library's error


class Outcome(NamedTuple):
    """What became of one row."""

    examples: list[Example]
    reason: str | None = None  # why there are none
    truncated: bool = False
    shifted: bool = False


def prepare_pairs(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
) -> PreparedDataset | StreamedDataset:
    """Pairs as token ids.

    Args:
        rows: dicts, a `datasets.Dataset`, or a stream of rows (anything that can be iterated again but has
            no length, such as a `datasets.IterableDataset`), with the columns of `pyfast_dpo.data.rows`.
        tokenizer: a `transformers` tokenizer, or a processor, whose tokenizer is used; with a chat template if
            the rows are messages. Plain responses get its end-of-sequence token appended.
        max_length: the most tokens of prompt + response; responses are cut, prompts never.
        name: of the dataset, for the report.
        chat_template_kwargs: options of the chat template for all rows, such as `{"enable_thinking": False}`;
            those in a row's own column `chat_template_kwargs` come first.
        num_proc: processes that tokenize; not for streams, whose data loader has workers.

    Returns:
        Examples `{"prompt_ids", "chosen_ids", "rejected_ids"}` of lists of ints; where tools or users speak inside
        a response also `chosen_assistant_mask` and `rejected_assistant_mask`, 1 for each token of the
        assistant's own turns, which alone are scored. `.report` accounts for every row. For a stream they are
        made as they are read.

    Raises:
        ValueError: a first row without a needed column; no usable row, with the reasons.
        TypeError: a first row that is not a mapping.
    """

    examples_of = functools.partial(
        _pair, tokenize=TextTokenizer(tokenizer, max_length), given=dict(chat_template_kwargs or {})
    )
    return prepare_rows(rows, examples_of, _columns_of_pairs, iter, name, num_proc)


def prepare_unpaired(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
) -> PreparedDataset | StreamedDataset:
    """Unpaired examples as token ids, each with a completion of another prompt for KTO's KL estimate.

    Args: as `prepare_pairs`. Rows with the columns of pairs become two examples each: chosen with the
        label True, rejected with False.

    Returns:
        Examples `{"prompt_ids", "completion_ids", "label", "KL_completion_ids"}`, and masks as those of
        `prepare_pairs` (`completion_assistant_mask`, `KL_completion_assistant_mask`). `KL_completion_ids` is
        the completion of the next example with a different prompt: fixed here, before any shuffling or
        batching, so that any batch size and order will do.

    Raises:
        ValueError: as `prepare_pairs`; fewer than two different prompts.
        TypeError: as `prepare_pairs`.
    """

    examples_of = functools.partial(
        _unpaired,
        tokenize=TextTokenizer(tokenizer, max_length),
        given=dict(chat_template_kwargs or {}),
    )
    return prepare_rows(
        rows,
        examples_of,
        _columns_of_unpaired,
        _with_mismatched_completions,
        name,
        num_proc,
    )


# Functions with names: worker processes that are started anew get them by pickle.


def _columns_of_pairs(row: Row) -> tuple[str, ...]:
    return PAIR_COLUMNS


def _columns_of_unpaired(row: Row) -> tuple[str, ...]:
    return PAIR_COLUMNS if is_pair(row) else UNPAIRED_COLUMNS


# One row -------------------------------------------------------------------------------------------------


def _pair(row: Row, tokenize: TextTokenizer, given: Mapping[str, Any]) -> Outcome:
    tokenized = _tokenized_pair(row, tokenize, given)
    (chosen, rejected), (chosen_mask, rejected_mask) = tokenized.responses, tokenized.masks
    example = {
        "prompt_ids": tokenized.prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        **_mask("chosen", chosen_mask),
        **_mask("rejected", rejected_mask),
    }
    return Outcome([example], None, tokenized.truncated, tokenized.shifted)


def _unpaired(row: Row, tokenize: TextTokenizer, given: Mapping[str, Any]) -> Outcome:
    if is_pair(row):
        tokenized, labels = _tokenized_pair(row, tokenize, given), [True, False]
    else:
        example = parse_unpaired(row)
        tokenized = tokenize(example.prompt, [example.completion], template_options(row, given))
        labels = [example.label]
    examples = [
        {
            "prompt_ids": tokenized.prompt,
            "completion_ids": ids,
            "label": label,
            **_mask("completion", mask),
        }
        for ids, mask, label in zip(tokenized.responses, tokenized.masks, labels, strict=True)
    ]
    return Outcome(examples, None, tokenized.truncated, tokenized.shifted)


def _tokenized_pair(row: Row, tokenize: TextTokenizer, given: Mapping[str, Any]) -> Tokenized:
    pair = parse_pair(row)
    tokenized = tokenize(pair.prompt, [pair.chosen, pair.rejected], template_options(row, given))
    chosen, rejected = tokenized.responses
    if np.array_equal(chosen, rejected):
        raise UnusableRow("identical responses after tokenization and truncation")
    return tokenized


def _mask(response: str, mask: np.ndarray | None) -> Example:
    return {} if mask is None else {response + MASK_SUFFIX: mask}


# Rows and their account ----------------------------------------------------------------------------------


def prepare_rows(
    rows: Iterable[Row],
    examples_of: Callable[[Row], Outcome],
    columns_of: Callable[[Row], tuple[str, ...]],
    finish: Finish,
    name: str,
    num_proc: int | None,
) -> PreparedDataset | StreamedDataset:
    """The examples of rows, which have the columns that their first one asks for."""
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"dataset: num_proc must be None or positive, got {num_proc}")
    # What `datasets` keeps in columns has None for every field that only other rows have.
    outcome_of = functools.partial(_outcome, examples_of=examples_of, filled=is_of_datasets(rows))
    first_checked = functools.partial(_first_checked, columns_of=columns_of)
    if not isinstance(rows, Sized):
        stream = functools.partial(_stream, first_checked, outcome_of, finish)
        return StreamedDataset(rows, stream, name)
    report = DataReport(name)
    for _ in first_checked(enumerate(rows, start=1)):
        break
    tqdm = require("tqdm", "the progress bar").tqdm
    outcomes = tqdm(
        _outcomes(rows, outcome_of, num_proc or 1),
        desc=f"tokenizing {name}",
        total=len(rows),
        disable=len(rows) < SHOW_PROGRESS_FROM,
    )
    numbers: list[int] = []
    prepared = PreparedDataset(
        _noting(finish(_accounted(enumerate(outcomes, start=1), report)), numbers),
        report,
        _with_prompts(rows if hasattr(rows, "__getitem__") else list(rows)),
        numbers,
    )
    if not len(prepared):
        raise ValueError(f"dataset: no usable row; {report}")
    return prepared


def _stream(
    first_checked: Callable[[Iterable[tuple[int, Row]]], Iterator[tuple[int, Row]]],
    outcome_of: Callable[[Row], Outcome],
    finish: Finish,
    numbered: Iterable[tuple[int, Row]],
    report: DataReport,
) -> Iterator[Numbered]:
    outcomes = ((number, outcome_of(row)) for number, row in first_checked(numbered))
    yield from finish(_accounted(outcomes, report, USELESS_ROWS))


def _outcome(row: Any, examples_of: Callable[[Row], Outcome], filled: bool) -> Outcome:
    """No row ends a run: whatever goes wrong with one is the reason why it is left out."""
    try:
        if not isinstance(row, Mapping):
            return Outcome([], f"not a mapping, but {type(row).__name__}")
        if filled:
            row = {column: without_none(value) for column, value in row.items()}
        return examples_of(row)
    except UnusableRow as reason:
        return Outcome([], str(reason))
    except Exception as error:  # of a chat template, a tokenizer, a column of another kind
        return Outcome([], f"{type(error).__name__}: {error}"[:REASON_LENGTH])


def _first_checked(
    numbered: Iterable[tuple[int, Row]], columns_of: Callable[[Row], tuple[str, ...]]
) -> Iterator[tuple[int, Row]]:
    """The rows; a first one of another kind than expected means that all are."""
    first = True
    for number, row in numbered:
        if first:
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"dataset: row {number} must be a mapping, got {type(row).__name__}"
                )
            try:
                check_columns(row, columns_of(row))
            except UnusableRow as reason:
                raise ValueError(f"dataset: row {number} has {reason}") from None
            first = False
        yield number, row


def _accounted(
    outcomes: Iterable[tuple[int, Outcome]], report: DataReport, useless: int = sys.maxsize
) -> Iterator[Numbered]:
    """The examples, with every row in the report.

    Raises:
        ValueError: `useless` rows and no example.
    """
    seen, fruitless = 0, True
    for number, outcome in outcomes:
        seen += 1
        report.total += 1
        if outcome.reason is not None:
            report.drop(number, outcome.reason)
            if fruitless and seen >= useless:
                raise ValueError(f"dataset: no usable row among the first {seen}; {report}")
        if outcome.truncated:
            report.truncated.append(number)
        if outcome.shifted:
            report.shifted_boundary.append(number)
        for example in outcome.examples:
            fruitless = False
            yield number, example


def _with_prompts(rows: Any) -> Any:
    """The rows of pairs with the prompt that their responses share, where they have no column of it."""
    return RowsWithPrompts(rows) if len(rows) and "prompt" not in rows[0] else rows


class RowsWithPrompts:
    """Finds the prompt when a row is asked for."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> Row:
        row = self._rows[index]
        return row if "prompt" in row else {"prompt": parse_pair(row).prompt, **row}


def _noting(numbered: Iterable[Numbered], numbers: list[int]) -> Iterator[Example]:
    for number, example in numbered:
        numbers.append(number)
        yield example


# In several processes ------------------------------------------------------------------------------------


def _outcomes(rows: Any, outcome_of: Callable[[Row], Outcome], processes: int) -> Iterator[Outcome]:
    """Of all rows, in their order."""
    processes = min(processes, -(-len(rows) // ROWS_OF_A_TASK))
    if processes <= 1:
        yield from map(outcome_of, rows)
        return
    if not hasattr(rows, "__getitem__"):
        rows = list(rows)
    tasks = [
        range(start, min(start + ROWS_OF_A_TASK, len(rows)))
        for start in range(0, len(rows), ROWS_OF_A_TASK)
    ]
    # A fork has rows and tokenizer already, and asks nothing of the script that runs.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with multiprocessing.get_context(method).Pool(
        processes, _begin_tasks, (rows, outcome_of)
    ) as pool:
        for outcomes in pool.imap(_run_task, tasks):
            yield from outcomes


_task: list[Any] = []  # of a process of the pool: rows, and what to do with one


def _begin_tasks(rows: Any, outcome_of: Callable[[Row], Outcome]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as were asked for
    _task[:] = rows, outcome_of


def _run_task(numbers: range) -> list[Outcome]:
    rows, outcome_of = _task
    return [outcome_of(rows[i]) for i in numbers]


# Mismatched completions ----------------------------------------------------------------------------------


def _with_mismatched_completions(examples: Iterable[Numbered]) -> Iterator[Numbered]:
    """Adds to every example the completion of the next one with another prompt, from the beginning again
    for the last ones."""
    waiting: list[Numbered] = []  # examples of one prompt
    first: Example | None = None
    other: Example | None = None  # the first example with another prompt than the first
    for number, example in examples:
        first = first or example
        if other is None and not np.array_equal(first["prompt_ids"], example["prompt_ids"]):
            other = example
        if waiting and not np.array_equal(waiting[0][1]["prompt_ids"], example["prompt_ids"]):
            yield from (_with_mismatched(*earlier, example) for earlier in waiting)
            waiting = []
        waiting.append((number, example))
    if first is None:
        return
    if other is None:
        raise ValueError(
            "dataset: KTO estimates KL from completions under other prompts and needs at least two "
            "different prompts, got 1"
        )
    again = other if np.array_equal(waiting[0][1]["prompt_ids"], first["prompt_ids"]) else first
    yield from (_with_mismatched(*last, again) for last in waiting)


def _with_mismatched(number: int, example: Example, other: Example) -> Numbered:
    mask = other.get("completion" + MASK_SUFFIX)
    return number, {
        **example,
        "KL_completion_ids": other["completion_ids"],
        **_mask("KL_completion", mask),
    }
