"""Branches for tests: a small store to begin from, random pushes, and training in this process as the reference."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from embedding_service.budget import Budget
from embedding_service.client.gradients import push_pieces, summed
from embedding_service.client.router import Router
from embedding_service.placement.routing import Routing
from embedding_service.rows import TIERS
from embedding_service.security.server import Files, Security
from embedding_service.serving import RequestLimits, Server, cancel
from embedding_service.shard.holdings import Holdings
from embedding_service.shard.shares import Shares
from embedding_service.shard.training import SERVICE, TrainingService
from embedding_service.store.importing import import_checkpoint
from embedding_service.store.store import Store
from embedding_service.training.branch import Branch, create_branch, read_branch
from embedding_service.training.log import NEVER
from embedding_service.training.optimizers import optimizer_of
from embedding_service.wire import embedding_pb2 as base_wire
from embedding_service.wire import training_pb2 as wire

MODEL, TABLE, ROWS, DIM = "m", "t", 4096, 16
LR = 0.05
T = TypeVar("T")


def start_rows() -> Tensor:
    """float32 [ROWS, DIM]: row r begins with its id."""
    rows = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = torch.arange(ROWS)
    return rows


def store_to_train(folder: Path, dtype: str = "fp32") -> Path:
    """A store with version 1 of MODEL: one table in eight parts."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": start_rows()}, folder / "rows.safetensors")
    part_bytes = ROWS * DIM * 4 // 8
    import_checkpoint(
        folder / "rows.safetensors", folder / "store", MODEL, dtype=dtype, part_bytes=part_bytes, generic={"w": TABLE}
    )
    return folder / "store"


def numbers(kind: str) -> wire.Optimizer:
    """An optimizer as the client says it."""
    beta1, beta2 = (0.9, 0.999) if kind == "rowwise_adam" else (0.0, 0.0)
    return wire.Optimizer(kind=kind, eps=0.0 if kind == "sgd" else 1e-8, beta1=beta1, beta2=beta2)


def new_branch(
    store: Path, kind: str, shards: list[str], every: int = 1000, name: str = "b", copies: int = 1
) -> Branch:
    """A branch whose parts are with the shards in turn."""
    request = wire.OpenRequest(optimizer=numbers(kind), checkpoint_every=every, copies=copies)
    return create_branch(Store(store), f"{MODEL}@{name}", request, {}, shards)


def changes(step: int, worker: int = 0, most: int = 200) -> tuple[Tensor, Tensor]:
    """What a worker changes in a step: ascending ids [n] and gradients [n, DIM]."""
    chance = torch.Generator().manual_seed(1000 * step + worker)
    ids = torch.randperm(ROWS, generator=chance)[: int(torch.randint(1, most, (1,), generator=chance))].sort().values
    return ids, torch.randn(len(ids), DIM, generator=chance)


