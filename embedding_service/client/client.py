"""`EmbeddingClient`: the public face of the service for Python."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedding_service.client import forks
from embedding_service.client.cache import Group, RowCache
from embedding_service.client.hedging import HedgingTransport
from embedding_service.client.router import Router, Steps, Want, run, run_async
from embedding_service.client.sinks import PLAIN, DecodedRows, Decoder, StoredRows
from embedding_service.client.transport import GrpcTransport, Transport
from embedding_service.errors import InvalidRequest, Unavailable
from embedding_service.machine import split_address
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import Ids, Model, Routing, Table, check_ids
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.rows import Bytes

_ENCODINGS = {
    torch.float32: wire.ROW_ENCODING_FLOAT32,
    torch.float16: wire.ROW_ENCODING_FLOAT16,
    torch.bfloat16: wire.ROW_ENCODING_BFLOAT16,
}
# Up to so many ids a set finds repetitions sooner than sorting does.
FEW_IDS = 64
# Rows are asked for once where one in so many is a repetition; spreading them over their places costs a copy of all.
WORTH_SPREADING = 16
# Seconds for which a version stays the newest one for rows of the cache; then a lookup asks a shard again, which says
# so when it was replaced.
TRUSTED_SECONDS = 1.0
# Lookups that run ahead at the same time; they wait for shards, they hardly compute. Others wait for their turn.
MOST_AHEAD = 32


@dataclass(frozen=True)
class ModelDescription:
    """A served model: `tables` maps a table's name to (rows, dim, dtype)."""

    name: str
    version: str
    family: str
    tables: dict[str, tuple[int, int, str]]


