"""Requests to completion servers: a time limit for each, and a bounded number of tries."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from pyfast_dpo.rollout.engine import RolloutError

BACKOFF = 0.5  # seconds before the first retry; twice as long before each further one
SHOWN = 500  # characters of a server's own words in an error


class Refused(RolloutError):
    """The server understood and said no (4xx): the same request would be refused again."""


class _Passing(Exception):
    """What may be over at the next try."""


class HTTPClient:
    """Sends JSON and hands back what came.

    Args:
        timeout: seconds without a byte after which a request has failed.
        retries: >= 0, further tries after a failure that may pass: no connection, one that broke, no answer in time,
            5xx.
        api_key: sent as a bearer token.
    """

    def __init__(self, timeout: float, retries: int, api_key: str | None) -> None:
        self.timeout, self.retries = timeout, retries
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def send(
        self,
        urls: Sequence[str],
        path: str,
        body: dict[str, Any] | None = None,
        given_up: threading.Event | None = None,
    ) -> tuple[str, bytes]:
        """(the server that answered, its answer): GET without a body, else POST; each try goes to the next server.

        Raises:
            Refused: 4xx, at once.
            RolloutError: no try succeeded, or `given_up` was set before the next one.
        """
        waiting = given_up or threading.Event()
        failures: list[str] = []
        for attempt in range(self.retries + 1):
            if attempt and waiting.wait(BACKOFF * 2 ** (attempt - 1)):
                break
            url = urls[attempt % len(urls)]
            try:
                return url, self._once(url, path, body)
            except _Passing as failure:
                failures.append(f"{url}{path}: {failure}")
        tries = "1 try" if len(failures) == 1 else f"{len(failures)} tries"
        raise RolloutError(f"HTTPEngine: no answer after {tries}: {'; '.join(failures)}")

    def _once(self, url: str, path: str, body: dict[str, Any] | None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            answer = f"HTTP {error.code}: {_words(error)}"
            if error.code >= 500:
                raise _Passing(answer) from error
            raise Refused(f"HTTPEngine: {url}{path}: {answer}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no answer within {self.timeout:g} s") from error
            raise _Passing(f"{type(reason).__name__}: {reason}") from error


def decoded(url: str, path: str, answer: bytes) -> Any:
    """The JSON of an answer.

    Raises:
        RolloutError: it is none.
    """
    try:
        return json.loads(answer)
    except ValueError as error:
        shown = answer[:SHOWN].decode(errors="replace")
        raise RolloutError(f"HTTPEngine: {url}{path}: no JSON: {shown!r}") from error


def _words(error: urllib.error.HTTPError) -> str:
    """What the server says of its refusal: the message where there is one, else the body."""
    text = error.reason
    with contextlib.suppress(OSError, http.client.HTTPException):
        text = error.read().decode(errors="replace") or text
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        found = json.loads(text)
        found = found.get("error", found)  # vLLM puts it one level deeper than SGLang
        text = found.get("message") or found.get("error_message") or text
    return str(text)[:SHOWN]
