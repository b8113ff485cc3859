"""A steady load of lookups whose every row is checked by content."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

from embedding_service import EmbeddingClient
from embedding_service.errors import EmbeddingServiceError


class Load:
    """Threads that look up random rows of one fp32 table and compare them with what may be served.

    Args:
        tables: Whole tables, one for each version that may answer: an answer must be all of one of them.
    """

    def __init__(self, address: str | list[str], name: str, *tables: torch.Tensor, threads: int = 2) -> None:
        self.client = EmbeddingClient(address, timeout=30)
        self.lookups = 0
        self.wrong: list[str] = []
        self.failed: list[EmbeddingServiceError] = []
        self.answered_by = [0] * len(tables)
        self._name, self._tables = name, tables
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.client.close()

    def check(self) -> None:
        """After the load: every lookup answered, every row right."""
        assert self.lookups > 0
        assert not self.failed, f"{len(self.failed)} of {self.lookups} lookups failed, the first: {self.failed[0]}"
        assert not self.wrong, f"{len(self.wrong)} of {self.lookups} lookups brought wrong rows: {self.wrong[0]}"

    def _run(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        while not self._stop.is_set():
            ids = torch.randint(0, len(self._tables[0]), (48,), generator=random)
            self.lookups += 1
            try:
                rows = self.client.lookup(self._name, ids)
            except EmbeddingServiceError as error:
                self.failed.append(error)
                continue
            matches = [torch.equal(rows, table[ids]) for table in self._tables]
            if any(matches):
                self.answered_by[matches.index(True)] += 1
            else:
                self.wrong.append(f"asked {ids.tolist()}, got tags {rows[:, 0].unique().tolist()}")
