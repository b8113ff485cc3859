"""The shard process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from embedding_service import tracing
from embedding_service.address_space import can_seal
from embedding_service.budget import Budget
from embedding_service.client.router import Router
from embedding_service.client.steps import run_async
from embedding_service.client.transport import GrpcTransport
from embedding_service.ending import END_SECONDS, end_within, told_to_end
from embedding_service.errors import InvalidRequest
from embedding_service.front import Front, Kind
from embedding_service.machine import boot_id, check_free, spare_collections
from embedding_service.memory import keep_freed_memory, memory_for_requests
from embedding_service.metrics import MetricsServer, counter, gauge, info
from embedding_service.placement.demand import MOST_MEMORY
from embedding_service.placement.parts import PartKey
from embedding_service.private_folder import PrivateFolder, own_folder
from embedding_service.rows import TIERS
from embedding_service.rows.base import LiesIn, TableRows
from embedding_service.security.access import Access, near_host
from embedding_service.security.identity import Caller
from embedding_service.security.policy import Identity
from embedding_service.security.server import Files, Security
from embedding_service.serving import (
    RequestLimits,
    Server,
    cancel,
    first_of,
    reachable_address,
    run_process,
)
from embedding_service.shard.held import SERVICE, Counters
from embedding_service.shard.holdings import Holdings
from embedding_service.shard.near import NearServer, all_parts
from embedding_service.shard.processes import Processes, Settings
from embedding_service.shard.registration import Registration
from embedding_service.shard.service import LookupService
from embedding_service.shard.shares import Shares
from embedding_service.shard.training import SERVICE as TRAINING
from embedding_service.shard.training import TrainingService
from embedding_service.store.store import Store
from embedding_service.threads import apart
from embedding_service.wire import control_pb2 as control

log = logging.getLogger(__name__)

DEFAULT_CACHE = Path(tempfile.gettempdir()) / "embedding-service"


@dataclass(frozen=True)
class ShardOptions:
    """How a shard runs.

    Attributes:
        controller: host:port of the controller.
        store: Path or URL of the store.
        listen: host:port. Port 0 takes a free one.
        shared_listen: A second host:port that all shards of this machine listen on together.
        advertise: How others reach it, if that is not `listen`.
        shard_id: Its name in placement and status. It is stable over restarts if the platform gives it one.
        tier: Where rows are kept: a name in `rows.TIERS`.
        memory_limit: Bytes it offers for rows.
        cache: Folder for parts of a remote store.
        load_rate: Bytes a second at which parts are read while lookups are served. 0: no limit.
        topology: A zone or a node. Copies of a part go to different ones.
        drain_seconds: The most seconds to wait, after SIGTERM, until others have this shard's branches and parts.
        threads: torch threads a gather may use.
        processes: Processes that answer lookups, this one included.
        near: Path of the Unix socket at which clients of this machine get the files of its parts; None: nowhere.
        metrics_port: Port of Prometheus metrics, on the host of `listen`. 0: none.
        security: Certificate, key, authorities and policy. None: plain text, and everybody may do everything.
        logs: Folder for the logs of branches. None: each branch's own folder in the store.
        log_sync: Seconds until a push is on disk at most. 0: before it is accepted. Below 0: never told to the kernel.
        health_listen: A second host:port that answers health checks alone, in plain text.
    """

    controller: str
    store: str
    listen: str = "127.0.0.1:0"
    shared_listen: str | None = None
    advertise: str | None = None
    shard_id: str = field(default_factory=lambda: f"shard-{os.getpid()}")
    tier: str = "ram"
    memory_limit: int = 0
    cache: Path = DEFAULT_CACHE
    load_rate: int = 256 << 20
    topology: str = ""
    drain_seconds: float = 60.0
    threads: int = 1
    processes: int = 1
    near: str | None = None
    metrics_port: int = 0
    security: Files | None = None
    logs: Path | None = None
    log_sync: float = 0.1
    health_listen: str | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)


def main(options: ShardOptions) -> None:
    """Run a shard until SIGTERM or SIGINT."""
    run_process(options.shard_id, lambda: _serve(options))


async def _serve(options: ShardOptions) -> None:
    tracing.start(tracing.SHARD, options.shard_id)
    shard = _Shard(options)
    await shard.listen()
    spare_collections()
    try:
        await shard.run()
    finally:
        log.info("ending")
        end_within()
        await shard.close()
        tracing.stop()


class _Shard:
    """What makes up a shard's main process, each made from those before it.

    Raises InvalidRequest where this machine or the options do not go with the tier.
    """

    def __init__(self, options: ShardOptions) -> None:
        self._options = options
        self._tier = tier = _tier(options)
        torch.set_num_threads(options.threads)
        keep_freed_memory()
        # A network's filesystem may say that it has 8 EiB.
        memory_limit = min(options.memory_limit or tier.default_limit(options.store, options.cache), MOST_MEMORY)
        tier.prepare(memory_limit)
        store = Store(options.store)
        if options.cache == DEFAULT_CACHE and not store.is_local and not own_folder(options.cache):
            raise InvalidRequest(f"others may write to {options.cache}: give this user a folder with --cache")
        self._holdings = Holdings(store, tier, memory_limit, options.cache, options.load_rate)
        self._security = Security(options.security) if options.security else None
        self._access = options.security.access if options.security else None
        self._router = Router([options.controller], topology=options.topology)
        self._transport = GrpcTransport(self._access, lambda: self._router.addresses)
        rows_here = memory_limit if tier.lies_in is LiesIn.HOST else 0
        self._budget = Budget(memory_for_requests(rows_here, options.processes))
        self._service = LookupService(self._holdings, self._router, self._transport, options.limits, self._budget)
        in_memory = self._holdings if tier.lies_in is LiesIn.HOST else None
        self._shares = _shares(options, store, self._router, self._access, in_memory)
        audit = self._security.audit if self._security else None
        training = TrainingService(
            store, options.shard_id, self._router, options.limits, self._budget, self._shares, audit
        )
        self._server = Server(options.limits, self._budget, self._security)
        self._server.add(LookupService.add_to, self._service, SERVICE)
        self._server.add(TrainingService.add_to, training, TRAINING)
        self._fronts: list[Front] = []
        self._others = Processes(options.processes - 1, self._holdings.add_accesses)
        self._folder: PrivateFolder | None = None
        self._near: NearServer | None = None
        self._metrics: MetricsServer | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def listen(self) -> None:
        """Answer at all addresses, with all processes. Raises InvalidRequest for one that cannot be had."""
        options, several = self._options, self._options.processes > 1
        if several:
            check_free(options.listen)
        self._fronts.append(await self._server.listen(options.listen, shared=several))
        if options.shared_listen:
            self._fronts.append(await self._server.listen(options.shared_listen, shared=True))
        if options.health_listen:
            await self._server.listen(options.health_listen, kind=Kind(health_only=True))
        self._about = self._report()
        self._shares.address = self._about.address
        self._near = _near(options, self._about.incarnation, self._router, self._holdings, self._security)
        if self._near:
            self._holdings.sharing.append(
                self._near
            )  # the first: what is dropped is near no more before it is given up
            self._about.near.CopyFrom(self._near.place)
        if several:
            await self._start_others()
        log.info("listening on %s, %s bytes of %s", self._about.address, f"{self._about.memory_limit:,}", options.tier)

    async def _start_others(self) -> None:
        options = self._options
        self._holdings.sharing.append(self._others)
        # Who may enter this folder may say whose a call is: nobody else.
        self._folder = PrivateFolder()
        back = await self._server.listen(f"unix:{self._folder.path}/main", private=True)
        addresses, budget = [front.address for front in self._fronts], self._budget.most
        self._others.start(
            Settings(
                options.shard_id, addresses, back.address, options.limits, options.threads, budget, options.security
            )
        )

    def _report(self) -> control.ShardReport:
        """What the controller is told of it."""
        options = self._options
        return control.ShardReport(
            shard_id=options.shard_id,
            address=reachable_address(self._fronts[0].address, options.advertise),
            device=self._tier.device,
            tier=options.tier,
            memory_limit=self._holdings.memory_limit,
            topology=options.topology,
            incarnation=secrets.randbits(63),
        )

    async def run(self) -> None:
        """Register and serve until told to end, then drain. Raises what ends a shard before that."""
        options = self._options
        registration = Registration(
            options.controller,
            self._about,
            self._holdings,
            self._router,
            self._counters,
            self._set_serving,
            self._access,
            self._shares.statuses,
        )
        self._metrics = MetricsServer(
            options.listen.rpartition(":")[0],
            options.metrics_port,
            self._collect,
            self._security,
        )
        doing = registration.run(), _look_around(self._router, self._transport), self._shares.run()
        self._tasks = [asyncio.create_task(each) for each in doing]
        told = told_to_end(options.drain_seconds + END_SECONDS)
        await first_of(told.wait(), *self._tasks, self._server.death())
        told.clear()
        await first_of(told.wait(), self._drain(registration), *self._tasks, self._server.death())

    async def _drain(self, registration: Registration) -> None:
        """Have others take over branches, in half of the time at most, then parts in what is left."""
        seconds, began = self._options.drain_seconds, time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                await self._shares.drain()
        await registration.drain(max(seconds - (time.monotonic() - began), 0))

    def _collect(self) -> Iterator[Metric]:
        """For Prometheus, on its thread."""
        about = self._about
        yield info(
            "shard",
            "Which shard a process is.",
            shard_id=about.shard_id,
            device=about.device,
            tier=about.tier,
            topology=about.topology,
        )
        yield from _metrics(self._counters(), self._holdings, self._router)
        yield from branch_metrics(self._shares.statuses())

    def _counters(self) -> Counters:
        """Of all processes."""
        here = Counters(errors=self._server.refused, near_rows=self._near.rows if self._near else 0)
        return self._service.counters + self._others.counters() + here

    async def _set_serving(self, serving: bool) -> None:
        if self._near:
            self._near.tell_age()  # before anybody is answered by the new routing
        self._others.set_serving(serving)
        await self._server.set_serving(serving)

    async def close(self) -> None:
        """Let calls under way end, those that other processes passed on too, and give everything back."""
        await asyncio.gather(apart(self._others.stop), *(front.stop() for front in self._fronts))
        await self._server.stop()
        if self._folder:
            self._folder.close()
        if self._near:
            self._near.close()
        await cancel(self._tasks)
        await self._shares.close()
        self._transport.close()
        if self._metrics:
            self._metrics.close()
        await self._holdings.close()


def _tier(options: ShardOptions) -> type[TableRows]:
    """Its class. Raises InvalidRequest for an unknown one, or one that this machine or these options do not go with."""
    tier = TIERS.find(options.tier)
    tier.check_machine()
    if not tier.shareable and (options.processes > 1 or options.near):
        remedy = "leave --near out" if options.near else "leave --processes at 1"
        raise InvalidRequest(f"rows of tier {options.tier} lie with one process: {remedy}")
    return tier


def _shares(
    options: ShardOptions, store: Store, router: Router, access: Access | None, memory: Holdings | None
) -> Shares:
    several = "a shard with several processes trains no branch: start it with --processes 1"
    why_not = several if options.processes > 1 else ""
    logs, sync = options.logs, options.log_sync
    return Shares(store, options.shard_id, router, logs, sync, memory=memory, why_not=why_not, access=access)


def _near(
    options: ShardOptions, incarnation: int, router: Router, holdings: Holdings, security: Security | None
) -> NearServer | None:
    """Where clients of this machine get the files of its parts, if they do."""
    if not options.near:
        return None
    if not can_seal():
        log.warning("no client reads rows in place: this kernel does not seal memory, which Linux 5.1 does")
        return None
    host = near_host(boot_id(), os.path.realpath(options.near))
    rights_of = partial(near_rights, security, host) if security else all_parts
    near = NearServer(options.near, incarnation, lambda: _age(router), holdings.add_accesses, rights_of)
    if security:
        security.guard.watch(partial(asyncio.get_running_loop().call_soon_threadsafe, near.look_again))
    return near


async def _look_around(router: Router, transport: GrpcTransport) -> None:
    """Hear of a later controller from other shards, though this one's is not it, and report that to this one's."""
    while True:
        await asyncio.sleep(await run_async(router.look_around(), transport))


def _metrics(counters: Counters, holdings: Holdings, router: Router) -> Iterator[Metric]:
    yield counters.histogram()
    yield counter("lookups", "Lookups answered.", counters.lookups)
    yield counter("rows", "Rows answered.", counters.rows)
    yield counter("row_bytes", "Bytes of rows answered.", counters.row_bytes)
    yield counter("near_rows", "Rows that clients of this machine read in place.", counters.near_rows)
    yield counter("forwarded_rows", "Rows asked of other shards for thin clients.", counters.forwarded_rows)
    yield counter("request_errors", "Requests ended with an error.", counters.errors)
    yield gauge("held_parts", "Parts held.", len(holdings.held))
    yield gauge("held_bytes", "Bytes of rows held.", holdings.held_bytes)
    yield gauge("failing_parts", "Assigned parts that cannot be held.", len(holdings.failures))
    yield gauge("memory_limit_bytes", "Bytes offered for rows.", holdings.memory_limit)
    term, epoch = _age(router)
    yield gauge("routing_term", "Term of the newest routing seen.", term)
    yield gauge("routing_epoch", "Epoch of the newest routing seen.", epoch)


def branch_metrics(shares: Iterable[control.BranchStatus]) -> Iterator[Metric]:
    """How far the shares of branches are that a shard leads."""
    labels = ("branch", "share")
    step = GaugeMetricFamily("embedding_branch_step", "Step that a share's rows are of.", labels=labels)
    durable = GaugeMetricFamily("embedding_branch_durable_step", "Step that is on disk.", labels=labels)
    copies = GaugeMetricFamily("embedding_branch_copies", "Shards that have all that was accepted.", labels=labels)
    losses = CounterMetricFamily(
        "embedding_branch_losses", "How often updates that were accepted were lost.", labels=labels
    )
    for each in shares:
        about = (each.branch, each.share)
        step.add_metric(about, each.applied_step)
        durable.add_metric(about, each.durable_step)
        copies.add_metric(about, each.in_sync)
        losses.add_metric(about, each.losses)
    yield from (step, durable, copies, losses)


@dataclass(frozen=True)
class NearRights:
    """What a near client may read. Equal where the policy gives the same rights."""

    who: str
    rights: Identity
    caller: Caller = field(compare=False)

    def __call__(self, key: PartKey) -> bool:
        """Whether it may read a part."""
        return self.caller.may_read(key.model, key.version)


def near_rights(security: Security, host: str, authorization: str) -> NearRights:
    """Whose a near client is. `host`: what its proof is for. Raises Unauthenticated, PermissionDenied."""
    caller = security.admit(("read",), b"/near rows", bearer=authorization or None, near=host)
    assert caller
    return NearRights(caller.name, caller.rights, caller)


def _age(router: Router) -> tuple[int, int]:
    return router.current.age if router.current else (0, 0)
