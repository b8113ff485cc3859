"""What is taken for an address, wherever one is given, and that proxies for the web are not asked."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import grpc
import pytest
import torch
from support.checkpoints import longcat_table
from support.cluster import Up, dead_proxies
from typer.testing import CliRunner

from embedding_service import EmbeddingClient, InvalidRequest
from embedding_service.cli import app
from embedding_service.client.channels import open_channel_async
from embedding_service.client.status import get_status
from embedding_service.machine import complete_address, join_address, split_address
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

WRONG = {
    "::1": r"brackets, as \[::1\]:7070",
    "::1:7070": "brackets",
    "[::1]": "port is missing",
    "[::g]:7070": "HOST:PORT",
    "host": "port is missing, as in localhost:7070",
    "host:": "port is missing",
    ":7070": "HOST:PORT",
    "host:0": "up to 65,535",
    "host:65536": "up to 65,535",
    "host:70000": "up to 65,535",
    "host:-1": "HOST:PORT",
    "host:" + 5000 * "9": "up to 65,535",
    "": "empty",
    " ": "empty",
    "host:7070 ": "blanks",
    "http://host:7070": "leave out the scheme",
    "dns:///host:7070": "leave out the scheme",
    "host:7070/": "leave out what follows the port",
    "unix:/tmp/socket": "not on socket files",
    "unix-abstract:name": "not on socket files",
    "one:7070,two:7070": "as a list",
    "user@host:7070": "HOST:PORT",
}


@pytest.mark.parametrize(("address", "remedy"), WRONG.items(), ids=[each[:20] for each in WRONG])
def test_what_is_no_address_is_told_its_remedy(address: str, remedy: str) -> None:
    for take in (
        lambda each: split_address(each, least=1),
        EmbeddingClient,
        get_status,
        lambda each: EmbeddingClient(["localhost:7070", each]),
    ):
        with pytest.raises(InvalidRequest, match=remedy) as raised:
            take(address)
        assert repr(address)[:20] in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", [[], None, 7070, b"host:7070", [None]])
def test_what_is_no_text_is_no_address(address: object) -> None:
    with pytest.raises(InvalidRequest, match="HOST:PORT"):
        EmbeddingClient(address)  # type: ignore[arg-type]


def test_what_is_an_address() -> None:
    for host in ("localhost", "127.0.0.1", "[::1]", "[fe80::1%eth0]", "embedding-0.shards_x.svc."):
        assert split_address(f"{host}:65535") == (host, 65535)
        assert complete_address(host, 7) == complete_address(f"{host}:7", 8) == f"{host}:7"
        EmbeddingClient(f"{host}:7070").close()
    assert split_address("host:0") == ("host", 0)
    assert complete_address("::1", 7) == join_address("::1", 7) == "[::1]:7"
    with pytest.raises(InvalidRequest):
        complete_address("http://host", 7)


@pytest.mark.parametrize("command", ["status", "models", "lookup", "bench"])
def test_commands_say_it_in_one_line(command: str) -> None:
    arguments = {"lookup": ["m/t", "1", "--address=::1"], "bench": ["::1", "--table=m/t"]}.get(command, ["::1"])
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code != 0
    assert "[::1]:7070" in (result.output + str(result.exception))


class _Relay(socketserver.BaseRequestHandler):
    """Hands a connection on to `address`."""

    address: tuple[str, int]

    def handle(self) -> None:
        with socket.create_connection(self.address) as there:
            back = threading.Thread(target=_copy, args=(there, self.request), daemon=True)
            back.start()
            _copy(self.request, there)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # either may hang up
        while data := source.recv(65536):
            sink.sendall(data)


@pytest.fixture
def over_ipv6(service: Up) -> Iterator[str]:
    """The service, at an address in brackets."""

    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6
        daemon_threads = True
        block_on_close = False

    handler = type("Handler", (_Relay,), {"address": split_address(service.address)})
    try:
        server = Server(("::1", 0), handler)
    except OSError:
        pytest.skip("needs IPv6 on the loopback interface")
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield join_address("::1", server.server_address[1])
        server.shutdown()


def test_ipv6(over_ipv6: str) -> None:
    with EmbeddingClient(over_ipv6) as client:
        assert torch.equal(client.lookup("fp32/ngram", torch.tensor([5])), longcat_table()[[5]])


def test_proxies_are_not_asked(service: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    """`service` itself runs with proxies that are not there (tests/conftest.py)."""
    dead_proxies(monkeypatch)
    with grpc.insecure_channel(service.address) as proxied, pytest.raises(grpc.RpcError):
        EmbeddingServiceStub(proxied).GetRouting(wire.GetRoutingRequest(), timeout=2)
    for hedge in (True, False):
        with EmbeddingClient(service.address, timeout=60, hedge=hedge, near=False) as client:
            assert torch.equal(client.lookup("fp32/ngram", torch.tensor([5])), longcat_table()[[5]])
    assert get_status(service.address).shards

    async def ask() -> wire.Routing:
        async with open_channel_async(service.address, None) as channel:
            return await EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=120)

    assert asyncio.run(ask()).shards
