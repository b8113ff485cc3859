"""A store that stalls, goes, and comes back."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from embedding_service.controller import watch as watching
from embedding_service.controller.watch import StoreWatch
from embedding_service.store.store import Catalogue, Store

HERE = "127.0.0.1:1"


class Stalling(Store):
    """Does not answer before it is let."""

    def __init__(self, url: Path) -> None:
        super().__init__(url)
        self.answers = threading.Event()
        self.looks = 0

    def catalogue(self, known: Catalogue | None = None) -> Catalogue:
        self.looks += 1
        assert self.answers.wait(180)
        return super().catalogue(known)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SCAN_SECONDS", 0.01)
    monkeypatch.setattr(watching, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(watching, "TERM_SECONDS", 60.0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(180):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_store_that_stalls_is_away_until_it_answers_and_keeps_nobody(
    store: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stalling = Stalling(store)
    changes: list[str] = []

    async def use() -> None:
        watch = StoreWatch(stalling, HERE, lambda: changes.append(watch.problem))
        task = asyncio.create_task(watch.run())
        await until(lambda: bool(changes))
        assert watch.found is None and "has not answered for 0.05 s" in watch.problem
        await asyncio.sleep(0.3)
        assert stalling.looks == 1  # no second thread waits beside the first
        stalling.answers.set()
        await until(lambda: watch.found is not None)
        assert watch.problem == "" and watch.found and "fp32" in watch.found.manifests
        stalling.answers.clear()
        await until(lambda: watch.found is None)
        assert changes[0] and not changes[1] and changes[2]
        task.cancel()

    asyncio.run(use())  # ends, though a thread still waits for the store
    stalling.answers.set()


def test_a_store_that_answers_is_not_away_however_long_a_look_takes(store: Path, quick: None) -> None:
    slow = Stalling(store)
    changes: list[str] = []

    async def use() -> None:
        watch = StoreWatch(slow, HERE, lambda: changes.append(watch.problem))
        slow.answered = time.monotonic() + 180.0  # as if it answered again and again
        task = asyncio.create_task(watch.run())
        await asyncio.sleep(0.3)
        assert slow.looks == 1 and not changes
        slow.answers.set()
        await until(lambda: bool(changes))
        assert changes[0] == "" and watch.found and "fp32" in watch.found.manifests
        task.cancel()

    asyncio.run(use())


def test_the_term_is_noted_in_the_store_and_never_lowered(store: Path, tmp_path: Path, quick: None) -> None:
    async def use() -> None:
        watch = StoreWatch(Store(tmp_path / "store"), HERE, lambda: None)
        assert await watch.noted_term() == 0
        assert not await watch.note_term(5)  # there is no store to write into
        assert not (tmp_path / "store").exists()
        (tmp_path / "store").mkdir()
        assert await watch.note_term(5)
        assert watch.noted == 5
        assert not await watch.note_term(4)
        assert watch.noted == 5
        assert await watch.noted_term() == 5
        assert Store(tmp_path / "store").models() == []
        [path] = (tmp_path / "store" / watching.TERM_FOLDER).iterdir()
        for rubbish in (b"", b"\xff", b"-3", b"1" * 1000, str(2**60).encode()):
            path.write_bytes(rubbish)
            assert await watch.noted_term() == 0
        path.unlink()
        path.mkdir()
        assert await watch.noted_term() == 0
        assert not await watch.note_term(6)

    asyncio.run(use())


def test_services_that_share_a_store_note_their_terms_apart(tmp_path: Path, quick: None) -> None:
    """A controller of one service is no reason for another one's to end. But a service may have been elsewhere."""

    async def use() -> None:
        store = Store(tmp_path)
        here, there, on_a_network = (StoreWatch(store, at, lambda: None) for at in (HERE, "127.0.0.1:2", "a.b:1"))
        assert await here.note_term(5) and await there.note_term(7)
        assert (await here.noted_term(), await here.others_term()) == (5, 7)
        assert (await there.noted_term(), await there.others_term()) == (7, 5)
        assert (await on_a_network.noted_term(), await on_a_network.others_term()) == (0, 7)
        assert await here.note_term(6)
        await there._look()
        assert there.noted == 7
        again = StoreWatch(store, HERE, lambda: None)
        assert await again.noted_term() == 6
        old = time.time() - (watching.NOTE_DAYS + 1) * 86400
        for note in (tmp_path / watching.TERM_FOLDER).iterdir():
            os.utime(note, (old, old))
        assert await on_a_network.note_term(9)
        assert (await on_a_network.noted_term(), await on_a_network.others_term()) == (9, 0)

    asyncio.run(use())
