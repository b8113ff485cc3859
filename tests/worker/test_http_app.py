"""What the HTTP side takes and refuses, on the real worker in this process."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import openai
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import CONTEXT, VOCAB
from starlette.testclient import TestClient
from support.cluster import until
from support.collector import Collector, Span, tracing_here
from support.security import write_policy
from transformers import PreTrainedTokenizerFast

from embedding_service import tracing
from embedding_service.security.authority import Authority
from embedding_service.security.policy import digest_of
from embedding_service.security.proofs import prove
from model_worker.http_app import build_app
from model_worker.keys import Keys
from model_worker.sampling import SamplingParams
from model_worker.worker import Worker, WorkerConfig

pytestmark = pytest.mark.slow

PROMPT = "The import statement, naïvely"
MAX_BATCH, MAX_QUEUE = 2, 6
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def worker(model_folder: Path, embeddings: str) -> Iterator[Worker]:
    running = Worker(
        WorkerConfig(model_folder, embeddings, name="small", version="1", max_batch=MAX_BATCH, max_queue=MAX_QUEUE)
    )
    yield running
    running.close()


@pytest.fixture(scope="module")
def http(worker: Worker) -> Iterator[TestClient]:
    with TestClient(build_app(worker), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)


def complete(http: TestClient, **change: Any) -> Any:
    return http.post(COMPLETIONS, json={"model": "small", "prompt": PROMPT, "max_tokens": 4, "temperature": 0} | change)


def chat(http: TestClient, *messages: Any, **change: Any) -> Any:
    body = {"model": "small", "messages": list(messages), "max_tokens": 4, "temperature": 0}
    return http.post(CHAT, json=body | change)


def refusal(answer: Any, status: int = 400) -> tuple[str | None, str]:
    """The parameter and the message of an error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600
    return error["param"], error["message"]


# Several prompts


