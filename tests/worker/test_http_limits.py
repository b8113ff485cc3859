"""What clients may take of a server, on real connections: uvicorn as Ray Serve's proxy runs it, with small limits."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from support.cluster import until

from embedding_service.security.authority import Authority
from model_worker import http_limits
from model_worker.http_limits import MAX_BODY_BYTES, MAX_HEAD_BYTES, GuardedHttp, WholeBodies, guard_proxy

pytestmark = pytest.mark.slow

MOST = 8
SECONDS, PATIENCE = 2.0, 180.0
HEAD = b"POST / HTTP/1.1\r\nHost: test\r\n"


class Server:
    """An application that tells what it was given, behind the limits, on a thread of its own."""

    def __init__(self, seconds: float, **tls: Any) -> None:
        self.running = 0
        self.cut_off = threading.Event()
        bodies, answers = guard_proxy()
        GuardedHttp.most = MOST
        app = bodies.cls(self.app, *bodies.args, seconds=seconds, held_bytes=2 * MAX_BODY_BYTES)  # type: ignore[arg-type]
        app = answers.cls(app)  # type: ignore[call-arg]
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, lifespan="off", log_level="critical", access_log=False, **tls
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        until(lambda: self._server.started, "the server")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        try:
            message = await receive()
            if scope["path"] == "/hold":
                while (await receive())["type"] != "http.disconnect":
                    pass
            elif scope["path"] == "/flood":
                await StreamingResponse(self.flood())(scope, receive, send)
            elif scope["path"] == "/unread":
                await self.answer_till_a_rest_is_unread(send)
            elif scope["path"] == "/lost":
                pass
            elif scope["path"] == "/lost-in-the-middle":
                headers = [(b"content-type", b"text/event-stream")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            elif scope["path"].endswith("/plain-404"):
                await PlainTextResponse("no such path", 404)(scope, receive, send)
            elif scope["path"] == "/plain-408":
                await PlainTextResponse("too slow", 408)(scope, receive, send)
            elif scope["path"] == "/json-404":
                await JSONResponse({"told": "by the application"}, 404)(scope, receive, send)
            else:
                told = {"bytes": len(message["body"]), "more": message["more_body"]}
                if scope["path"] == "/headers":
                    told = {name.decode(): value.decode() for name, value in scope["headers"]}
                await JSONResponse(told)(scope, receive, send)
        finally:
            self.running -= 1

    async def flood(self) -> Any:
        try:
            while True:
                yield b"x" * 2**16
                await asyncio.sleep(0)
        finally:
            self.cut_off.set()

    @property
    def connections(self) -> list[Any]:
        return list(self._server.server_state.connections)

    async def answer_till_a_rest_is_unread(self, send: Send) -> None:
        """To the only connection. The rest is too small to stop the application."""
        [connection] = self.connections
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not connection.transport.get_write_buffer_size():
            await send({"type": "http.response.body", "body": b"x" * 8000, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=180)
        connection.sendall(sent)
        return connection

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Config", uvicorn.Config)
        patch.setattr(GuardedHttp, "most", MOST)
        patch.setattr(http_limits, "HEAD_SECONDS", PATIENCE)
        running = Server(PATIENCE)
        yield running
        running.close()


@pytest.fixture
def hasty(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One that waits for nobody longer than SECONDS."""
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", SECONDS)
    monkeypatch.setattr(http_limits, "UNREAD_SECONDS", SECONDS)
    running = Server(SECONDS)
    yield running
    running.close()


def told(connection: socket.socket) -> tuple[int, Any]:
    """The status and the body of an answer whose connection the server then closes; (0, None) if it just closes it."""
    got = b""
    with connection:
        try:
            while piece := connection.recv(65536):
                got += piece
        # It was closed while something of ours was under way.
        except ConnectionError:
            pass
    if not got:
        return 0, None
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def trickle(connection: socket.socket, piece: bytes) -> None:
    """Send a piece again and again until the server has had enough."""

    def run() -> None:
        try:
            while True:
                connection.sendall(piece)
                time.sleep(0.1)
        except OSError:
            pass

    threading.Thread(target=run, daemon=True).start()


