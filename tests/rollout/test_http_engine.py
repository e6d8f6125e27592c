"""Servers at their worst: each fault is a named error after a bounded number of tries, and no wrong data comes back."""

from __future__ import annotations

import socket
import time

import pytest
import torch

pytest.importorskip("transformers")

from completions_server import BASE, WRONG_ANSWERS, CompletionsServer
from engine_checks import NEVER, PROMPTS, scored
from test_engine_protocol import adapted
from tiny_models import make_model
from trainer_runs import lora

from pyfast_dpo.rollout import HTTPEngine, RolloutError, Sampling, TransformersEngine, http_client

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLING = Sampling(max_tokens=10, seed=1, stop_token_ids=NEVER)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch) -> None:
    monkeypatch.setattr(http_client, "BACKOFF", 0.01)


@pytest.fixture
def server():
    with CompletionsServer() as server:
        yield server


@pytest.mark.parametrize("fault", ["dies", "hangs up", "500", "503"])
def test_what_may_pass_is_tried_again_and_no_more_often_than_said(server, fault) -> None:
    engine = HTTPEngine(server.url, retries=2)
    expected = engine.generate(PROMPTS, 2, SAMPLING)
    calls = len(server.requests)
    server.faults.extend([fault, None, fault])
    assert engine.generate(PROMPTS, 2, SAMPLING) == expected, "the same seeds at the second try"
    assert len(server.requests) == calls + len(PROMPTS) + 2
    server.requests.clear()
    server.faults.extend([fault] * 9)
    words = f"HTTP {fault}: fault" if fault.isdigit() else r"[A-Z]\w+: "
    with pytest.raises(
        RolloutError, match=rf"no answer after 3 tries: {server.url}/v1/completions: {words}"
    ):
        engine.generate(PROMPTS[:1], 2, SAMPLING)
    assert len(server.requests) == 3


def test_a_late_answer_is_tried_again_and_not_waited_for(server) -> None:
    server.late = 10.0
    expected = HTTPEngine(server.url).generate(PROMPTS[:1], 2, SAMPLING)
    engine = HTTPEngine(server.url, timeout=1.0, retries=1)
    server.faults.append("late")
    assert engine.generate(PROMPTS[:1], 2, SAMPLING) == expected
    server.requests.clear()
    server.faults.extend(["late"] * 9)
    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"after 2 tries: .* no answer within 1 s"):
        engine.generate(PROMPTS[:1], 2, SAMPLING)
    assert time.monotonic() - started < 9 and len(server.requests) == 2


@pytest.mark.parametrize(
    "fault, words",
    [
        ("400", "HTTP 400: fault 400"),
        ("404", "HTTP 404: fault 404"),
        ("html", "no JSON: '<html>Bad gateway"),
        ("one too few", "2 responses where n = 3"),
        ("one too many", "4 responses where n = 3"),
        ("one twice", r"numbered 0 to 2, got \[0, 1, 0\]"),
        ("without numbers", r"numbered 0 to 2, got \[0, 1, None\]"),
        ("an old version", "'policy-v1' answered where 'tiny' was asked"),
        ("no choices", "holds no list of choices"),
        ("another prompt", "the prompt was read as other tokens"),
        ("no ids", "response 2: no token_ids"),
        ("ids as text", "response 2: no token_ids"),
        ("no log-probs", r"response 2: no logprobs\.token_logprobs"),
        ("a log-prob too few", "response 2: 10 token ids and 9 log-probs"),
        ("a null among log-probs", "response 2: None is the log-prob of no token"),
        ("a NaN among log-probs", "response 2: nan is the log-prob of no token"),
        ("logits for log-probs", "response 2: 3.5 is the log-prob of no token"),
        ("minus infinity", "response 2: -9999.0 is the log-prob of no token"),
        ("aborted", "response 2: it ended by 'abort'"),
        ("cut early", "response 2: 2 tokens and 'length' where max_tokens = 10"),
        ("a stop token left out", "response 2: it is said to have stopped"),
        ("one seed for all", "the same response of 10 tokens twice"),
    ],
)
def test_wrong_answers_are_named_and_not_asked_for_again(server, fault, words) -> None:
    engine = HTTPEngine(server.url)
    server.faults.append(fault)
    with pytest.raises(RolloutError, match=words):
        engine.generate(PROMPTS[:1], 3, SAMPLING)
    assert len(server.requests) == 1
    assert engine.generate(PROMPTS[:1], 3, SAMPLING), "the engine is as good as before"


def test_every_wrong_answer_is_tested() -> None:
    marks = test_wrong_answers_are_named_and_not_asked_for_again.pytestmark
    (table,) = (mark.args[1] for mark in marks if mark.name == "parametrize")
    assert set(WRONG_ANSWERS) <= {fault for fault, _ in table}


