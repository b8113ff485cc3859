"""A shard's word to the controller, where there is none."""

import asyncio
from pathlib import Path

import pytest
from support.cluster import free_port

from embedding_service.client.router import Router
from embedding_service.placement.parts import PartKey
from embedding_service.rows.ram import RamTable
from embedding_service.serving import cancel
from embedding_service.shard import registration
from embedding_service.shard.held import Counters
from embedding_service.shard.holdings import Holdings
from embedding_service.shard.registration import Registration
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control


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
