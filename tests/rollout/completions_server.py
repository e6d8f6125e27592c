"""A completion server of a tiny model for tests: vLLM's protocol, real LoRA folders, and faults on order."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from tiny_models import make_model

from pyfast_dpo.rollout import Completion, Sampling, TransformersEngine
from pyfast_dpo.rollout.sampler import Sampler

BASE = "tiny"


class CompletionsServer(ThreadingHTTPServer):
    """`with CompletionsServer() as server:`, at `server.url` until the end.

    Attributes:
        kind: which log-probs it gives: "raw" and "processed" are vLLM's modes, "scaled" is SGLang's way.
        maker: "vllm" or "sglang", which differ in routes and names.
        late: seconds that "late" takes.
        faults: one for each completion request to come, None for none: "late"; "hangs up" without an answer; "dies" in
            the middle of it; a status such as "503"; "html"; a key of `WRONG_ANSWERS`.
        load_faults: the same of the requests that load and unload adapters.
        requests: the bodies of the completion requests that came.
        calls: how many requests came, by path.
        authorizations: the keys that came.
        adapters: the loaded ones by name.
        most: requests that were under way at once.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, kind: str = "scaled", maker: str = "vllm", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.kind, self.maker = kind, maker
        self.late = 0.0
        self.faults: deque[str | None] = deque()
        self.load_faults: deque[str | None] = deque()
        self.requests: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.authorizations: set[str | None] = set()
        self.adapters: dict[str, TransformersEngine] = {}
        self.base = TransformersEngine(make_model())
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.under_way = self.most = 0

    def __enter__(self) -> CompletionsServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that has left is no news."""

    def models(self) -> dict[str, Any]:
        cards = [{"id": BASE, "owned_by": self.maker, "max_model_len": 64}]
        cards += [{"id": name, "owned_by": self.maker, "parent": BASE} for name in self.adapters]
        return {"object": "list", "data": cards}

    def load(self, body: dict[str, Any]) -> tuple[int, Any]:
        import peft

        if body["lora_name"] in self.adapters and not body.get("load_inplace"):
            return 400, {"error": {"message": "has already been loaded"}}
        model = peft.PeftModel.from_pretrained(make_model(), body["lora_path"])
        self.adapters[body["lora_name"]] = TransformersEngine(model)
        return 200, "Success: adapter added."

    def unload(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "cannot be found"}}
        return 200, "Success: adapter removed."

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["model"]
        adapter = name.removeprefix(f"{BASE}:") if self.maker == "sglang" else name
        engine = self.base if name == BASE else self.adapters.get(adapter)
        if engine is None:
            return 404, {"error": {"message": f"The model `{name}` does not exist."}}
        if not 0 <= body["temperature"] <= 2:
            return 400, {"error": {"message": "temperature must be in [0, 2]"}}
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, {"error": {"message": "n must be 1 when using greedy sampling"}}
        sampling = Sampling(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(body["top_k"], 0),
            min_p=body["min_p"],
            stop_token_ids=tuple(body["stop_token_ids"]) if body.get("ignore_eos") else None,
            seed=body["seed"],
        )
        prompt, n = body["prompt"], body["n"]
        responses = engine.generate([prompt], n, sampling)[0]
        choices = [
            {
                "index": i,
                "text": "",
                "token_ids": response.ids,
                "prompt_token_ids": prompt,
                "finish_reason": response.finish_reason,
                "logprobs": {"token_logprobs": self._logprobs(engine, prompt, response, sampling)},
            }
            for i, response in enumerate(responses)
        ]
        return 200, {"model": name, "choices": choices}

    def _logprobs(
        self,
        engine: TransformersEngine,
        prompt: list[int],
        response: Completion,
        sampling: Sampling,
    ) -> list[float]:
        if self.kind == "scaled" or sampling.temperature == 0:
            return response.logprobs
        ids = torch.tensor(response.ids)
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt + response.ids])).logits[
                0, len(prompt) - 1 : -1
            ]
        if self.kind == "processed":
            sampler = Sampler(sampling, 1, logits.device)
            logits = sampler._kept((logits / sampling.temperature).log_softmax(-1))
        return logits.log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1).tolist()


def _of_choice(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda answer: change(answer["choices"][-1])


# What is changed in a right answer.
WRONG_ANSWERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one too few": lambda a: a["choices"].pop(),
    "one too many": lambda a: a["choices"].append(dict(a["choices"][0], index=len(a["choices"]))),
    "one twice": lambda a: a["choices"].__setitem__(-1, a["choices"][0]),
    "without numbers": _of_choice(lambda c: c.pop("index")),
    "an old version": lambda a: a.update(model="policy-v1"),
    "no choices": lambda a: a.pop("choices"),
    "another prompt": _of_choice(lambda c: c.update(prompt_token_ids=[3])),
    "no ids": _of_choice(lambda c: c.pop("token_ids")),
    "ids as text": _of_choice(lambda c: c.update(token_ids=["5"] * len(c["token_ids"]))),
    "no log-probs": _of_choice(lambda c: c.update(logprobs=None)),
    "a log-prob too few": _of_choice(lambda c: c["logprobs"]["token_logprobs"].pop()),
    "a null among log-probs": _of_choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None)),
    "a NaN among log-probs": _of_choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, float("nan"))),
    "logits for log-probs": _of_choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, 3.5)),
    "minus infinity": _of_choice(lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, -9999.0)),
    "aborted": _of_choice(lambda c: c.update(finish_reason="abort")),
    "cut early": _of_choice(
        lambda c: c.update(
            token_ids=c["token_ids"][:2],
            logprobs={"token_logprobs": c["logprobs"]["token_logprobs"][:2]},
            finish_reason="length",
        )
    ),
    "a stop token left out": _of_choice(lambda c: c.update(finish_reason="stop")),
    "one seed for all": lambda a: a.update(
        choices=[dict(a["choices"][0], index=i) for i in range(len(a["choices"]))]
    ),
}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.under_way += 1
            self.server.authorizations.add(self.headers["Authorization"])
        self._answer(200, self.server.models())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prefix = "" if server.maker == "sglang" else "/v1"
        with server.lock:
            server.calls[self.path] += 1
            server.authorizations.add(self.headers["Authorization"])
            if self.path == "/v1/completions":
                server.requests.append(body)
            queue = server.faults if self.path == "/v1/completions" else server.load_faults
            fault = queue.popleft() if queue else None
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        actions = {
            "/v1/completions": server.complete,
            f"{prefix}/load_lora_adapter": server.load,
            f"{prefix}/unload_lora_adapter": server.unload,
        }
        if self.path not in actions:
            self._answer(404, {"error": {"message": "Not Found"}})
        else:
            self._play(fault, actions[self.path], body)

    def _play(
        self, fault: str | None, action: Callable[[dict[str, Any]], Any], body: dict[str, Any]
    ) -> None:
        if fault == "late":
            time.sleep(self.server.late)
        elif fault == "hangs up":
            self.close_connection = True
            return
        elif fault is not None and fault.isdigit():
            self._answer(int(fault), {"error": {"message": f"fault {fault}"}})
            return
        with self.server.lock:
            status, answer = action(body)
        if fault in WRONG_ANSWERS:
            WRONG_ANSWERS[fault](answer)
        if fault == "html":
            answer = "<html>Bad gateway</html>"
        self._answer(status, answer, broken=fault == "dies")

    def _answer(self, status: int, answer: Any, broken: bool = False) -> None:
        with self.server.lock:  # before the client can know and send the next
            self.server.under_way -= 1
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)