def test_one_bad_answer_among_many_ends_the_call_and_what_was_waiting(server) -> None:
    engine = HTTPEngine(server.url, max_requests=2)
    server.faults.extend([None, "one too few"])
    with pytest.raises(RolloutError, match="n = 2"):
        engine.generate(PROMPTS * 10, 2, SAMPLING)
    time.sleep(0.3)
    assert len(server.requests) < 20


def test_requests_under_way_are_bounded_and_more_than_one(server) -> None:
    engine = HTTPEngine(server.url, max_requests=3)
    server.late = 0.5
    server.faults.extend(["late"] * 3)
    engine.generate(PROMPTS * 3, 2, SAMPLING)
    assert server.most == 3


def test_prompts_are_spread_over_the_servers_and_a_dead_one_is_replaced() -> None:
    with CompletionsServer() as first, CompletionsServer() as second:
        engine = HTTPEngine([first.url, f"{second.url}/v1/"])
        expected = engine.generate(PROMPTS, 2, SAMPLING)
        assert len(first.requests) == len(second.requests) == 2
        second.shutdown()
        second.server_close()
        assert engine.generate(PROMPTS, 2, SAMPLING) == expected
        assert len(first.requests) == 6


def test_every_number_is_said(server) -> None:
    """What is left out of a request, vLLM takes from the model's generation_config.json."""
    HTTPEngine(server.url).generate([[5, 6]], 2, Sampling(max_tokens=3, seed=1))
    (body,) = server.requests
    neutral = {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert {name: body[name] for name in neutral} == neutral
    assert "ignore_eos" not in body, "the model's own end-of-sequence tokens"
    assert body["model"] == BASE and body["n"] == 2 and body["prompt"] == [5, 6]


def test_a_key_goes_with_every_request(server) -> None:
    engine = HTTPEngine(server.url, api_key="secret")
    engine.update_weights(adapted(0.5), 1)
    engine.generate([[5, 6]], 2, SAMPLING)
    assert server.authorizations == {"Bearer secret"}


def test_what_a_server_writes_behind_a_stop_token_is_left_away(server, monkeypatch) -> None:
    """SGLang under ignore_eos heeds no stop token at all."""
    engine = HTTPEngine(server.url)
    whole = engine.generate(PROMPTS, 2, SAMPLING)
    stop = whole[0][0].ids[4]
    heedless = server.complete
    monkeypatch.setattr(server, "complete", lambda body: heedless(dict(body, stop_token_ids=[])))
    cut = engine.generate(PROMPTS, 2, Sampling(max_tokens=10, seed=1, stop_token_ids=(stop,)))
    for long, short in zip(sum(whole, []), sum(cut, []), strict=True):  # noqa: RUF017
        end = long.ids.index(stop) + 1 if stop in long.ids else 10
        assert (short.ids, short.logprobs) == (long.ids[:end], long.logprobs[:end])
        assert short.finish_reason == ("stop" if stop in long.ids else "length")


COLD, CUT, BOTH = {"temperature": 0.7}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 5}


@pytest.mark.parametrize(
    "kind, served, refused",
    [
        ("raw", [{}, {"temperature": 0}, CUT], [COLD, BOTH]),
        ("processed", [{}, {"temperature": 0}, COLD], [CUT, BOTH]),
        ("scaled", [{}, {"temperature": 0}, COLD, CUT, BOTH], []),
    ],
)
def test_log_probs_of_another_distribution_are_refused(kind, served, refused) -> None:
    model = make_model()
    with CompletionsServer(kind) as server:
        engine = HTTPEngine(server.url)
        for options in served:
            groups = engine.generate(PROMPTS, 2, Sampling(max_tokens=16, seed=1, **options))
            for prompt, group in zip(PROMPTS, groups, strict=True):
                for each in group:
                    truth = scored(model, prompt, each, options.get("temperature") or 1.0)
                    torch.testing.assert_close(
                        torch.tensor(each.logprobs), truth, rtol=0, atol=2e-6
                    )
        server.requests.clear()
        for options in refused * 2:
            with pytest.raises(
                RolloutError, match=r"gives log-probs (at temperature 1|after top_p)"
            ):
                engine.generate(PROMPTS, 2, Sampling(max_tokens=16, **options))
        assert len(server.requests) <= 2, "a server is asked once"


@pytest.mark.parametrize("maker", ["vllm", "sglang"])
def test_an_adapter_comes_under_a_new_name_and_the_old_one_goes(maker, tmp_path) -> None:
    with CompletionsServer(maker=maker) as server:
        engine = HTTPEngine(server.url, adapter_folder=tmp_path)
        names = []
        for version in (3, 3, 4):
            engine.update_weights(adapted(0.1 * version), version)
            (name,) = server.adapters
            assert name.endswith(f"-v{version}")
            folders = list(next(tmp_path.iterdir()).iterdir())
            assert [folder.name for folder in folders] == [name], "the folders before are gone"
            names.append(name)
            engine.generate([[5, 6]], 1, SAMPLING)
            asked = server.requests[-1]["model"]
            assert asked == (f"{BASE}:{name}" if maker == "sglang" else name)
        assert len(set(names)) == 3, "servers keep what they computed of prompts by the name"
        engine.close()
        assert not server.adapters and not list(tmp_path.iterdir())
        assert engine.generate([[5, 6]], 1, SAMPLING), "the base model answers"


