"""What shards claim counts once it was read back. A shard here is a server with a certificate and rows of its own."""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from embedding_service.controller.claims import NOT_THE_STORES, Claims, ShardClaims
from embedding_service.controller.decisions import part_keys, place_version
from embedding_service.placement.parts import PartKey
from embedding_service.security.access import Access
from embedding_service.security.authority import URI, Authority
from embedding_service.security.proofs import Signer
from embedding_service.security.routing import sign_routing
from embedding_service.store.manifest import Manifest
from embedding_service.store.reading import part_rows
from embedding_service.store.store import Catalogue, Store
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceServicer, add_EmbeddingServiceServicer_to_server

MODEL = "fp32"
SECONDS = 60


def run(test: Callable[[Path, Path], Coroutine[Any, Any, None]]) -> Callable[[Path, Path], None]:
    """A test on an event loop."""

    @functools.wraps(test)
    def on_loop(store: Path, tmp_path: Path) -> None:
        asyncio.run(test(store, tmp_path))

    return on_loop


class Rows(EmbeddingServiceServicer):
    """Answers with the rows of a version, and for some parts with other ones."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.false: set[int] = set()
        self.routing = wire.Routing()
        table = manifest.tables[0]
        self._step = table.rows_per_part
        parts = []
        for part in table.parts:
            with part_rows(store, manifest, table, part) as rows:
                parts.append(np.array(rows))
        self._rows = np.concatenate(parts)

    async def Lookup(self, request: wire.LookupRequest, context: Any) -> wire.LookupResponse:
        ids = np.array(request.ids)
        rows = self._rows[ids].copy()
        rows[np.isin(ids // self._step, list(self.false)), 0] ^= 1
        return wire.LookupResponse(rows=rows.tobytes())

    async def GetRouting(self, request: wire.GetRoutingRequest, context: Any) -> wire.Routing:
        return self.routing


class World(NamedTuple):
    """A controller's view of a store, and a shard."""

    claims: Claims
    rows: Rows
    manifest: Manifest
    found: list[Catalogue | None]
    report: control.ShardReport
    folder: Path

    @property
    def keys(self) -> list[PartKey]:
        return part_keys(self.manifest)

    def signed_by(self, name: str) -> wire.Routing:
        """A routing that names the shard for the first three parts."""
        address = wire.ShardAddress(id=self.report.shard_id, address=self.report.address)
        holders = {key: ["shard-0"] for key in self.keys[:3]}
        placement = place_version(self.manifest, holders, holders, ["shard-0"])
        routing = wire.Routing(shards=[address], models=[placement], term=self.report.term, epoch=self.report.epoch)
        Authority.load(self.folder).issue(self.folder / "signer", [f"{URI}/{name}"])
        signer = Signer(self.folder / "signer" / "tls.crt", self.folder / "signer" / "tls.key")
        routing.signature = sign_routing(routing, signer)
        return routing


@asynccontextmanager
async def world(store: Path, folder: Path) -> AsyncIterator[World]:
    authority = Authority.create()
    authority.save(folder)
    authority.issue(folder / "shard-0", [f"{URI}/shard/shard-0", "shard-0", "127.0.0.1"])
    authority.issue(folder / "controller", [f"{URI}/controller", "127.0.0.1"])
    opened = Store(store)
    found: list[Catalogue | None] = [opened.catalogue()]
    manifest = opened.manifest(MODEL)
    rows = Rows(opened, manifest)
    server = grpc.aio.server()
    add_EmbeddingServiceServicer_to_server(rows, server)
    files = [(folder / "shard-0" / name).read_bytes() for name in ("tls.key", "tls.crt")]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(files[0], files[1])]))
    await server.start()
    ours = folder / "controller"
    claims = Claims(opened, Access(ours / "ca.crt", ours / "tls.crt", ours / "tls.key"), lambda: found[0])
    report = control.ShardReport(
        shard_id="shard-0",
        address=f"127.0.0.1:{port}",
        device="cpu",
        tier="ram",
        has_parts=True,
        parts=[key.to_wire() for key in part_keys(manifest)],
        part_accesses=range(len(part_keys(manifest))),
        term=5,
        epoch=1,
    )
    try:
        yield World(claims, rows, manifest, found, report, folder)
    finally:
        await server.stop(None)


