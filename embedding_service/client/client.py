"""`EmbeddingClient`: the public face of the service for Python."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from embedding_service import tracing
from embedding_service.client import forks
from embedding_service.client.kept import Keeper, KeptRows
from embedding_service.client.near import NearRows
from embedding_service.client.router import Router
from embedding_service.client.steps import Steps, run, run_async
from embedding_service.client.traced import traced
from embedding_service.client.transport import GrpcTransport
from embedding_service.client.wants import ENCODINGS, Lookup, NgramLookup, RowLookup, Tally
from embedding_service.errors import DeadlineExceeded, InvalidRequest, Unavailable
from embedding_service.machine import split_address
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import Hashers, Ids, Model, Routing
from embedding_service.security.access import Access, access_of
from embedding_service.wire import training_pb2 as wire

if TYPE_CHECKING:
    from embedding_service.client.optimizers import Optimizer
    from embedding_service.client.training import Session

# Lookups that run ahead at the same time. They wait for shards and hardly compute. Others wait for their turn.
MOST_AHEAD = 32
# Seconds that stand for longer ones: a thread can wait no longer than nine times as long.
_FOR_EVER = 1e9
# Seconds between two looks whether a version is served.
_LOOK_SECONDS = 0.1
# Where a process is. The platform that started it knows that better than its code.
TOPOLOGY = "EMBEDDING_SERVICE_TOPOLOGY"


@dataclass(frozen=True)
class ModelDescription:
    """A served version of a model.

    Attributes:
        tables: Of each table: (rows, dim, dtype).
        base: "name@version" of the version whose rows it has but for some. Empty for a version that is whole by itself.
        checkpoint: "name@version" of the import to whose checkpoint's dense half its rows belong.
    """

    name: str
    version: str
    family: str
    tables: dict[str, tuple[int, int, str]]
    base: str = ""
    checkpoint: str = ""

    @property
    def full_name(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Statistics(NamedTuple):
    """What a client had, each row once a lookup.

    Attributes:
        near_rows: Rows that were read in place.
        wired_rows: Rows that shards sent.
        shards: Of each shard that would be read in place on this machine: "near", or why it, or some of it, is not.
    """

    near_rows: int
    wired_rows: int
    shards: dict[str, str]


class EmbeddingClient:
    """Looks rows up in an embedding service. It asks the shards that hold them directly, in parallel.

    It is a context manager, and threads and event loops may share it. Every method raises the errors of
    `embedding_service.errors`: RequestError if the request is wrong, ServiceError if the service could not answer
    within the deadline.

    Args:
        address: `host:port` of any shard (or a name that stands for all of them), or several.
        timeout: Seconds a call may take in all, retries included, where the call gives none.
        hedge: Where rows have copies, ask another owner when a shard takes unusually long. At most 2 % of the requests
            are asked again.
        cache_bytes: Keep rows in so much memory, in the bytes they came in; a lookup whose rows are all here does no
            RPC. 0 keeps none. `cache` has the counts.
        near: Read rows in place where a shard of this machine hands them out (docs/near.md). What is not near comes
            over the wire.
        topology: Where this client is, as `embedding-service shard --topology` says it for shards: of several copies it
            asks those of its own topology first. Bytes between zones may cost money. Default: what the variable
            EMBEDDING_SERVICE_TOPOLOGY says.
        tls: A folder with the authority's certificate ca.crt, and perhaps a certificate (tls.crt, tls.key) and a token.
            Or that certificate's file alone, or a TOML file (docs/security.md). None: what EMBEDDING_SERVICE_TLS
            says, plain text without it. False: plain text.
        token: A bearer token. None: that of the folder, of EMBEDDING_SERVICE_TOKEN or EMBEDDING_SERVICE_TOKEN_FILE.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        timeout: float = 10.0,
        hedge: bool = True,
        cache_bytes: int = 0,
        near: bool = True,
        topology: str | None = None,
        tls: str | os.PathLike[str] | bool | Access | None = None,
        token: str | None = None,
    ) -> None:
        seeds: list[Any] = list(address) if isinstance(address, (list, tuple)) else [address]
        if not seeds:
            raise InvalidRequest("address must be HOST:PORT, or several of them: got none")
        for seed in seeds:
            split_address(seed, least=1)
        self._seeds, self._timeout, self._hedge, self._cache_bytes = seeds, timeout, hedge, cache_bytes
        self._reads_near = near
        self._topology = os.environ.get(TOPOLOGY, "") if topology is None else topology
        self._access = access_of(tls, token)
        self._hashers = Hashers()
        self._tally = Tally()
        self._closed = False
        self._begin_fresh(None)
        forks.watch(self)

    def _begin_fresh(self, routing: Routing | None) -> None:
        """Connections, threads and locks of this process. None is used yet."""
        self._in_child = forks.in_child()
        tracing.start(tracing.CLIENT)
        self._sessions: dict[str, Session] = {}  # a child of a fork is no trainer
        router = self._router = Router(self._seeds, routing, hedge=self._hedge, topology=self._topology)
        self._transport = GrpcTransport(self._access, lambda: router.addresses)
        self._kept = Keeper(KeptRows(self._cache_bytes), lambda: router.current) if self._cache_bytes else None
        self._near = NearRows(self._access) if self._reads_near else None  # has no thread before a shard is near
        self._ahead = ThreadPoolExecutor(MOST_AHEAD, "embedding-prefetch")  # has no thread before it is used

    def before_fork(self, deadline: float) -> None:
        """See `forks.Forkable`."""
        self._transport.pause(deadline)

    def after_fork_in_parent(self) -> None:
        """See `forks.Forkable`."""
        self._transport.resume()

    def after_fork_in_child(self) -> None:
        """See `forks.Forkable`. Kept rows are not: a thread that is not here may have been about to change them."""
        if self._near:
            self._near.abandon()
        if not self._closed:
            self._begin_fresh(self._router.current)

    def __copy__(self) -> EmbeddingClient:
        """Copies of what holds a client share it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingClient:
        """Copies of what holds a client share it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: a client of the same service, which connects when it is first used."""
        options = {
            "timeout": self._timeout,
            "hedge": self._hedge,
            "cache_bytes": self._cache_bytes,
            "near": self._reads_near,
            "topology": self._topology,
            "tls": self._access or False,
        }
        return _client, (self._seeds, options)

    @property
    def cache(self) -> KeptRows | None:
        """The rows kept here. Their `stats` count hits. None without `cache_bytes`."""
        return self._kept.rows if self._kept else None

    @property
    def statistics(self) -> Statistics:
        """Where rows came from so far; threads that count at the same time may lose some."""
        shards = self._near.states if self._near else {}
        return Statistics(self._tally.near, self._tally.wired, shards)

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all connections. Calls under way fail with Unavailable."""
        self._closed = True
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._transport.close()
        if self._near:
            self._near.close()
        self._ahead.shutdown()

    def lookup(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Tensor:
        """Rows of one table.

        Args:
            table: `model/table` or `model@version/table`.
            ids: Row ids, any integer dtype and shape [*]. Repetitions cost nothing on the wire.
            dtype: float32, float16 or bfloat16.
            timeout: Seconds, retries included.

        Returns:
            `dtype` Tensor[*, dim] on the device of `ids`. To a GPU rows travel as stored, through page-locked memory,
            and are decoded there on the current stream.

        Raises:
            NotFound, OutOfRange, InvalidRequest: no such model, table or row; not an integer tensor.
            Unavailable, DeadlineExceeded: the rows could not be had in time.
        """
        if self._sessions and (session := self.session_of(table)):
            return session.lookup(table.partition("/")[2], ids, dtype=dtype)
        if self._in_child and forks.must_leave_thread():
            return self._begin(self.lookup, table, ids, dtype=dtype, timeout=timeout).result()
        return self._get(self._asked_for(table, ids, dtype), timeout)

    async def lookup_async(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Tensor:
        """`lookup` for asyncio."""
        if self._sessions and self.session_of(table):
            return await asyncio.to_thread(self.lookup, table, ids, dtype=dtype, timeout=timeout)
        if self._in_child and forks.must_leave_thread():
            return await asyncio.wrap_future(self._begin(self.lookup, table, ids, dtype=dtype, timeout=timeout))
        return await self._get_async(self._asked_for(table, ids, dtype), timeout)

    def lookup_ngrams(
        self,
        model: str,
        token_ids: Tensor,
        context: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        timeout: float | None = None,
    ) -> Tensor:
        """The n-gram rows of every token: hashed here, looked up there.

        Args:
            model: `name` or `name@version`.
            token_ids: int64 [B, S]. -1 is "no token" (left padding).
            context: int64 [B, C], the tokens directly before. None at a sequence's start.
            dtype: float32, float16 or bfloat16.
            timeout: Seconds, retries included.

        Returns:
            `dtype` Tensor[B, S, L, H, dim] on the device of `token_ids`: L tables, H heads.

        Raises:
            As `lookup`, and InvalidRequest for token ids out of range.
        """
        if self._sessions and (session := self.session_of(model)):
            return session.lookup_ngrams(token_ids, context, dtype=dtype)
        if self._in_child and forks.must_leave_thread():
            return self._begin(self.lookup_ngrams, model, token_ids, context, dtype=dtype, timeout=timeout).result()
        return self._get(self._ngrams_asked_for(model, token_ids, context, dtype), timeout)

    async def lookup_ngrams_async(
        self,
        model: str,
        token_ids: Tensor,
        context: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        timeout: float | None = None,
    ) -> Tensor:
        """`lookup_ngrams` for asyncio."""
        if self._sessions and self.session_of(model):
            return await asyncio.to_thread(self.lookup_ngrams, model, token_ids, context, dtype=dtype, timeout=timeout)
        if self._in_child and forks.must_leave_thread():
            begun = self._begin(self.lookup_ngrams, model, token_ids, context, dtype=dtype, timeout=timeout)
            return await asyncio.wrap_future(begun)
        return await self._get_async(self._ngrams_asked_for(model, token_ids, context, dtype), timeout)

    def prefetch(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Future[Tensor]:
        """Begin a `lookup` and go on; `result()` waits for its rows and raises what it raised.

        Rows on a GPU are there for any stream.

        `ids` may be changed once this returned. `timeout` counts from when a thread takes it up. That is at once unless
        32 others are under way. If it has not begun when the client is closed, it is cancelled: its `result()` raises
        concurrent.futures.CancelledError. Raises Unavailable once closed.
        """
        return self._begin(self.lookup, table, self._copy(ids), dtype=dtype, timeout=timeout)

    def prefetch_ngrams(
        self,
        model: str,
        token_ids: Tensor,
        context: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        timeout: float | None = None,
    ) -> Future[Tensor]:
        """Begin a `lookup_ngrams` and go on, as `prefetch` does."""
        copies = self._copy(token_ids), self._copy(context)
        return self._begin(self.lookup_ngrams, model, *copies, dtype=dtype, timeout=timeout)

    def _begin(self, lookup: Callable[..., Tensor], *arguments: Any, **options: Any) -> Future[Tensor]:
        if tracing.tracer is not None:
            lookup = partial(copy_context().run, lookup)  # under the span of who begins it
        try:
            return self._ahead.submit(_finish, lookup, *arguments, **options)
        except RuntimeError:  # the pool was shut down
            raise Unavailable("this client is closed") from None

    def _copy(self, ids: Any) -> Any:
        """Copy what others may change. The lookup refuses what is no tensor."""
        if not isinstance(ids, Tensor):
            return ids
        leave = self._in_child and forks.must_leave_thread()
        return self._begin(ids.clone).result() if leave else ids.clone()

    def hasher(self, model: str, *, timeout: float | None = None) -> NgramHasher:
        """What the client hashes this model's token ids with. Raises NotFound, InvalidRequest (no n-gram family)."""
        if self._sessions and (session := self.session_of(model)):
            return session.hasher()
        return self._hasher_of(run(self._router.model(model, self._deadline(timeout)), self._transport))

    def models(self, *, timeout: float | None = None) -> list[ModelDescription]:
        """What is served now, and the branches that this client trains."""
        deadline = self._deadline(timeout)
        routing = run(self._router.newest_routing(deadline), self._transport)
        branches = [
            ModelDescription(session.model, session.branch, session.family, session.tables)
            for session in self._sessions.values()
        ]
        return [_description(model) for model in routing.models] + branches

    def model(self, name: str, *, timeout: float | None = None) -> ModelDescription:
        """The newest served version of a model, or NAME@VERSION, as lookups know it now. Raises NotFound.

        The service is asked only where lookups would ask it: at first, or for a name that is not known.
        """
        return _description(run(self._router.model(name, self._deadline(timeout)), self._transport))

    def train(
        self,
        name: str,
        *,
        optimizer: Optimizer | None = None,
        base: str | None = None,
        dequantize: bool = False,
        at_step: int | None = None,
        workers: int = 1,
        worker: int = 0,
        join: int | None = None,
        staleness: int = 0,
        dtype: torch.dtype = torch.float32,
        checkpoint_every: int | None = None,
        copies: int = 1,
        shares: int | None = None,
        timeout: float = 120.0,
    ) -> Session:
        """Begin a session of a branch, which is made if it is not there (docs/training.md).

        While it lasts, lookups and modules of this client that name the branch get its rows, and gradients of those
        modules are collected. `Session.step` pushes them.

        Args:
            name: `model@branch`.
            optimizer: Of a new branch. None: the branch's own; then set `Session.lr`.
            base: The version of the model that a new branch begins from. None: the newest one.
            dequantize: The base may be one of quantized rows.
            at_step: Go back to the branch as it was after this step. None: where all shards are.
            workers: That push in each step.
            worker: Which of them this one is. The first one begins the session.
            join: The number of the session that the first worker began, for the others.
            staleness: Steps that rows may be behind this worker's pushes.
            dtype: In which gradients travel: float32, float16 or bfloat16.
            checkpoint_every: Steps between checkpoints of a new branch. None: 1,000.
            copies: Shards that have each share of a new branch. With 2, one may die at any time.
            shares: In which a new branch lies; a share moves as a whole. None: one a shard.
            timeout: Seconds that a shard may be away before that is an error.

        Raises:
            InvalidRequest, NotFound: The branch cannot be had so.
            LostUpdates: No shard can go back to `at_step`.
            Unavailable: A shard did not answer in time.
        """
        if at_step is not None and join is not None:
            raise InvalidRequest("the first worker says at_step, the others join its session")
        request = wire.OpenRequest(
            branch=name,
            base=base or "",
            optimizer=optimizer.message() if optimizer else None,
            dequantize=dequantize,
            checkpoint_every=checkpoint_every or 0,
            copies=copies,
            shares=shares or 0,
        )
        session = self._session(
            name,
            lr=optimizer.lr if optimizer else None,
            workers=workers,
            worker=worker,
            staleness=staleness,
            dtype=dtype,
            timeout=timeout,
        )
        session.begin(request, at_step, join)
        self._sessions[name] = session
        return session

    def publish(
        self,
        name: str,
        *,
        version: str | None = None,
        dtype: str | None = None,
        base: str | None = None,
        timeout: float = 600.0,
    ) -> str:
        """Publish a branch, as it is now, as a version of its model. Returns its `model@version` once it is served.

        Args:
            name: `model@branch`.
            version: Of the new version. None: one that sorts last.
            dtype: Of its rows. None: that of `base`, or of the version the branch began from.
            base: A version of which those rows stay that are the same. None: a whole version.
            timeout: Seconds.

        Raises:
            NotFound, InvalidRequest: No such branch, version or dtype.
            DeadlineExceeded: It was published, and is not served in time.
        """
        deadline = time.monotonic() + timeout
        session = self._sessions.get(name)
        if session is None:
            session = self._session(
                name, lr=None, workers=1, worker=0, staleness=0, dtype=torch.float32, timeout=timeout
            )
            session.attend()
        published = session.publish(version=version, dtype=dtype, base=base)
        while published not in run(self._router.newest_routing(deadline), self._transport).by_name:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{published} is published, and not served after {timeout:g} s")
            time.sleep(_LOOK_SECONDS)
        return published

    def session_of(self, name: str) -> Session | None:
        """The session of the branch that `model@branch` or `model@branch/table` names, if this client has one."""
        return self._sessions.get(name.partition("/")[0]) if isinstance(name, str) else None

    def _session(self, name: str, **options: Any) -> Session:
        try:
            from embedding_service.client.training import Session  # not needed for lookups
        except ModuleNotFoundError as error:
            raise InvalidRequest(f"training needs {error.name}: pip install 'embedding-service[train]'") from None

        def seeds() -> list[str]:
            routing = self._router.current
            return [*self._seeds, *(routing.addresses if routing else ())]

        def end(session: Session) -> None:
            if self._sessions.get(name) is session:
                del self._sessions[name]

        return Session(self._transport, seeds, name, on_end=end, **options)

    def _get(self, asked: Lookup, timeout: float | None) -> Tensor:
        steps = self._fetch(asked, self._deadline(timeout))
        if tracing.tracer is None or (span := tracing.inside("lookup")) is None:
            run(steps, self._transport)
            return asked.result()
        with span, closing(traced(steps, span)) as steps:
            run(steps, self._transport)
            rows = asked.result()
            span.note(asked.about() | asked.sources())
        return rows

    async def _get_async(self, asked: Lookup, timeout: float | None) -> Tensor:
        steps = self._fetch(asked, self._deadline(timeout))
        if tracing.tracer is None or (span := tracing.inside("lookup")) is None:
            await run_async(steps, self._transport)
            return asked.result()
        with span, closing(traced(steps, span)) as steps:
            await run_async(steps, self._transport)
            rows = asked.result()
            span.note(asked.about() | asked.sources())
        return rows

    def _fetch(self, lookup: Lookup, deadline: float) -> Steps[Any]:
        if self._near is None:
            return self._router.fetch(lookup.model, lookup.wants, deadline)
        return self._near.fetch(self._router, lookup, deadline)

    def _deadline(self, timeout: float | None) -> float:
        seconds = self._timeout if timeout is None else timeout
        if seconds != seconds:
            raise InvalidRequest(f"timeout must be seconds, got {seconds}; None stands for the client's own")
        return time.monotonic() + min(seconds, _FOR_EVER)

    def _hasher_of(self, model: Model) -> NgramHasher:
        return self._hashers.of(model, self._router.current)

    def _asked_for(self, name: str, ids: Tensor, dtype: torch.dtype) -> RowLookup:
        model, slash, table = name.partition("/") if isinstance(name, str) else ("", "", "")
        if not slash or not table:
            raise InvalidRequest(f"table must be named as MODEL/TABLE, got {name!r}")
        flat = _flat(ids)
        if dtype not in ENCODINGS:
            raise _no_dtype(dtype)
        return RowLookup(
            model=model,
            table=table,
            ids=flat,
            shape=ids.shape,
            dtype=dtype,
            device=ids.device,
            kept=self._kept,
            tally=self._tally,
        )

    def _ngrams_asked_for(
        self, model: str, token_ids: Tensor, context: Tensor | None, dtype: torch.dtype
    ) -> NgramLookup:
        if dtype not in ENCODINGS:
            raise _no_dtype(dtype)
        if not isinstance(model, str):
            raise InvalidRequest(f"model must be named as NAME or NAME@VERSION, got {model!r}")
        if not isinstance(token_ids, Tensor):
            given = type(token_ids).__name__
            raise InvalidRequest(f"token_ids must be an int64 torch.Tensor, got {given}; use torch.tensor(token_ids)")
        return NgramLookup(
            model=model,
            token_ids=token_ids,
            context=context,
            hasher_of=self._hasher_of,
            dtype=dtype,
            device=token_ids.device,
            kept=self._kept,
            tally=self._tally,
        )


def _description(model: Model) -> ModelDescription:
    return ModelDescription(
        name=model.name,
        version=model.version,
        family=model.family,
        tables={table.name: (table.rows, table.dim, table.dtype) for table in model.tables.values()},
        base=model.base,
        checkpoint=model.checkpoint,
    )


def _no_dtype(dtype: torch.dtype) -> InvalidRequest:
    return InvalidRequest(f"dtype must be float32, float16 or bfloat16, got {dtype}")


def _client(seeds: list[str], options: dict[str, Any]) -> EmbeddingClient:
    """One that was pickled."""
    return EmbeddingClient(seeds, **options)


def _finish(lookup: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Look up on a thread of its own. Nobody else waits for its GPU stream."""
    rows = lookup(*arguments, **options)
    if rows.is_cuda:
        torch.cuda.current_stream(rows.device).synchronize()
    return rows


def _flat(ids: Tensor) -> Ids:
    """Integer ids [*] as int64 [n] on the CPU. Raises InvalidRequest for anything else."""
    if not isinstance(ids, Tensor):
        raise InvalidRequest(f"ids must be an integer torch.Tensor, got {type(ids).__name__}; use torch.tensor(ids)")
    try:
        flat = ids if ids.dim() == 1 else ids.reshape(-1)
        if ids.dtype is torch.int64 and ids.is_cpu:
            return flat.numpy()
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise InvalidRequest(f"ids must be an integer tensor, got {ids.dtype}")
        return flat.to("cpu", torch.int64).numpy()
    except (RuntimeError, TypeError):
        if ids.layout is torch.strided and not ids.is_meta:
            raise
    raise InvalidRequest(f"ids must be a dense tensor that has values, got {ids.layout} on {ids.device}")