def test_choices_are_numbered_across_the_prompts(client: openai.OpenAI) -> None:
    prompts = ["A list", "naïve", "one two three"]
    options: dict[str, Any] = {"model": "small", "max_tokens": 6, "seed": 11, "n": 2}
    alone = [client.completions.create(prompt=prompt, **options) for prompt in prompts]
    answer = client.completions.create(prompt=prompts, **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [choice.text for each in alone for choice in each.choices]
    assert len({choice.text for choice in answer.choices}) > 3
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(answer.usage, count) == sum(getattr(each.usage, count) for each in alone)

    streamed, used = [""] * 6, None
    for chunk in client.completions.create(
        prompt=prompts, stream=True, stream_options={"include_usage": True}, **options
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
        used = chunk.usage or used
    assert streamed == [choice.text for choice in answer.choices]
    assert used == answer.usage


def test_several_prompts_of_ids(client: openai.OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["A", "one two"]
    options: dict[str, Any] = {"model": "small", "max_tokens": 5, "temperature": 0, "logprobs": 1}
    by_text = client.completions.create(prompt=texts, **options)
    by_ids = client.completions.create(prompt=[tokenizer.encode(text) for text in texts], **options)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices]
    assert [len(choice.logprobs.tokens) for choice in by_ids.choices] == [5, 5]
    [only] = client.completions.create(prompt=["A"], **options).choices
    assert only.text == by_text.choices[0].text


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        (["A", ""], "prompt[1] holds no token"),
        ([[5], []], "prompt[1] holds no token"),
        ([], "prompt holds no token"),
        ([[5], [6, VOCAB]], f"prompt[1][1] is {VOCAB}, not a token id in [0, {VOCAB})"),
        ([[5], [6, "a"]], "prompt[1][1] is 'a', not a token id"),
        ([[5, True]], "prompt[1] is True"),
        ([2**70], f"prompt[0] is {2**70}"),
        ([1, "a"], "not a list with a number and a string"),
        (["a", ["b"]], "not a list with a list and a string"),
        ([1.5], "not a list with a number"),
        ([None], "not a list with null"),
        (7, "not a number"),
        ({"text": "a"}, "not an object"),
        (["A", "word " * 2 * CONTEXT], "prompt[1] has"),
        (
            ["A"] * (MAX_BATCH + MAX_QUEUE + 1),
            f"at most {MAX_BATCH + MAX_QUEUE} choices at once, not 9 prompts of 1 each",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_prompts_that_are_none(http: TestClient, prompt: Any, told: str) -> None:
    param, message = refusal(complete(http, prompt=prompt))
    assert param == "prompt"
    assert told in message


# What changes nothing


def dumps(message: Any) -> list[Any]:
    """An answer's message in every way that a program may put it into its next request."""
    return [message, message.model_dump(), message.to_dict(), json.loads(message.model_dump_json())]


def test_a_second_turn_takes_what_the_first_gave(client: openai.OpenAI) -> None:
    ask: Any = {"role": "user", "content": "What is a list?"}
    options: dict[str, Any] = {"model": "small", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    first = client.chat.completions.create(messages=[ask], **options).choices[0].message
    expected = client.chat.completions.create(
        messages=[ask, {"role": "assistant", "content": first.content}, ask], **options
    )
    for turn in dumps(first):
        second = client.chat.completions.create(messages=[ask, turn, ask], **options)
        assert second.choices[0].message == expected.choices[0].message
        assert second.usage.prompt_tokens == expected.usage.prompt_tokens
    with client.chat.completions.stream(messages=[ask], **options) as stream:
        assert list(stream)
        streamed = stream.current_completion_snapshot.choices[0].message
    assert streamed.content == first.content
    for turn in dumps(streamed):
        second = client.chat.completions.create(messages=[ask, turn, ask], **options)
        assert second.choices[0].message == expected.choices[0].message


NEUTRAL = {
    "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "n": None,
    "metadata": {"job": "7"}, "store": False, "user": "me", "service_tier": "auto", "parallel_tool_calls": True,
    "tools": [], "tool_choice": "auto", "functions": None, "response_format": {"type": "text"}, "stream_options": None,
    "stop": None, "modalities": ["text"], "reasoning_effort": None, "safety_identifier": "s", "prompt_cache_key": "k",
    "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": True, "stop_token_ids": [],
    "chat_template_kwargs": {}, "add_generation_prompt": True, "min_tokens": 0, "max_tokens": None, "seed": None,
}  # fmt: skip
QUIET_MESSAGE: dict[str, Any] = {
    "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "name": None,
    "reasoning_content": None,
}  # fmt: skip


def test_what_changes_nothing_is_taken(http: TestClient) -> None:
    asked = {"role": "user", "content": "What is a list?"}
    part = {"type": "text", "text": "What is a list?", "annotations": None, "cache_control": None}
    plain = chat(http, asked, max_completion_tokens=6).json()["choices"]
    answer = chat(http, {**QUIET_MESSAGE, **asked, "content": [part]}, **NEUTRAL, max_completion_tokens=6)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain
    assert complete(http, suffix="", echo=False, best_of=1, logprobs=False, stop=[]).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_k": 2**63}, "top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"presence_penalty": 1e-300}, "presence_penalty"),
        ({"logit_bias": {"": -100}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"messages": [{"role": "user", "content": "a", "audio": {"id": "1"}}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages"),
        ({"x" * 10_000: 1}, "x" * 200 + "..."),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_would_change_the_answer_is_refused_by_name(http: TestClient, change: Any, param: str) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "a"}]} | change
    given, message = refusal(http.post(CHAT, json=body))
    assert given == param
    assert "not supported" in message


def test_a_name_and_a_reasoning_are_the_templates(http: TestClient, tokenizer: PreTrainedTokenizerFast, worker: Worker,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    template = "{% for m in messages %}{{ m.name }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(worker.tokenizer, "chat_template", template)
    message = {"role": "user", "content": "What?", "name": "Ada", "reasoning_content": "Hm. "}
    answer = chat(http, message)
    assert answer.json()["usage"]["prompt_tokens"] == len(tokenizer.encode("AdaHm. What?"))


# Bodies that are wrong


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_that_is_not_called_json(http: TestClient, kind: str) -> None:
    body = json.dumps({"model": "small", "prompt": "a"})
    answer = http.post(COMPLETIONS, content=body, headers={"Content-Type": kind} if kind else {})
    assert "Content-Type: application/json" in refusal(answer, 415)[1]
    assert not kind or kind in refusal(answer, 415)[1]


def test_a_compressed_body(http: TestClient) -> None:
    answer = http.post(COMPLETIONS, content=b"\x1f\x8b", headers={**JSON, "Content-Encoding": "gzip"})
    assert "'gzip'" in refusal(answer, 415)[1]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_a_body_that_is_called_json(http: TestClient, kind: str) -> None:
    body = json.dumps({"model": "small", "prompt": "a"})
    assert http.post(COMPLETIONS, content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "line 1 column"),
        (b"model=small&prompt=a", "line 1 column"),
        (b'{"model": "small", "prompt": "\xff"}', "must be UTF-8"),
        ('{"model": "small", "prompt": "é"}'.encode("utf-16"), "line 1 column"),
        (b'{"model": "small", "prompt": "\\ud800 a"}', "surrogate"),
        (b'{"model": "small", "prompt": "a", "stop": "\\udc00"}', "surrogate"),
        (b"[" * 100_000, "recursion limit"),
        (b'{"a":' * 100_000, "recursion limit"),
        (b"[]", 'must be one JSON object, as {"model": ...}, and is a list'),
        (b'"text"', "and is a string"),
        (b"null", "and is null"),
        (b"NaN", "and is a number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_is_no_request(http: TestClient, body: bytes, told: str) -> None:
    for path in (COMPLETIONS, CHAT):
        param, message = refusal(http.post(path, content=body, headers=JSON))
        assert param is None
        assert told in message


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
         "messages.0.content.0.type: parts of type 'image_url' are not supported: this server reads text alone"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio'"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages.0.content.0.type is missing"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text is missing"),
        ({"role": "user", "content": ["a"]}, "messages.0.content.0"),
        ({"role": "user", "content": 5}, "messages.0.content: give a text, or a list of parts"),
        ({"role": "user", "content": None}, "messages.0.content is missing, or null"),
        ({"role": "tool", "content": "a"}, "messages.0.role: Input should be 'system', 'developer', 'user' or"),
        ({"content": "a"}, "messages.0.role is missing"),
        ("hello", "messages.0"),
        ({str(n): n for n in range(200)}, "messages.0: 200 fields are more than there are"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_message_that_is_none(http: TestClient, message: Any, told: str) -> None:
    param, said = refusal(chat(http, message))
    assert param == "messages"
    assert told in said


# The model and its tokenizer


def test_a_token_that_the_model_does_not_have(http: TestClient, worker: Worker) -> None:
    worker.tokenizer.add_tokens(["<|beyond|>"])
    for text in ("<|beyond|>", "a <|beyond|> b"):
        param, message = refusal(complete(http, prompt=text))
        assert param == "prompt"
        assert f"'<|beyond|>', token {VOCAB}" in message
    assert refusal(chat(http, {"role": "user", "content": "<|beyond|>"}))[0] == "messages"
    assert refusal(complete(http, prompt=["a", "<|beyond|>"]))[1].startswith("prompt[1] holds")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('system comes first') }}", "TemplateError: system comes first"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x.y }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{% for i in range(10000000) %}a{% endfor %}", "Error"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails(
    http: TestClient, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, template: str,
    told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(worker.tokenizer, "chat_template", template)
    with caplog.at_level(logging.WARNING):
        param, message = refusal(chat(http, {"role": "user", "content": "a"}))
    assert param == "messages"
    assert "chat template of 'small' refuses" in message
    assert told in message
    assert not caplog.records
    assert complete(http).status_code == 200


# Sizes


def repeated(piece: str, times: int) -> str:
    """A JSON list, written fast."""
    return f"[{(piece + ',') * (times - 1)}{piece}]"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("prompt", json.dumps("ab " * 2_500_000), "7500000 characters,"),
        ("prompt", json.dumps(" " * 8_000_000), "8000000 characters,"),
        ("prompt", repeated("5", 2_000_000), "2000000 tokens, but the model's context is"),
        ("prompt", repeated("5", 4_000_000), "commas"),
        ("prompt", repeated(repeated("5", 1_000_000), 2), "prompt[0] has 1000000 tokens"),
        ("prompt", repeated("[]", 200_000), "choices at once"),
        ("prompt", repeated("[]", 2_600_000), "brackets"),
        ("prompt", repeated('{"a":1}', 100_000), "not a list with an object"),
        ("prompt", repeated('"a"', 1_500_000), "choices at once"),
        ("junk", repeated("[]", 200_000), "not supported"),
        ("junk", repeated("[]", 2_600_000), "brackets"),
        ("model", json.dumps("m" * 8_000_000), "does not exist"),
        ("stop", repeated(json.dumps("a" * 2_000_000), 4), "1024 characters"),
        ("stop", repeated("5", 2_000_000), "stop"),
    ],
    ids=lambda value: value[:20],
)
def test_a_large_request_is_refused(http: TestClient, name: str, value: str, told: str) -> None:
    body = {"model": '"small"', "prompt": '"a"'} | {name: value}
    content = "{" + ",".join(f'"{key}":{each}' for key, each in body.items()) + "}"
    answer = http.post(COMPLETIONS, content=content, headers=JSON)
    param, message = refusal(answer, 404 if name == "model" else 400)
    assert told in message
    assert param == (None if "commas" in message else name)


@pytest.mark.parametrize(
    "messages",
    [
        repeated(json.dumps({"role": "user", "content": "ab " * 2_500_000}), 1),
        repeated('{{"role":"user","content":[{}]}}'.format(",".join(['{"type":"text","text":"a"}'] * 200_000)), 1),
        repeated('{"role":"user","content":"a"}', 200_000),
        repeated("{}", 200_000),
        repeated("5", 2_000_000),
        repeated(json.dumps({"role": "user", "content": "a", **{str(n): None for n in range(200_000)}}), 1),
    ],
    ids=lambda messages: messages[:40],
)
def test_a_large_conversation_is_refused(http: TestClient, messages: str) -> None:
    answer = http.post(CHAT, content=f'{{"model":"small","messages":{messages}}}', headers=JSON)
    assert refusal(answer)[0] == "messages"


def test_the_longest_prompt_that_fits(http: TestClient, tokenizer: PreTrainedTokenizerFast) -> None:
    longest = max(tokenizer.get_vocab(), key=len).replace("Ġ", " ").replace("Ċ", "\n")
    [token] = tokenizer.encode(longest, add_special_tokens=False)
    assert complete(http, prompt=longest * (CONTEXT - 1), max_tokens=1).json()["usage"]["prompt_tokens"] <= CONTEXT - 1
    assert complete(http, prompt=[token] * (CONTEXT - 1), max_tokens=1).status_code == 200
    assert "2048" in refusal(complete(http, prompt=longest * 3 * CONTEXT, max_tokens=1))[1]
    assert refusal(complete(http, prompt=[token] * CONTEXT, max_tokens=1))[0] == "prompt"


# Values at their ends

NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [0, -0.0, 1, -1, 2, 1e-300, 5e-324, 1e-45, 1e-38, 1 - 1e-17, 1 + 1e-15, 1e300, float("inf"), float("-inf"),
         float("nan"), 2**31, 2**63, 2**63 - 1, -(2**63), -(2**63) - 1, 2**64, 2**70, 10**400, True, None, "1", [], {}]
    ),
    st.floats(),
    st.integers(),
)  # fmt: skip
PARAMETERS = ["temperature", "top_p", "seed", "max_tokens", "n", "logprobs", "top_k", "min_p", "presence_penalty",
              "frequency_penalty", "logit_bias", "best_of", "stop", "max_completion_tokens"]  # fmt: skip


