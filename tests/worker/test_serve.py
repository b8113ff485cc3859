"""`model-worker serve` as users run it: one real process, asked over HTTP with the openai package."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from page.prometheus import board_queries, need_prometheus, prometheus
from prometheus_client.parser import text_string_to_metric_families
from small_model import CONTEXT, VOCAB
from support.cluster import Up, free_port, proxies_of_nobody, until
from test_engine import without_a_cache
from transformers import LongcatFlashForCausalLM, PreTrainedTokenizerFast

from embedding_service.machine import join_address

pytestmark = [pytest.mark.service, pytest.mark.heavy]

PROMPT = "The import statement, naïvely"
MAX_BATCH, MAX_QUEUE = 2, 3


class Server:
    """`model-worker serve` in a process of its own, with proxies for the web that are not there."""

    def __init__(self, log: Path, checkpoint: Path, embeddings: str, *options: str, host: str = "127.0.0.1") -> None:
        self.log = log
        self.port = free_port()
        self.url = f"http://{join_address(host, self.port)}"
        command = [str(Path(sys.executable).with_name("model-worker")), "serve", str(checkpoint)]
        with log.open("wb") as output:
            self.popen = psutil.Popen(
                [*command, f"--embeddings={embeddings}", f"--host={host}", f"--port={self.port}", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ray's own pace of metrics is ten seconds. Nobody is at these proxies: Ray must not ask them either.
                env=os.environ | proxies_of_nobody() | {"RAY_metrics_report_interval_ms": "1000"},
            )

    def wait_until_ready(self) -> None:
        def printed() -> bool:
            assert self.popen.poll() is None, self.log.read_text()
            return " ready at " in self.log.read_text()

        until(printed, "the server")

    def metrics_url(self) -> str:
        return re.findall(r"metrics at (\S+)\)", self.log.read_text())[0]

    def family(self) -> list[psutil.Process]:
        """The process and all that came from it."""
        return [self.popen, *self.popen.children(recursive=True)]

    def end(self) -> None:
        """Leave nothing of it."""
        if not self.popen.is_running():
            return
        family = self.family()
        self.popen.terminate()
        for process in psutil.wait_procs(family, timeout=20)[1]:
            process.kill()

    def info(self) -> dict[str, int]:
        return httpx.get(f"{self.url}/v1/worker", timeout=60).json()


@pytest.fixture(scope="module")
def server(model_folder: Path, embeddings: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = [f"--max-batch={MAX_BATCH}", f"--max-queue={MAX_QUEUE}", "--drain-seconds=250"]
    running = Server(log, model_folder, embeddings, *options)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)


@pytest.fixture(scope="module")
def expected(model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str]:
    """Greedy tokens after PROMPT and their text, from the tables in this process, without a cache."""
    tokens = without_a_cache(model, tokenizer.encode(PROMPT), 24)
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def half_sent(server: Server) -> Iterator[list[socket.socket]]:
    """More requests than the replica has places, each without its end."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    body = b'Content-Length: 100\r\n\r\n{"model":'
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(140)]
    for number, connection in enumerate(connections):
        connection.settimeout(60)
        connection.sendall(head + (body if number % 10 else b"X-Half: "))
    yield connections
    for connection in connections:
        connection.close()


# Answers


def test_half_sent_requests_take_no_place(half_sent: list[socket.socket], client: openai.OpenAI) -> None:
    assert client.completions.create(model="small", prompt=PROMPT, max_tokens=4).choices[0].text


def test_completion(client: openai.OpenAI, expected: tuple[list[int], str], tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, text = expected
    answer = client.completions.create(model="small", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == "small"
    assert [choice.text for choice in answer.choices] == [text]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))  # type: ignore[union-attr]
    assert answer.usage.completion_tokens == len(tokens)  # type: ignore[union-attr]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens  # type: ignore[union-attr]


