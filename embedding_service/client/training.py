"""A trainer's side of a branch: `Session` looks rows up, collects their gradients and pushes them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedding_service.client.branch_calls import Begun, BranchCalls, BranchTable, ShareOfBranch
from embedding_service.client.gradients import (
    DTYPES,
    ENCODINGS,
    MOST_IDS,
    PIECE_BYTES,
    ascend,
    check_finite,
    from_data,
    push_pieces,
    summed,
)
from embedding_service.errors import InvalidRequest, NotFound, OutOfTurn, Unavailable
from embedding_service.ngram import NgramHasher
from embedding_service.placement.routing import check_ids
from embedding_service.wire import training_pb2 as wire

if TYPE_CHECKING:
    from embedding_service.client.transport import GrpcTransport

# How often a step may pass while a checkpoint of it is asked for.
_TRIES = 20
Ids = npt.NDArray[np.int64]


class _Reading(NamedTuple):
    """Rows under way: one of each of `ids`, in `rows`, whose places each answer fills. `where`: of all ids."""

    ids: Tensor
    step: int
    rows: Tensor
    where: Tensor | None
    places: list[Ids]
    begun: list[Begun]

    def serves(self, ids: Tensor, dtype: torch.dtype, step: int) -> bool:
        """Whether these are the rows that a lookup wants."""
        return self.step >= step and self.rows.dtype == dtype and torch.equal(self.ids, ids)


class Session:
    """One run of a trainer against a branch, and its context manager. `EmbeddingClient.train` makes it.

    It is not thread-safe, but for gradients, which autograd's threads may add.

    Attributes:
        name, model, branch: `model@branch`, and its two halves.
        begun_at: The step that the branch was at when it began.
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
        self.begun_at = 0
        self._calls = BranchCalls(transport, seeds, name, workers=workers, worker=worker, timeout=timeout)
        self._worker, self._on_end = worker, on_end
        self._hasher: NgramHasher | None = None
        self._lock = threading.Lock()
        self._gradients: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._prefetched: dict[str, _Reading] = {}
        self._pushing: list[Begun] = []
        self._summed: set[str] = set()  # tables whose gradients are one sum

    # Beginning and ending

    def begin(self, request: wire.OpenRequest, at_step: int | None, join: int | None) -> None:
        """Open the branch, fence sessions of before, and have all shards at one step."""
        request.new_session = join is None
        about = self._describe(request)
        calls, shares = self._calls, self._calls.shares
        calls.session = join if join is not None else about.session
        begun = calls.ask_all([(share, calls.beginning(share)) for share in shares])
        if join is not None:
            self.begun_at = calls.pushed = max((each.accepted_steps[self._worker] for each in begun), default=0)
            return
        step = min((each.applied_step for each in begun), default=0) if at_step is None else at_step
        if short := [share for share, each in zip(shares, begun, strict=True) if each.applied_step < step]:
            had = max(each.applied_step for each in begun)
            raise calls.lost(short[0], min(each.applied_step for each in begun) + 1, max(step, had))
        calls.ask_all([(share, calls.beginning(share, rewind_to=step)) for share in shares])
        self.begun_at = calls.pushed = step

    def attend(self) -> None:
        """Have it stand for a branch that others train, to publish it. It begins no session."""
        self._describe(wire.OpenRequest(branch=self.name))

    def _describe(self, request: wire.OpenRequest) -> wire.OpenResponse:
        about = self._calls.describe(request)
        if about.family:
            self._hasher = NgramHasher.from_params(about.family, json.loads(about.hash_params))
        return about

    @property
    def number(self) -> int:
        """Of the session. It fences all before it."""
        return self._calls.session

    @property
    def steps(self) -> int:
        """Steps done since the branch began: the last one that this worker pushed."""
        return self._calls.pushed

    @property
    def family(self) -> str:
        """Of the tables; empty if they have none."""
        return self._hasher.family if self._hasher else ""

    @property
    def tables(self) -> dict[str, tuple[int, int, str]]:
        """As `ModelDescription.tables`."""
        return {table.name: (table.rows, table.dim, "fp32") for table in self._calls.tables.values()}

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
        for index, share in enumerate(self._calls.shares):
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
        return _Reading(ids, step, rows, where, places, self._calls.begin(asked))

    def _end_read(self, reading: _Reading) -> Tensor:
        rows = reading.rows
        for place, answer in zip(reading.places, self._calls.end(reading.begun), strict=True):
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
        # Copies: a caller may use its ids again, and autograd may add to the same memory for a parameter.
        flat = ids.detach().to("cpu", torch.int64, copy=True).reshape(-1)
        if gradients.numel() != len(flat) * about.dim:
            raise InvalidRequest(
                f"gradients of table {table} are {list(gradients.shape)}, for ids {list(ids.shape)}: they must be "
                f"[*ids, {about.dim}]"
            )
        own = gradients.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        with self._lock:
            all_ids, all_values = self._gradients.setdefault(table, ([], []))
            all_ids.append(flat)
            all_values.append(own.view(-1, about.dim))
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
        with self._lock:
            for table, (ids, values) in self._gradients.items():
                if table not in self._summed:
                    some, total = summed(ids, values)
                    self._gradients[table] = [some], [total]
                    self._summed.add(table)
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
        shard lost what it had accepted, and Unavailable if one does not come back within the timeout. After these two a
        new session begins where all shards are. Overloaded if a shard's memory or its log's disk is full.
        """
        if self.lr is None:
            raise InvalidRequest(f"session.lr is not set: {self.name} has its optimizer, but no learning rate yet")
        tables = {}
        for name, (ids, values) in self.sums().items():
            sent = values.to(self.dtype)
            check_finite(name, ids, sent)
            tables[name] = ids, sent
        self._end_push()
        number = self.steps + 1
        pushing = []
        for index, share in enumerate(self._calls.shares):
            head = wire.PushPiece(
                branch=self.name, session=self.number, worker=self._worker, step=number, share=share.name
            )
            made = push_pieces(head, self._rows_of(index, tables), self.lr)
            pushing.append(self._calls.begin_push(share, number, made))
        self.zero_grad()
        self._calls.pushed, self._pushing = number, pushing
        if not self.staleness:
            self._end_push()
        return number

    def _end_push(self) -> None:
        """Wait until all shards have the last step."""
        pushing, self._pushing = self._pushing, []
        self._calls.end_pushes(pushing)

    def _rows_of(self, share: int, tables: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """What a share has of the rows."""
        found = {}
        for name, table in self._calls.tables.items():  # the order of the branch
            if name in tables:
                ids, values = tables[name]
                mine = torch.from_numpy(table.shares[ids.numpy() // table.rows_per_part] == share)
                if bool(mine.all()):
                    found[name] = ids, values
                elif bool(mine.any()):
                    found[name] = ids[mine], values[mine]
        return found

    # Checkpoints

    def checkpoint(self) -> int:
        """Have a checkpoint written of the last step, by all shards. Returns the step once it is on disk."""
        self._end_push()

        def request(share: ShareOfBranch) -> wire.CheckpointRequest:
            return wire.CheckpointRequest(
                branch=self.name, step=self.steps, session=self.number, worker=self._worker, share=share.name
            )

        self._calls.ask_all([(share, request(share)) for share in self._calls.shares])
        return self.steps

    def publish(self, *, version: str | None, dtype: str | None, base: str | None) -> str:
        """Publish the branch, as `EmbeddingClient.publish` says. Returns `model@version`, perhaps not served yet."""
        step = self.checkpoint() if self.number else self._checkpoint_now()
        request = wire.PublishRequest(
            branch=self.name, step=step, version=version or "", dtype=dtype or "", base=base or ""
        )
        answer = self._calls.ask(self._calls.shares[0], request)
        return f"{self.model}@{answer.version}"

    def _checkpoint_now(self) -> int:
        """Have a checkpoint written while others push: of the step that the first shards have reached."""
        for _ in range(_TRIES):
            answers = self._calls.ask_all([(share, self._nothing_of(share)) for share in self._calls.shares])
            self._calls.pushed = max(answer.step for answer in answers)
            try:
                return self.checkpoint()
            except OutOfTurn:
                continue
        raise Unavailable(f"{self.name} is trained faster than it can be told to stop: publish it from its trainer")

    def _nothing_of(self, share: ShareOfBranch) -> wire.ReadRequest:
        """A request that only the step is wanted of."""
        index = self._calls.shares.index(share)
        table = next(each.name for each in self._calls.tables.values() if index in each.shares)
        return wire.ReadRequest(branch=self.name, table=table, encoding=ENCODINGS[torch.float32], share=share.name)

    def _table(self, name: str) -> BranchTable:
        tables = self._calls.tables
        if name not in tables:
            raise NotFound(f"no table {name!r} in {self.name}; its tables: {', '.join(tables)}")
        return tables[name]


def _slice_or(places: Ids) -> slice | Ids:
    """Ascending places, as a slice if they are one: that is copied faster."""
    first, end = int(places[0]), int(places[-1]) + 1
    return slice(first, end) if end - first == len(places) else places


assert set(DTYPES) == set(ENCODINGS.values())
