"""One replica: the model, its tokenizer, its engine and its connection to the embedding service."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from embedding_service import EmbeddingClient, tracing
from embedding_service.commands.text import parse_bytes
from embedding_service.errors import NotFound, Unavailable
from model_worker import families
from model_worker.domains import Domains
from model_worker.engine import Engine, Event
from model_worker.keys import Keys
from model_worker.options import Options
from model_worker.sampling import SamplingParams
from model_worker.text import Spelling, load_tokenizer

# Seconds a step waits for its rows, retries included, before its requests fail with 503. If a shard is cut off, a try
# takes 2 s, and the routing names it for 5 s (the controller's --lost-after). This is both and another try.
LOOKUP_TIMEOUT = 10.0
# Seconds within which a healthy embedding service answers for one token.
_HEALTH_TIMEOUT = 2.0
# For all streams together. A write of any size costs Serve's replica and proxy about a millisecond of a core.
_WRITES_PER_SECOND = 300

# Events of a request, each with its choice.
Events = list[tuple[int, Event]]


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(Options):
    """What a replica is told: the options, and what was found of them.

    checkpoint, policy: files of the replica's machine.
    name: the served model id.
    version: of the model in the service, as it was when the worker was started.
    imported_as: NAME@VERSION that the checkpoint was imported as. Other tables do not belong to its dense half.
        Empty: that version.
    pinned: use that version alone, and none that was published over it since.
    """

    name: str
    version: str
    imported_as: str = ""
    pinned: bool = False


class Generation:
    """The choices that answer one HTTP request, as its handler sees them.

    choices: the prompt of each, and how to generate it.
    streamed: whether events are wanted as they come. If not, the last ones will do.
    tables: see `Engine.submit_all`.
    Raises EngineBusy, which takes none of the choices.
    """

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[tuple[list[int], SamplingParams]],
        streamed: bool,
        tables: str | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._streamed = streamed
        self._come: deque[tuple[int, Event]] = deque()
        # The engine wakes the loop for a choice's end, and for any event that somebody waits for. If it woke the loop
        # for each token of each request, the loop would take Python's lock from the engine as often.
        self._wake = asyncio.Event()
        self._any_event_wakes = False
        self._requests = engine.submit_all(
            [(prompt, params, partial(self._emit, choice)) for choice, (prompt, params) in enumerate(choices)], tables
        )

    def _emit(self, choice: int, event: Event) -> None:
        self._come.append((choice, event))
        if self._any_event_wakes or event.finish_reason or event.error:
            # The loop is closed when the whole worker is.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._wake.set)

    @property
    def completion_tokens(self) -> int:
        """Generated so far, by all choices."""
        return sum(len(request.completion) for request in self._requests)

    async def events(self) -> AsyncGenerator[Events]:
        """All events with their choice, up to every choice's finish_reason. Those that came together are together.

        Raises what a choice failed with, after the events before it. Closing or dropping a started iterator cancels all
        choices.
        """
        try:
            unfinished = len(self._requests)
            while unfinished:
                come = await self._next()
                if told := [(choice, event) for choice, event in come if not event.error]:
                    yield told
                if failed := next((event.error for _, event in come if event.error), None):
                    raise failed
                unfinished -= sum(event.finish_reason is not None for _, event in come)
                if unfinished:
                    await self._pause()
        finally:
            for request in self._requests:
                request.cancel()

    async def _next(self) -> Events:
        """The events since the last time, at least one."""
        self._any_event_wakes = self._streamed
        while not self._come:
            self._wake.clear()
            await self._wake.wait()
        self._any_event_wakes = False
        self._wake.clear()
        return [self._come.popleft() for _ in range(len(self._come))]

    async def _pause(self) -> None:
        """Let events gather, so that all streams together stay within _WRITES_PER_SECOND. A choice's end stops it."""
        seconds = self._engine.running / _WRITES_PER_SECOND if self._streamed else None
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()


