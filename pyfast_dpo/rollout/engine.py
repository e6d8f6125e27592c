"""What every engine takes and gives. Text never makes the round trip: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pyfast_dpo.ops.checks import check_finite


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        max_tokens: >= 1, of a response.
        temperature: >= 0; 0 takes the likeliest token.
        top_p: in (0, 1]: the likeliest tokens that hold this share; 1: all.
        top_k: >= 0: that many of the likeliest tokens; 0: all.
        min_p: in [0, 1]: tokens with at least this share of the likeliest one's probability.
        stop_token_ids: a response ends with one of them; None: the model's end-of-sequence tokens.
        seed: the same call with the same seed and weights gives the same responses to the last bit; None: draws one
            from torch's generator.

    Raises:
        TypeError, ValueError: a number out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Sampling: {name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"Sampling: {name} must be at least {least}, got {value}")
        for name, good, expected in (
            ("temperature", lambda x: x >= 0, "not negative"),
            ("top_p", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("min_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
        ):
            value = getattr(self, name)
            check_finite("Sampling", name, value)
            if not good(value):
                raise ValueError(f"Sampling: {name} must be {expected}, got {value}")
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        ids: its tokens, the stop token included.
        logprobs: of each, in nats, under the model's distribution at the sampler's temperature (at 1 where that is 0),
            before top_p, top_k and min_p: what a trainer computes with `logit_scale = 1 / temperature`.
        finish_reason: "stop": it ended with a stop token; "length": it was cut at max_tokens.
        version: of the weights that wrote it.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    version: int


class RolloutError(RuntimeError):
    """An engine did not answer, or not as it was asked; no response of that call is handed on."""


class Engine(Protocol):
    """Writes responses. An engine of a user's own is any object with these two methods."""

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """n responses to each prompt, in the order of the prompts."""

    def update_weights(self, model: Any, version: int) -> None:
        """From now on responses are those of `model`, and carry this version."""


def check_request(
    function: str, prompts: Sequence[Sequence[int]], n: int, vocab: int | None = None
) -> list[list[int]]:
    """The prompts as lists of integers.

    Raises:
        TypeError, ValueError: n < 1, an empty prompt, ids that are no integers or outside the vocabulary.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{function}: n must be an integer of at least 1, got {n!r}")
    checked = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise TypeError(
                f"{function}: prompts must hold token ids, got a string as prompt {number}; tokenize it first"
            )
        ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError(
                f"{function}: prompt {number} is empty; begin it with a token such as the tokenizer's bos_token"
            )
        if min(ids) < 0 or (vocab is not None and max(ids) >= vocab):
            bad = next(
                token for token in ids if token < 0 or (vocab is not None and token >= vocab)
            )
            raise ValueError(
                f"{function}: token ids must be in [0, {vocab}), got {bad} in prompt {number}"
            )
        checked.append(ids)
    return checked


def check_completions(
    function: str,
    answers: Sequence[Sequence[Completion]],
    prompts: int,
    n: int,
    sampling: Sampling,
    version: int,
) -> None:
    """What an engine answered is what it was asked for: nothing is trained on anything else.

    Raises:
        ValueError: another number of responses, more tokens than asked for, log-probs of another number or that are
            none (NaN, above 0), another version of the weights.
    """
    numbers = [len(answer) for answer in answers]
    if numbers != [n] * prompts:
        raise ValueError(
            f"{function}: the engine must write {n} responses to each of {prompts} prompts, got {numbers}"
        )
    for number, answer in enumerate(answers):
        for each in answer:
            where = f"a response to prompt {number}"
            if each.version != version:
                raise ValueError(
                    f"{function}: {where} must be of the weights of version {version}, got version {each.version}"
                )
            if not len(each.ids) == len(each.logprobs) <= sampling.max_tokens:
                raise ValueError(
                    f"{function}: {where} must have at most {sampling.max_tokens} tokens and a log-prob for each, got "
                    f"{len(each.ids)} tokens and {len(each.logprobs)} log-probs"
                )
            if not all(logp <= 1e-4 for logp in each.logprobs):  # NaN is not
                wrong = next(logp for logp in each.logprobs if not logp <= 1e-4)
                raise ValueError(
                    f"{function}: {where} must have log-probs of at most 0, got {wrong}"
                )