class EmbeddingClient:
    """Looks rows up in an embedding service; asks the shards that hold them directly, in parallel.

    A context manager; safe to share between threads and event loops. Every method raises the errors of
    `embedding_service.errors`: RequestError when the request is wrong, ServiceError when the service could not answer
    within the deadline.

    Args:
        address: `host:port` of any shard (or a name that stands for all of them), or several.
        timeout: Seconds a call may take in all, retries included, where the call gives none.
        hedge: Ask a second owner when the first takes longer than 95 % of the last calls did. Needs replicas; costs up
            to 5 % more requests, and smaller ones. Off by default: it pays only where single shards are slow at times.
        cache_bytes: Keep rows in so much memory, in the bytes they came in; a lookup whose rows are all here does no
            RPC. 0 keeps none. `cache` has the counts.
    """

    def __init__(
        self, address: str | Sequence[str], *, timeout: float = 10.0, hedge: bool = False, cache_bytes: int = 0
    ) -> None:
        seeds: list[Any] = list(address) if isinstance(address, (list, tuple)) else [address]
        if not seeds:
            raise InvalidRequest("address must be HOST:PORT, or several of them: got none")
        for seed in seeds:
            split_address(seed, least=1)
        self._seeds, self._timeout, self._hedge, self._cache_bytes = seeds, timeout, hedge, cache_bytes
        self._hashers: dict[str, NgramHasher] = {}
        self._closed = False
        self._begin_anew(None)
        forks.watch(self)

    def _begin_anew(self, routing: Routing | None) -> None:
        """Connections, threads and locks of this process; none is used yet."""
        self._transport: Transport = HedgingTransport(GrpcTransport()) if self._hedge else GrpcTransport()
        self._router = Router(self._seeds, routing, alternatives=self._hedge)
        self._kept = _KeptRows(RowCache(self._cache_bytes)) if self._cache_bytes else None
        self._ahead = ThreadPoolExecutor(MOST_AHEAD, "embedding-prefetch")  # has no thread before it is used

    def before_fork(self, deadline: float) -> None:
        """See `forks.Forkable`."""
        self._transport.pause(deadline)

    def after_fork_in_parent(self) -> None:
        """See `forks.Forkable`."""
        self._transport.resume()

    def after_fork_in_child(self) -> None:
        """See `forks.Forkable`. Kept rows are not: a thread that is not here may have been about to change them."""
        if not self._closed:
            self._begin_anew(self._router.current)

    def __copy__(self) -> EmbeddingClient:
        """Copies of what holds a client share it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingClient:
        """Copies of what holds a client share it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: a client of the same service, which connects when it is first used."""
        return _client, (self._seeds, self._timeout, self._hedge, self._cache_bytes)

    @property
    def cache(self) -> RowCache | None:
        """The rows kept here, whose `stats` count hits; None without `cache_bytes`."""
        return self._kept.cache if self._kept else None

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all connections; calls under way fail with Unavailable."""
        self._closed = True
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._transport.close()
        self._ahead.shutdown()

    def lookup(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Tensor:
        """Rows of one table.

        Args:
            table: `model/table` or `model@version/table`.
            ids: Row ids, any integer dtype and shape [*]; repetitions cost nothing on the wire.
            dtype: float32, float16 or bfloat16.
            timeout: Seconds, retries included.

        Returns:
            `dtype` Tensor[*, dim] on the device of `ids`. To a GPU rows travel as stored, through page-locked memory,
            and are decoded there on the current stream.

        Raises:
            NotFound, OutOfRange, InvalidRequest: no such model, table or row; not an integer tensor.
            Unavailable, DeadlineExceeded: the rows could not be had in time.
        """
        return run(self._lookup(table, ids, dtype, timeout), self._transport)

    async def lookup_async(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Tensor:
        """`lookup` for asyncio."""
        return await run_async(self._lookup(table, ids, dtype, timeout), self._transport)

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
            token_ids: int64 [B, S]; -1 is "no token" (left padding).
            context: int64 [B, C], the tokens directly before; None at a sequence's start.
            dtype: float32, float16 or bfloat16.
            timeout: Seconds, retries included.

        Returns:
            `dtype` Tensor[B, S, L, H, dim] on the device of `token_ids`: L tables, H heads.

        Raises:
            As `lookup`, and InvalidRequest for token ids out of range.
        """
        return run(self._lookup_ngrams(model, token_ids, context, dtype, timeout), self._transport)

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
        return await run_async(self._lookup_ngrams(model, token_ids, context, dtype, timeout), self._transport)

    def prefetch(
        self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32, timeout: float | None = None
    ) -> Future[Tensor]:
        """Begin a `lookup` and go on; `result()` waits for its rows and raises what it raised.

        Rows on a GPU are there for any stream.

        `ids` may be changed once this returned. `timeout` counts from when a thread takes it up: at once, unless 32
        others are under way. One that has not begun when the client is closed is cancelled: its `result()` raises
        concurrent.futures.CancelledError. Raises Unavailable once closed.
        """
        return self._begin(self.lookup, table, _copy(ids), dtype=dtype, timeout=timeout)

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
        return self._begin(self.lookup_ngrams, model, _copy(token_ids), _copy(context), dtype=dtype, timeout=timeout)

    def _begin(self, lookup: Callable[..., Tensor], *arguments: Any, **options: Any) -> Future[Tensor]:
        try:
            return self._ahead.submit(_finish, lookup, *arguments, **options)
        except RuntimeError:  # the pool was shut down
            raise Unavailable("this client is closed") from None

    def hasher(self, model: str, *, timeout: float | None = None) -> NgramHasher:
        """What the client hashes this model's token ids with. Raises NotFound, InvalidRequest (no n-gram family)."""
        return self._hasher_of(run(self._router.model(model, self._deadline(timeout)), self._transport))

    def models(self, *, timeout: float | None = None) -> list[ModelDescription]:
        """What is served now."""
        deadline = self._deadline(timeout)
        routing = run(self._router.newest_routing(deadline), self._transport)
        return [
            ModelDescription(
                name=model.name,
                version=model.version,
                family=model.family,
                tables={table.name: (table.rows, table.dim, table.dtype) for table in model.tables.values()},
            )
            for model in routing.models
        ]

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _hasher_of(self, model: Model) -> NgramHasher:
        if model.full_name not in self._hashers:
            self._hashers[model.full_name] = model.hasher()
        return self._hashers[model.full_name]

    def _lookup(self, name: str, ids: Tensor, dtype: torch.dtype, timeout: float | None) -> Steps[Tensor]:
        model_name, slash, table_name = name.partition("/")
        if not slash or not table_name:
            raise InvalidRequest(f"table must be named as MODEL/TABLE, got {name!r}")
        flat = _flat_ids(ids)

        def ids_of(model: Model) -> list[tuple[Table, Ids]]:
            return [(model.table(table_name), flat)]

        rows = yield from self._rows(model_name, ids_of, dtype, ids.device, timeout)
        return rows[0].view(*ids.shape, rows[0].shape[1])

    def _lookup_ngrams(
        self, name: str, token_ids: Tensor, context: Tensor | None, dtype: torch.dtype, timeout: float | None
    ) -> Steps[Tensor]:
        shape: list[int] = []

        def ids_of(model: Model) -> list[tuple[Table, Ids]]:
            hasher = self._hasher_of(model)
            row_ids = hasher.row_ids(token_ids, context)
            shape[:] = row_ids.shape
            return [
                (model.table(table.name), _flat_ids(row_ids[:, :, index])) for index, table in enumerate(hasher.tables)
            ]

        rows = yield from self._rows(name, ids_of, dtype, token_ids.device, timeout)
        batch, length, tables, heads = shape
        if tables == 1:
            return rows[0].view(batch, length, 1, heads, rows[0].shape[1])
        return torch.stack([table.view(batch, length, heads, table.shape[1]) for table in rows], 2)

    def _rows(
        self,
        name: str,
        ids_of: Callable[[Model], list[tuple[Table, Ids]]],
        dtype: torch.dtype,
        device: torch.device,
        timeout: float | None,
    ) -> Steps[list[Tensor]]:
        """Fetch each row once, then spread and decode: for each (table, ids [n]) a Tensor[n, dim] on `device`."""
        if dtype not in _ENCODINGS:
            raise InvalidRequest(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        asked: list[_Asked] = []
        founds: list[_Found] = []
        kept, began = self._kept, time.monotonic()

        def wants_of(model: Model) -> list[Want]:
            asked[:] = [_ask(table, ids, dtype, device) for table, ids in ids_of(model)]
            wants = [each.want for each in asked]
            if kept is None:
                return wants
            founds[:] = kept.find(model, wants, began, self._router.current, pinned=name == model.full_name)
            return [found.missing for found in founds]

        yield from self._router.fetch(name, wants_of, self._deadline(timeout))
        if kept is None:
            return [each.values() for each in asked]
        merged = kept.merge(founds, began)
        return [each.decoder.decode(rows, each.inverse) for each, rows in zip(asked, merged, strict=True)]


def _client(seeds: list[str], timeout: float, hedge: bool, cache_bytes: int) -> EmbeddingClient:
    """One that was pickled."""
    return EmbeddingClient(seeds, timeout=timeout, hedge=hedge, cache_bytes=cache_bytes)


class _Found(NamedTuple):
    """What the cache had of a want: bool [n] and uint8 [hits, row_bytes]; `missing` asks for the rest, `fetched`."""

    group: Group
    here: np.ndarray[Any, Any]
    rows: Bytes
    missing: Want
    fetched: StoredRows


class _KeptRows:
    """When rows of the cache may stand for those of the service, and what goes into it."""

    def __init__(self, cache: RowCache) -> None:
        self.cache = cache
        self._routing: Routing | None = None
        self._confirmed: dict[str, float] = {}

    def find(
        self, model: Model, wants: Sequence[Want], now: float, routing: Routing | None, *, pinned: bool
    ) -> list[_Found]:
        """Split wants. Raises OutOfRange as the service would: what is out of range is no key."""
        if routing is not None and routing is not self._routing:
            self._routing = routing
            self.cache.retain({each.full_name for each in routing.models})
        trusted = pinned or now < self._confirmed.get(model.full_name, now - TRUSTED_SECONDS) + TRUSTED_SECONDS
        return [self._split(model, want, trusted) for want in wants]

    def merge(self, founds: Sequence[_Found], began: float) -> list[Bytes]:
        """The rows of split wants in their order, uint8 [n, row_bytes] each; what was fetched is kept."""
        if any(len(found.missing.ids) for found in founds):
            self._confirmed[founds[0].group.model] = began
        return [self._together(found) for found in founds]

    def _split(self, model: Model, want: Want, trusted: bool) -> _Found:
        check_ids(want.ids, want.table.rows, f"{model.full_name}/{want.table.name}")
        group = Group(model.full_name, want.table.name, want.encoding, want.row_bytes)
        here, rows = np.zeros(len(want.ids), np.bool_), np.empty((0, want.row_bytes), np.uint8)
        if trusted:
            here, rows = self.cache.find(group, want.ids)
        ids = want.ids[~here] if len(rows) else want.ids
        fetched = StoredRows(len(ids), want.row_bytes)
        return _Found(group, here, rows, want._replace(ids=ids, sink=fetched), fetched)

    def _together(self, found: _Found) -> Bytes:
        fetched = found.fetched.rows
        if not len(fetched):
            return found.rows
        self.cache.keep(found.group, found.missing.ids, fetched)
        if not len(found.rows):
            return fetched
        rows = np.empty((len(found.here), found.group.row_bytes), np.uint8)
        rows[found.here], rows[~found.here] = found.rows, fetched
        return rows


def _finish(lookup: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    """Look up on a thread of its own, whose GPU stream nobody else waits for."""
    rows = lookup(*arguments, **options)
    if rows.is_cuda:
        torch.cuda.current_stream(rows.device).synchronize()
    return rows


def _copy(ids: Any) -> Any:
    """What others may change is copied; what is no tensor is refused by the lookup."""
    return ids.clone() if isinstance(ids, Tensor) else ids


def _flat_ids(ids: Tensor) -> Ids:
    if not isinstance(ids, Tensor):
        raise InvalidRequest(f"ids must be an integer torch.Tensor, got {type(ids).__name__}; use torch.tensor(ids)")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InvalidRequest(f"ids must be an integer tensor, got {ids.dtype}")
    flat = ids.reshape(-1)
    if flat.dtype != torch.int64 or flat.device.type != "cpu":
        flat = flat.to("cpu", torch.int64)
    return flat.numpy()


class _Asked(NamedTuple):
    """A want, and what becomes of its rows; `inverse`: where each stands among the ids that were given."""

    want: Want
    decoder: Decoder
    inverse: Ids | None

    def values(self) -> Tensor:
        """Once its sink has all rows: Tensor[n, dim]."""
        sink = self.want.sink
        if isinstance(sink, DecodedRows):
            return sink.values
        assert isinstance(sink, StoredRows)
        return self.decoder.decode(sink.rows, self.inverse)


def _ask(table: Table, ids: Ids, dtype: torch.dtype, device: torch.device) -> _Asked:
    """Rows cross the wire as stored, or converted by the shard where that is fewer bytes.

    Where ids repeat they are spread while they are still bytes, which are fewer than what they decode to.
    """
    encoding, row_bytes, name = wire.ROW_ENCODING_STORED, table.row_bytes, table.dtype
    if table.dim * dtype.itemsize < row_bytes:
        encoding, row_bytes, name = _ENCODINGS[dtype], table.dim * dtype.itemsize, PLAIN[dtype]
    unique, inverse = _once(ids)
    decoder = Decoder(name, table.dim, dtype, device)
    sink = DecodedRows(len(ids), decoder) if inverse is None else StoredRows(len(unique), row_bytes)
    return _Asked(Want(table, unique, encoding, row_bytes, sink), decoder, inverse)


def _once(ids: Ids) -> tuple[Ids, Ids | None]:
    """Each different id, and where it stands among `ids`; None where nearly all differ and the ids stay as they are."""
    if len(ids) <= FEW_IDS:
        repeated = len(ids) - len(set(ids.tolist()))
    else:
        ordered = np.sort(ids.astype(np.uint32))  # half the bytes; few that differ look alike then, which does no harm
        repeated = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
    if repeated * WORTH_SPREADING < len(ids):
        return ids, None
    unique, inverse = np.unique(ids, return_inverse=True)
    return unique, inverse
