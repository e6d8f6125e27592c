"""`/v1/completions` with token ids on both sides: what is asked, and what is believed of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NoReturn

from pyfast_dpo.rollout.engine import Completion, RolloutError, Sampling

PATH = "/v1/completions"
# Two equal responses of a group are refused if, by their log-probs, drawing one twice has less than this chance
# (e^-30 = 1e-13): then the server has drawn all with one seed.
LEAST_CHANCE = -30.0
# Servers write this for what JSON has no number for.
NO_LOGPROB = -9999.0


def leaves_out(sampling: Sampling) -> bool:
    """Whether tokens are left out before one is drawn."""
    return sampling.temperature > 0 and (
        sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
    )


def request_of(
    model: str, prompt: Sequence[int], n: int, sampling: Sampling, seed: int
) -> dict[str, Any]:
    """The body of a request for n responses to one prompt.

    Every number is written out: what a request leaves out, servers take from the model's generation_config.json.
    """
    cut = leaves_out(sampling)
    body = {
        "model": model,
        "prompt": list(prompt),
        "n": n,
        "seed": seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if cut else 1.0,
        "top_k": sampling.top_k if cut and sampling.top_k else -1,
        "min_p": sampling.min_p if cut else 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the drawn token alone
        "return_token_ids": True,
    }
    if sampling.stop_token_ids is not None:
        body |= {"stop_token_ids": list(sampling.stop_token_ids), "ignore_eos": True}
    return body


def completions_of(
    url: str, answer: Any, body: dict[str, Any], sampling: Sampling, version: int
) -> list[Completion]:
    """The n responses of an answer to `body`.

    Raises:
        RolloutError: another model than the one asked for answered, to another prompt, another number of times; ids
            or log-probs are missing, of unlike lengths or impossible; a response ended for no reason that we know.
    """

    def refuse(problem: str) -> NoReturn:
        raise RolloutError(f"HTTPEngine: {url}{PATH}: {problem}")

    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        refuse("the answer holds no list of choices")
    if answer.get("model") != body["model"]:
        refuse(f"{answer.get('model')!r} answered where {body['model']!r} was asked")
    choices, n = answer["choices"], body["n"]
    if len(choices) != n or not all(isinstance(choice, dict) for choice in choices):
        refuse(f"{len(choices)} responses where n = {n} were asked")
    numbers = [choice.get("index") for choice in choices]
    if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(n)):
        refuse(f"responses must be numbered 0 to {n - 1}, got {numbers}")
    responses = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        if choice.get("prompt_token_ids") not in (None, body["prompt"]):
            refuse("the prompt was read as other tokens than were sent")
        try:
            responses.append(_completion(choice, sampling, version))
        except ValueError as problem:
            refuse(f"response {choice['index']}: {problem}")
    if sampling.temperature > 0 and not leaves_out(sampling):
        seen: set[tuple[int, ...]] = set()
        for response in responses:
            ids, chance = tuple(response.ids), sum(response.logprobs)
            if ids in seen and chance < LEAST_CHANCE:
                refuse(
                    f"the same response of {len(ids)} tokens twice, which by its log-probs has a chance of e^{chance:.0f}; "
                    "the server gives all n of a request one seed"
                )
            seen.add(ids)
    return responses


def _completion(choice: dict[str, Any], sampling: Sampling, version: int) -> Completion:
    """One response, up to its first stop token: a server may go on behind it (SGLang with ignore_eos does).

    Raises:
        ValueError: what is wrong with it.
    """
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    listed = choice.get("logprobs")
    logprobs = listed.get("token_logprobs") if isinstance(listed, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError("no token_ids; the server must know return_token_ids")
    if not isinstance(logprobs, list):
        raise ValueError("no logprobs.token_logprobs")
    if len(ids) != len(logprobs):
        raise ValueError(f"{len(ids)} token ids and {len(logprobs)} log-probs")
    for number in logprobs:
        if not isinstance(number, (int, float)) or not NO_LOGPROB < number < 1e-3:  # NaN fails it
            raise ValueError(f"{number!r} is the log-prob of no token that was drawn")
    stops = sampling.stop_token_ids
    end = next((i for i, token in enumerate(ids) if token in (stops or ())), None)
    if end is not None:
        ids, logprobs, reason = ids[: end + 1], logprobs[: end + 1], "stop"
    if reason not in ("stop", "length"):
        raise ValueError(f"it ended by {reason!r}, where 'stop' and 'length' are known")
    if reason == "stop" and (not ids or (stops is not None and end is None)):
        raise ValueError("it is said to have stopped, and its stop token is not there")
    if len(ids) > sampling.max_tokens or (reason == "length" and len(ids) != sampling.max_tokens):
        raise ValueError(
            f"{len(ids)} tokens and {reason!r} where max_tokens = {sampling.max_tokens}"
        )
    return Completion(ids, [min(float(number), 0.0) for number in logprobs], reason, version)


def kind_of_logprobs(cold: Completion, hot: Completion) -> str:
    """What a server's log-probs are: "raw", "scaled" or "processed".

    Args:
        cold, hot: one greedy response, drawn with top_k = 1 at two temperatures.

    After top_k one token is left, whose log-prob is 0 (processed: after temperature and cuts). Before it, the
    likeliest has nearly all of a cold distribution and less of a hot one (scaled: after the temperature); or the
    temperature changes nothing (raw). Medians, since half types round, and have ties.
    """
    if median(hot.logprobs) > -1e-6:
        return "processed"
    differences = []
    for i, (c, h) in enumerate(zip(cold.logprobs, hot.logprobs, strict=True)):
        differences.append(abs(c - h))
        if cold.ids[i] != hot.ids[i]:  # a tie: other text from here on
            break
    return "scaled" if median(differences) > 0.1 else "raw"
