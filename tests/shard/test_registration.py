"""A shard's word to the controller: where there is none, and where it is false."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from support.cluster import free_port

from embedding_service.client.router import Router
from embedding_service.placement.parts import PartKey
from embedding_service.rows.ram import RamTable
from embedding_service.security.access import Access
from embedding_service.security.authority import URI, Authority
from embedding_service.security.proofs import Signer
from embedding_service.security.routing import sign_routing
from embedding_service.serving import cancel
from embedding_service.shard import registration
from embedding_service.shard.held import Counters
from embedding_service.shard.holdings import Holdings
from embedding_service.shard.registration import Registration
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server


def test_a_shard_that_drains_waits_for_no_controller_for_ever(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registration, "CONTROLLER_PATIENCE", 0.2)
    caplog.set_level("INFO")

    async def set_serving(serving: bool) -> None:
        raise AssertionError("nobody told it anything")

    async def use() -> None:
        holdings = Holdings(Store(store), RamTable, 1 << 30, tmp_path)
        holdings.assign([PartKey("fp32", "1", "ngram", 0)])
        while not holdings.held:
            await asyncio.sleep(0.01)
        about = control.ShardReport(shard_id="a", address="127.0.0.1:9", device="cpu")
        nobody = f"127.0.0.1:{free_port()}"
        ours = Registration(nobody, about, holdings, Router([nobody]), Counters, set_serving)
        asking = asyncio.create_task(ours.run())
        await ours.drain(3600)
        await cancel([asking])
        await holdings.close()

    asyncio.run(use())
    assert "draining: 1 parts" in caplog.text
    assert "no controller to drain with" in caplog.text


def test_s6_a_shard_adopts_no_routing_that_the_controller_did_not_sign(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first two are of a higher term than the right one."""
    authority, names = Authority.create(), {"controller": "controller", "shard": "shard/b"}
    for folder, name in names.items():
        authority.issue(tmp_path / folder, [f"{URI}/{name}", "localhost", "127.0.0.1"])

    def files(folder: str) -> tuple[Path, Path]:
        return tmp_path / folder / "tls.crt", tmp_path / folder / "tls.key"

    def routing(term: int, folder: str) -> wire.Routing:
        message = wire.Routing(term=term, epoch=1)
        message.signature = sign_routing(message, Signer(*files(folder)))
        return message

    told = [wire.Routing(term=9, epoch=1), routing(8, "shard"), routing(7, "controller")]

    class Controller(ControlServiceServicer):
        async def Register(self, reports: object, context: object) -> AsyncIterator[control.Assignment]:
            for message in told:
                yield control.Assignment(routing=message)
            await asyncio.sleep(3600)

    async def use() -> Router:
        served = asyncio.Event()

        async def set_serving(serving: bool) -> None:
            served.set()

        server = grpc.aio.server()
        certificate, key = (path.read_bytes() for path in files("controller"))
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
        add_ControlServiceServicer_to_server(Controller(), server)
        await server.start()
        holdings = Holdings(Store(store), RamTable, 1 << 30, tmp_path)
        about = control.ShardReport(shard_id="a", address="127.0.0.1:9", device="cpu")
        router, access = Router(["127.0.0.1:9"]), Access(tmp_path / "shard" / "ca.crt", *files("shard"))
        ours = Registration(f"127.0.0.1:{port}", about, holdings, router, Counters, set_serving, access)
        asking = asyncio.create_task(ours.run())
        await asyncio.wait_for(served.wait(), 60)
        await cancel([asking])
        await server.stop(None)
        await holdings.close()
        return router

    current = asyncio.run(use()).current
    assert current and current.message == told[-1]
    assert caplog.text.count("ignored a routing") == 2
