"""A trainer's side of a branch: `Session` looks rows up, collects their gradients and pushes them."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import grpc
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.client.gradients import (
    DTYPES,
    ENCODINGS,
    MOST_IDS,
    PIECE_BYTES,
    ROWS,
    ascend,
    check_finite,
    from_data,
    push_pieces,
    summed,
)
from embedding_service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LostUpdates,
    NotFound,
    OutOfTurn,
    ProtocolError,
    Unavailable,
)
from embedding_service.grpc_codes import error_of
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import check_ids
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.lookup_codec import Bytes

if TYPE_CHECKING:
    from embedding_service.client.transport import GrpcTransport

_SERVICE = "/embedding.v1.TrainingService"
_METHODS: dict[type[Any], tuple[str, Any]] = {
    wire.OpenRequest: ("Open", wire.OpenResponse.FromString),
    wire.BeginRequest: ("Begin", wire.BeginResponse.FromString),
    wire.ReadRequest: ("Read", lambda message: _Rows.read(message)),
    wire.CheckpointRequest: ("Checkpoint", wire.CheckpointResponse.FromString),
    wire.PublishRequest: ("Publish", wire.PublishResponse.FromString),
}
# Seconds between two tries, at first and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
# Seconds that a try may take. A shard that comes back may have a log to go through.
_ATTEMPT = 30.0
# Seconds without an answer after which it is asked whether another shard has the share by now.
_QUIET = 3.0
# Pushes that are kept for a shard that loses them with its machine.
_KEPT_BYTES = 1 << 30
# How often a step may pass while a checkpoint of it is asked for.
_TRIES = 20
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

Ids = npt.NDArray[np.int64]


class _Rows(NamedTuple):
    """What a `ReadResponse` says. `rows`: uint8 [bytes]."""

    rows: Bytes
    step: int

    @staticmethod
    def read(message: bytes) -> _Rows:
        answer, [rows] = large.read(wire.ReadResponse, message, ROWS)
        return _Rows(rows, answer.step)


class _Begun(NamedTuple):
    """A call under way. `request`: None for a push, whose pieces the share keeps. `address`: Whom it asks."""

    share: _Share
    request: Any
    call: Any
    address: str


class _Reading(NamedTuple):
    """Rows under way: one of each of `ids`, in `rows`, whose places each answer fills. `where`: of all ids."""

    ids: Tensor
    step: int
    rows: Tensor
    where: Tensor | None
    places: list[Ids]
    begun: list[_Begun]

    def serves(self, ids: Tensor, dtype: torch.dtype, step: int) -> bool:
        """Whether these are the rows that a lookup wants."""
        return self.step >= step and self.rows.dtype == dtype and torch.equal(self.ids, ids)


class _Table(NamedTuple):
    """A table of the branch. `shares`: int64 [parts], which one each is in."""

    name: str
    rows: int
    dim: int
    rows_per_part: int
    shares: npt.NDArray[np.int64]


@dataclass
class _Share:
    """Parts of the branch that lie with one shard. `kept`: pushes that are not on its disk yet, as (step, pieces)."""

    name: str
    shard: str
    address: str
    kept: deque[tuple[int, list[bytes]]] = field(default_factory=deque)
    kept_bytes: int = 0
    durable: int = 0


class Session:
    """One run of a trainer against a branch, and its context manager. `EmbeddingClient.train` makes it.

    It is not thread-safe, but for gradients, which autograd's threads may add.

    Attributes:
        name, model, branch: `model@branch`, and its two halves.
        number: Of the session. It fences all before it.
        begun_at: The step that the branch was at when it began.
        steps: Steps done since the branch began: the last one that this worker pushed.
        lr: The learning rate of the next step. A schedule may set it. None: it was not given yet.
        staleness: Steps that rows may be behind.
        dtype: In which gradients travel.
    """

    def __init__(
        self,
        transport: GrpcTransport,
        seeds: Callable[[], Sequence[str]],
        name: str,
        *,
        lr: float | None,
        workers: int,
        worker: int,
        staleness: int,
        dtype: torch.dtype,
        timeout: float,
        on_end: Callable[[Session], object],
    ) -> None:
        if dtype not in ENCODINGS:
            raise InvalidRequest(f"gradients travel as float32, float16 or bfloat16, not {dtype}")
        if not 0 <= worker < workers:
            raise InvalidRequest(f"worker must be from 0 to workers - 1 = {workers - 1}, got {worker}")
        self.name, self.lr, self.staleness, self.dtype = name, lr, staleness, dtype
        self.model, _, self.branch = name.partition("@")
        self.number = self.begun_at = self.steps = 0
        self._transport, self._seeds, self._timeout, self._on_end = transport, seeds, timeout, on_end
        self._workers, self._worker = workers, worker
        self._tables: dict[str, _Table] = {}
        self._shares: list[_Share] = []
        self._hasher: NgramHasher | None = None
        self._lock = threading.Lock()
        self._gradients: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._prefetched: dict[str, _Reading] = {}
        self._pushing: list[_Begun] = []
        self._summed: set[str] = set()  # tables whose gradients are one sum, in memory of ours

    # Beginning and ending

    def begin(self, request: wire.OpenRequest, at_step: int | None, join: int | None) -> None:
        """Open the branch, fence sessions of before, and have all shards at one step."""
        request.new_session = join is None
        about = self._describe(request)
        self.number = join if join is not None else about.session
        begun = [self._ask(share, self._beginning(share)) for share in self._shares]
        if join is not None:
            self.begun_at = self.steps = max((each.accepted_steps[self._worker] for each in begun), default=0)
            return
        step = min((each.applied_step for each in begun), default=0) if at_step is None else at_step
        if short := [share for share, each in zip(self._shares, begun, strict=True) if each.applied_step < step]:
            had = max(each.applied_step for each in begun)
            raise self._lost(short[0], min(each.applied_step for each in begun) + 1, max(step, had))
        for share in self._shares:
            self._ask(share, self._beginning(share, rewind_to=step))
        self.begun_at = self.steps = step

    def attend(self) -> None:
        """Have it stand for a branch that others train, to publish it. It begins no session."""
        self._describe(wire.OpenRequest(branch=self.name))

    def _describe(self, request: wire.OpenRequest) -> wire.OpenResponse:
        about = self._open(request)
        self._tables = {
            table.name: _Table(table.name, table.rows, table.dim, table.rows_per_part, np.array(table.shares, np.int64))
            for table in about.tables
        }
        self._shares = [_Share(each.name, each.shard, each.address) for each in about.shares]
        if about.family:
            self._hasher = NgramHasher.from_params(about.family, json.loads(about.hash_params))
        return about

    @property
    def family(self) -> str:
        """Of the tables; empty if they have none."""
        return self._hasher.family if self._hasher else ""

    @property
    def tables(self) -> dict[str, tuple[int, int, str]]:
        """As `ModelDescription.tables`."""
        return {table.name: (table.rows, table.dim, "fp32") for table in self._tables.values()}

    def _beginning(self, share: _Share, rewind_to: int | None = None) -> wire.BeginRequest:
        return wire.BeginRequest(
            branch=self.name,
            session=self.number,
            workers=self._workers,
            at_step=rewind_to or 0,
            rewind=rewind_to is not None,
            share=share.name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let modules of the branch look up nothing any more. Gradients that were not pushed are dropped.

        A push under way is waited for. Raises what `step` does.
        """
        self._gradients, self._prefetched = {}, {}
        self._on_end(self)
        self._end_push()

    # Rows

    def lookup(self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of a table of the branch, by its name alone: integer ids [*] -> `dtype` [*, dim] on their device.

        They are of the last step that this worker pushed, or of up to `staleness` steps before. Where there are several
        workers, the others' pushes of that step are waited for.
        """
        reading = self._prefetched.pop(table, None)
        if reading is None or not reading.serves(ids, dtype, self.steps - self.staleness):
            reading = self._begin_read(table, ids, dtype, self.steps - self.staleness)
        elif reading.step >= self.steps:
            self._end_push()  # what it waits for
        return self._end_read(reading)

    def prefetch(self, table: str, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> None:
        """Ask for the rows that `lookup` will want after the next step, while this step is computed.

        That lookup, of the same table, ids and dtype, takes what came. It needs `staleness` of 1 or more: rows are
        asked for before the gradients of this step are there.
        """
        if not self.staleness:
            raise InvalidRequest(
                f"prefetch of table {table} needs rows that may be behind: give client.train staleness=1, or leave "
                "prefetch out"
            )
        self._prefetched[table] = self._begin_read(table, ids.clone(), dtype, self.steps + 1 - self.staleness)

    def prefetch_ngrams(
        self, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """`prefetch` for what `lookup_ngrams` will want."""
        for table, ids in self._ids_of(token_ids, context):
            self.prefetch(table, ids, dtype=dtype)

    def _begin_read(self, table: str, ids: Tensor, dtype: torch.dtype, step: int) -> _Reading:
        about = self._table(table)
        if dtype not in ENCODINGS:
            raise InvalidRequest(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        flat = ids.detach().to("cpu", torch.int64).reshape(-1)
        once, where = flat.numpy(), None
        if not ascend(flat):
            once, inverse = np.unique(once, return_inverse=True)
            where = torch.from_numpy(inverse)
        check_ids(once, about.rows, f"{self.name}/{table}")
        asked, places = [], []
        most = min(max(1, PIECE_BYTES // (about.dim * dtype.itemsize)), MOST_IDS)
        owner = about.shares[once // about.rows_per_part]
        for index, share in enumerate(self._shares):
            mine = np.flatnonzero(owner == index)
            for begin in range(0, len(mine), most):
                some = mine[begin : begin + most]
                request = wire.ReadRequest(
                    branch=self.name,
                    table=table,
                    ids=once[some].astype("<i8").tobytes(),
                    encoding=ENCODINGS[dtype],
                    at_least_step=max(step, 0),
                    # A push that is under way may come after this. It is waited for there, not missed.
                    session=0 if self._pushing and step >= self.steps else self.number,
                    worker=self._worker,
                    share=share.name,
                )
                asked.append((share, request))
                places.append(some)
        rows = torch.empty(len(once), about.dim, dtype=dtype)
        return _Reading(ids, step, rows, where, places, self._begin(asked))

    def _end_read(self, reading: _Reading) -> Tensor:
        rows = reading.rows
        for place, answer in zip(reading.places, self._end(reading.begun), strict=True):
            got = from_data(answer.rows, rows.dtype, [len(place), rows.shape[1]])
            if len(place) == len(rows):
                rows = got
            else:
                rows[_slice_or(place)] = got
        rows = rows if reading.where is None else rows[reading.where]
        return rows.view(*reading.ids.shape, rows.shape[1]).to(reading.ids.device)

    def lookup_ngrams(
        self, token_ids: Tensor, context: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """As `EmbeddingClient.lookup_ngrams`, of the branch."""
        return torch.stack([self.lookup(*each, dtype=dtype) for each in self._ids_of(token_ids, context)], 2)

    def _ids_of(self, token_ids: Tensor, context: Tensor | None) -> list[tuple[str, Tensor]]:
        """For each table of a family its name, and the ids int64 [B, S, H] of tokens."""
        hasher = self.hasher()
        ids = hasher.row_ids(token_ids, context)
        return [(table.name, ids[:, :, index]) for index, table in enumerate(hasher.tables)]

    def hasher(self) -> NgramHasher:
        """What the branch's tokens are hashed with. Raises InvalidRequest for tables without an n-gram family."""
        if self._hasher is None:
            raise InvalidRequest(f"{self.name} has no n-gram family: look its rows up by id")
        return self._hasher

    # Gradients

    def add_gradients(self, table: str, ids: Tensor, gradients: Tensor) -> None:
        """Add gradients of rows: integer ids [*], floating [*, dim]. Autograd's backward calls it."""
        about = self._table(table)
        flat = ids.detach().to("cpu", torch.int64).reshape(-1)
        if gradients.numel() != len(flat) * about.dim:
            raise InvalidRequest(
                f"gradients of table {table} are {list(gradients.shape)}, for ids {list(ids.shape)}: they must be "
                f"[*ids, {about.dim}]"
            )
        values = gradients.detach().to("cpu").reshape(-1, about.dim)
        with self._lock:
            all_ids, all_values = self._gradients.setdefault(table, ([], []))
            all_ids.append(flat)
            all_values.append(values)
            self._summed.discard(table)

    def add_ngram_gradients(self, token_ids: Tensor, context: Tensor | None, gradients: Tensor) -> None:
        """Add gradients of what `lookup_ngrams` gave: [B, S, L, H, dim], or the last three as one."""
        hasher = self.hasher()
        ids = hasher.row_ids(token_ids.cpu(), None if context is None else context.cpu())
        together = gradients.detach().to("cpu").reshape(*ids.shape, -1)
        for index, table in enumerate(hasher.tables):
            self.add_gradients(table.name, ids[:, :, index], together[:, :, index])

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The gradients so far, summed by row: for each table ids int64 [n] and float32 [n, dim].

        The sums may be changed in place: that is how they are clipped or unscaled.
        """
        return self._sums(to_change=True)

    def _sums(self, *, to_change: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """`to_change`: in memory that autograd does not know."""
        with self._lock:
            for table, (ids, values) in self._gradients.items():
                if table not in self._summed:
                    some, total = summed(ids, values)
                    if to_change:
                        total = total.clone() if total is values[0] else total
                        self._summed.add(table)
                    self._gradients[table] = [some], [total]
            return {table: (ids[0], values[0]) for table, (ids, values) in self._gradients.items()}

    def zero_grad(self) -> None:
        """Forget the gradients so far."""
        with self._lock:
            self._gradients = {}
            self._summed.clear()

    def clip_grad_norm_(self, max_norm: float, *, others: Sequence[Tensor] = ()) -> float:
        """Scale the gradients so that their norm, with that of `others`, is at most `max_norm`. Returns the norm.

        others: Gradients of the rest of the model. They are scaled too.
        """
        own = [values for _, values in self.sums().values()]
        norms = [each.norm().item() for each in (*own, *others)]
        norm = sum(each * each for each in norms) ** 0.5
        if norm > max_norm:
            for each in (*own, *others):
                each.mul_(max_norm / (norm + 1e-6))
        return norm

    def unscale_(self, scale: float) -> bool:
        """Divide gradients by a GradScaler's scale. Returns whether all are finite: otherwise leave the step out."""
        finite = True
        for _, values in self.sums().values():
            values.div_(scale)
            finite = finite and bool(torch.isfinite(values).all())
        return finite

    def step(self) -> int:
        """Push the gradients so far as the next step. Returns its number once all shards have it in their logs.

        With `staleness` it does not wait for that. The next step does, or `checkpoint`, or the end of the session.

        Raises InvalidRequest for a gradient that is not finite; SessionEnded if another trainer began; LostUpdates if a
        shard lost what it had accepted, and Unavailable if one does not come back within the timeout. After the latter
        two, a new session begins where all shards are.
        """
        if self.lr is None:
            raise InvalidRequest(f"session.lr is not set: {self.name} has its optimizer, but no learning rate yet")
        tables = {}
        for name, (ids, values) in self._sums().items():
            sent = values.to(self.dtype)
            check_finite(name, ids, sent)
            tables[name] = ids, sent
        self._end_push()
        number = self.steps + 1
        pushing = []
        for index, share in enumerate(self._shares):
            made = push_pieces(self._head(share, number), self._rows_of(index, tables), self.lr)
            pushing.append(_Begun(share, None, self._push_as_made(share, number, made), share.address))
        self.zero_grad()
        self.steps, self._pushing = number, pushing
        if not self.staleness:
            self._end_push()
        return number

    def _end_push(self) -> None:
        """Wait until all shards have the last step."""
        pushing, self._pushing = self._pushing, []
        for (share, *_), answer in zip(pushing, self._end(pushing), strict=True):
            if answer is not None:
                self._settle(share, answer)

    def _head(self, share: _Share, step: int) -> wire.PushPiece:
        return wire.PushPiece(branch=self.name, session=self.number, worker=self._worker, step=step, share=share.name)

    def _rows_of(self, share: int, tables: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """What a share has of the rows."""
        found = {}
        for name, table in self._tables.items():  # the order of the branch
            if name in tables:
                ids, values = tables[name]
                mine = torch.from_numpy(table.shares[ids.numpy() // table.rows_per_part] == share)
                if bool(mine.all()):
                    found[name] = ids, values
                elif bool(mine.any()):
                    found[name] = ids[mine], values[mine]
        return found

    def _push_as_made(self, share: _Share, step: int, made: Iterable[bytes]) -> Any:
        """Begin a push, make its pieces while those before travel, and keep them."""
        pieces, ready = list[bytes](), SimpleQueue[bytes | None]()
        call = self._begin_push(share, iter(ready.get, None))
        try:
            for piece in made:
                pieces.append(piece)
                ready.put(piece)
        finally:
            ready.put(None)
        self._keep(share, step, pieces)
        return call

    def _keep(self, share: _Share, step: int, pieces: list[bytes]) -> None:
        share.kept.append((step, pieces))
        share.kept_bytes += sum(map(len, pieces))
        while (
            share.kept
            and (share.kept[0][0] <= share.durable or share.kept_bytes > _KEPT_BYTES)
            and (len(share.kept) > 1)
        ):
            _, dropped = share.kept.popleft()
            share.kept_bytes -= sum(map(len, dropped))

    def _settle(self, share: _Share, answer: wire.PushResponse) -> None:
        share.durable = answer.durable_step

    # Checkpoints

    def checkpoint(self) -> int:
        """Have a checkpoint written of the last step, by all shards. Returns the step once it is on disk."""
        self._end_push()

        def request(share: _Share) -> wire.CheckpointRequest:
            return wire.CheckpointRequest(
                branch=self.name, step=self.steps, session=self.number, worker=self._worker, share=share.name
            )

        self._ask_all([(share, request(share)) for share in self._shares])
        return self.steps

    def publish(self, *, version: str | None, dtype: str | None, base: str | None) -> str:
        """Publish the branch, as `EmbeddingClient.publish` says. Returns `model@version`, perhaps not served yet."""
        step = self.checkpoint() if self.number else self._checkpoint_now()
        request = wire.PublishRequest(
            branch=self.name, step=step, version=version or "", dtype=dtype or "", base=base or ""
        )
        answer = self._ask(self._shares[0], request)
        return f"{self.model}@{answer.version}"

    def _checkpoint_now(self) -> int:
        """Have a checkpoint written while others push: of the step that the first shards have reached."""
        for _ in range(_TRIES):
            answers = self._ask_all([(share, self._nothing_of(share)) for share in self._shares])
            self.steps = max(answer.step for answer in answers)
            try:
                return self.checkpoint()
            except OutOfTurn:
                continue
        raise Unavailable(f"{self.name} is trained faster than it can be told to stop: publish it from its trainer")

    def _nothing_of(self, share: _Share) -> wire.ReadRequest:
        """A request that only the step is wanted of."""
        index = self._shares.index(share)
        table = next(each.name for each in self._tables.values() if index in each.shares)
        return wire.ReadRequest(branch=self.name, table=table, encoding=ENCODINGS[torch.float32], share=share.name)

    # Calls

    def _table(self, name: str) -> _Table:
        if name not in self._tables:
            raise NotFound(f"no table {name!r} in {self.name}; its tables: {', '.join(self._tables)}")
        return self._tables[name]

    def _open(self, request: wire.OpenRequest, last: str = "") -> wire.OpenResponse:
        """Ask the shards that are known, one after the other, until one answers. `last`: the one to be asked last."""
        attempt = _QUIET if last else _ATTEMPT
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        while True:
            addresses = dict.fromkeys([*(share.address for share in self._shares if share.address), *self._seeds()])
            for address in sorted(addresses, key=last.__eq__):
                try:
                    answer: wire.OpenResponse = self._call(address, request, attempt).result()
                    return answer
                except grpc.RpcError as error:
                    failure = error
                    if error.code() not in (*_AGAIN, grpc.StatusCode.UNIMPLEMENTED):
                        raise _error(error) from None
            if time.monotonic() + pause > deadline:
                raise _error(failure) from None
            time.sleep(pause)
            pause, attempt = min(2 * pause, _LONGEST_PAUSE), min(2 * attempt, _ATTEMPT)

    def _ask(self, share: _Share, request: Any) -> Any:
        return self._ask_all([(share, request)])[0]

    def _ask_all(self, asked: Sequence[tuple[_Share, Any]]) -> list[Any]:
        """Ask all at the same time. One that does not answer is waited for, and told what it may have lost."""
        return self._end(self._begin(asked))

    def _begin(self, asked: Sequence[tuple[_Share, Any]]) -> list[_Begun]:
        return [
            _Begun(share, request, self._call(share.address, request, self._timeout), share.address)
            for share, request in asked
        ]

    def _end(self, begun: Sequence[_Begun]) -> list[Any]:
        answers, quiet_at = [], time.monotonic() + _QUIET
        for share, request, call, address in begun:
            try:
                answers.append(self._result(share, call, address, max(quiet_at - time.monotonic(), _FIRST_PAUSE)))
            except grpc.RpcError as error:
                answers.append(self._recover(share, error, request))
        return answers

    def _result(self, share: _Share, call: Any, address: str, patience: float = _QUIET) -> Any:
        """What a call gives. Raises RpcError, also for a shard that says nothing while another one has its share.

        address: Of the shard that was asked. patience: Seconds until it is asked who has the share, the first time.
        """
        while True:
            try:
                return call.result(patience)
            except grpc.FutureTimeoutError:
                patience = _QUIET
                self._find(share)
                if share.address != address and call.cancel():
                    raise call from None

    def _recover(self, share: _Share, error: grpc.RpcError, request: Any = None) -> Any:
        """Find a share that did not answer, send it what it does not have, and ask it again. Returns its answer."""
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        has_all = not self.number  # a session's shard may have lost what it was sent
        while True:
            if error.code() not in _AGAIN and (has_all or error.code() is not grpc.StatusCode.ABORTED):
                raise _error(error) from None
            if time.monotonic() + pause > deadline:
                raise Unavailable(
                    f"shard {share.shard} of {self.name} did not come back within {self._timeout:g} s "
                    f"({error.details()}): start it again, with the disk that has its log, and begin a new session"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._find(share)
            try:
                if not has_all and not isinstance(request, wire.BeginRequest):
                    self._send_again(share)
                has_all = True
                if request is None:
                    return None
                return self._result(share, self._call(share.address, request, self._timeout), share.address)
            except grpc.RpcError as again:
                has_all = has_all and again.code() not in _AGAIN
                error = again

    def _find(self, share: _Share) -> None:
        """Learn where a share is by now, from others first: its shard may hang."""
        try:
            about = self._open(wire.OpenRequest(branch=self.name), last=share.address)
        except (Unavailable, DeadlineExceeded):
            return
        for each in about.shares:
            if each.name == share.name:
                share.shard, share.address = each.shard, each.address or share.address

    def _send_again(self, share: _Share) -> None:
        """Push what the shard does not have by now. Raises LostUpdates if that is not here any more."""
        begun = self._result(share, self._call(share.address, self._beginning(share), _ATTEMPT), share.address)
        accepted = begun.accepted_steps[self._worker]
        missing = [(step, pieces) for step, pieces in share.kept if step > accepted]
        if accepted < self.steps and (not missing or missing[0][0] > accepted + 1):
            raise self._lost(share, accepted + 1, missing[0][0] - 1 if missing else self.steps)
        for _, pieces in missing:
            self._settle(share, self._result(share, self._begin_push(share, pieces), share.address))

    def _lost(self, share: _Share, first: int, last: int) -> LostUpdates:
        index = self._shares.index(share)
        parts = [
            f"{table.name}/{part}" for table in self._tables.values() for part in np.flatnonzero(table.shares == index)
        ]
        return LostUpdates(
            f"shard {share.shard} of {self.name} lost steps {first} to {last}, which it had accepted: begin a session "
            f"at step {first - 1} with the model's own checkpoint of that step, or without at_step",
            parts,
            (first, last),
        )

    def _begin_push(self, share: _Share, pieces: Iterable[bytes | None]) -> Any:
        try:
            method = self._transport.channel(share.address).stream_unary(
                f"{_SERVICE}/Push", None, wire.PushResponse.FromString
            )
            return method.future(iter(pieces), timeout=self._timeout)
        except ValueError:  # the connection was dropped since we looked
            return self._begin_push(share, pieces)

    def _call(self, address: str, request: Any, timeout: float) -> Any:
        name, read = _METHODS[type(request)]
        try:
            method = self._transport.channel(address).unary_unary(
                f"{_SERVICE}/{name}", type(request).SerializeToString, read
            )
            return method.future(request, timeout=timeout)
        except ValueError:  # the connection was dropped since we looked
            return self._call(address, request, timeout)


def _slice_or(places: Ids) -> slice | Ids:
    """Ascending places, as a slice if they are one: that is copied faster."""
    first, end = int(places[0]), int(places[-1]) + 1
    return slice(first, end) if end - first == len(places) else places


def _error(error: grpc.RpcError) -> Exception:
    """What this package raises for a failed call."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.ABORTED:
        return OutOfTurn(details)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{details}: this service trains no tables, it is older than its client")
    return error_of(code, details)


assert set(DTYPES) == set(ENCODINGS.values())
