"""The client reads near rows by itself: the same bits as over the wire, for every caller, and right in every fault."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import longcat_checkpoint, longcat_table
from support.cluster import Cluster, Up, cluster, until
from support.near import near_reader, near_shard, wait_for
from support.nearness import all_near, come_near, read_near

from embedding_service import EmbeddingClient, RemoteEmbedding
from embedding_service.client import trips
from embedding_service.client.streams import Ended, Stream
from embedding_service.client.wants import decoder, near_values
from embedding_service.near.reader import NearTable
from embedding_service.store.importing import import_checkpoint
from embedding_service.wire import embedding_pb2 as wire

ROWS = len(longcat_table())


@pytest.fixture(scope="module")
def near(service: Up) -> Iterator[EmbeddingClient]:
    """A client that has found the shards of this machine."""
    with EmbeddingClient(service.address, timeout=60) as client:
        yield come_near(client)


@pytest.fixture(scope="module")
def wired(service: Up) -> Iterator[EmbeddingClient]:
    with EmbeddingClient(service.address, timeout=60, near=False) as client:
        yield client


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_n1_near_rows_have_the_bits_of_the_wires(
    near: EmbeddingClient, wired: EmbeddingClient, model: str, dtype: torch.dtype
) -> None:
    for ids in (torch.arange(12), torch.randint(0, ROWS, (64, 12)), torch.full((5, 7), 3), torch.zeros(0, 3).long()):
        here, there = (client.lookup(f"{model}/ngram", ids, dtype=dtype) for client in (near, wired))
        assert here.shape == there.shape
        assert here.dtype == there.dtype == dtype
        assert torch.equal(here.view(torch.int16), there.view(torch.int16))


def test_every_caller_reads_near_rows(near: EmbeddingClient, wired: EmbeddingClient) -> None:
    ids, tokens = torch.randint(0, ROWS, (3, 12)), torch.randint(0, 900, (2, 5))
    expected, ngrams = wired.lookup("fp32/ngram", ids), wired.lookup_ngrams("fp32", tokens)

    def everybody() -> None:
        assert torch.equal(asyncio.run(near.lookup_async("fp32/ngram", ids)), expected)
        assert torch.equal(near.prefetch("fp32/ngram", ids).result(), expected)
        assert torch.equal(RemoteEmbedding(near, "fp32/ngram")(ids), expected)
        assert torch.equal(near.lookup_ngrams("fp32", tokens), ngrams)

    assert read_near(near, everybody) == 3 * ids.numel() + tokens.numel() * 6
    until(lambda: set(near.statistics.shards.values()) == {"near"}, "all shards to be near")
    assert wired.statistics.near_rows == 0
    assert wired.statistics.shards == {}


def test_torchrecs_modules_read_near_rows(near: EmbeddingClient) -> None:
    torchrec = pytest.importorskip("torchrec")
    from embedding_service.torchrec import RemoteEmbeddingBagCollection

    config = torchrec.EmbeddingBagConfig(
        name="ngram", embedding_dim=longcat_table().shape[1], num_embeddings=ROWS, feature_names=["f"]
    )
    bags = RemoteEmbeddingBagCollection(near, "fp32", [config])
    features = torchrec.KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2, 3]), torch.tensor([2, 1]))
    table = longcat_table()

    def pooled() -> None:
        assert torch.equal(bags(features)["f"], torch.stack([table[1] + table[2], table[3]]))

    assert read_near(near, pooled) == 3


def test_a_client_that_was_told_not_to_stays_so_in_another_process(service: Up) -> None:
    with EmbeddingClient(service.address, near=False) as client, pickle.loads(pickle.dumps(client)) as copy:
        copy.lookup("fp32/ngram", torch.tensor([1]))
        assert copy.statistics.shards == {}


def test_a_child_of_a_fork_is_near_by_itself(near: EmbeddingClient) -> None:
    """What its parent's client has mapped is not there."""
    table, mapped = longcat_table(), maps_of_rows()
    child = os.fork()
    if child == 0:
        good = False
        try:
            good = maps_of_rows() < mapped and all_near(come_near(near))
            good &= np.array_equal(near.lookup("fp32/ngram", torch.arange(0, ROWS, 7)).numpy(), table[::7].numpy())
            near.close()
        finally:
            os._exit(0 if good else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(near.lookup("fp32/ngram", torch.arange(0, ROWS, 7)), table[::7])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_a_client_that_may_not_map_uses_the_wire_and_says_why(service: Up, near: EmbeddingClient) -> None:
    table = longcat_table()
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        said = "?"
        try:
            os.setuid(65534)
            with EmbeddingClient(service.address, timeout=60) as client:
                until(lambda: client.lookup("fp32/ngram", torch.arange(9)) is not None and refused(client), "a refusal")
                right = np.array_equal(
                    client.lookup("fp32/ngram", torch.arange(0, ROWS, 7)).numpy(), table[::7].numpy()
                )
                said = f"{right} {client.statistics.near_rows} {client.statistics.wired_rows > 0}"
        except Exception as error:
            said = repr(error)
        finally:
            os.write(there, said.encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(here, 1000) == b"True 0 True"
    os.close(here)
    os.close(there)


def refused(client: EmbeddingClient) -> bool:
    shards = client.statistics.shards
    return len(shards) == 3 and all("Permission denied" in why for why in shards.values())


class Watched(Stream):
    """A stream that notes what is done with it."""

    def __init__(self, inner: Stream, events: list[str]) -> None:
        self._inner, self._events = inner, events

    def send(self, message: bytes) -> object:
        self._events.append("sent")
        return self._inner.send(message)

    def receive(self) -> bytes | Ended:
        self._events.append("waited")
        return self._inner.receive()

    def cancel(self, code: grpc.StatusCode, message: str) -> None:
        self._inner.cancel(code, message)


def test_rows_of_a_lookup_that_is_partly_near_are_read_while_the_others_travel(
    service: Up, wired: EmbeddingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    open_stream, held, copy = trips.open_stream, NearTable.held, NearTable.copy
    monkeypatch.setattr(trips, "open_stream", lambda channel: Watched(open_stream(channel), events))
    ids = torch.randperm(ROWS)[:3000]

    def noted(table: NearTable, ids: np.ndarray) -> np.ndarray | None:
        events.append("read")
        return copy(table, ids)

    with EmbeddingClient(service.address, timeout=60, near=True) as client:
        until(lambda: all_near(client), "all rows to be near")
        # From now on every second part is not.
        monkeypatch.setattr(NearTable, "is_unchanged", lambda table: False)
        monkeypatch.setattr(NearTable, "held", lambda table, parts: held(table, parts) & (parts % 2 == 0))
        monkeypatch.setattr(NearTable, "copy", noted)
        for dtype in (torch.float32, torch.float16):  # used together, and decoded one by one as they come
            expected = wired.lookup("fp32/ngram", ids, dtype=dtype)

            def some_near() -> bool:
                """Whether some rows were near: a shard that misses its beat is not."""
                events.clear()
                before = client.statistics
                assert torch.equal(client.lookup("fp32/ngram", ids, dtype=dtype), expected)  # noqa: B023
                after = client.statistics
                assert after.near_rows + after.wired_rows == before.near_rows + before.wired_rows + len(ids)
                return after.near_rows > before.near_rows

            until(some_near, "rows that are near")
            order = [event for event, _ in itertools.groupby(events)]
            assert order == ["sent", "read", "waited"], order
            assert torch.equal(asyncio.run(client.lookup_async("fp32/ngram", ids, dtype=dtype)), expected)
        # A part that goes while its rows are read: all rows come over the wire.
        monkeypatch.setattr(NearTable, "copy", lambda table, ids: None)
        before = client.statistics
        assert torch.equal(client.lookup("fp32/ngram", ids), wired.lookup("fp32/ngram", ids))
        assert client.statistics.near_rows == before.near_rows


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_zeros_below_zero_are_what_the_wire_makes_of_them(tmp_path: Path, encoding: str) -> None:
    """A shard that narrows fp32 rows for the wire gives 0.0 for -0.0."""
    values = torch.randn(1024, 4)
    values[:, 1] = -0.0
    (tmp_path / "checkpoint").mkdir()
    save_file({"table.weight": values}, tmp_path / "checkpoint" / "model.safetensors")
    import_checkpoint(
        tmp_path / "checkpoint", str(tmp_path / "store"), "m", dtype="fp32", generic={"table.weight": "t"}
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[encoding]
    with near_shard(tmp_path / "near", tmp_path / "store", "m") as shard, near_reader(shard) as reader:
        shard.hold()
        table, ids = wait_for(reader, shard.key), np.arange(1024)
        stored = table.copy(ids)
        assert stored is not None
        near = near_values(stored, decoder("fp32", 4, dtype, torch.device("cpu")))
        assert np.array_equal(near.view(torch.uint8).numpy(), shard.rows.gather(ids, encoding))


def maps_of_rows() -> int:
    return Path("/proc/self/maps").read_text().count("embedding-rows")


def folder_for_sockets() -> tempfile.TemporaryDirectory[str]:
    """Its path is short: a socket's may have 107 bytes."""
    return tempfile.TemporaryDirectory(prefix="near-")


class Reading:
    """Threads that look up rows near or far, and check each by content: a row names its table and its id.

    Attributes:
        clients: One a thread, so that its counts tell of each lookup whether rows were near.
        rows: Of each outcome: "right", "wrong", "stale" or "failed". Stale rows are near ones of the version before
            `flipped`. A shard that is asked over the wire may give those until its grace ends.
    """

    def __init__(self, address: list[str], threads: int = 2) -> None:
        self.clients = [EmbeddingClient(address, timeout=60) for _ in range(threads)]
        self.rows: Counter[str] = Counter()
        self.failures: list[Exception] = []
        self.flipped = float("inf")
        self._tables = {tag: longcat_table(tag) for tag in (1, 2)}
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=each) for each in enumerate(self.clients)]

    def __enter__(self) -> Reading:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        for client in self.clients:
            client.close()

    @property
    def near_rows(self) -> int:
        return sum(client.statistics.near_rows for client in self.clients)

    def all_see(self, shard: str, *, near: bool) -> bool:
        """Whether a shard is near for all clients, or for none."""
        return all((client.statistics.shards.get(shard) == "near") == near for client in self.clients)

    def more(self, rows: int = 20_000) -> None:
        """Until so many more were right."""
        before = self.rows["right"]
        until(lambda: self.rows["right"] >= before + rows, f"{rows} more rows")

    def until_near(self) -> None:
        """Until every client has read near rows once more."""
        before = [client.statistics.near_rows for client in self.clients]

        def near() -> bool:
            return all(client.statistics.near_rows > rows for client, rows in zip(self.clients, before, strict=True))

        until(near, f"near rows, {[client.statistics for client in self.clients]}")

    def _read(self, seed: int, client: EmbeddingClient) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not self._done.is_set():
            ids = torch.randint(0, ROWS, (600,), generator=generator)
            began, near_before = time.monotonic(), client.statistics.near_rows
            try:
                rows = client.lookup("m/ngram", ids)
            except Exception as error:
                self.failures.append(error)
                self.rows["failed"] += len(ids)
                continue
            tag = int(rows[0, 0])
            right = tag in self._tables and torch.equal(rows, self._tables[tag][ids])
            near = client.statistics.near_rows > near_before
            stale = right and near and tag == 1 and began > self.flipped
            self.rows["stale" if stale else "right" if right else "wrong"] += len(ids)


@pytest.mark.service
def test_a_million_near_rows_are_right_through_every_fault(tmp_path: Path) -> None:
    """N2 to N4: shards are killed, hang, come again, are drained and replaced, and the version is replaced."""
    first, second = (longcat_checkpoint(tmp_path / f"checkpoint-{tag}", tag) for tag in (1, 2))
    store = tmp_path / "store"
    import_checkpoint(first, str(store), "m", dtype="fp32", part_bytes=64 << 10)
    options = ("--replicas=2", "--expect-shards=3", "--lost-after=3", "--grace=1")
    with folder_for_sockets() as sockets, cluster(tmp_path, store, *options) as running:

        def start(name: str) -> None:
            running.start_shard(name, f"--near={sockets}/{name}", "--memory=64MiB")

        for name in ("a", "b", "c"):
            start(name)
        running.wait_serving()
        addresses = list(running.addresses.values())
        with Reading(addresses) as reading:
            reading.until_near()
            reading.more()
            killed_and_hung(running, reading, start)
            drained(running, reading, start)
            version_replaced(running, reading, store, second)
            until(lambda: reading.rows["right"] >= 1_000_000 and reading.near_rows > 500_000, "a million rows")
        assert reading.rows["wrong"] == reading.rows["stale"] == 0, reading.rows
        assert reading.rows["failed"] == 0, reading.failures[0]


def killed_and_hung(running: Cluster, reading: Reading, start: Callable[[str], None]) -> None:
    """One after the other, with rows read in between."""
    running.processes["a"].end(signal.SIGKILL)
    reading.more()
    start("a")
    until(lambda: running.is_whole(2), "all copies")
    reading.until_near()
    hung = running.processes["b"].popen
    hung.send_signal(signal.SIGSTOP)
    until(lambda: reading.all_see("b", near=False), "the silence to be noticed")
    reading.more()
    hung.send_signal(signal.SIGCONT)
    until(lambda: running.is_whole(2), "all copies")
    until(lambda: reading.all_see("b", near=True), "b to be near again")


def drained(running: Cluster, reading: Reading, start: Callable[[str], None]) -> None:
    """Parts move away, and back to the shard that is started in its place."""
    running.processes["c"].end(signal.SIGTERM)
    reading.more()
    start("c")
    until(lambda: running.is_whole(2), "all copies")
    reading.until_near()


def version_replaced(running: Cluster, reading: Reading, store: Path, checkpoint: Path) -> None:
    """From when every shard has the new routing on, no lookup that begins has a near row of the old version."""
    import_checkpoint(checkpoint, str(store), "m", version="2", dtype="fp32", part_bytes=64 << 10)

    def everywhere() -> bool:
        versions = {
            running.stub(name).ListModels(wire.ListModelsRequest()).models[0].version for name in running.addresses
        }
        return versions == {"2"}

    until(everywhere, "version 2 at every shard")
    reading.flipped = time.monotonic()
    reading.until_near()
    reading.more()
