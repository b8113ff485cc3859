"""What members claim to hold, and what of it was read back.

A claim counts once some rows of the part came from its shard as the store has them. Until then the state hears nothing
of it, as of a part that is still being loaded. So a shard that claims parts and has other rows is asked by nobody.

A controller that starts hears the claims of all shards at once. It takes over the newest routing that a controller
signed before. A claim that this routing names counts at once, and is read back all the same. So a restart loses no
lookup, and a store that is away takes no part from anybody.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import grpc

from embedding_service.client.channels import open_channel_async
from embedding_service.controller.decisions import routed_parts
from embedding_service.controller.reports import check_report
from embedding_service.errors import EmbeddingServiceError
from embedding_service.foreign import one_line, printable
from embedding_service.placement.parts import PartKey
from embedding_service.security.access import Access
from embedding_service.store.manifest import Manifest, Part, Table
from embedding_service.store.overlays import Replaced
from embedding_service.store.reading import check_part, some_rows
from embedding_service.store.store import Catalogue, Store
from embedding_service.threads import apart
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

log = logging.getLogger(__name__)

# Seconds that a registration waits for its first claims. Later ones are heard of when they count.
FIRST_SECONDS = 2.0
# Seconds that a shard has to answer.
ASK_SECONDS = 5.0
# Shards that are asked for the routing at a time. The first answer is enough.
TAKING = 4
# Pause before what could not be read back is tried again. It doubles.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
# Threads that read the store, and parts that are read and asked for together.
READERS, TOGETHER = 8, 128
# Parts whose rows are kept, and registrations that are remembered.
MOST_KEPT, MOST_REMEMBERED = 100_000, 10_000

_NOT_READ = "it could not be read back, so nobody asks this shard for it: {}"
NOT_THE_STORES = "its rows are not the store's: does the shard have another store? Nobody asks it for them"


class _NotYet(Exception):
    """Why claims could not be read back, for the moment."""


class _NotAll(_NotYet):
    """Some of them are to be tried one by one."""


# A part, and the checksums of what the store has of it.
_File = tuple[PartKey, str, str]


class Claims:
    """Of all shards of a controller. To be used on its event loop.

    Args:
        store: What is served.
        access: What the controller shows shards.
        found: The last look at the store. None while it is away.
    """

    def __init__(self, store: Store, access: Access, found: Callable[[], Catalogue | None]) -> None:
        self._store, self._access, self._found = store, access, found
        self._readers, self._taking = asyncio.Semaphore(READERS), asyncio.Semaphore(TAKING)
        self._kept: dict[_File, Replaced] = {}
        self._sound: set[_File] = set()
        self._remembered: dict[tuple[str, str, int], _Believed] = {}
        # The routing that was taken over: its age, and what it names of each shard at its address.
        self._age = (0, 0)
        self._trusted: dict[tuple[str, str], set[PartKey]] = {}

    def of(self, first: control.ShardReport) -> ShardClaims:
        """Those of a registration. A shard that registers again is believed what it was believed before."""
        who = first.shard_id, first.address, first.incarnation
        believed = self._remembered.pop(who, None) or _Believed()
        if len(self._remembered) >= MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[who] = believed
        return ShardClaims(self, first, believed)

    def channel(self, address: str) -> grpc.aio.Channel:
        """To a shard."""
        return open_channel_async(address, self._access)

    def trusted(self, report: control.ShardReport) -> set[PartKey]:
        """What the routing that was taken over names of a shard."""
        return self._trusted.get((report.shard_id, report.address), set())

    async def take_over(self, report: control.ShardReport) -> None:
        """Take over the routing that a shard goes by, if it is newer and a controller signed it."""
        async with self._taking:
            if (report.term, report.epoch) <= self._age:
                return
            try:
                async with self.channel(report.address) as channel:
                    asked = EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=FIRST_SECONDS)
                    routing: wire.Routing = await asked
                self._access.check_routing(routing, (0, 0))
            except (grpc.aio.AioRpcError, EmbeddingServiceError) as error:
                log.warning("the routing of shard %s is not taken over: %s", report.shard_id, _told(error))
                return
        if (routing.term, routing.epoch) > self._age:
            self._age = routing.term, routing.epoch
            addresses = {shard.id: shard.address for shard in routing.shards}
            self._trusted = {(name, addresses[name]): parts for name, parts in routed_parts(routing).items()}

    async def rows(self, keys: Sequence[PartKey]) -> list[tuple[PartKey, Replaced]]:
        """Some rows of each part of one table, as the store has them. Raises _NotYet."""
        manifest, table = self._table(keys[0])
        if any(key.part >= len(table.parts) for key in keys):
            raise _NotAll(f"{manifest.full_name}/{table.name} has {len(table.parts)} parts")
        files = [_file(manifest, table, key) for key in keys]
        missing = [file for file in files if file not in self._kept]
        parts = [table.parts[key.part] for key, _, _ in missing]
        async with self._readers:
            try:
                read = await apart(_read, self._store, manifest, table, parts)
            except Exception as error:  # filesystems raise what their libraries do
                raise _NotAll(f"the store cannot be read: {one_line(error)}") from None
        found = dict(zip(missing, read, strict=True))
        rows = [(file[0], found.get(file) or self._kept[file]) for file in files]
        if len(self._kept) > MOST_KEPT:
            self._kept.clear()
        self._kept.update(found)
        return rows

    async def check(self, key: PartKey) -> None:
        """Read the whole part in the store. Nobody is named because a file changed. Raises _NotAll if it did."""
        manifest, table = self._table(key)
        file = _file(manifest, table, key)
        if file in self._sound:
            return
        async with self._readers:
            try:
                await apart(check_part, self._store, manifest, table.parts[key.part])
            except Exception as error:  # as above
                raise _NotAll(f"the store cannot be read: {one_line(error)}") from None
        self._sound.add(file)

    def _table(self, key: PartKey) -> tuple[Manifest, Table]:
        found = self._found()
        for manifest in found.manifests.get(key.model, ()) if found else ():
            for table in manifest.tables if manifest.version == key.version else ():
                if table.name == key.table:
                    return manifest, table
        raise _NotYet(f"the store has no {key.model}@{key.version}/{key.table} now")


@dataclass
class _Believed:
    """What was read back of a shard's parts: those that are the store's, and those that are not."""

    proven: set[PartKey] = field(default_factory=set)
    false: set[PartKey] = field(default_factory=set)


class ShardClaims:
    """The claims of one registration. See `Claims.of`."""

    def __init__(self, all_claims: Claims, first: control.ShardReport, believed: _Believed) -> None:
        self._all, self._believed = all_claims, believed
        self._last = self._parts = first
        self._claimed: set[PartKey] = set()
        self._why: dict[PartKey, str] = {}
        self._said: tuple[set[PartKey], dict[PartKey, str]] = set(), {}
        self._wanted, self._tried = asyncio.Event(), asyncio.Event()

    async def begin(self, first: control.ShardReport) -> control.ShardReport:
        """The first report as the state is to hear it. Waits a moment for what is read back."""
        await self._all.take_over(first)
        heard = self.hear(first)
        if self._open() - self._counting():
            try:
                async with asyncio.timeout(FIRST_SECONDS):
                    await self._tried.wait()
            except TimeoutError:
                log.warning("the parts of shard %s are not read back yet", first.shard_id)
            heard = self._told(first)
        return heard

    def hear(self, report: control.ShardReport) -> control.ShardReport:
        """A report as the state is to hear it: without the claims that do not count."""
        try:
            check_report(report, report.term)
        except EmbeddingServiceError:
            return report  # which the state refuses
        self._last = report
        if not report.has_parts:
            return report
        self._parts = report
        self._claimed = {PartKey.from_wire(part) for part in report.parts}
        self._believed.proven &= self._claimed
        self._believed.false &= self._claimed
        self._why = {key: why for key, why in self._why.items() if key in self._claimed}
        if self._open():
            self._wanted.set()
        return self._told(report)

    async def run(self, tell: Callable[[control.ShardReport], None]) -> None:
        """Read claims back until cancelled. Calls `tell` with a report whenever others count."""
        pause = FIRST_PAUSE
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                async with self._all.channel(self._last.address) as channel:
                    for keys in _together(self._open()):
                        await self._try(channel, keys)
            except Exception as error:  # whatever it is, what was not read back is tried again
                log.warning("reading back what shard %s holds failed: %s", self._last.shard_id, one_line(error))
            self._tried.set()
            if (self._counting(), self._why) != self._said:
                pause = FIRST_PAUSE
                tell(self._told(self._whole()))
            if self._open():
                await self._wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self._wanted.set()

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        except TimeoutError:
            pass

    def _open(self) -> set[PartKey]:
        return self._claimed - self._believed.proven - self._believed.false

    def _counting(self) -> set[PartKey]:
        """The claims that count."""
        trusted = self._all.trusted(self._last) & self._claimed if self._open() else set()
        return self._believed.proven | trusted - self._believed.false

    def _whole(self) -> control.ShardReport:
        """The last report, with the last parts."""
        report = control.ShardReport()
        report.CopyFrom(self._last)
        if not report.has_parts:
            report.has_parts = True
            for name in ("parts", "part_accesses", "failures"):
                getattr(report, name).MergeFrom(getattr(self._parts, name))
        return report

    def _told(self, report: control.ShardReport) -> control.ShardReport:
        """A report with the claims that count, and with what is wrong with the others."""
        counting = self._counting()
        if not report.has_parts:
            return report
        self._said = counting, dict(self._why)
        if counting == self._claimed:
            return report
        told = control.ShardReport()
        told.CopyFrom(report)
        for name in ("parts", "part_accesses"):
            told.ClearField(name)  # type: ignore[arg-type]
        kept = [PartKey.from_wire(part) in counting for part in report.parts]
        told.parts.extend(part for part, keep in zip(report.parts, kept, strict=True) if keep)
        told.part_accesses.extend(count for count, keep in zip(report.part_accesses, kept, strict=False) if keep)
        for key in sorted(self._claimed - counting):
            why = NOT_THE_STORES if key in self._believed.false else self._why.get(key)
            if why:
                told.failures.add(part=key.to_wire(), message=why)
        return told

    async def _try(self, channel: grpc.aio.Channel, keys: Sequence[PartKey]) -> None:
        """Read some claims of one table back."""
        try:
            rows = await self._all.rows(keys)
            differ = await _differing(channel, rows)
            if differ and not self._believed.false:  # one such part is enough to doubt the shard, and not the store
                await self._all.check(min(differ))
        except _NotAll as error:
            if len(keys) > 1:
                for key in keys:
                    await self._try(channel, [key])
            else:
                self._why[keys[0]] = _NOT_READ.format(error)
        except _NotYet as error:
            self._why.update(dict.fromkeys(keys, _NOT_READ.format(error)))
        else:
            for key in differ:
                log.error("shard %s: %s: %s", self._last.shard_id, key, NOT_THE_STORES)
            self._believed.false |= differ & self._claimed
            self._believed.proven |= (set(keys) - differ) & self._claimed
            self._why = {key: why for key, why in self._why.items() if key not in keys}


def _file(manifest: Manifest, table: Table, key: PartKey) -> _File:
    overlay = manifest.overlays(table.name).get(key.part)
    return key, table.parts[key.part].checksum, overlay.checksum if overlay else ""


def _together(keys: Iterable[PartKey]) -> Iterator[list[PartKey]]:
    """Some parts of one table each."""
    for _, group in groupby(sorted(keys), lambda key: key[:3]):
        of_table = list(group)
        for begin in range(0, len(of_table), TOGETHER):
            yield of_table[begin : begin + TOGETHER]


def _read(store: Store, manifest: Manifest, table: Table, parts: Sequence[Part]) -> list[Replaced]:
    """The first and the last row of each part, and one between that nobody can foresee."""
    return [
        some_rows(store, manifest, table, part, sorted({0, secrets.randbelow(part.rows), part.rows - 1}))
        for part in parts
    ]


async def _differing(channel: grpc.aio.Channel, rows: Sequence[tuple[PartKey, Replaced]]) -> set[PartKey]:
    """The parts that the shard has other rows of. Raises _NotYet if it does not answer."""
    first, _ = rows[0]
    request = wire.LookupRequest(
        model=f"{first.model}@{first.version}",
        table=first.table,
        ids=[row for _, known in rows for row in known.ids.tolist()],
        encoding=wire.ROW_ENCODING_STORED,
        term=1,
        epoch=1,  # so that it forwards nothing
    )
    try:
        answer = await EmbeddingServiceStub(channel).Lookup(request, timeout=ASK_SECONDS)
    except grpc.aio.AioRpcError as error:
        moved = error.code() is grpc.StatusCode.ABORTED  # it gave one of them up
        raise (_NotAll if moved else _NotYet)(_told(error)) from None
    differ, begin = set(), 0
    for key, known in rows:
        end = begin + known.rows.nbytes
        if answer.rows[begin:end] != known.rows.tobytes():
            differ.add(key)
        begin = end
    return differ


def _told(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {printable(error.details() or '')}"
    return one_line(error)
