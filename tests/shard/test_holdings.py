"""What a shard holds: where its store does not answer, and versions that share rows."""

import asyncio
import errno
import operator
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.overlays import new_rows, overlaid_table, rows_file, some_ids
from support.tiers import MIB

from embedding_service.errors import NotFound
from embedding_service.formats import get_format
from embedding_service.placement.parts import PartKey
from embedding_service.rows import TIERS
from embedding_service.rows.base import Location
from embedding_service.rows.mmap import MmapTable
from embedding_service.rows.ram import RamTable
from embedding_service.shard import holdings as holdings_module
from embedding_service.shard.holdings import Holdings
from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.store.publishing import publish_rows
from embedding_service.store.store import Store


class Stalling(Store):
    """Does not come back with one part before it is let."""

    def __init__(self, url: Path, stuck: PartKey) -> None:
        super().__init__(url)
        self.stuck, self.answers = stuck, threading.Event()

    def fetch_part(self, manifest: Manifest, part: Part, cache: Path) -> Path:
        if (manifest.model, part.index) == (self.stuck.model, self.stuck.part):
            assert self.answers.wait(180)
        return super().fetch_part(manifest, part, cache)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(180):
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


class Told:
    """Remembers the parts that are shared."""

    def __init__(self) -> None:
        self.held: set[PartKey] = set()

    def hold(self, key: PartKey, table: Table, location: Location) -> None:
        self.held.add(key)

    def drop(self, key: PartKey) -> None:
        self.held.remove(key)


def linked_store(store: Path, model: str, folder: Path) -> Store:
    """A store with that model alone, to which a test may add."""
    folder.mkdir()
    shutil.copytree(store / model, folder / model, copy_function=os.link)
    return Store(folder)


@pytest.mark.parametrize("tier", ["ram", "mmap"])
def test_t12_a_base_and_what_overlies_it_are_held_once(store: Path, tmp_path: Path, tier: str) -> None:
    own = linked_store(store, "int8", tmp_path / "store")
    base = own.manifest("int8")
    few = np.array([0, 5])
    versions = {
        ("int8", "2"): publish_rows(own, "int8@1", rows_file(tmp_path / "rows", some_ids(7, 0.04), 7)),
        ("int8+legal", "1"): publish_rows(own, "int8@1", rows_file(tmp_path / "few", few, 8), name="int8+legal"),
    }
    expected = {
        ("int8", "1"): overlaid_table("int8"),
        ("int8", "2"): overlaid_table("int8", (some_ids(7, 0.04), 7)),
        ("int8+legal", "1"): overlaid_table("int8", (few, 8)),
    }
    keys = {name: [PartKey(*name, "ngram", part.index) for part in base.tables[0].parts] for name in expected}
    ids = np.random.default_rng(1).permutation(len(expected["int8", "1"]))

    async def use() -> None:
        holdings = Holdings(own, TIERS[tier], base.bytes + MIB, tmp_path)
        told = Told()
        holdings.sharing.append(told)

        async def hold(*names: tuple[str, str], but: int = 0) -> None:
            wanted = {key for name in names for key in keys[name][but:]}
            holdings.assign(wanted)
            await until(lambda: holdings.held == wanted or holdings.failures)
            assert not holdings.failures
            rows = base.bytes - sum(part.bytes for part in base.tables[0].parts[:but])
            overlays = [
                each for name in names if name in versions for each in versions[name].overlays("ngram").values()
            ]
            assert holdings.held_bytes == rows + sum(each.bytes for each in overlays if each.part >= but)
            assert holdings._taken == holdings.held_bytes
            for name in names:
                table = holdings.table(*name, "ngram")
                here = ids[ids >= but * base.tables[0].rows_per_part]
                assert table and np.array_equal(table.gather(here, "stored"), expected[name][here])
            assert all(holdings.table(*name, "ngram") is None for name in expected if name not in names)
            await until(lambda: holdings._manifests.keys() == {*names})  # once no fold is under way

        await hold(("int8", "1"))
        await hold(*expected)  # for which there would be no room three times
        assert {key for key in told.held if key[:2] == ("int8", "1")} == set(keys["int8", "1"])
        assert {key for key in told.held if key[:2] == ("int8+legal", "1")} == set(keys["int8+legal", "1"][1:])
        await hold(("int8", "2"), ("int8+legal", "1"))  # the base has left the routing
        await hold(("int8+legal", "1"), but=2)
        await hold(("int8", "2"))
        holdings.assign([])
        await until(lambda: not holdings._taken)
        assert holdings.held_bytes == 0 and not told.held and not holdings._grounds
        await until(lambda: not holdings._manifests)  # a fold may be under way
        for name in (("int8", "2"), ("int8", "1"), ("int8+legal", "1"), ("int8", "2")):
            await hold(name)  # alone: its rows are folded in, and then others read it in place
            if tier == "ram":
                await until(partial(operator.eq, told.held, set(keys[name])))
                await hold(name)
            await hold(*expected)  # the base is over the other one's rows now, where they differ
            assert len(holdings._grounds) == 1
        await holdings.close()

    asyncio.run(use())


