"""What a shard holds, where its store does not answer."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from embedding_service.placement.parts import PartKey
from embedding_service.rows.ram import RamTable
from embedding_service.shard import holdings as holdings_module
from embedding_service.shard.holdings import Holdings
from embedding_service.store.manifest import Manifest, Part
from embedding_service.store.store import Store


class Stalling(Store):
    """Does not come back with one part before it is let."""

    def __init__(self, url: Path, stuck: PartKey) -> None:
        super().__init__(url)
        self.stuck, self.answers = stuck, threading.Event()

    def fetch_part(self, manifest: Manifest, part: Part, cache: Path) -> Path:
        if (manifest.model, part.index) == (self.stuck.model, self.stuck.part):
            assert self.answers.wait(60)
        return super().fetch_part(manifest, part, cache)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_stalls_holds_up_its_part_alone_and_no_end(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    monkeypatch.setattr(holdings_module, "STALL_SECONDS", 0.2)
    keys = [PartKey("fp32", "1", "ngram", part) for part in range(3)]
    stalling = Stalling(store, keys[1])

    async def use() -> None:
        holdings = Holdings(stalling, RamTable, 1 << 30, tmp_path)
        holdings.assign(keys)
        await until(lambda: holdings.held == {keys[0], keys[2]})
        await until(lambda: "has not answered for 0.2 s" in holdings.failures.get(keys[1], ""))
        holdings.assign(keys[1:])
        assert holdings.held == {keys[2]}
        if answers:
            stalling.answers.set()
            await until(lambda: holdings.held == set(keys[1:]))
            assert not holdings.failures
        await holdings.close()

    asyncio.run(use())  # ends, though a thread may still wait for the store
    stalling.answers.set()
