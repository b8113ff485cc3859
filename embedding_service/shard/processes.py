"""Further processes of a shard. They listen on its port too, and answer from the rows that its main process holds.

Python runs one thread at a time, so one process answers no more than one core can. The rows exist once: the main
process loads them where others can map them (`TableRows.location`). It tells the others of each part that it holds, and
before it gives one up. They pass on to it what they cannot answer, over a socket in a folder that is closed to other
users. The kernel spreads connections over all of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import grpc

from embedding_service import tracing
from embedding_service.budget import Budget
from embedding_service.client.channels import open_channel_async
from embedding_service.errors import EmbeddingServiceError
from embedding_service.front import CALLER, PEER
from embedding_service.machine import end_with_parent, spare_collections
from embedding_service.memory import keep_freed_memory
from embedding_service.methods import Context, Method
from embedding_service.placement.parts import PartKey
from embedding_service.rows.base import Ids, Location
from embedding_service.rows.mmap import MappedTable
from embedding_service.security.server import Files, Security
from embedding_service.serving import RequestLimits, Server, first_of, log_to_stderr
from embedding_service.shard.held import ANSWER, SERVICE, Counters, HeldRows
from embedding_service.store.manifest import Table

log = logging.getLogger(__name__)

# A process that does not take a message, or does not give a part up, is killed and replaced.
PATIENCE = 1.0
# Seconds between a process's death and its successor's start.
PAUSE = 1.0
# Seconds that one has for its end. Then it is killed.
END_PATIENCE = 5.0
# How often the main process hears the counts.
REPORT_SECONDS = 1.0

# Model, version, table.
TableKey = tuple[str, str, str]


class Settings(NamedTuple):
    """How a process runs: the `addresses` that it shares, the `main` process's address, torch `threads` of a gather.

    `budget`: bytes of requests and answers that may be under way in it. `security`: None for plain text.
    """

    name: str
    addresses: Sequence[str]
    main: str
    limits: RequestLimits
    threads: int
    budget: int
    security: Files | None = None


class _Ready(NamedTuple):
    """It listens."""


class _Open(NamedTuple):
    key: TableKey
    table: Table


class _Hold(NamedTuple):
    part: PartKey
    location: Location


class _Drop(NamedTuple):
    """Answered with the same, once the part is not used any more."""

    part: PartKey


class _Serve(NamedTuple):
    """What health checks are told from now on."""

    serving: bool


class _Stop(NamedTuple):
    """End what is under way, then yourself."""


class _Report(NamedTuple):
    """Counts since the process started, and rows gathered from each part since the last report."""

    counters: Counters
    accesses: Mapping[TableKey, Ids]


@dataclass(eq=False)
class _Process:
    """As the main process sees one."""

    popen: subprocess.Popen[bytes]
    pipe: Connection
    tables: set[TableKey] = field(default_factory=set)
    dropped: dict[PartKey, threading.Event] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    ready: bool = False


class Processes:
    """Starts the processes, keeps them running, and tells them what is held. Thread-safe.

    Args:
        count: How many.
        add_accesses: Called with what they gathered: int64 [parts] of a table.
    """

    def __init__(self, count: int, add_accesses: Callable[[TableKey, Ids], None]) -> None:
        self._count = count
        self._add_accesses = add_accesses
        self._held: dict[PartKey, tuple[Table, Location]] = {}
        self._serving = False
        self._running: set[_Process] = set()
        self._ended = Counters()
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, settings: Settings) -> None:
        """Start them. They take part as soon as they listen."""
        for _ in range(self._count):
            thread = threading.Thread(target=self._keep_running, args=(settings,), name="process", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End them, letting calls under way end as the main process does."""
        self._stopping.set()
        with self._lock:
            for process in list(self._running):
                if process.ready:
                    self._tell(process, _Stop())
                else:
                    process.popen.kill()  # it answers nobody yet
        deadline = time.monotonic() + END_PATIENCE
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        with self._lock:
            for process in self._running:
                log.warning("process %d does not end: killed", process.popen.pid)
                process.popen.kill()
        for thread in self._threads:
            thread.join()

    def counters(self) -> Counters:
        """What all of them did, ended ones included."""
        with self._lock:
            return sum((process.counters for process in self._running), self._ended)

    def hold(self, part: PartKey, table: Table, location: Location) -> None:
        """The main process holds a part."""
        with self._lock:
            self._held[part] = table, location
            for process in list(self._running):
                self._tell_held(process, part)

    def set_serving(self, serving: bool) -> None:
        """What health checks are told."""
        with self._lock:
            if serving != self._serving:
                self._serving = serving
                for process in list(self._running):
                    self._tell(process, _Serve(serving))

    def drop(self, part: PartKey) -> None:
        """Returns when none of them uses the part any more."""
        with self._lock:
            self._held.pop(part, None)
            waiting = {}
            for process in list(self._running):
                if process.ready:
                    waiting[process] = process.dropped[part] = threading.Event()
                    self._tell(process, _Drop(part))
        until = time.monotonic() + PATIENCE
        for process, dropped in waiting.items():
            if not dropped.wait(until - time.monotonic()) and process.popen.poll() is None:
                log.warning("process %d holds on to %s: killed", process.popen.pid, part)
                process.popen.kill()
                process.popen.wait()

    def _keep_running(self, settings: Settings) -> None:
        while not self._stopping.is_set():
            process = _start(settings)
            with self._lock:
                self._running.add(process)
            try:
                while True:
                    self._hear(process, process.pipe.recv())
            except (EOFError, OSError):
                process.popen.wait()
            with self._lock:
                self._running.discard(process)
                self._ended += process.counters
                for dropped in process.dropped.values():
                    dropped.set()
            process.pipe.close()
            if not self._stopping.is_set():
                log.warning("process %d ended with %s: starting another", process.popen.pid, process.popen.returncode)
                self._stopping.wait(PAUSE)

    def _hear(self, process: _Process, message: Any) -> None:
        with self._lock:
            if isinstance(message, _Ready):
                process.ready = True
                self._tell(process, _Serve(self._serving))
                for part in self._held:
                    self._tell_held(process, part)
                if self._stopping.is_set():
                    self._tell(process, _Stop())
            elif isinstance(message, _Drop):
                process.dropped.pop(message.part).set()
            elif isinstance(message, _Report):
                process.counters = message.counters
        if isinstance(message, _Report):
            for table, accesses in message.accesses.items():
                self._add_accesses(table, accesses)

    def _tell_held(self, process: _Process, part: PartKey) -> None:
        if not process.ready:
            return  # it receives the full state once ready
        table, location = self._held[part]
        if part[:3] not in process.tables:
            process.tables.add(part[:3])
            self._tell(process, _Open(part[:3], table))
        self._tell(process, _Hold(part, location))

    def _tell(self, process: _Process, message: object) -> None:
        try:
            process.pipe.send(message)
        except OSError:  # it has died, or takes nothing. `_keep_running` starts another
            process.popen.kill()