def test_completion_of_token_ids(
    client: openai.OpenAI, expected: tuple[list[int], str], tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = client.completions.create(
        model="small", prompt=tokenizer.encode(PROMPT), max_tokens=24, temperature=0, n=1, logprobs=None, user="me"
    )
    assert answer.choices[0].text == expected[1]


def test_streamed_completion(client: openai.OpenAI, expected: tuple[list[int], str]) -> None:
    chunks = list(
        client.completions.create(
            model="small",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *pieces, usage = chunks
    assert len(pieces) > 5
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected[1]
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(expected[0])  # type: ignore[union-attr]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_string(client: openai.OpenAI, expected: tuple[list[int], str]) -> None:
    text = expected[1]
    stop = text[6:9]
    options: dict[str, Any] = {
        "model": "small",
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "stop": ["never seen", stop],
    }
    answer = client.completions.create(**options)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    assert streamed == text[: text.index(stop)]


def test_chat(client: openai.OpenAI, model: LongcatFlashForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a list?"}]},
    ]
    prompt = tokenizer.encode("<system>Be brief.\n<user>What is a list?\n<assistant>", add_special_tokens=False)
    text = tokenizer.decode(without_a_cache(model, prompt, 12), skip_special_tokens=True)
    options: dict[str, Any] = {"model": "small", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)

    chunks = list(client.chat.completions.create(**options, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_sampling_with_a_seed(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        options: dict[str, Any] = {
            "model": "small",
            "prompt": PROMPT,
            "max_tokens": 20,
            "temperature": 0.9,
            "top_p": 0.9,
        }
        return client.completions.create(**options, seed=seed).choices[0].text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_several_choices(client: openai.OpenAI, expected: tuple[list[int], str]) -> None:
    """Choice i is what a request of its own with the seed plus i gives; a stream tells them apart by index."""
    options: dict[str, Any] = {"model": "small", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.9}
    alone = [client.completions.create(**options, seed=seed).choices[0].text for seed in (5, 6, 7)]
    answer = client.completions.create(**options, seed=5, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == alone
    assert answer.usage.completion_tokens <= 60
    pieces = [chunk.choices[0] for chunk in client.completions.create(**options, seed=5, n=3, stream=True)]
    assert ["".join(piece.text for piece in pieces if piece.index == index) for index in range(3)] == alone
    assert sorted(piece.index for piece in pieces if piece.finish_reason) == [0, 1, 2]

    messages = [{"role": "user", "content": "What is a list?"}]
    chat: dict[str, Any] = {"model": "small", "messages": messages, "max_tokens": 8, "seed": 5, "n": 2}
    whole = [choice.message.content for choice in client.chat.completions.create(**chat).choices]
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, stream=True)]
    assert [delta.delta.role for delta in deltas].count("assistant") == 2
    assert ["".join(d.delta.content or "" for d in deltas if d.index == index) for index in range(2)] == whole


@pytest.fixture(scope="module")
def logprobs(
    model: LongcatFlashForCausalLM, expected: tuple[list[int], str], tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Log probabilities [T, V] at the places of the expected tokens."""
    prompt = tokenizer.encode(PROMPT)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[0]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_log_probabilities_of_a_completion(
    client: openai.OpenAI,
    expected: tuple[list[int], str],
    logprobs: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    options: dict[str, Any] = {"model": "small", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 3}
    told = client.completions.create(**options).choices[0].logprobs
    spelled = [tokenizer.decode([token]) for token in expected[0]]
    assert told.tokens == spelled
    assert told.token_logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(logprobs, expected[0], strict=True)], abs=1e-4
    )
    assert told.text_offset == [len("".join(spelled[:number])) for number in range(len(spelled))]  # type: ignore[arg-type]
    for place, row in zip(told.top_logprobs, logprobs, strict=True):
        assert list(place.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)

    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece.tokens] == spelled
    assert [offset for piece in pieces for offset in piece.text_offset] == told.text_offset
    none = client.completions.create(**options | {"logprobs": 0}).choices[0].logprobs
    assert (none.token_logprobs, none.top_logprobs[0]) == (pytest.approx(told.token_logprobs, abs=1e-4), {})


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    options: dict[str, Any] = {"model": "small", "messages": messages, "max_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for place in content:
        first, second = place.top_logprobs
        assert (first.token, first.logprob) == (place.token, place.logprob)
        assert second.logprob <= place.logprob <= 0
        assert place.bytes is None or bytes(place.bytes).decode(errors="replace") == place.token
    chunks = [c.choices[0] for c in client.chat.completions.create(**options, logprobs=True, stream=True)]
    streamed = [place for chunk in chunks if chunk.logprobs for place in chunk.logprobs.content]
    assert [place.token for place in streamed] == [place.token for place in content]
    assert {len(place.top_logprobs) for place in streamed} == {0}
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_concurrent_requests_do_not_mix(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        answer = client.completions.create(
            model="small", prompt=f"{number} is a number", max_tokens=10 + 5 * number, temperature=0
        )
        return answer.choices[0].text

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def test_models(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "model-worker"
    with pytest.raises(openai.NotFoundError, match=r"'gpt'.*'small'"):
        client.models.retrieve("gpt")


# Refusals


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": MAX_BATCH + MAX_QUEUE + 1}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"prompt": ["one", 2]}, "prompt"),
        ({"prompt": [1, 2, VOCAB]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "word " * CONTEXT}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"stream_options": {"include_usage": True}}, None),
    ],
    ids=str,
)
def test_bad_parameters_are_named(server: Server, change: dict[str, object], param: str | None) -> None:
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 4} | change
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, None),
    ],
    ids=str,
)
def test_bad_chat_parameters_are_named(server: Server, change: dict[str, object], param: str | None) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}]} | change
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_other_bad_requests(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist: this server serves 'small'"):
        client.completions.create(model="gpt", prompt=PROMPT)
    headers = {"Content-Type": "application/json"}
    not_json = httpx.post(f"{server.url}/v1/completions", content=b"{", headers=headers, timeout=60)
    assert (not_json.status_code, not_json.json()["error"]["code"]) == (400, "json_invalid")
    assert "error" in httpx.get(f"{server.url}/v2", timeout=60).json()
    assert httpx.get(f"{server.url}/v1/completions", timeout=60).status_code == 405


@pytest.mark.parametrize("told", [True, False], ids=["length told", "chunked"])
def test_a_body_that_is_too_large(server: Server, told: bool) -> None:
    piece = b"x" * 2**20
    content = piece * 9 if told else (piece for _ in range(9))
    answer = httpx.post(f"{server.url}/v1/completions", content=content, timeout=120)
    assert answer.status_code == 413
    assert "8 MiB" in answer.json()["error"]["message"]


def test_a_full_queue_answers_429(server: Server) -> None:
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 150, "temperature": 0}
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=180) for _ in range(12)]
    answers = [answer.result() for answer in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    served = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
    assert refused
    assert len(served) == 1
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert {answer.json()["error"]["type"] for answer in refused} == {"rate_limit_error"}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels(server: Server, stream: bool) -> None:
    before = server.info()["generated_tokens"]
    body = {"model": "small", "prompt": PROMPT, "max_tokens": CONTEXT - 100, "temperature": 1, "seed": 7}
    content = json.dumps(body | {"stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head % len(content) + content)
        until(lambda: server.info()["generated_tokens"] > before, "the first tokens")
    until(lambda: server.info()["running"] == 0, "the request to leave")
    assert server.info()["generated_tokens"] - before < CONTEXT - 100


# The process


def test_its_start_told_what_it_waited_for(server: Server, model_folder: Path, embeddings: str) -> None:
    lines = server.log.read_text().splitlines()
    phases = (
        "loading torch and transformers",
        f"checking {model_folder}",
        f"asking the embedding service at {embeddings}",
        "loading ray",
        "starting Ray",
        "starting Ray Serve and its HTTP server",
        f"loads {model_folder} and connects to {embeddings}",
        " ready at ",
    )
    said = iter(lines)
    assert [phase for phase in phases if not any(phase in line for line in said)] == []


def test_it_holds_no_tables(server: Server, client: openai.OpenAI, model_folder: Path) -> None:
    client.completions.create(model="small", prompt=PROMPT, max_tokens=5)
    info = server.info()
    dense = (model_folder / "model-00001-of-00002.safetensors").stat().st_size
    assert info["table_bytes"] == 0
    assert 0 < info["parameter_bytes"] <= dense
    assert info["remote_table_values"] * 4 > 100_000
    assert info["anonymous_bytes"] > 0
    assert info["lookups"] > 0
    assert info["looked_up_tokens"] >= info["lookups"]
    assert info["lookup_wait_seconds"] > 0
    replica = psutil.Process(info["pid"])
    assert replica.nice() == psutil.Process().nice()


def test_metrics(server: Server, client: openai.OpenAI) -> None:
    """What Prometheus reads: the counts that the worker itself tells, in time."""

    def near() -> bool:
        client.completions.create(model="small", prompt=PROMPT, max_tokens=5)
        return server.info()["near_rows"] > 0

    until(near, "near rows")
    info = server.info()

    def scrape() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(server.metrics_url(), timeout=60).text)
        samples = [sample for family in families for sample in family.samples if "model_worker" in sample.name]
        assert all(sample.labels["replica"] for sample in samples)
        return {sample.name.removeprefix("ray_model_worker_"): sample.value for sample in samples}

    names = ("requests", "prompt_tokens", "generated_tokens", "looked_up_tokens", "near_rows")
    expected = {f"{name}_total": info[name] for name in names}
    expected |= {"batch_requests": 0, "queue_requests": 0, "lookup_wait_seconds_count": info["lookups"]}
    until(lambda: expected.items() <= scrape().items(), f"{expected}")
    seen = scrape()
    assert 0 < seen["time_to_first_token_seconds_count"] <= info["requests"]
    assert seen["lookup_wait_seconds_sum"] > 0


def test_every_panel_of_the_workers_board_has_data(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    need_prometheus()
    queries = board_queries()["workers"]
    rows = [query for query in queries if "_rows_total" in query or "cache_hits" in query]  # it may have no wired ones
    busy = {"model": "small", "prompt": PROMPT, "max_tokens": 64, "n": MAX_BATCH + MAX_QUEUE}

    def refused() -> bool:
        with ThreadPoolExecutor(2) as pool:
            posted = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=busy, timeout=180) for _ in range(2)]
        return any(each.result().status_code == 429 for each in posted)

    until(refused, "a request that is refused")
    address = server.metrics_url().removeprefix("http://").removesuffix("/metrics")
    with prometheus(tmp_path / "prometheus", {"ray": [address]}, []) as running:

        def without_data() -> list[str]:
            client.completions.create(model="small", prompt=PROMPT, max_tokens=4)
            missing = [query for query in queries if not running.ask(query)]
            return [query for query in missing if query not in rows or len(rows) == len(set(rows) & set(missing))]

        until(lambda: not without_data(), "data of every panel")


def test_nothing_listens_beyond_loopback(server: Server) -> None:
    listening = [
        connection.laddr
        for process in server.family()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert server.port in {address.port for address in listening}
    assert not [address for address in listening if address.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]


def test_a_service_that_is_away_answers_503_until_it_is_back(
    server: Server, client: openai.OpenAI, tables: Up, expected: tuple[list[int], str]
) -> None:
    assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
    started = threading.Event()
    broken: list[Exception] = []

    def read_a_long_stream() -> None:
        try:
            for _ in client.completions.create(
                model="small", prompt=PROMPT, max_tokens=CONTEXT - 100, stream=True, seed=7
            ):
                started.set()
        except openai.APIError as error:
            broken.append(error)

    reader = threading.Thread(target=read_a_long_stream)
    reader.start()
    assert started.wait(180)
    tables.end()
    try:
        reader.join(180)
        assert [("embedding service" in str(error)) for error in broken] == [True]
        assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 503
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "small", "prompt": PROMPT}, timeout=60)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]
        assert "embedding service" in answer.json()["error"]["message"]
    finally:
        tables.restart()
    until(lambda: httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200, "health")
    again = client.completions.create(model="small", prompt=PROMPT, max_tokens=24, temperature=0)
    assert again.choices[0].text == expected[1]


def test_half_sent_requests_are_408(half_sent: list[socket.socket]) -> None:
    assert {connection.recv(65536).split(maxsplit=2)[1] for connection in half_sent} == {b"408"}


def _refusal(server: Server) -> dict[str, Any] | None:
    answer = httpx.get(f"{server.url}/v1/models", timeout=60)
    return answer.json() if answer.status_code == 503 and answer.headers["Retry-After"] else None


def test_sigterm_ends_everything_once_what_runs_has_ended(server: Server) -> None:
    family = server.family()
    assert len(family) > 5  # Ray is there
    body = {"model": "small", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=280)
        until(lambda: server.info()["running"] == 1, "the request to run")
        server.popen.send_signal(signal.SIGTERM)
        refused = until(lambda: _refusal(server), "new requests to be refused")
        assert "no replica of this worker" in refused["error"]["message"]
        answer = running.result()
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 1500
    assert server.popen.wait(180) == 0
    assert psutil.wait_procs(family, timeout=60)[1] == []
    lines = server.log.read_text().splitlines()
    assert [line for line in lines if "Traceback" in line] == []