def pieces_of(branch: Branch, session: int, step: int, ids: Tensor, gradients: Tensor, worker: int = 0) -> list[bytes]:
    """A push of one table, to the share of the first id."""
    [table] = branch.tables
    first = max(0, min(int(ids[0]), ROWS - 1)) if len(ids) else 0
    share = table.shares[first // table.rows_per_part]
    head = wire.PushPiece(branch=branch.full_name, session=session, worker=worker, step=step, share=share)
    return list(push_pieces(head, {TABLE: (ids, gradients)}, LR))


class InProcess:
    """Training of one table in this process, by the same optimizer."""

    def __init__(self, kind: str) -> None:
        self._optimizer = optimizer_of(numbers(kind))
        self.rows = start_rows()
        self.state = {name: torch.zeros(each) for name, each in self._optimizer.state_shapes(ROWS, DIM).items()}
        self.steps = 0

    def step(self, *pushes: tuple[Tensor, Tensor]) -> None:
        """One step of as many workers."""
        self.steps += 1
        ids, gradients = summed([each for each, _ in pushes], [each for _, each in pushes])
        self._optimizer.step(self.rows, self.state, ids, gradients, LR, self.steps)

    def until(self, step: int, workers: int = 1) -> Tensor:
        """The rows after a step of `changes`."""
        while self.steps < step:
            self.step(*(changes(self.steps + 1, worker) for worker in range(workers)))
        return self.rows


def spread(branch: Branch, ids: Tensor, gradients: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(share, ids, gradients) of what is in each share of a branch."""
    [table] = branch.tables
    for share in branch.shares:
        mine = torch.tensor([table.shares[id // table.rows_per_part] == share for id in ids.tolist()], dtype=torch.bool)
        yield share, ids[mine], gradients[mine]


class InThread:
    """Servers that train branches of a store, each as a shard of its own, on one thread of this process.

    `secure`: a folder with their certificates and a policy, as `up --secure` makes it. Their audit comes there.
    """

    def __init__(
        self,
        store: Path,
        logs: Path,
        shards: Sequence[str],
        sync: float = NEVER,
        patience: float = 60,
        memory: int = 1 << 30,
        secure: Path | None = None,
        budget: int = 1 << 30,
    ) -> None:
        self._memory, self._secure, self._budget = memory, secure, budget
        self.store, self._logs, self._sync, self._patience = Store(store), logs, sync, patience
        self.addresses: dict[str, str] = {}
        self.shares: dict[str, Shares] = {}
        self.holdings: dict[str, Holdings] = {}
        self.budgets: dict[str, Budget] = {}
        self._servers: dict[str, Server] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}
        self._routers: dict[str, Router] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()
        for shard in shards:
            self._do(self._start(shard))
        self.route(shards)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _start(self, shard: str) -> None:
        limits, budget = RequestLimits(), self.budgets.setdefault(shard, Budget(self._budget))
        router = self._routers[shard] = Router(["127.0.0.1:1"])
        security = self._security(shard) if self._secure else None
        self.holdings[shard] = Holdings(self.store, TIERS.find("ram"), self._memory, self._logs / "cache")
        shares = self.shares[shard] = Shares(
            self.store,
            shard,
            router,
            self._logs,
            self._sync,
            memory=self.holdings[shard],
            patience=self._patience,
            look_seconds=0.1,
            access=security.files.access if security else None,
        )
        server = self._servers[shard] = Server(limits, budget, security)
        audit = security.audit if security else None
        service = TrainingService(self.store, shard, router, limits, budget, shares, audit)
        server.add(TrainingService.add_to, service, SERVICE)
        front = await server.listen(self.addresses.get(shard, "127.0.0.1:0"))
        shares.address = self.addresses[shard] = front.address

    def _security(self, shard: str) -> Security:
        assert self._secure
        own, policy, audit = self._secure / shard, self._secure / "policy.toml", self._secure / "audit.jsonl"
        return Security(Files(own / "tls.crt", own / "tls.key", own / "ca.crt", policy, audit))

    def route(self, shards: Sequence[str], told: Sequence[str] | None = None) -> None:
        """Say to all, or to some, which shards are there."""
        about = [base_wire.ShardAddress(id=shard, address=self.addresses[shard]) for shard in shards]
        self._epoch = getattr(self, "_epoch", 0) + 1

        async def tell() -> None:
            for shard in self.shares if told is None else told:
                self._routers[shard].adopt(Routing(base_wire.Routing(term=1, epoch=self._epoch, shards=about)))
                if shard not in self._looking:
                    self._looking[shard] = asyncio.create_task(self.shares[shard].run())

        self._do(tell())

    async def _stop(self, shard: str) -> None:
        await cancel([self._looking.pop(shard)])
        await self._servers.pop(shard).stop()
        await self.shares.pop(shard).close()
        await self.holdings.pop(shard).close()

    def stop(self, shard: str) -> None:
        """It ends."""
        self._do(self._stop(shard))

    def start(self, shard: str) -> None:
        """It starts, again at its address if it had one."""
        self._do(self._start(shard))
        self.route([*self.shares])

    def look_away(self, shard: str) -> None:
        """It does not look at the seats any more."""
        self._do(cancel([self._looking[shard]]))

    def end_following(self, shard: str, branch: str, share: str) -> None:
        """The task of a copy ends, as by an error that nobody foresaw."""
        following = self.shares[shard]._open[branch, share].following
        assert following
        self._do(cancel([following]))

    def drain(self, shard: str) -> None:
        """It hands over what it has."""
        self._do(self.shares[shard].drain())

    def logs_of(self, branch: str, share: str, shard: str | None = None) -> Path:
        """The folder of a share's log at a shard, or at the one that it is named after."""
        made = read_branch(self.store, branch).made
        return self._logs / branch / made / share / (shard or share)

    def close(self) -> None:
        """All end."""
        for shard in list(self._servers):
            self.stop(shard)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
