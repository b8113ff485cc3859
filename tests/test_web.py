"""Ports of the page and of metrics: what their clients may take."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.cluster import free_port
from support.security import write_policy

from embedding_service import web
from embedding_service.security.authority import Authority
from embedding_service.security.server import Files, Security

MOST = 8


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.URL]:
    """One that waits for everybody without end."""
    monkeypatch.setattr(web, "MOST_CONNECTIONS", MOST)
    monkeypatch.setattr(web._Handler, "timeout", None)
    security = None
    if request.param == "tls":
        Authority.create().issue(tmp_path, ["127.0.0.1"])
        policy = write_policy(tmp_path, {})
        security = Security(Files(tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt", policy))
    port = free_port()

    def app(environ: dict, start_response: object) -> list[bytes]:
        start_response("200 OK", [])  # type: ignore[operator]
        return [b"here"]

    serving = web.WebServer("127.0.0.1", port, app, "--http-port", security)
    yield httpx.URL(f"{'https' if security else 'http'}://127.0.0.1:{port}")
    serving.close()
    if security:
        security.guard.close()


def connect(server: httpx.URL, host: str) -> socket.socket:
    return socket.create_connection((server.host, server.port or 0), timeout=120, source_address=(host, 0))


def test_connections_that_say_nothing_take_no_more_than_their_share(server: httpx.URL) -> None:
    other = connect(server, "127.0.0.2")
    before = threading.active_count()
    waiting = [connect(server, "127.0.0.1") for _ in range(3 * MOST)]
    for each in waiting[: 2 * MOST]:
        assert each.recv(1) == b""
    assert httpx.get(server, verify=False, timeout=120).text == "here"
    assert threading.active_count() < before + 2 * MOST
    if server.scheme == "http":  # who came first, from elsewhere, still has his place
        other.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert other.makefile("rb").read().endswith(b"here")
    for each in (other, *waiting):
        each.close()