@asynccontextmanager
async def begun(at: World) -> AsyncIterator[tuple[ShardClaims, list[control.ShardReport]]]:
    """A registration, and what the state is told of it."""
    claims = at.claims.of(at.report)
    told: list[control.ShardReport] = []
    running = asyncio.create_task(claims.run(told.append))
    try:
        told.append(await claims.begin(at.report))
        yield claims, told
    finally:
        running.cancel()


def parts_of(report: control.ShardReport) -> list[PartKey]:
    return [PartKey.from_wire(part) for part in report.parts]


async def until(told: list[control.ShardReport], condition: Callable[[control.ShardReport], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition(told[-1]):
            await asyncio.sleep(0.01)


@run
async def test_s6_a_claim_counts_once_its_rows_came_from_the_shard(store: Path, tmp_path: Path) -> None:
    async with world(store, tmp_path) as at:
        at.rows.false = {1}
        async with begun(at) as (claims, told):
            good = [key for key in at.keys if key.part != 1]
            await until(told, lambda report: parts_of(report) == good)
            assert list(told[-1].part_accesses) == [key.part for key in good]
            assert [(failure.part.part, failure.message) for failure in told[-1].failures] == [(1, NOT_THE_STORES)]
            # A shard that gives it up and loads the right one is believed.
            at.rows.false = set()
            fewer = control.ShardReport()
            fewer.CopyFrom(at.report)
            del fewer.parts[:], fewer.part_accesses[:]
            fewer.parts.extend(key.to_wire() for key in good)
            assert parts_of(claims.hear(fewer)) == good
            assert parts_of(claims.hear(at.report)) == good
            await until(told, lambda report: parts_of(report) == at.keys)
            beat = control.ShardReport(shard_id="shard-0", address=at.report.address, device="cpu", tier="ram")
            assert claims.hear(beat) is beat
        # A shard of that id at another address is believed nothing.
        other = control.ShardReport()
        other.CopyFrom(at.report)
        other.address = "127.0.0.1:1"
        assert parts_of(at.claims.of(at.report).hear(at.report)) == at.keys
        assert parts_of(at.claims.of(other).hear(other)) == []


@run
async def test_s6_what_a_controller_signed_counts_while_the_store_is_away(store: Path, tmp_path: Path) -> None:
    async with world(store, tmp_path) as at:
        there, at.found[0] = at.found[0], None
        at.rows.routing = at.signed_by("shard/shard-0")
        async with begun(at) as (_, told):
            assert parts_of(told[-1]) == []
        at.rows.routing = at.signed_by("controller")
        async with begun(at) as (_, told):
            assert parts_of(told[0]) == at.keys[:3]
            # What is not the store's counts no more, once that is known.
            at.rows.false, at.found[0] = {2}, there
            good = [key for key in at.keys if key.part != 2]
            await until(told, lambda report: parts_of(report) == good)


@run
async def test_s6_files_that_are_away_for_a_moment_end_no_reading_back(store: Path, tmp_path: Path) -> None:
    async with world(store, tmp_path) as at:
        authority = tmp_path / "controller" / "ca.crt"
        content = authority.read_bytes()
        authority.unlink()
        async with begun(at) as (_, told):
            assert parts_of(told[0]) == []
            authority.write_bytes(content)
            await until(told, lambda report: parts_of(report) == at.keys)


@run
async def test_s6_nobody_is_named_because_a_file_of_the_store_changed(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store / MODEL, tmp_path / "store" / MODEL)
    async with world(tmp_path / "store", tmp_path) as at:
        file = Store(tmp_path / "store").part_path(at.manifest, at.manifest.tables[0].parts[2])
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.seek(size - at.manifest.tables[0].row_bytes)
            opened.write(b"\xff")
        at.rows.routing = at.signed_by("controller")
        async with begun(at) as (_, told):
            await until(told, lambda report: parts_of(report) == at.keys)
            assert not told[-1].failures