@given(st.dictionaries(st.sampled_from(PARAMETERS), NUMBERS, min_size=1, max_size=3))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_answered_or_refused_by_name(http: TestClient, change: dict[str, Any]) -> None:
    body = {"model": "small", "prompt": "A list", "max_tokens": 2} | change
    answer = http.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
    if answer.status_code == 200:
        return
    param, _ = refusal(answer)
    assert param in change


@pytest.mark.parametrize("tiny", [1e-30, 1e-39, 1e-45, 1e-46, 1e-300, 5e-324, -0.0])
def test_a_temperature_next_to_nothing_takes_the_likeliest(http: TestClient, tiny: float) -> None:
    likeliest = complete(http, max_tokens=8).json()["choices"]
    assert complete(http, max_tokens=8, temperature=tiny, seed=3).json()["choices"] == likeliest
    assert complete(http, max_tokens=8, temperature=1, top_p=abs(tiny), seed=3).json()["choices"] == likeliest


# Keys


@pytest.fixture(scope="module")
def guarded(http: TestClient, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The same worker with a policy."""
    identities: dict[str, Any] = {
        "user": {"tokens": ["user"], "read": ["small"]},
        "other": {"tokens": ["other"], "read": ["large"]},
        "watcher": {"tokens": ["watcher"], "rights": ["metrics"]},
        "thrifty": {"tokens": ["thrifty"], "read": ["*"], "tokens_per_second": 1},
        "patient": {"tokens": ["patient"], "read": ["*"], "tokens_per_second": 1},
        "busy": {"tokens": ["busy"], "read": ["*"], "calls": 1},
    }
    worker.keys = Keys(write_policy(tmp_path_factory.mktemp("policy"), identities))
    app = build_app(worker)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    worker.keys.close()
    worker.keys = None


def with_key(guarded: TestClient, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key=key, max_retries=0, http_client=guarded)


ASKED: dict[str, Any] = {"model": "small", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}


def test_s8_a_key_is_asked_for_and_gives_what_the_policy_says(guarded: TestClient, http: TestClient) -> None:
    assert guarded.get("/healthz").status_code == 200
    for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Basic dXNlcjo="}):
        for answer in (guarded.get("/v1/models", headers=headers), guarded.post(COMPLETIONS, json={}, headers=headers)):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
    user, other, watcher = (with_key(guarded, key) for key in ("user", "other", "watcher"))
    expected = complete(http).json()["choices"][0]["text"]
    assert user.completions.create(**ASKED).choices[0].text == expected
    assert [model.id for model in user.models.list()] == ["small"]
    # A model that one may not use looks like one that is not there, and its name is not told.
    assert list(other.models.list()) == []
    for name in ("small", "absent"):
        with pytest.raises(openai.NotFoundError, match=f"the model '{name}' does not exist: .* none that your key"):
            other.completions.create(**ASKED | {"model": name})
        with pytest.raises(openai.NotFoundError, match="none that your key"):
            other.models.retrieve(name)
    with pytest.raises(openai.PermissionDeniedError, match="watcher has no right to use models"):
        watcher.completions.create(**ASKED)
    statuses = {key: guarded.get("/v1/worker", headers=bearer(key)).status_code for key in ("user", "watcher")}
    assert statuses == {"user": 403, "watcher": 200}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_s8_what_is_over_a_quota_is_429_and_says_for_how_long(guarded: TestClient, worker: Worker) -> None:
    assert worker.keys
    spent = worker.keys.caller("Bearer thrifty").quota
    assert spent
    now = time.monotonic()
    spent._clock = lambda: now  # nothing comes back while this runs
    thrifty = with_key(guarded, "thrifty")
    *chunks, last = thrifty.completions.create(stream=True, stream_options={"include_usage": True}, **ASKED)
    assert "".join(chunk.choices[0].text for chunk in chunks)
    with pytest.raises(openai.RateLimitError, match="quota of 1 tokens a second") as raised:
        thrifty.completions.create(**ASKED)
    # Of the prompt, and of what was generated.
    assert last.usage and last.usage.completion_tokens == 4
    assert int(raised.value.response.headers["retry-after"]) == last.usage.total_tokens
    one = worker.keys.caller("Bearer busy").quota
    assert one
    one.enter()
    with pytest.raises(openai.RateLimitError, match="busy has 1 calls open"):
        with_key(guarded, "busy").models.list()
    one.leave()
    for _ in range(3):  # each call gives its place back
        assert [model.id for model in with_key(guarded, "busy").models.list()] == ["small"]


def test_s8_a_request_that_finds_no_place_costs_no_tokens(guarded: TestClient, worker: Worker) -> None:
    engine, held = worker._engine, SamplingParams(1500, ignore_eos=True)
    requests = engine.submit_all([([5, 6], held, lambda event: None)] * engine.capacity)
    patient = with_key(guarded, "patient")
    try:
        for _ in range(3):
            with pytest.raises(openai.RateLimitError, match="run or wait already"):
                patient.completions.create(**ASKED)
    finally:
        for each in requests:
            each.cancel()
    until(lambda: not engine.running, "places")
    assert patient.completions.create(**ASKED).choices[0].text


def test_s8_json_has_a_bounded_depth(http: TestClient) -> None:
    deep = b'{"model": "small", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert "recursion limit" in refusal(http.post(COMPLETIONS, content=deep, headers=JSON))[1]


# The red team's table: what each of these may do, by the rights that it needs one of. None: whoever asks.
ROUTES: dict[tuple[str, str], tuple[str, ...] | None] = {
    ("GET", "/healthz"): None,
    ("GET", "/openapi.json"): (),
    ("POST", COMPLETIONS): ("read",),
    ("POST", CHAT): ("read",),
    ("GET", "/v1/models"): ("read",),
    ("GET", "/v1/models/small"): ("read",),
    ("GET", "/v1/worker"): ("admin", "metrics"),
    # What there is not is no secret, but is told to those alone who have a key.
    ("GET", "/v1/nothing"): (),
    ("GET", "/"): (),
    ("GET", "/docs"): (),
    ("DELETE", "/v1/models/small"): (),
    ("OPTIONS", COMPLETIONS): (),
    ("GET", "//healthz"): (),
    ("GET", "/healthz/"): (),
    ("GET", "/healthz%2F..%2Fv1/worker"): (),
}
# The answer to who has the right: what is not there is told as that.
LET_IN = dict.fromkeys(ROUTES, 200) | dict.fromkeys(list(ROUTES)[7:], 404)
LET_IN |= {("DELETE", "/v1/models/small"): 405, ("OPTIONS", COMPLETIONS): 405, ("GET", "/healthz/"): 307}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": "small", "prompt": [5], "max_tokens": 1},
    CHAT: {"model": "small", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}


@dataclass
class Asking:
    """Somebody who asks: what he shows, and his rights. None: nobody's."""

    shown: dict[str, str]
    rights: tuple[str, ...] | None = None
    model: str = "small"


Siege = tuple[TestClient, dict[str, Asking]]


@pytest.fixture(scope="module")
def besieged(http: TestClient, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """The same worker with a policy for all kinds of keys, and everybody who asks."""
    folder = tmp_path_factory.mktemp("besieged")
    ours, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    public = jwt.algorithms.ECAlgorithm.to_jwk(ours.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "k", "alg": "ES256"}]}))
    identities: dict[str, Any] = {
        "user": {"tokens": ["user"], "read": ["small"], "subjects": ["user"], "certificates": ["*"]},
        "other": {"tokens": ["other"], "read": ["large"]},
        "version": {"tokens": ["version"], "read": ["small@2"]},
        "watcher": {"tokens": ["watcher"], "rights": ["metrics"]},
        "admin": {"tokens": ["admin"], "rights": ["admin"]},
        "trainer": {"tokens": ["trainer"], "train": ["*"], "publish": ["*"]},
        "member": {"tokens": ["member"], "rights": ["member"]},
    }
    about = {"jwks": "jwks.json", "issuer": "https://i", "audience": "us"}
    now = int(time.time())

    def token(key: Any = ours, **other: Any) -> dict[str, str]:
        claims = {"iss": "https://i", "aud": "us", "sub": "user", "exp": now + 3600, **other}
        return bearer(jwt.encode(claims, key, "ES256", headers={"kid": "k"}))

    Authority.create().issue(folder / "own", ["spiffe://us/user"])
    proof = prove("testserver", (folder / "own/tls.crt").read_bytes(), (folder / "own/tls.key").read_bytes())
    asking = {
        "nothing": Asking({}),
        "a guess": Asking(bearer("guess")),
        "an empty key": Asking(bearer("")),
        "a digest of the policy": Asking(bearer(f"sha256:{digest_of('user')}")),
        "a key by another scheme": Asking({"Authorization": "Basic user"}),
        "a key without a scheme": Asking({"Authorization": "user"}),
        "a key where none is read": Asking({"X-API-Key": "user", "Cookie": "Authorization=Bearer user"}),
        "the words of a process of the service": Asking({"embedding-caller": "user"}),
        "a proof, which counts at the service": Asking(bearer(proof)),
        "a web token of another key": Asking(token(theirs)),
        "an expired web token": Asking(token(exp=now - 3600)),
        "a web token for others": Asking(token(aud="them")),
        "a web token": Asking(token(), ("read",)),
        "a key of user": Asking(bearer("user"), ("read",)),
        "a key by a small scheme": Asking({"Authorization": "bearer user"}, ("read",)),
        "a key of other": Asking(bearer("other"), ("read",), "large"),
        "a key of version": Asking(bearer("version"), ("read",), "small@2"),
        "a key of watcher": Asking(bearer("watcher"), ("metrics",)),
        "a key of admin": Asking(bearer("admin"), ("admin",)),
        "a key of trainer": Asking(bearer("trainer"), ("train", "publish")),
        "a key of member": Asking(bearer("member"), ("member", "read")),
    }
    keys = worker.keys
    worker.keys = Keys(write_policy(folder, identities, about))
    with TestClient(build_app(worker), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client, asking
    worker.keys.close()
    worker.keys = keys


def expected(route: tuple[str, str], asking: Asking) -> int:
    """The status of an answer, by the table."""
    needed = ROUTES[route]
    if needed is None:
        return 200
    if asking.rights is None:
        return 401
    if needed and not set(needed) & set(asking.rights):
        return 403
    of_the_model = needed and route[1] in (*BODIES, "/v1/models/small")
    return 404 if of_the_model and asking.model != "small" else LET_IN[route]


def test_s8_every_route_is_answered_to_whom_the_table_says_and_to_nobody_else(
    besieged: Siege,
) -> None:
    client, everybody = besieged
    application: Any = client.app
    paths = {
        (method, route.path.replace("{name:path}", "small"))
        for route in application.routes
        for method in route.methods - {"HEAD"}
    }
    assert paths <= ROUTES.keys()  # none was forgotten
    cells, wrong = 0, []
    for route in ROUTES:
        method, path = route
        body = json.dumps(BODIES[path]).encode() if method == "POST" else None
        for name, asking in everybody.items():
            headers = {**asking.shown, **(JSON if body else {})}
            answer = client.request(method, f"http://testserver{path}", content=body, headers=headers)
            cells += 1
            if answer.status_code != expected(route, asking):
                wrong.append((route, name, answer.status_code, expected(route, asking)))
            if answer.status_code in (401, 403):
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                assert "small" not in answer.text, (route, name)
    assert cells == len(ROUTES) * len(everybody) and not wrong, wrong


def test_s8_a_key_that_is_taken_back_counts_no_more(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = {"tokens": ["one"], "read": ["*"]}, {"tokens": ["other"], "read": ["*"]}
    monkeypatch.setattr(worker, "keys", Keys(write_policy(tmp_path, {"one": one, "other": other})))
    assert worker.keys
    with TestClient(build_app(worker), raise_server_exceptions=False) as client:
        for key in ("one", "other"):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        write_policy(tmp_path, {"other": other})
        worker.keys._guard.look()
        assert client.get("/v1/models", headers=bearer("one")).status_code == 401
        assert client.get("/v1/models", headers=bearer("other")).status_code == 200
        write_policy(tmp_path, {"other": {**other, "read": []}})
        worker.keys._guard.look()
        assert client.get("/v1/models", headers=bearer("other")).status_code == 403
    worker.keys.close()


# Traces


def test_a_request_is_followed_down_to_the_shards(
    worker: Worker, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's header, the passes of the model, their lookups, and what shards answer."""
    monkeypatch.setattr(worker._client, "_near", None)
    monkeypatch.setattr(worker, "keys", None)
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with tracing_here(collector), TestClient(build_app(worker)) as http:
        headers = {tracing.TRACEPARENT: f"00-{trace}-{caller}-01"}
        body = {"model": "small", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
        assert http.post(COMPLETIONS, json=body, headers=headers).status_code == 200
        tracing.stop()  # with what was not sent yet

    def whole() -> list[Span]:
        spans = collector.of(trace)
        asked = {span.id for span in spans if span.kind == "CLIENT" and not span.failed}
        answered = {span.parent for span in spans if span.service == "embedding-shard"}
        return spans if asked and asked <= answered else []

    spans = until(whole, "all spans")
    by_id = {span.id: span for span in spans}

    def way(span: Span) -> list[str]:
        """Names from the first span to this one."""
        return [*(way(by_id[span.parent]) if span.parent in by_id else ()), span.name]

    [request] = [span for span in spans if span.parent == caller]
    assert (request.kind, request.attributes["http.response.status_code"]) == ("SERVER", 200)
    answers = [span for span in spans if span.service == "embedding-shard"]
    assert {tuple(way(answer)) for answer in answers} == {
        (f"POST {COMPLETIONS}", "forward", "lookup", "Lookup", "Lookup")
    }
    assert len([span for span in spans if span.name == "forward"]) == 3
    assert all(span.attributes["embedding.table"] for span in answers)
