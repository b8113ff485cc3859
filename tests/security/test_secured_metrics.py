"""Metrics of a secured process."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.cluster import free_port
from support.security import write_policy

from embedding_service.metrics import MetricsServer, gauge
from embedding_service.security.authority import Authority, prepare_folder
from embedding_service.security.server import Files, Security


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a process that has one metric."""
    prepare_folder(tmp_path, ["127.0.0.1"], ["controller"])
    watcher = {"tokens": ["watcher"], "rights": ["metrics"]}
    policy = write_policy(tmp_path, {"watcher": watcher, "reader": {"tokens": ["reader"], "read": ["*"]}})
    own = tmp_path / "controller"
    security = Security(Files(own / "tls.crt", own / "tls.key", tmp_path / "ca.crt", policy))
    port = free_port()
    server = MetricsServer("127.0.0.1", port, lambda: [gauge("answer", "The answer.", 42)], security)
    yield port
    server.close()


def test_s2_s4_metrics_are_told_over_tls_to_who_has_the_right(port: int, tmp_path: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    url = f"https://127.0.0.1:{port}/metrics"

    def scrape(token: str | None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.get(url, headers=headers, verify=trusting, timeout=60)

    # One that connects and says nothing keeps nobody.
    with socket.create_connection(("127.0.0.1", port)):
        assert "embedding_answer 42.0" in scrape("watcher").text
        assert scrape(None).status_code == scrape("guess").status_code == 401
        refused = scrape("reader")
        assert refused.status_code == 403 and "reader has no right" in refused.text
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60)
    old = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, verify=old, timeout=60)


def test_s2_a_certificate_that_is_replaced_counts_for_metrics_too(port: int, tmp_path: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))

    def served() -> bytes:
        with (
            socket.create_connection(("127.0.0.1", port), 60) as plain,
            trusting.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            return connection.getpeercert(binary_form=True) or b""

    first = served()
    assert first == served()
    Authority.load(tmp_path).issue(tmp_path / "controller", ["127.0.0.1"])
    assert served() not in (first, b"")