class Worker:
    """Loads a checkpoint's dense part, attaches it to the service and generates.

    on_first_token, on_lookup_wait: called with the seconds of each, see `Engine` and `Lookups`.
    Raises what `load_model` and `attach` raise.
    """

    def __init__(
        self,
        config: WorkerConfig,
        on_first_token: Callable[[float], object] = lambda seconds: None,
        on_lookup_wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        tracing.start(tracing.WORKER)
        self.keys = Keys(config.policy) if config.policy else None
        self.name = config.name
        self.started = int(time.time())
        connect = partial(EmbeddingClient, config.embeddings, near=config.near, topology=config.topology)
        self._client = connect(timeout=LOOKUP_TIMEOUT, cache_bytes=parse_bytes(config.cache_bytes))
        # An answer from the cache says nothing about the service.
        self._probe = connect() if self._client.cache else self._client
        served_as = f"{config.name}@{config.version}"
        version = config.version if config.pinned else None
        self.domains = Domains(self._client, config.name, config.imported_as or served_as, version)
        """The tables that requests may name."""
        model: Any = families.load_model(config.checkpoint)
        self._lookups = families.attach(model, self._client, self.domains.resolve(config.name))
        self._lookups.on_wait = on_lookup_wait
        tables = self._lookups.tables
        tables.name, tables.resolve = config.name, self.domains.resolve
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.vocab_size: int = model.config.get_text_config().vocab_size
        """Token ids are below it."""
        self.tokenizer: Any = load_tokenizer(config.checkpoint)
        self._engine = Engine(
            model,
            self.tokenizer,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            on_first_token=on_first_token,
            tables=tables,
            speculate=config.speculate,
            draft_tokens=config.draft_tokens,
            prefix_bytes=parse_bytes(config.prefix_bytes),
        )

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and completion together."""
        return self._engine.context_length

    @property
    def spelling(self) -> Spelling:
        """What tokens are as text."""
        return self._engine.spelling

    @property
    def capacity(self) -> int:
        """The most choices that may run and wait at once."""
        return self._engine.capacity

    def generate(
        self, choices: Sequence[tuple[list[int], SamplingParams]], *, streamed: bool, tables: str | None = None
    ) -> Generation:
        """Queue choices, see `Generation`. Call on an event loop. Raises EngineBusy."""
        return Generation(self._engine, choices, streamed, tables)

    def check(self) -> None:
        """Prove that the worker can generate. Raises Unavailable or what the service's client raises."""
        self.check_engine()
        token = torch.zeros(1, 1, dtype=torch.int64)
        self._probe.lookup_ngrams(self.domains.resolve(self.name), token, timeout=_HEALTH_TIMEOUT)

    def check_engine(self) -> None:
        """Raises Unavailable when the engine has died."""
        if not self._engine.alive:
            raise Unavailable("the engine of this worker has stopped: restart the worker")

    def close(self) -> None:
        """Fail what still runs, and disconnect."""
        self._engine.close()
        self._client.close()
        self._probe.close()
        if self.keys:
            self.keys.close()

    @property
    def _version(self) -> str:
        """NAME@VERSION of its own tables, or NAME where they are served no more."""
        try:
            return self.domains.resolve(self.name)
        except NotFound:
            return self.name

    def info(self) -> dict[str, Any]:
        """What this replica holds and has done. Bytes, seconds, and counts since its start."""
        memory = psutil.Process().memory_info()
        return {
            "pid": os.getpid(),
            "model": self._version,
            "anonymous_bytes": memory.rss - memory.shared,
            "file_bytes": memory.shared,
            "parameter_bytes": self._engine.parameter_bytes,
            "table_bytes": families.table_bytes(self._model),
            "remote_table_values": self._lookups.table_values,
            "lookup_wait_seconds": round(self._lookups.wait_seconds, 6),
            **self.counts(),
        }

    def counts(self) -> dict[str, int]:
        """What it does now and has done since its start, in numbers."""
        cache = self._client.cache.stats if self._client.cache else None
        rows = self._client.statistics
        return {
            "requests": self._engine.requests,
            "refused": self._engine.refused,
            "running": self._engine.running,
            "waiting": self._engine.waiting,
            "prompt_tokens": self._engine.prompt_tokens,
            "prefix_tokens": self._engine.prefix_tokens,
            "generated_tokens": self._engine.tokens,
            "drafted_tokens": self._engine.drafted,
            "accepted_tokens": self._engine.accepted,
            "lookups": self._lookups.count,
            "looked_up_tokens": self._lookups.tokens,
            "near_rows": rows.near_rows,
            "wired_rows": rows.wired_rows,
            "cache_hits": cache.hits if cache else 0,
            "cache_misses": cache.misses if cache else 0,
        }
