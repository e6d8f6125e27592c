"""Engines of their own processes or machines: vLLM, SGLang and what else speaks their protocol."""

from __future__ import annotations

import os
import threading
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import torch

from pyfast_dpo.ops.checks import check_positive
from pyfast_dpo.rollout.engine import Completion, RolloutError, Sampling, check_request
from pyfast_dpo.rollout.http_adapters import ServedAdapter, lora_adapter
from pyfast_dpo.rollout.http_client import HTTPClient, decoded
from pyfast_dpo.rollout.http_completions import (
    PATH,
    completions_of,
    kind_of_logprobs,
    leaves_out,
    request_of,
)

PROBED = 16  # tokens of one response


class HTTPEngine:
    """Responses from completion servers that take token ids, with the policy's LoRA adapter loaded into them.

    Each prompt is one request for n responses with a seed of its own (servers give all prompts of a request one
    seed); `max_requests` of them are under way at a time, spread over the servers; a failed one is tried again at the
    next server. An answer is used only if it is of the model asked for, to the prompt asked about, and complete.

    The servers hold the model that the adapter is trained on, in the dtype of the trainer if log-probs are to agree.
    Tested with vLLM 0.32:

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16

    SGLang (`--enable-lora`) is asked as its source says, and has not been tried. Several processes that train together
    need one engine: the trainer's main process speaks to the servers for all.

    Log-probs are those of `Completion`: at the sampler's temperature, before tokens are left out. Servers differ in
    what they give, so that they are asked by a small request where it matters. vLLM's default (`raw_logprobs`) serves
    temperature 1 and 0 with any top_p, top_k and min_p; its `--logprobs-mode processed_logprobs` any temperature
    without these. SGLang serves all, as long as SGLANG_RETURN_ORIGINAL_LOGPROB is not set. The rest is refused.

    A seed repeats responses as far as the servers compute the same numbers for any batch.

    Args:
        urls: of the servers, such as "http://localhost:8000"; one or several, all with the same model.
        model: the name of the base model there; None: the first that the servers list. It answers, as `version`,
            until weights are updated.
        adapter_folder: where adapters are written, at one path for the trainer and all servers (a network folder, if
            they are on several machines); None: the temporary folder of this machine.
        version: of the weights that the servers started with.
        max_requests: >= 1, prompts that are being answered at a time.
        timeout: seconds after which a request without an answer has failed.
        retries: >= 0, further tries of a request that failed: no connection, a broken one, a late answer, HTTP 5xx.
            HTTP 4xx and wrong answers are not tried again.
        api_key: of the servers.

    Raises:
        TypeError, ValueError: a URL or number out of its range.
        RolloutError: a server does not answer, or does not have the model.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        adapter_folder: str | os.PathLike[str] | None = None,
        version: int = 0,
        max_requests: int = 64,
        timeout: float = 600.0,
        retries: int = 3,
        api_key: str | None = None,
    ) -> None:
        self.urls = _checked_urls(urls)
        check_positive("HTTPEngine", "timeout", timeout)
        for name, value, least in (("max_requests", max_requests, 1), ("retries", retries, 0)):
            if type(value) is not int or value < least:
                raise ValueError(
                    f"HTTPEngine: {name} must be an integer of at least {least}, got {value!r}"
                )
        self.version, self.max_requests = version, max_requests
        self._client = HTTPClient(timeout, retries, api_key)
        self._kinds: dict[str, str] = {}
        self.model, is_sglang, self._positions = self._read_models(model)
        routes = ("" if is_sglang else "/v1") + "/{}_lora_adapter"
        self._served = ServedAdapter(self._client, self.urls, routes, adapter_folder)
        self._prefix = f"{self.model}:" if is_sglang else ""  # of an adapter's name in a request

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> list[list[Completion]]:
        """n responses to each prompt, in the order of the prompts.

        Raises:
            TypeError, ValueError: prompts that are no token ids, n, more positions than the servers have.
            RolloutError: a request failed for good, an answer was wrong, the servers' log-probs are others than
                these options need. No response of the call is handed on.
        """
        name = "HTTPEngine.generate"
        checked = check_request(name, prompts, n)
        if not checked:
            return []
        longest = max(map(len, checked)) + sampling.max_tokens
        if self._positions is not None and longest > self._positions:
            raise ValueError(
                f"{name}: the longest prompt and max_tokens need {longest} positions, the servers have {self._positions}"
            )
        self._check_kind(min(checked, key=len), sampling)
        generator = torch.Generator()
        generator.manual_seed(
            int(torch.randint(2**62, ())) if sampling.seed is None else sampling.seed
        )
        seeds = torch.randint(2**53, (len(checked),), generator=generator).tolist()
        given_up = threading.Event()
        pool = ThreadPoolExecutor(min(self.max_requests, len(checked)), "HTTPEngine")
        try:
            answers = [
                pool.submit(self._ask, self._from(i), prompt, n, sampling, seed, given_up)
                for i, (prompt, seed) in enumerate(zip(checked, seeds, strict=True))
            ]
            wait(answers, return_when=FIRST_EXCEPTION)
            failed = [a for a in answers if a.done() and not a.cancelled() and a.exception()]
            return [answer.result() for answer in failed or answers]
        finally:
            # Requests under way end by themselves; nobody waits for them.
            given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def update_weights(self, model: Any, version: int) -> None:
        """Loads the model's LoRA adapter into every server under a new name, then takes the old one out.

        A new name, since servers keep what they have computed of prompts by the name.

        Raises:
            ValueError: no PEFT model with one LoRA adapter that holds all that is trained.
            RolloutError: a server did not load it; the version before stays in use.
        """
        adapter = lora_adapter("HTTPEngine.update_weights", model)
        self._served.exchange(model, adapter, version)
        self.version = version

    def close(self) -> None:
        """Takes the adapter out of the servers and removes its folder."""
        self._served.close()

    def _read_models(self, wanted: str | None) -> tuple[str, bool, int | None]:
        """(name of the base model, whether the servers are SGLang's, positions), by what they say of themselves."""
        makers, positions = set(), []
        for url in self.urls:
            path = "/v1/models"
            listed = decoded(url, path, self._client.send([url], path)[1])
            cards = listed.get("data") if isinstance(listed, dict) else None
            if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
                raise RolloutError(f"HTTPEngine: {url}{path}: no list of models")
            bases = {str(card.get("id")): card for card in cards if card.get("parent") is None}
            wanted = wanted or next(iter(bases), None)
            if wanted not in bases:
                raise RolloutError(
                    f"HTTPEngine: {url} must serve the model {wanted!r}, it lists {list(bases)}"
                )
            makers.add(bases[wanted].get("owned_by") == "sglang")
            positions.append(bases[wanted].get("max_model_len"))
        if len(makers) > 1:
            raise RolloutError("HTTPEngine: the servers must be all SGLang's or none")
        assert wanted is not None
        return wanted, makers.pop(), min((p for p in positions if p is not None), default=None)

    def _from(self, first: int) -> list[str]:
        """All servers, beginning with one."""
        first %= len(self.urls)
        return self.urls[first:] + self.urls[:first]

    def _ask(
        self,
        urls: Sequence[str],
        prompt: list[int],
        n: int,
        sampling: Sampling,
        seed: int,
        given_up: threading.Event | None = None,
    ) -> list[Completion]:
        adapter = self._served.name
        name = self.model if adapter is None else self._prefix + adapter
        copies = n if sampling.temperature == 0 else 1  # vLLM refuses n > 1 where all are equal
        body = request_of(name, prompt, n // copies, sampling, seed)
        url, answer = self._client.send(urls, PATH, body, given_up)
        return copies * completions_of(
            url, decoded(url, PATH, answer), body, sampling, self.version
        )

    def _check_kind(self, prompt: list[int], sampling: Sampling) -> None:
        """That each server's log-probs are at the temperature, and of all tokens.

        Raises:
            RolloutError: they are not.
        """
        temperature, cut = sampling.temperature, leaves_out(sampling)
        if temperature in (0, 1) and not cut:
            return  # all kinds are the same
        for url in self.urls:
            if url not in self._kinds:
                tokens = min(PROBED, sampling.max_tokens)
                (cold,), (hot,) = (
                    self._ask([url], prompt, 1, Sampling(tokens, t, top_k=1, stop_token_ids=()), 0)
                    for t in (0.1, 2.0)  # vLLM takes no higher one
                )
                self._kinds[url] = kind_of_logprobs(cold, hot)
            kind = self._kinds[url]
            if kind == "raw" and temperature != 1:
                raise RolloutError(
                    f"HTTPEngine: {url} gives log-probs at temperature 1, and temperature = {temperature} samples from "
                    "others; start vLLM with --logprobs-mode processed_logprobs (then without top_p, top_k and min_p), "
                    "or SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
                )
            if kind == "processed" and cut:
                raise RolloutError(
                    f"HTTPEngine: {url} gives log-probs after top_p, top_k and min_p, which are not the model's; leave "
                    "these out, or use temperature = 1 and start vLLM without --logprobs-mode"
                )


def _checked_urls(urls: str | Sequence[str]) -> list[str]:
    """Without what the paths begin with."""
    listed = [urls] if isinstance(urls, str) else list(urls)
    if not listed:
        raise ValueError("HTTPEngine: urls must name at least one server, got none")
    for url in listed:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"HTTPEngine: urls must be such as http://localhost:8000, got {url!r}")
    return [url.rstrip("/").removesuffix("/v1") for url in listed]