def _start(settings: Settings) -> _Process:
    ours, theirs = socket.socketpair()
    seconds = int(PATIENCE)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds.to_bytes(8, sys.byteorder) + bytes(8))
    with theirs:
        popen = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
    pipe = Connection(ours.detach())
    pipe.send((os.getpid(), settings))
    return _Process(popen, pipe)


class _PassedOn:
    """Has the main process answer."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel_async(address, None)  # a socket that is closed to other users

    def handler(self, path: str) -> Any:
        """Passes the calls of a method on, as the bytes they came in."""
        ask = self._channel.unary_unary(f"/{path}")

        async def answer(message: bytes, context: Context) -> bytes:
            try:
                whose = [(PEER, context.peer())]
                if context.caller:
                    whose.append((CALLER, context.caller.name))
                if context.traceparent:
                    whose.append((tracing.TRACEPARENT, context.traceparent))
                return await ask(message, timeout=context.time_remaining(), metadata=whose)
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))

        return grpc.unary_unary_rpc_method_handler(answer)


class _Serving:
    """The process's own side."""

    def __init__(self, settings: Settings, pipe: Connection) -> None:
        self._pipe = pipe
        self._settings = settings
        self._tables: dict[TableKey, MappedTable] = {}
        self._rows = HeldRows(lambda *key: self._tables.get(key), settings.limits)

    async def run(self) -> None:
        """Until the main process says so, or is no more."""
        self._loop = asyncio.get_running_loop()
        security = Security(self._settings.security) if self._settings.security else None
        self._server = Server(self._settings.limits, Budget(self._settings.budget), security)
        self._server.add(self._offer, _PassedOn(self._settings.main), SERVICE)
        for address in self._settings.addresses:
            await self._server.listen(address, shared=True)
        spare_collections()
        self._pipe.send(_Ready())
        self._told = self._loop.create_future()
        # Not one of asyncio's threads, which it waits for at its end.
        threading.Thread(target=self._follow, name="follow", daemon=True).start()
        await first_of(self._told, self._server.death())
        await self._server.stop()
        self._report()

    def _offer(self, passed_on: _PassedOn, server: Server) -> None:
        self._rows.offer_lookups(server, passed_on.handler(f"{SERVICE}/Lookup"), passed_on.handler(ANSWER))
        for name in ("LookupNgrams", "ListModels", "GetRouting"):
            server.offer(f"{SERVICE}/{name}", Method(passed_on.handler(f"{SERVICE}/{name}")))

    def _follow(self) -> None:
        """Do what the main process says. A thread of its own does it, because mapping a part may take a while."""
        told = True
        try:
            while told:
                if self._pipe.poll(REPORT_SECONDS):
                    told = self._obey(self._pipe.recv())
                else:
                    self._report()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._told.set_exception, error)
        else:
            self._loop.call_soon_threadsafe(self._told.set_result, None)

    def _obey(self, message: Any) -> bool:
        """Do what was said. False: end."""
        if isinstance(message, _Open):
            self._tables[message.key] = MappedTable(message.table)
        elif isinstance(message, _Hold):
            rows = self._tables[message.part[:3]]
            rows.take(rows.table.parts[message.part.part], message.location)
        elif isinstance(message, _Drop):
            rows = self._tables[message.part[:3]]
            rows.drop(rows.table.parts[message.part.part])
            self._pipe.send(message)
        elif isinstance(message, _Serve):
            asyncio.run_coroutine_threadsafe(self._server.set_serving(message.serving), self._loop)
        return not isinstance(message, _Stop)

    def _report(self) -> None:
        accesses = {key: rows.take_accesses() for key, rows in self._tables.items()}
        counters = self._rows.counters + Counters(errors=self._server.refused)
        self._pipe.send(_Report(counters, {key: counts for key, counts in accesses.items() if counts.any()}))


def main(pipe: Connection) -> None:
    """Run a process that `Processes` started."""
    parent, settings = pipe.recv()
    for number in (signal.SIGINT, signal.SIGTERM):  # a group's signal is the main process's business
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return
    log_to_stderr(settings.name)
    tracing.start(tracing.SHARD, settings.name)
    import torch

    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    try:
        asyncio.run(_Serving(settings, pipe).run())
    except (EOFError, BrokenPipeError):
        log.warning("the main process is gone")
    except EmbeddingServiceError as error:
        log.error("%s", error)
        os._exit(1)
    tracing.stop()
    logging.shutdown()
    os._exit(0)  # as the commands do: taking torch and gRPC down takes a second


if __name__ == "__main__":
    from embedding_service.shard import processes  # under its name, which messages are pickled with

    processes.main(Connection(int(sys.argv[1])))
