"""A steady load of lookups. Every row is checked by content."""

from __future__ import annotations

import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
import torch

from embedding_service import EmbeddingClient
from embedding_service.errors import EmbeddingServiceError
from embedding_service.security.access import Access
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

# Seconds that one lookup may take, retries included.
DEADLINE = 60.0
IDS = 48
SomeLoad = TypeVar("SomeLoad", bound="CheckedLoad")


class CheckedLoad(ABC):
    """Threads that look up random rows of one fp32 table and compare them with what may be served.

    Args:
        tables: Whole tables, one for each version that may answer: an answer must be all of one of them.
        pause: Seconds each thread waits between its lookups. Without it they take the processor from what they watch.
        ids: Rows of each lookup.

    Attributes:
        phase: What the time now is called in `seconds`.
        seconds: How long each answered lookup took, by the phase in which it began.
        failed_in, wrong_in: Counts of the others, likewise.
    """

    def __init__(self, *tables: torch.Tensor, threads: int, pause: float, ids: int = IDS) -> None:
        self.lookups = 0
        self.wrong: list[str] = []
        self.failed: list[Exception] = []
        self.failed_in: Counter[str] = Counter()
        self.wrong_in: Counter[str] = Counter()
        self.answered_by = [0] * len(tables)
        self.phase = ""
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._tables, self._pause, self._ids = tables, pause, ids
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def __enter__(self: SomeLoad) -> SomeLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._close()

    def check(self) -> None:
        """Check, after the load, that every lookup was answered and every row right."""
        assert self.lookups > 0
        assert not self.failed, f"{len(self.failed)} of {self.lookups} lookups failed, the first: {self.failed[0]}"
        assert not self.wrong, f"{len(self.wrong)} of {self.lookups} lookups brought wrong rows: {self.wrong[0]}"

    @abstractmethod
    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """float32 [n, dim] of ids int64 [n]. Raises EmbeddingServiceError or grpc.RpcError."""

    @abstractmethod
    def _close(self) -> None: ...

    def _run(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not self._stop.wait(self._pause):
            ids = torch.randint(0, len(self._tables[0]), (self._ids,), generator=generator)
            self.lookups += 1
            phase, began = self.phase, time.monotonic()
            try:
                rows = self._lookup(ids)
            except (EmbeddingServiceError, grpc.RpcError) as error:
                self.failed.append(error)
                self.failed_in[phase] += 1
                continue
            self.seconds[phase].append(time.monotonic() - began)
            matches = [torch.equal(rows, table[ids]) for table in self._tables]
            if any(matches):
                self.answered_by[matches.index(True)] += 1
            else:
                self.wrong_in[phase] += 1
                self.wrong.append(f"asked {ids.tolist()}, got tags {rows[:, 0].unique().tolist()}")


class Load(CheckedLoad):
    """Through the Python client, which asks the owners.

    `near`: it may read rows in place. `tls`: what it shows, None for plain text.
    """

    def __init__(
        self,
        address: str | list[str],
        name: str,
        *tables: torch.Tensor,
        threads: int = 2,
        pause: float = 0.01,
        ids: int = IDS,
        near: bool = True,
        tls: Access | None = None,
    ) -> None:
        super().__init__(*tables, threads=threads, pause=pause, ids=ids)
        self.client = EmbeddingClient(address, timeout=DEADLINE, near=near, tls=tls)
        self._name = name

    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return self.client.lookup(self._name, ids)

    def _close(self) -> None:
        self.client.close()


class ThinLoad(CheckedLoad):
    """As a client in another language would: the bare protos, any shard, and another try if it is UNAVAILABLE.

    Args:
        addresses: The shards that may be asked now.
        tls: What it shows. None for plain text.
    """

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        name: str,
        table: torch.Tensor,
        *,
        pause: float,
        tls: Access | None = None,
    ) -> None:
        super().__init__(table, threads=1, pause=pause)
        self._addresses = addresses
        self._credentials = tls.credentials() if tls else None
        self._model, _, self._table = name.partition("/")
        self._channels: dict[str, grpc.Channel] = {}

    def _lookup(self, ids: torch.Tensor) -> torch.Tensor:
        request = wire.LookupRequest(model=self._model, table=self._table, ids=ids.tolist())
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                answer = self._stub().Lookup(request, timeout=max(deadline - time.monotonic(), 0.001))
                return torch.frombuffer(bytearray(answer.rows), dtype=torch.float32).view(-1, answer.dim)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _stub(self) -> EmbeddingServiceStub:
        address = random.choice(self._addresses())
        if address not in self._channels:
            shown = self._credentials
            channel = grpc.secure_channel(address, shown) if shown else grpc.insecure_channel(address)
            self._channels[address] = channel
        return EmbeddingServiceStub(self._channels[address])

    def _close(self) -> None:
        for channel in self._channels.values():
            channel.close()