def test_a_load_that_fails_at_its_last_step_leaves_nothing_that_answers(store: Path, tmp_path: Path) -> None:
    key = PartKey("int8", "1", "ngram", 0)
    fails = True

    class Opened(MmapTable):
        def location(self, part: Part, path: Path) -> Location:
            if fails:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
            return super().location(part, path)

    async def use() -> None:
        nonlocal fails
        holdings = Holdings(Store(store), Opened, 1 << 30, tmp_path)
        told = [Told(), Told()]
        holdings.sharing += told
        holdings.assign([key])
        await until(lambda: "Too many open files" in holdings.failures.get(key, ""))
        table, ids = holdings.table(*key[:3]), np.arange(3)
        assert table and not table.holds(ids).any()  # lookups of thin clients ask this alone
        with pytest.raises(NotFound):
            table.gather(ids, "stored")
        assert not holdings._taken and not told[0].held and not told[1].held
        fails = False
        holdings._room.set()
        await until(lambda: holdings.held == {key} == told[0].held == told[1].held)
        assert np.array_equal(table.gather(ids, "stored"), overlaid_table("int8")[ids])
        await holdings.close()

    asyncio.run(use())


@pytest.mark.slow
def test_fifty_tables_of_domains_cost_their_own_rows_each(store: Path, tmp_path: Path) -> None:
    own = linked_store(store, "int8", tmp_path / "store")
    base = own.manifest("int8")
    rows_of = {f"int8+{tag}": (some_ids(tag, 0.001), tag) for tag in range(10, 60)}
    manifests = [
        publish_rows(own, "int8@1", rows_file(tmp_path / name, ids, tag), name=name)
        for name, (ids, tag) in rows_of.items()
    ]
    keys = {
        PartKey(each.model, each.version, "ngram", part.index)
        for each in (base, *manifests)
        for part in base.tables[0].parts
    }

    async def use() -> None:
        replaced = sum(each.replaced_bytes for each in manifests)
        holdings = Holdings(own, RamTable, base.bytes + replaced, tmp_path)
        holdings.assign(keys)
        await until(lambda: holdings.held == keys)
        assert holdings.held_bytes == base.bytes + replaced < 1.1 * base.bytes
        everything, whole = np.arange(base.tables[0].rows), overlaid_table("int8")
        for name, (ids, tag) in {"int8": (everything[:0], 0), **rows_of}.items():
            table, expected = holdings.table(name, "1", "ngram"), whole.copy()
            expected[ids] = get_format("int8").encode(new_rows(ids, tag)).numpy()
            assert table and np.array_equal(table.gather(everything, "stored"), expected), name
        await holdings.close()

    asyncio.run(use())


def test_an_overlay_that_cannot_be_read_leaves_the_base_alone(store: Path, tmp_path: Path) -> None:
    own = linked_store(store, "int8", tmp_path / "store")
    manifest = publish_rows(own, "int8@1", rows_file(tmp_path / "rows", np.array([1]), 7))
    path = Path(own.location("int8", "2", manifest.overlays("ngram")[0].file))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    keys = [PartKey("int8", "1", "ngram", 0), PartKey("int8", "2", "ngram", 0)]

    async def use() -> None:
        holdings = Holdings(own, RamTable, 1 << 30, tmp_path)
        holdings.assign(keys)
        await until(lambda: holdings.held == {keys[0]} and "is corrupt" in holdings.failures.get(keys[1], ""))
        taken = holdings._taken
        path.write_bytes(good)
        holdings._room.set()
        await until(lambda: holdings.held == set(keys))
        assert holdings._taken == taken + manifest.replaced_bytes
        await holdings.close()

    asyncio.run(use())