def test_a_whole_request_comes_in_one_piece(server: Server) -> None:
    with httpx.Client(timeout=120) as client:
        for size in (0, 10, 200_000, MAX_BODY_BYTES, 1, 100_000, 2):
            answer = client.post(server.url, content=b"x" * size)
            assert answer.json() == {"bytes": size, "more": False}
        chunked = client.post(server.url, content=(b"x" * 1000 for _ in range(50)))
        assert chunked.json() == {"bytes": 50_000, "more": False}


@pytest.mark.parametrize(
    ("sent", "then"),
    [
        (HEAD + b"Content-Length: 100\r\n\r\nhalf", b""),
        (HEAD + b"Content-Length: 100000\r\n\r\n", b"x"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["half", "slow", "chunks without end"],
)
def test_a_body_that_does_not_come_is_408(hasty: Server, sent: bytes, then: bytes) -> None:
    connection = hasty.connect(sent)
    if then:
        trickle(connection, then)
    else:
        time.sleep(0.2)
        assert hasty.running == 0
    status, body = told(connection)
    assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert "not whole after 2 s" in body["error"]["message"]


def test_headers_that_do_not_come_are_408(hasty: Server) -> None:
    connection = hasty.connect(HEAD + b"X-Slow: ")
    trickle(connection, b"x")
    status, body = told(connection)
    assert status == 408
    assert "headers" in body["error"]["message"]


def test_a_connection_without_a_request_is_closed(hasty: Server) -> None:
    assert told(hasty.connect()) == (0, None)


def test_headers_without_end_are_431(server: Server) -> None:
    connection = server.connect(HEAD)
    line = b"X-Filler: " + b"x" * 1000 + b"\r\n"
    for _ in range(MAX_HEAD_BYTES // len(line) + 2):
        connection.sendall(line)
    status, body = told(connection)
    assert status == 431
    assert "64 KiB" in body["error"]["message"]


def test_whole_headers_that_are_too_large_are_431(server: Server) -> None:
    connection = server.connect(HEAD + b"X-Filler: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n")
    assert told(connection)[0] == 431


HOLD = b"POST /hold HTTP/1.1\r\nHost: test\r\n"
LAST_CHUNK = b"0\r\n"


@pytest.mark.parametrize(
    ("first", "piece"),
    [
        (HOLD + b"Transfer-Encoding: chunked\r\n\r\n" + LAST_CHUNK, b"a:b\r\n" * 1000),
        (HOLD + b"Transfer-Encoding: chunked\r\n\r\n" + LAST_CHUNK, b"x" * 5000),
        (HOLD + b"Content-Length: 0\r\n\r\n" + HEAD, b"a:b\r\n" * 1000),
        (HOLD + b"Content-Length: 0\r\n\r\n" + HEAD + b"X: ", b"x" * 5000),
        (HOLD + b"Content-Length: 0\r\n\r\nPOST /", b"x" * 5000),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n850000\r\n" + b"x" * 0x850000 + b"\r\n" + LAST_CHUNK,
            b"a:b\r\n" * 999,
        ),
    ],
    ids=["trailers", "a trailer", "next headers", "next header", "next url", "trailers of a refused body"],
)
def test_headers_without_end_after_a_request_are_cut_off(server: Server, first: bytes, piece: bytes) -> None:
    connection = server.connect(first)
    with pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(piece)
            time.sleep(0.001)
    connection.close()
    until(lambda: server.running == 0, "the request to be given up")


@pytest.mark.parametrize("length", [b"Content-Length: 9000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_is_413_and_not_read_for_ever(server: Server, length: bytes) -> None:
    connection = server.connect(HEAD + length + b"\r\n\r\n")
    chunk = b"%x\r\n%s\r\n" % (2**16, b"x" * 2**16) if b"chunked" in length else b"x" * 2**16
    sent = 0
    with pytest.raises(ConnectionError):
        while True:
            connection.sendall(chunk)
            sent += 2**16
            assert sent < 64 * MAX_BODY_BYTES
    # The server goes on for others, and a client that ends its body in time reads the answer.
    answer = httpx.post(server.url, content=b"x" * (MAX_BODY_BYTES + 1), timeout=120)
    assert answer.status_code == 413
    assert "8 MiB" in answer.json()["error"]["message"]


def test_headers_that_serve_would_obey_or_choke_on_are_left_out(server: Server) -> None:
    headers = [
        (b"X-Request-ID", b"mine"),
        (b"X-Request-Timeout-Seconds", b"0.001"),
        (b"X-Request-Disconnect-Disabled", b"?1"),
        (b"Serve_Multiplexed_Model_Id", b"\xff"),
    ]
    seen = httpx.get(f"{server.url}/headers", headers=headers, timeout=120).json()
    assert seen["x-request-id"] == "mine"
    assert (
        not {"x-request-timeout-seconds", "x-request-disconnect-disabled", "serve_multiplexed_model_id"} & seen.keys()
    )


def test_all_bodies_together_are_bounded(server: Server) -> None:
    """In bytes: two that are held fill the bound, and their end makes room."""
    content = b"x" * (MAX_BODY_BYTES - 1)
    head = b"POST /hold HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(content)
    holding = [server.connect(head + content) for _ in range(2)]
    until(lambda: server.running == 2, "both to be held")
    refused = httpx.post(server.url, content=b"abc", timeout=120)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.json()["error"]["code"] == "server_busy"
    for connection in holding:
        connection.close()
    until(lambda: server.running == 0, "both to be given up")
    assert httpx.post(server.url, content=content, timeout=120).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\nhalf"], ids=["nothing", "head", "body"]
)
def test_a_full_server_takes_the_new_for_the_one_that_waits_longest(server: Server, sent: bytes) -> None:
    idle = [server.connect(sent) for _ in range(MOST)]
    with httpx.Client(timeout=120) as client:
        assert client.post(server.url, content=b"abc").status_code == 200
        assert told(idle[0]) == (0, None)
    for connection in idle[1:]:
        connection.close()


def test_a_server_full_of_requests_refuses_a_connection(server: Server) -> None:
    held = [server.connect(b"POST /hold HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n") for _ in range(MOST)]
    until(lambda: server.running == MOST, "all to be held")
    status, body = told(server.connect())
    assert status == 503
    assert "connections" in body["error"]["message"]
    for connection in held:
        connection.close()
    until(lambda: server.running == 0, "all to be given up")
    assert httpx.post(server.url, content=b"abc", timeout=120).status_code == 200


def test_a_client_that_reads_nothing_is_cut_off(hasty: Server) -> None:
    connection = hasty.connect(b"POST /flood HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
    assert hasty.cut_off.wait(180)
    connection.close()


UNREAD = b"POST /unread HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"


def test_a_client_that_does_not_read_an_answers_end_is_cut_off(hasty: Server) -> None:
    connection = hasty.connect(UNREAD)
    until(lambda: hasty.connections, "the connection")
    until(lambda: not hasty.connections, "it to be cut off")
    connection.close()


def test_an_answer_that_is_not_read_makes_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    until(lambda: not server.connections, "earlier connections to end")
    connection = server.connect(UNREAD)
    until(lambda: [each for each in server.connections if each.transport.is_closing()], "its time to be over")
    monkeypatch.setattr(GuardedHttp, "most", 1)
    for _ in range(2):
        assert httpx.post(server.url, content=b"abc", headers={"Connection": "close"}, timeout=120).status_code == 200
        until(lambda: not server.connections, "the connection to end")
    connection.close()


def test_a_replica_that_is_gone_is_503_in_openais_form(server: Server) -> None:
    answer = httpx.post(f"{server.url}/lost", timeout=60)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("server_error", "unavailable")
    assert "the replica was gone" in answer.json()["error"]["message"]


def test_a_stream_whose_replica_is_gone_ends_with_an_error(server: Server) -> None:
    answer = httpx.post(f"{server.url}/lost-in-the-middle", timeout=60)
    first, last = answer.text.rstrip().split("\n\n")
    assert first == "data: {}"
    assert "the replica was gone" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_errors_of_ray_serve_are_in_openais_form(server: Server) -> None:
    told = {path: httpx.get(f"{server.url}{path}", timeout=60) for path in ("/plain-404", "/plain-408", "/json-404")}
    assert [answer.status_code for answer in told.values()] == [503, 408, 404]
    assert "no replica of this worker" in told["/plain-404"].json()["error"]["message"]
    assert told["/plain-404"].headers["Retry-After"] == "1"
    assert told["/plain-408"].json()["error"]["message"] == "too slow"
    assert told["/json-404"].json() == {"told": "by the application"}
    assert httpx.get(f"{server.url}/-/plain-404", timeout=60).text == "no such path"


def test_the_client_that_goes_while_it_sends() -> None:
    """The application is not called, and what was held is given back."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b"abc", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []
    calls: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(scope)

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    limited: Callable[..., Any] = WholeBodies(app)
    asyncio.run(limited({"type": "http", "headers": []}, receive, send))
    assert calls == sent == []
    assert limited._held == 0  # type: ignore[attr-defined]


@contextmanager
def connections_of_another_process(port: int, count: int) -> Iterator[None]:
    """That many are tried, and stay open until the end."""
    program = (
        "import contextlib, socket, sys\n"
        "port, count = map(int, sys.argv[1:])\n"
        "kept = []\n"
        "for _ in range(count):\n"
        "    with contextlib.suppress(OSError):\n"
        "        kept.append(socket.create_connection(('127.0.0.1', port), 5))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdin
        assert child.stdout.readline() == b"open\n"
        yield
        child.stdin.close()


def next_file() -> int:
    """The number of the next file that is opened here; -1 where there is none left."""
    try:
        number = os.dup(0)
    except OSError:
        return -1
    os.close(number)
    return number


def test_a_server_at_its_limit_of_open_files_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cap of connections is half of that, but the process may have more open besides."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(GuardedHttp, "most", 1000)
    few = next_file() + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with connections_of_another_process(server.port, 200):
            until(lambda: next_file() == -1, "all files to be used")
        until(lambda: 0 <= next_file() < few - 20, "files to be free")
        assert httpx.post(server.url, content=b"abc", timeout=120).json()["bytes"] == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


Tls = tuple[Server, ssl.SSLContext, Authority, Path]


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tls]:
    """One that speaks TLS, with what its clients believe, who issued its certificate, and the folder of its files."""
    authority = Authority.create()
    authority.issue(tmp_path, ["127.0.0.1"])
    monkeypatch.setattr(uvicorn, "Config", uvicorn.Config)
    monkeypatch.setattr(GuardedHttp, "most", MOST)
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", PATIENCE)
    running = Server(PATIENCE, ssl_certfile=str(tmp_path / "tls.crt"), ssl_keyfile=str(tmp_path / "tls.key"))
    yield running, ssl.create_default_context(cafile=tmp_path / "ca.crt"), authority, tmp_path
    running.close()


def test_s8_a_certificate_that_is_replaced_counts_from_the_next_connection_on(secured: Tls) -> None:
    server, trusting, authority, folder = secured

    def served() -> bytes:
        with trusting.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
            return connection.getpeercert(binary_form=True) or b""

    first = served()
    assert first == served()
    answer = httpx.post(f"https://127.0.0.1:{server.port}", content=b"x" * 300_000, verify=trusting, timeout=120)
    assert answer.json()["bytes"] == 300_000
    (folder / "tls.key").write_bytes(b"no key")
    assert served() == first
    authority.issue(folder, ["127.0.0.1"])
    assert served() not in (first, b"")


def test_s8_handshakes_that_stop_make_room_for_those_that_do_not(secured: Tls) -> None:
    server, trusting, _, _ = secured
    hello, said = b"", ssl.MemoryBIO()
    half = trusting.wrap_bio(ssl.MemoryBIO(), said, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        half.do_handshake()
    hello = said.read()
    stopped = [server.connect(hello[: 9 * number]) for number in range(MOST + 2)]
    assert [told(each) for each in stopped[:2]] == [(0, None)] * 2
    with httpx.Client(verify=trusting, timeout=120) as client:
        for _ in range(3):
            assert client.post(f"https://127.0.0.1:{server.port}", content=b"abc").status_code == 200
    assert told(stopped[2]) == (0, None)
    assert told(server.connect(b"GET / HTTP/1.1\r\n\r\n")) == (0, None)
    for each in stopped[3:]:
        each.close()


def test_s8_a_handshake_that_does_not_come_is_given_up(secured: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "HEAD_SECONDS", SECONDS)
    connection = secured[0].connect(b"\x16\x03\x01")
    connection.settimeout(45)  # asyncio alone would wait for a minute
    assert told(connection) == (0, None)
