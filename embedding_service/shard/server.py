"""The shard process."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from prometheus_client.core import Metric

from embedding_service.address_space import can_seal
from embedding_service.budget import Budget
from embedding_service.client.router import Router
from embedding_service.client.steps import run_async
from embedding_service.client.transport import GrpcTransport
from embedding_service.errors import InvalidRequest
from embedding_service.front import Kind
from embedding_service.machine import check_free, spare_collections
from embedding_service.memory import keep_freed_memory, memory_for_requests
from embedding_service.metrics import MetricsServer, counter, gauge
from embedding_service.placement.demand import MOST_MEMORY
from embedding_service.placement.parts import PartKey
from embedding_service.private_folder import PrivateFolder
from embedding_service.rows import TIERS
from embedding_service.rows.base import LiesIn, TableRows
from embedding_service.security.guard import Guard
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
    told_to_end,
)
from embedding_service.shard.held import SERVICE, Counters
from embedding_service.shard.holdings import Holdings
from embedding_service.shard.near import NearServer, all_parts
from embedding_service.shard.processes import Processes, Settings
from embedding_service.shard.registration import Registration
from embedding_service.shard.service import LookupService
from embedding_service.shard.training import SERVICE as TRAINING
from embedding_service.shard.training import TrainingService
from embedding_service.store.store import Store
from embedding_service.wire import control_pb2 as control

log = logging.getLogger(__name__)


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
        drain_seconds: The most seconds to wait, after SIGTERM, until others hold this shard's parts.
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
    cache: Path = Path(tempfile.gettempdir()) / "embedding-service"
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
    tier = _tier(options)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    # A network's filesystem may say that it has 8 EiB.
    memory_limit = min(options.memory_limit or tier.default_limit(options.store, options.cache), MOST_MEMORY)
    tier.prepare(memory_limit)
    store = Store(options.store)
    holdings = Holdings(store, tier, memory_limit, options.cache, options.load_rate)
    security = Security(options.security) if options.security else None
    access = options.security.access if options.security else None
    router, transport = Router([options.controller], topology=options.topology), GrpcTransport(access)
    budget = Budget(memory_for_requests(memory_limit if tier.lies_in is LiesIn.HOST else 0, options.processes))
    service = LookupService(holdings, router, transport, options.limits, budget)
    if options.processes > 1:
        check_free(options.listen)
    server = Server(options.limits, budget, security)
    server.add(LookupService.add_to, service, SERVICE)
    training = _training(options, store, router, budget, security)
    server.add(TrainingService.add_to, training, TRAINING)
    fronts = [await server.listen(options.listen, shared=options.processes > 1)]
    training.address = address = reachable_address(fronts[0].address, options.advertise)
    if options.shared_listen:
        fronts.append(await server.listen(options.shared_listen, shared=True))
    if options.health_listen:
        await server.listen(options.health_listen, kind=Kind(health_only=True))
    about = control.ShardReport(
        shard_id=options.shard_id,
        address=address,
        device=tier.device,
        tier=options.tier,
        memory_limit=holdings.memory_limit,
        topology=options.topology,
        incarnation=secrets.randbits(63),
    )
    near = _near(options, about.incarnation, router, holdings, security)
    if near:
        holdings.sharing.append(near)  # the first: what is dropped is near no more before others give it up
        about.near.CopyFrom(near.place)
    others, folder = Processes(options.processes - 1, holdings.add_accesses), None
    if options.processes > 1:
        holdings.sharing.append(others)
        # Who may enter this folder may say whose a call is: nobody else.
        folder = PrivateFolder()
        back = await server.listen(f"unix:{folder.path}/main", private=True)
        addresses = [front.address for front in fronts]
        limits, threads = options.limits, options.threads
        others.start(
            Settings(options.shard_id, addresses, back.address, limits, threads, budget.most, options.security)
        )

    spare_collections()

    def counters() -> Counters:
        here = Counters(errors=server.refused, near_rows=near.rows if near else 0)
        return service.counters + others.counters() + here

    async def set_serving(serving: bool) -> None:
        if near:
            near.tell_age()  # before anybody is answered by the new routing
        others.set_serving(serving)
        await server.set_serving(serving)

    log.info("listening on %s, %s bytes of %s", about.address, f"{about.memory_limit:,}", options.tier)
    registration = Registration(options.controller, about, holdings, router, counters, set_serving, access)
    metrics = MetricsServer(
        options.listen.rpartition(":")[0],
        options.metrics_port,
        lambda: _metrics(counters(), holdings, router),
        security,
    )
    registering, looking = asyncio.create_task(registration.run()), asyncio.create_task(_look_around(router, transport))
    opening = asyncio.create_task(training.open_all())
    try:
        told = told_to_end()
        await first_of(told.wait(), registering, server.death())
        told.clear()
        await first_of(told.wait(), registration.drain(options.drain_seconds), registering, server.death())
    finally:
        log.info("ending")
        await asyncio.gather(asyncio.to_thread(others.stop), *(front.stop() for front in fronts))
        await server.stop()  # calls that the others passed on ended before
        if folder:
            folder.close()
        if near:
            near.close()
        await cancel([registering, looking, opening])
        await training.close()
        transport.close()
        metrics.close()
        await holdings.close()


def _tier(options: ShardOptions) -> type[TableRows]:
    """Its class. Raises InvalidRequest for an unknown one, or one that this machine or these options do not go with."""
    tier = TIERS.find(options.tier)
    tier.check_machine()
    if not tier.shareable and (options.processes > 1 or options.near):
        remedy = "leave --near out" if options.near else "leave --processes at 1"
        raise InvalidRequest(f"rows of tier {options.tier} lie with one process: {remedy}")
    return tier


def _training(
    options: ShardOptions, store: Store, router: Router, budget: Budget, security: Security | None
) -> TrainingService:
    several = "a shard with several processes trains no branch: start it with --processes 1"
    return TrainingService(
        store,
        options.shard_id,
        router,
        options.limits,
        budget,
        logs=options.logs,
        sync=options.log_sync,
        why_not=several if options.processes > 1 else "",
        audit=security.audit if security else None,
    )


def _near(
    options: ShardOptions, incarnation: int, router: Router, holdings: Holdings, security: Security | None
) -> NearServer | None:
    """Where clients of this machine get the files of its parts, if they do."""
    if not options.near:
        return None
    if not can_seal():
        log.warning("no client reads rows in place: this kernel does not seal memory, which Linux 5.1 does")
        return None
    rights_of = partial(near_rights, security.guard) if security else all_parts
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


@dataclass(frozen=True)
class NearRights:
    """What a near client may read. Equal where the policy gives the same rights."""

    who: str
    rights: Identity
    caller: Caller = field(compare=False)

    def __call__(self, key: PartKey) -> bool:
        """Whether it may read a part."""
        return self.caller.may_read(key.model, key.version)


def near_rights(guard: Guard, authorization: str) -> NearRights:
    """Whose a near client is. Raises Unauthenticated, PermissionDenied."""
    caller = guard.caller(authorization or None)
    caller.require(("read",), "read rows in place")
    return NearRights(caller.name, caller.rights, caller)


def _age(router: Router) -> tuple[int, int]:
    return router.current.age if router.current else (0, 0)
