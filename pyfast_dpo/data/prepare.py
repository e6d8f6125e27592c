"""From rows to token ids: tokenize, find where the response begins, cut to `max_length`, report every loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

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
from pyfast_dpo.diagnostics.extras import require

Example = dict[str, Any]
Ids = np.ndarray  # int32, one dimension: a tenth of the memory of a list of ints
Parsed = TypeVar("Parsed")

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


def prepare_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
) -> PreparedDataset:
    """Pairs as token ids.

    Args:
        rows: dicts (or a `datasets.Dataset`) with the columns of `pyfast_dpo.data.rows`.
        tokenizer: a `transformers` tokenizer, with a chat template if the rows are messages. Plain
            responses get its end-of-sequence token appended.
        max_length: the most tokens of prompt + response; responses are cut, prompts never.
        name: of the dataset, for the report.

    Returns:
        Examples `{"prompt_ids", "chosen_ids", "rejected_ids"}` of int32 arrays; `.report` accounts for
        every row.

    Raises:
        ValueError: a missing column, with its row; no usable row; messages without a chat template.
    """
    check_columns(rows, PAIR_COLUMNS)
    report = DataReport(name)
    examples = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in _tokenized_pairs(rows, tokenizer, max_length, report)
    ]
    return _prepared(examples, report)


def prepare_unpaired(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    name: str = "train",
) -> PreparedDataset:
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
    paired = len(rows) > 0 and isinstance(rows[0], Mapping) and "chosen" in rows[0]
    report = DataReport(name)
    examples: list[Example] = []
    if paired:
        check_columns(rows, PAIR_COLUMNS)
        for prompt, chosen, rejected in _tokenized_pairs(rows, tokenizer, max_length, report):
            examples.append({"prompt_ids": prompt, "completion_ids": chosen, "label": True})
            examples.append({"prompt_ids": prompt, "completion_ids": rejected, "label": False})
    else:
        check_columns(rows, UNPAIRED_COLUMNS)
        for number, row in _numbered(rows, report):
            try:
                example = parse_unpaired(row)
                prompt, (completion,) = _tokenize(
                    tokenizer, example.prompt, [example.completion], max_length, report, number
                )
            except UnusableRow as reason:
                report.drop(number, str(reason))
                continue
            examples.append(
                {"prompt_ids": prompt, "completion_ids": completion, "label": example.label}
            )
    dataset = _prepared(examples, report)
    _add_mismatched_completions(dataset.examples)
    return dataset


def _tokenized_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int | None, report: DataReport
) -> Iterator[tuple[Ids, Ids, Ids]]:
    for number, row in _numbered(rows, report):
        try:
            pair = parse_pair(row)
            prompt, (chosen, rejected) = _tokenize(
                tokenizer, pair.prompt, [pair.chosen, pair.rejected], max_length, report, number
            )
            if np.array_equal(chosen, rejected):
                raise UnusableRow("identical responses after tokenization and truncation")
        except UnusableRow as reason:
            report.drop(number, str(reason))
            continue
        yield prompt, chosen, rejected


def _numbered(
    rows: Sequence[Mapping[str, Any]], report: DataReport
) -> Iterable[tuple[int, Mapping[str, Any]]]:
    report.total = len(rows)
    tqdm = require("tqdm", "the progress bar").tqdm
    return enumerate(
        tqdm(rows, desc=f"tokenizing {report.name}", disable=len(rows) < SHOW_PROGRESS_FROM),
        start=1,
    )


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


def _prepared(examples: list[Example], report: DataReport) -> PreparedDataset:
    if not examples:
        raise ValueError(f"dataset: no usable row; {report}")
    return PreparedDataset(examples, report)


def _add_mismatched_completions(examples: list[Example]) -> None:
    prompts = [example["prompt_ids"].tobytes() for example in examples]
    if len(set(prompts)) < 2:
        raise ValueError(
            "dataset: KTO estimates KL from completions under other prompts and needs at least two "
            f"different prompts, got {len(set(prompts))}"
        )
    # Backwards twice around: the next example with another prompt is the neighbour, or the neighbour's next.
    count = len(examples)
    partner = [0] * count
    for index in reversed(range(2 * count)):
        here, following = index % count, (index + 1) % count
        same = prompts[here] == prompts[following]
        partner[here] = partner[following] if same else following
    for example, index in zip(examples, partner, strict=True):
        example["KL_completion_ids"] = examples[index]["completion_ids"]
