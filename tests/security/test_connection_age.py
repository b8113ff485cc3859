"""An open connection would survive whatever becomes of its authority, so it has an age."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from embedding_service.front import base
from embedding_service.security.access import Access
from embedding_service.security.authority import prepare_folder
from embedding_service.security.server import Files, Security
from embedding_service.serving import RequestLimits, Server


def test_s2_a_connection_with_tls_ends_when_it_is_old_and_the_next_one_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "AGE_MS", 300)
    monkeypatch.setattr(base, "AGED_MS", 300)
    prepare_folder(tmp_path, ["127.0.0.1"], ["controller"])
    own = tmp_path / "controller"
    security = Security(Files(own / "tls.crt", own / "tls.key", tmp_path / "ca.crt", tmp_path / "policy.toml"))

    async def watch() -> None:
        server = Server(RequestLimits(), security=security)
        front = await server.listen("127.0.0.1:0")
        try:
            credentials = Access(tmp_path / "ca.crt").credentials()
            async with grpc.aio.secure_channel(front.address, credentials) as channel:
                health = HealthStub(channel)
                for _ in range(2):
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        async for _ in health.Watch(health_pb2.HealthCheckRequest(), timeout=240):
                            pass
                    assert raised.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
                    await health.Check(health_pb2.HealthCheckRequest(), timeout=240, wait_for_ready=True)
        finally:
            await server.stop()

    asyncio.run(watch())
