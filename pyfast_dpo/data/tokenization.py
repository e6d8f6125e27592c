"""From texts to token ids: where the response begins, special tokens once each, which turns are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pyfast_dpo.data.messages import Messages, UnusableRow
from pyfast_dpo.data.rows import Text
from pyfast_dpo.data.templates import ChatTemplate, tokenizer_of

Ids = np.ndarray  # int32, one dimension: a tenth of the memory of a list of ints


class Tokenized(NamedTuple):
    """A prompt and its responses as token ids."""

    prompt: Ids
    responses: list[Ids]
    # Of every response 1 for the assistant's tokens and 0 for those of others' turns; None if it is all the
    # assistant's.
    masks: list[Ids | None]
    truncated: bool  # a response was cut at max_length
    shifted: bool  # the tokens of the prompt alone are not the beginning of the whole


class TextTokenizer:
    """Tokenizes prompts with their responses.

    Args:
        processing_class: a `transformers` tokenizer, or a processor, whose tokenizer serves.
        max_length: the most tokens of prompt + response, or None.
    """

    def __init__(self, processing_class: Any, max_length: int | None) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self._template = ChatTemplate(processing_class)
        self._max_length = max_length
        self._before, after = _added_tokens(self.tokenizer)
        eos = self.tokenizer.eos_token_id
        self._after = after if eos is None else [eos]

    def __call__(
        self, prompt: Text, responses: list[Text], options: Mapping[str, Any]
    ) -> Tokenized:
        """Prompt and response are tokenized together, as the model will see them at inference, and the response
        begins where the tokens of the prompt alone diverge from those of the whole (a token can span the
        border). All responses of a row share one prompt.

        Args:
            options: for the chat template, if the texts are messages.

        Raises:
            UnusableRow: a prompt of max_length or more, an empty response, turns that cannot be told apart.
        """
        if isinstance(prompt, str):
            prompt_ids, *whole = self._texts([prompt, *(prompt + str(each) for each in responses)])
        else:
            conversations = [prompt, *([*prompt, *each] for each in responses)]
            prompt_ids, *whole = self._conversations(conversations, options)
        border = min(_common_prefix(prompt_ids, ids) for ids in whole)
        if self._max_length is not None and border >= self._max_length:
            raise UnusableRow(f"prompt not shorter than max_length {self._max_length}")
        masks: list[Ids | None] = [None] * len(responses)
        if not isinstance(prompt, str):
            for i, (ids, response) in enumerate(zip(whole, responses, strict=True)):
                masks[i] = self._assistant_mask(prompt, response, ids, border, options)  # type: ignore[arg-type]
        cut = slice(border, self._max_length)
        response_ids = [ids[cut] for ids in whole]
        if any(len(ids) == 0 for ids in response_ids):
            raise UnusableRow("empty response")
        return Tokenized(
            prompt_ids[:border],
            response_ids,
            [None if mask is None else mask[cut] for mask in masks],
            truncated=self._max_length is not None
            and any(len(ids) > self._max_length for ids in whole),
            shifted=border < len(prompt_ids),
        )

    def prompt(self, prompt: Text, options: Mapping[str, Any]) -> Ids:
        """A prompt alone, ready to be answered; one that ends with a turn of the assistant, to be gone on with.

        Raises:
            UnusableRow: max_length tokens or more, or none.
        """
        if isinstance(prompt, str):
            (ids,) = self._texts([prompt])
        elif not prompt:
            raise UnusableRow("'prompt' has no messages")
        else:
            goes_on = prompt[-1]["role"] == "assistant"
            how = {**options, "continue_final_message": True} if goes_on else options
            (ids,) = self._encode([self._template.render(prompt, how, ready=not goes_on)])
        if not len(ids):
            raise UnusableRow("empty prompt")
        if self._max_length is not None and len(ids) >= self._max_length:
            raise UnusableRow(f"prompt not shorter than max_length {self._max_length}")
        return ids

    def _texts(self, texts: list[str]) -> list[Ids]:
        """Special tokens once each, whether the text or the tokenizer writes them."""
        prompt, *whole = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        before, after = self._before, self._after
        started = [
            ids if not before or ids[: len(before)] == before else before + ids
            for ids in (prompt, *whole)
        ]
        ended = [
            ids if not after or ids[-len(after) :] == after else ids + after for ids in started[1:]
        ]
        return [np.array(ids, dtype=np.int32) for ids in (started[0], *ended)]

    def _conversations(
        self, conversations: list[Messages], options: Mapping[str, Any]
    ) -> list[Ids]:
        """The first one ready for the next turn of the assistant. The chat template writes all special tokens."""
        texts = [self._template.render(conversations[0], options, ready=True)]
        texts += [self._template.render(each, options) for each in conversations[1:]]
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[Ids]:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [np.array(ids, dtype=np.int32) for ids in encoded]

    def _assistant_mask(
        self,
        prompt: Messages,
        response: Messages,
        whole: Ids,
        border: int,
        options: Mapping[str, Any],
    ) -> Ids | None:
        """As long as `whole`; None if no other than the assistant speaks after the prompt.

        The turns of others reach from the end of the assistant's turn before them to where the assistant is
        ready to speak again, both found by rendering the conversation up to there.
        """
        mask = None
        turn = border  # where the assistant's turn before begins
        end = 0
        while (start := _next_other(response, end)) < len(response):
            end = _next_assistant(response, start)
            before, upto, ready = self._encode(
                [
                    self._template.render([*prompt, *response[:start]], options),
                    self._template.render([*prompt, *response[:end]], options),
                    self._template.render([*prompt, *response[:end]], options, ready=True),
                ]
            )
            first = self._end_of_turn(before, whole, turn)
            last = _common_prefix(ready, whole)
            if not turn <= first <= last or last < _common_prefix(upto, ready):
                raise UnusableRow(
                    "the chat template writes turns inside a response differently when others follow, so that the "
                    "assistant's cannot be found"
                )
            mask = np.ones(len(whole), dtype=np.int32) if mask is None else mask
            mask[first:last] = 0
            turn = last
        return mask

    def _end_of_turn(self, before: Ids, whole: Ids, turn: int) -> int:
        """Where the turn ends in `whole` with which `before` ends; -1 if that cannot be told.

        It may be followed by special tokens there that stand at the end of a conversation alone. Templates of
        reasoning models write a turn differently when it is the last: then it is told by the special token that
        it ends with, and what the template writes after that.
        """
        special = {*self.tokenizer.all_special_ids} | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        same = _common_prefix(before, whole)
        if special.issuperset(before[same:].tolist()):
            return same
        closing_at = max(
            (i for i, each in enumerate(before.tolist()) if each in special), default=-1
        )
        if closing_at < 0:
            return -1
        closing = before[closing_at:].tolist()
        ids = whole.tolist()
        for i in range(turn, len(ids) - len(closing) + 1):
            if ids[i : i + len(closing)] == closing:
                return i + len(closing)
        return -1


def _added_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer writes before and after a text."""
    bare = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    whole = tokenizer(["a"])["input_ids"][0]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    bos = tokenizer.bos_token_id
    return ([bos] if bos is not None and whole[:1] == [bos] else []), []


def _next_other(response: Messages, start: int) -> int:
    while start < len(response) and response[start]["role"] == "assistant":
        start += 1
    return start


def _next_assistant(response: Messages, start: int) -> int:
    while start < len(response) and response[start]["role"] != "assistant":
        start += 1
    return start


def _common_prefix(first: Ids, second: Ids) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
