"""Object stores on loopback: real servers that speak S3 and Google's JSON API, and a proxy that makes them fail."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from support.cluster import until

BUCKET = "bucket"
# What belongs to one connection, and what the proxy writes itself.
_OWN = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextmanager
def s3_server() -> Iterator[str]:
    """Moto's server with an empty bucket. Gives its address, HOST:PORT."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = ":".join(map(str, server.get_host_and_port()))
    try:
        assert Answer.of(address, "PUT", f"/{BUCKET}").status == 200
        yield address
    finally:
        server.stop()


@contextmanager
def gs_server(port: int) -> Iterator[str]:
    """An emulator of Google's storage with an empty bucket. Gives its address, HOST:PORT."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop()


# Of Azure's emulators, as their documentation names them.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
# `make azurite` installs it here.
_AZURITE = Path(__file__).parents[2] / ".azurite/node_modules/.bin/azurite-blob"


def azurite() -> str | None:
    """The command of Azure's emulator, if it is there."""
    return shutil.which("azurite-blob") or (str(_AZURITE) if _AZURITE.exists() else None)


def azure_account(address: str, key: str = AZURE_KEY) -> str:
    """A connection string."""
    place = f"BlobEndpoint=http://{address}/{AZURE_ACCOUNT}"
    return f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={key};{place};"


@contextmanager
def az_server(port: int) -> Iterator[str]:
    """Azurite with an empty container. Gives its address, HOST:PORT."""
    from azure.storage.blob import BlobServiceClient

    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    command = [str(azurite()), "--blobHost=127.0.0.1", f"--blobPort={port}", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    address = f"127.0.0.1:{port}"

    def listens() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        until(listens, "Azurite")
        with BlobServiceClient.from_connection_string(azure_account(address)) as client:
            client.create_container(BUCKET)
        yield address
    finally:
        process.kill()
        process.wait()


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """What a server said. `cut`: only so many bytes of the body come, and the connection ends."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    cut: int | None = None

    @classmethod
    def of(
        cls, address: str, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Ask a server."""
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return cls(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()


# What becomes of a request: given it and a way to ask the server. None: the connection ends without an answer.
Fault = Callable[[Request, Callable[[], Answer]], Answer | None]


class Proxy:
    """Stands before a server and lets requests pass, but for those that `fault` takes.

    Attributes:
        address: HOST:PORT.
        requests: All that came, in order.
        fault: Called for each request, in threads.
    """

    def __init__(self, server: str) -> None:
        self.requests: list[Request] = []
        self.fault: Fault = passing
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                request = Request(self.command, self.path, dict(self.headers), body)
                proxy.requests.append(request)
                answer = proxy.fault(request, lambda: Answer.of(server, *request))
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers:
                    if name.lower() not in _OWN:
                        self.send_header(name, value)
                # Of a HEAD, the size that a GET would have.
                sizes = [value for name, value in answer.headers if name.lower() == "content-length"]
                head = self.command == "HEAD"
                self.send_header("content-length", sizes[0] if head and sizes else str(len(answer.body)))
                self.end_headers()
                self.wfile.write(b"" if head else answer.body[: answer.cut])
                self.close_connection |= answer.cut is not None

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Take no more requests."""
        self._server.shutdown()
        self._server.server_close()


def passing(request: Request, ask: Callable[[], Answer]) -> Answer:
    """No fault."""
    return ask()


def slow_down(request: Request, ask: Callable[[], Answer]) -> Answer:
    """S3's answer to a client that asks too often. Google's servers say 503 too."""
    return Answer(503, [("content-type", "application/xml")], _SLOW_DOWN)


def hung_up(request: Request, ask: Callable[[], Answer]) -> None:
    """The connection ends without an answer."""


def hanging(request: Request, ask: Callable[[], Answer]) -> None:
    """The request is taken and never answered: not before its client has given up, for nobody waits for a minute."""
    threading.Event().wait(60)


def cut_short(request: Request, ask: Callable[[], Answer]) -> Answer:
    """The connection ends in the middle of the body."""
    answer = ask()
    return answer._replace(cut=len(answer.body) // 2)


def each_once(fault: Fault) -> Fault:
    """The fault for the first of all requests that are alike. The others pass."""
    seen: set[tuple[str, str]] = set()

    def first(request: Request, ask: Callable[[], Answer]) -> Answer | None:
        if request[:2] in seen:
            return ask()
        seen.add(request[:2])
        return fault(request, ask)

    return first