def test_an_adapter_of_another_name_than_peft_gives(server) -> None:
    """A kept reference beside it does not travel."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), lora(), adapter_name="policy")
    model.add_adapter("reference", lora())
    model.base_model.set_adapter("policy")
    for name, parameter in model.named_parameters():
        if "lora_B.policy" in name:
            torch.nn.init.constant_(parameter, 0.5)
    engine = HTTPEngine(server.url)
    engine.update_weights(model, 1)
    greedy = Sampling(max_tokens=8, temperature=0)
    expected = TransformersEngine(model, version=1).generate(PROMPTS, 1, greedy)
    result = engine.generate(PROMPTS, 1, greedy)
    assert [c.ids for (c,) in result] == [c.ids for (c,) in expected]


def test_an_adapter_that_one_server_refuses_changes_nothing(tmp_path) -> None:
    with CompletionsServer() as first, CompletionsServer() as second:
        engine = HTTPEngine([first.url, second.url], adapter_folder=tmp_path, retries=0)
        engine.update_weights(adapted(0.5), 1)
        before = engine.generate(PROMPTS, 1, SAMPLING)
        (old,) = first.adapters
        second.load_faults.append("500")
        with pytest.raises(RolloutError, match="load_lora_adapter: HTTP 500"):
            engine.update_weights(adapted(-0.5), 2)
        assert list(first.adapters) == list(second.adapters) == [old]
        assert engine.generate(PROMPTS, 1, SAMPLING) == before and before[0][0].version == 1
        engine.update_weights(adapted(-0.5), 2)
        assert engine.generate(PROMPTS, 1, SAMPLING) != before


def test_a_lost_answer_to_loading_is_no_mistake_at_the_second_try(server) -> None:
    engine = HTTPEngine(server.url)
    server.load_faults.append("dies")
    engine.update_weights(adapted(0.5), 1)
    assert len(server.adapters) == 1 and server.calls["/v1/load_lora_adapter"] == 2


def test_a_server_that_began_anew_does_not_answer_as_the_base_model(server) -> None:
    engine = HTTPEngine(server.url)
    engine.update_weights(adapted(0.5), 1)
    server.adapters.clear()
    with pytest.raises(
        RolloutError, match=r"HTTP 404: The model `pyfast_dpo-.*-v1` does not exist"
    ):
        engine.generate(PROMPTS, 1, SAMPLING)
    engine.update_weights(adapted(0.5), 2)
    assert engine.generate(PROMPTS, 1, SAMPLING)[0][0].version == 2


def peft_model(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(make_model(), config)


def divided():
    """As ZeRO-3 leaves it."""
    model = peft_model()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


def other_kind():
    peft = pytest.importorskip("peft")
    config = peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(make_model(), config)


@pytest.mark.parametrize(
    "model, words",
    [
        (make_model, "must be a PEFT model with a LoRA adapter, got LlamaForCausalLM"),
        (other_kind, "servers load LoRA adapters, got IA3"),
        (lambda: peft_model(modules_to_save=["lm_head"]), "1 trained weights are not part .* modules_to_save"),
        (divided, "the adapter is divided among processes"),
    ],
)  # fmt: skip
def test_weights_that_cannot_travel_are_named(server, model, words) -> None:
    with pytest.raises(ValueError, match=f"HTTPEngine.update_weights: .*{words}"):
        HTTPEngine(server.url).update_weights(model(), 1)
    assert not server.adapters


def test_servers_that_are_not_there(server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        RolloutError, match=r"no answer after 2 tries: .*/v1/models: ConnectionRefused"
    ):
        HTTPEngine(f"http://127.0.0.1:{port}", retries=1)
    with pytest.raises(RolloutError, match=r"must serve the model 'large', it lists \['tiny'\]"):
        HTTPEngine(server.url, model="large")
    with (
        CompletionsServer(maker="sglang") as other,
        pytest.raises(RolloutError, match="all SGLang's"),
    ):
        HTTPEngine([server.url, other.url])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"urls": []}, "urls must name at least one"),
        ({"urls": "localhost:8000"}, "urls must be such as"),
        ({"urls": ["http://a", "ftp://b"]}, "got 'ftp://b'"),
        ({"max_requests": 0}, "max_requests must be"),
        ({"retries": -1}, "retries must be"),
        ({"timeout": 0}, "timeout must be"),
    ],
)
def test_options_out_of_range(server, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        HTTPEngine(**{"urls": server.url, **options})
