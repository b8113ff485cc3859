"""A share: parts of a branch that lie together. What a shard does with one on its own, without a network.

Rows after step s are a function of the branch's start and of pushes 1 to s. A step is done when the pushes of all
workers are there: their gradients are summed in the order of the workers, and the optimizer runs once. So a copy that
does what the primary did has the same bits.

`accept`, `begin`, `rewind`, `want_checkpoint` and what copies do are called on one thread, the others on any.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embedding_service.client.gradients import summed
from embedding_service.errors import (
    EmbeddingServiceError,
    InvalidRequest,
    OutOfTurn,
    Overloaded,
    SessionEnded,
    StoreError,
    Unavailable,
)
from embedding_service.formats import get_format
from embedding_service.store.reading import part_rows, replaced_rows
from embedding_service.store.store import Store
from embedding_service.training import checkpoints
from embedding_service.training.branch import Branch, branch_folder
from embedding_service.training.log import PUSH, SESSION, Draft, Log, Record
from embedding_service.training.optimizers import optimizer_of
from embedding_service.training.push import Push, PushReader, read_push
from embedding_service.training.seats import change_seat, leading, read_seat
from embedding_service.training.tables import Ids, TrainedTable, trained_bytes
from embedding_service.wire import training_pb2 as wire

log = logging.getLogger(__name__)

MOST_WORKERS = 10_000
# Rows that are decoded at a time: they stay in a core's cache.
_LOADED_ROWS = 1024


class Change(NamedTuple):
    """What changes a share, for its copies to do the same. `step`: of a session its number. `pieces`: see `Record`."""

    kind: Literal["session", "push", "rewind", "checkpoint"]
    step: int
    pieces: Sequence[bytes | memoryview] = ()


def share_bytes(branch: Branch, name: str) -> int:
    """What a share takes in memory."""
    optimizer = optimizer_of(branch.optimizer.message)
    return sum(trained_bytes(table, table.parts_of(name), optimizer) for table in branch.tables)


class Share:
    """A share as a shard has it.

    Args:
        name: Of the share.
        log_folder: Of this share at this shard alone.
        sync: See `Log`.
        shard: Who has it. None: the shard that the share is named after.
        copy: It is no primary. Then it is empty until `restart`, and writes no checkpoints.
        on_applied: Called when a step was done or a checkpoint written, on any thread.
        on_change: Called with each change in turn, for copies to do the same.

    Attributes:
        session: The newest one. Older ones are refused.
        workers: That push in each step.
        applied: The step that all rows are of.
        accepted: Of each worker, the last step that was accepted.
        timeline: How often updates that were accepted were lost.
        is_broken: Rows were being changed when something failed, and are of no step. Open the share again.
    """

    def __init__(
        self,
        store: Store,
        branch: Branch,
        name: str,
        log_folder: Path,
        sync: float,
        *,
        shard: str | None = None,
        copy: bool = False,
        on_applied: Callable[[], object] = lambda: None,
        on_change: Callable[[Change], object] = lambda change: None,
    ) -> None:
        self.branch, self.name, self.shard = branch, name, shard or name
        self.folder = branch_folder(store, branch.model, branch.name)
        self._store, self._copy, self._on_applied, self._on_change = store, copy, on_applied, on_change
        optimizer = optimizer_of(branch.optimizer.message)
        self.tables = {
            table.name: TrainedTable(table, parts, optimizer)
            for table in branch.tables
            if (parts := table.parts_of(name))
        }
        self.session, self.workers, self.timeline = 0, 1, 0
        self.applied, self.accepted = 0, [0]
        self.is_broken = False
        self._loaded = 0  # the step of the checkpoint that was loaded
        self._held: list[int] = []  # of checkpoints that copies are loading
        self._pending: dict[int, dict[int, Push]] = {}
        self._lock = threading.RLock()  # held while rows change or are copied
        self._snapshot: checkpoints.Snapshot | None = None
        self._wanted: set[int] = set()
        self._failures: dict[int, Overloaded] = {}
        self._writer: threading.Thread | None = None
        self._log = Log(log_folder, sync)
        try:
            if not copy:
                self.timeline = self._find_timeline()
                self._recover()
        except BaseException:
            self._log.close()
            raise

    # Coming back

    def _find_timeline(self) -> int:
        """How often this share's log was lost. It was lost if the primary had another one."""
        seat, own = read_seat(self.folder, self.branch, self.name), self._log.identity
        before = seat.in_sync.get(self.shard, "")
        if before == own:
            return seat.timeline
        others = [shard for shard in seat.in_sync if shard != self.shard]
        if before and others:
            raise Unavailable(
                f"share {self.name} of {self.branch.full_name} has lost its log here, and shard {others[0]} has all: "
                "start that one"
            )
        if before:
            log.warning(
                "the log that %s had here is gone: updates since the last checkpoint are", self.branch.full_name
            )
        changes = {"in_sync": {**seat.in_sync, self.shard: own}, "timeline": seat.timeline + bool(before)}
        return change_seat(self.folder, self.branch, self.name, seat, **changes).timeline

    def _recover(self, to: int | None = None) -> None:
        """Load the last checkpoint, and do the steps that the log has after it, up to `to`."""
        steps = [step for step in checkpoints.saved_steps(self.folder, self.name) if to is None or step <= to]
        self._load(steps[-1] if steps else 0)
        self._pending, self.accepted = {}, [self.applied] * self.workers
        for record in self._log.read(self.applied):
            if record.kind == SESSION and record.step != self.session:  # files begin with the session that goes on
                self._enter(record.step, int.from_bytes(record.pieces[0], "little"))
            elif record.kind == PUSH and (to is None or record.step <= to):
                self._replay(record)
        self._log.ready(self.applied)
        log.info("%s is at step %d here", self.branch.full_name, self.applied)

    def _load(self, step: int) -> None:
        """Have the rows of a checkpoint; step 0: those that the branch began from."""
        if step:
            checkpoints.load_checkpoint(self.folder, self.name, step, self.tables)
        else:
            self._load_base()
        for table in self.tables.values():
            table.loaded()
        self.applied = self._loaded = step

    def _replay(self, record: Record) -> None:
        if record.step <= self.applied:
            return
        push = read_push(self.branch, record.pieces, check=False)
        if push.session == self.session and push.step == self.accepted[push.worker] + 1:
            self._take(push)
            while pushes := self._next():
                self._apply(pushes)

    def _load_base(self) -> None:
        manifest = self._store.manifest(self.branch.model, self.branch.base)
        for name, trained in self.tables.items():
            trained.clear()
            table = manifest.table(name)
            row_format = get_format(table.dtype)
            for index in trained.parts:
                part, out = table.parts[index], trained.rows_of(index)
                with part_rows(self._store, manifest, table, part) as stored:
                    for begin in range(0, part.rows, _LOADED_ROWS):
                        some = torch.from_numpy(np.array(stored[begin : begin + _LOADED_ROWS]))
                        row_format.decode(some, table.dim, out[begin : begin + len(some)])
                replaced = replaced_rows(self._store, manifest, table, part)
                if len(replaced.ids):
                    rows = torch.from_numpy(np.array(replaced.rows))
                    out[torch.from_numpy(replaced.ids - part.first_row)] = row_format.decode(rows, table.dim)

    # Sessions

    def begin(self, session: int, workers: int) -> None:
        """Take part in a session, again too. Raises SessionEnded for one that a later one followed."""
        if not 1 <= workers <= MOST_WORKERS:
            raise InvalidRequest(f"workers must be from 1 to {MOST_WORKERS:,}, got {workers}")
        self.check_session(session)
        self.advance()  # what was admitted counts
        if session == self.session:
            if workers != self.workers:
                raise InvalidRequest(f"session {session} has {self.workers} workers, not {workers}")
            return
        record = self._session_record(session, workers)
        self._log.append(record)
        self._enter(session, workers)
        self._on_change(Change("session", session, record.pieces))

    def check_session(self, session: int) -> None:
        """Raise SessionEnded unless it is this session or a later one."""
        if session < self.session:
            raise SessionEnded(
                f"session {session} of {self.branch.full_name} has ended, for session {self.session} began: one "
                "trainer at a time, with all of its workers in one session"
            )

    def rewind(self, step: int) -> None:
        """Go back to a step: have the rows and state that were there after it. What came later is lost."""
        self.advance()
        if step > self.applied:
            raise InvalidRequest(f"{self.branch.full_name} is at step {self.applied} and cannot begin at step {step}")
        if step == self.applied and not self._pending:
            self._forget_checkpoints_after(step)
            return
        self._wait_for_writer()
        first = self._oldest_step()
        if step < first:
            raise InvalidRequest(
                f"{self.branch.full_name} can go back to step {first} and no further: older checkpoints were removed"
            )
        session, workers = self.session, self.workers
        kept = [each for each in self._log.read() if each.kind == SESSION or each.step <= step]
        self._log.rewrite(kept, partial(self._forget_checkpoints_after, step))
        if step < self.applied:
            with self._changing_rows():
                self._recover(step)
            if self.applied != step:
                raise StoreError(f"the log of {self.branch.full_name} ends at step {self.applied}, before step {step}")
        self._enter(session, workers)
        self._on_change(Change("rewind", step))

    def _forget_checkpoints_after(self, step: int) -> None:
        """Those of steps that are lost. A primary of before may have written one that nobody else was told of.

        Raises Unavailable if somebody else leads: they are that one's.
        """
        later = [each for each in checkpoints.saved_steps(self.folder, self.name) if each > step]
        if later and not self._copy:
            with leading(self.folder, self.branch, self.name, self.shard):
                checkpoints.forget_checkpoints(self.folder, self.name, later)

    def _oldest_step(self) -> int:
        """The first step that checkpoints and the log can give."""
        first = self._log.first_step
        saved = checkpoints.saved_steps(self.folder, self.name) if first else []
        return min((step for step in saved if step >= first), default=0)

    def _enter(self, session: int, workers: int) -> None:
        self.session, self.workers = session, workers
        self._pending, self.accepted = {}, [self.applied] * workers

    # Pushes

    def read(self, pieces: Sequence[bytes | memoryview]) -> Push:
        """A push with all of it checked that does not depend on its turn. On any thread."""
        reader = self.reader()
        for piece in pieces:
            reader.add(piece)
        return reader.end()

    def reader(self) -> PushReader:
        """`read`, a piece at a time."""
        return PushReader(
            self.branch,
            locate=lambda table, ids: self._table(table).local(ids.numpy()),
            draft_of=lambda first: Draft(self._log) if self._is_next(first) else None,
        )

    def _is_next(self, push: wire.PushPiece) -> bool:
        """Whether the log's next record is this push, as far as its first piece says."""
        return push.session == self.session and self.workers == 1 and push.step == self.accepted[0] + 1

    def accept(self, push: Push) -> None:
        """`admit` and `advance`."""
        self.admit(push)
        self.advance()

    def admit(self, push: Push) -> None:
        """Log a push: it is accepted then. `advance` is to follow.

        One that was accepted before changes nothing. Raises SessionEnded, OutOfTurn; Overloaded if the log's disk takes
        no more.
        """
        self._check_whole()
        self.check_session(push.session)
        if push.session > self.session or push.worker >= self.workers:
            raise InvalidRequest(
                f"worker {push.worker} of session {push.session} pushed to {self.branch.full_name}, which is in "
                f"session {self.session} with {self.workers} workers: begin first"
            )
        expected = self.accepted[push.worker] + 1
        if push.step < expected:
            return
        if push.step > expected:
            raise OutOfTurn(
                f"worker {push.worker} pushed step {push.step} of {self.branch.full_name}, step {expected} is expected"
            )
        self._log.append(Record(PUSH, push.step, push.pieces), push.draft)
        self._take(push)
        self._on_change(Change("push", push.step, push.pieces))

    def advance(self, to: int | None = None) -> None:
        """Do the steps of which all pushes are here, up to `to`."""
        self._check_whole()
        before = self.applied
        while (to is None or self.applied < to) and (pushes := self._next()):
            self._apply(pushes)
            self._log.applied(self.applied)
            if not self._copy:
                self._checkpoint_if_due()
        if self.applied > before:
            self._on_applied()

    def check_has(self, session: int, worker: int, step: int) -> None:
        """Raise OutOfTurn if a worker of this session pushed a step that is not here. It may have been lost."""
        known = session == self.session and worker < self.workers
        if session > self.session or (known and step > self.accepted[worker]):
            last = self.accepted[worker] if known else self.applied
            raise OutOfTurn(
                f"step {step} of worker {worker} in session {session} is not here: {self.branch.full_name} expects "
                f"step {last + 1}"
            )

    def _take(self, push: Push) -> None:
        self.accepted[push.worker] = push.step
        self._pending.setdefault(push.step, {})[push.worker] = push

    def _next(self) -> list[Push]:
        """What the next step is made of. Empty while a worker's push is missing."""
        waiting = self._pending.get(self.applied + 1, {})
        return [waiting[worker] for worker in range(self.workers)] if len(waiting) == self.workers else []

    def _apply(self, pushes: list[Push]) -> None:
        """Do one step. Everything was checked, so nothing of it fails but for a lack of memory."""
        number, changes = self.applied + 1, []
        for name, trained in self.tables.items():
            rows = [each for push in pushes for each in push.tables.get(name, ())]
            if len(pushes) > 1 and rows:
                rows = [summed([ids for ids, _ in rows], [gradients for _, gradients in rows])]
            changes += [(name, trained, trained.local(ids.numpy()), gradients.float()) for ids, gradients in rows]
        with self._changing_rows():
            for name, trained, local, gradients in changes:
                if self._snapshot:
                    self._snapshot.put_aside(name, local)
                trained.step(local, gradients, pushes[0].learning_rate, number)
            self.applied = number
        del self._pending[number]

    @contextmanager
    def _changing_rows(self) -> Iterator[None]:
        """Nobody else sees rows. If this fails half-way, nobody sees them any more."""
        with self._lock:
            try:
                yield
            except BaseException:
                self.is_broken = True
                raise

    def _check_whole(self) -> None:
        """Raise Unavailable if rows are of no step."""
        if self.is_broken:
            raise Unavailable(
                f"share {self.name} of {self.branch.full_name} failed while its rows changed, and is opened again from "
                "its checkpoint and log: ask again"
            )

    # Rows

    def rows(self, table: str, ids: Ids) -> tuple[Tensor, int]:
        """Rows float32 [n, dim], and the step that they are of."""
        trained = self._table(table)
        local = trained.local(ids)
        with self._lock:
            self._check_whole()
            return trained.rows.index_select(0, local), self.applied

    def _table(self, name: str) -> TrainedTable:
        if name not in self.tables:
            raise InvalidRequest(
                f"share {self.name} has no part of table {name!r} of {self.branch.full_name}; it has parts of "
                f"{', '.join(self.tables) or 'none'}"
            )
        return self.tables[name]

    # Checkpoints

    @property
    def durable(self) -> int:
        """See `Log`."""
        return self._log.durable

    def want_checkpoint(self, step: int) -> None:
        """Have a checkpoint of a step written, now or when it is reached. Raises OutOfTurn for one that has passed."""
        self._check_whole()
        if self.has_checkpoint(step):
            return
        if step < self.applied:
            raise OutOfTurn(f"{self.branch.full_name} is at step {self.applied}, past step {step}: ask for a later one")
        self._wanted.add(step)
        self._checkpoint_if_due()

    def has_checkpoint(self, step: int) -> bool:
        """Whether it is on disk. Raises Overloaded if the disk did not take it."""
        if step in self._failures:
            raise self._failures.pop(step)
        return step in checkpoints.saved_steps(self.folder, self.name)

    def _checkpoint_if_due(self) -> None:
        due = self.applied in self._wanted or (self.applied and self.applied % self.branch.checkpoint_every == 0)
        if not due or self.has_checkpoint(self.applied):
            return
        self._wait_for_writer()
        step = self.applied
        self._wanted.discard(step)
        if step in checkpoints.saved_steps(self.folder, self.name):  # it was being written
            return
        try:
            self._begin_log_file(step)
        except Overloaded as error:
            self._fail_checkpoint(step, error)
            return
        self._on_change(Change("checkpoint", step))
        changed, over = self._what_changed()
        with self._lock:
            snapshot = self._snapshot = checkpoints.Snapshot(self.tables, changed, over)
        self._writer = threading.Thread(target=self._write, args=(step, snapshot), name="checkpoint", daemon=True)
        self._writer.start()

    def _what_changed(self) -> tuple[dict[str, Tensor] | None, int | None]:
        """The rows that are not in the last checkpoint, and its step. (None, None): it is time for a full one."""
        saved = checkpoints.saved_steps(self.folder, self.name)
        if not saved or saved[-1] < self._loaded:
            return None, None
        try:
            full, *over = checkpoints.chain(self.folder, self.name, saved[-1])
        except StoreError as error:
            log.warning("%s: %s, so the next checkpoint is a full one", self.branch.full_name, error)
            return None, None
        changed = {name: table.changed_since(saved[-1]) for name, table in self.tables.items()}
        rows = sum(each.rows for each in over) + sum(map(len, changed.values()))
        if len(over) >= checkpoints.MOST_OVER or 2 * rows > full.rows:
            return None, None
        return changed, saved[-1]

    def _begin_log_file(self, step: int) -> None:
        """With all that is not in the checkpoint, so that the two together are enough."""
        pending = [push for pushes in self._pending.values() for push in pushes.values()]
        records = [Record(PUSH, push.step, push.pieces) for push in pending]
        self._log.begin_file(step, [self._session_record(self.session, self.workers), *records])

    @staticmethod
    def _session_record(session: int, workers: int) -> Record:
        return Record(SESSION, session, [workers.to_bytes(8, "little")])

    def _write(self, step: int, snapshot: checkpoints.Snapshot) -> None:
        try:
            alone = leading(self.folder, self.branch, self.name, self.shard)
            checkpoints.write_checkpoint(self.folder, self.name, step, self.tables, snapshot, self._lock, alone)
            kept = checkpoints.kept_steps(self.folder, self.branch, self.name, self._held)
            checkpoints.forget_checkpoints(self.folder, self.name, checkpoints.old_steps(self.folder, self.name, kept))
            self._log.forget_before(kept[0])
        except (OSError, EmbeddingServiceError) as error:
            self._fail_checkpoint(step, error)
        finally:
            self._snapshot = None
            self._on_applied()

    def _fail_checkpoint(self, step: int, error: OSError | EmbeddingServiceError) -> None:
        said = error.strerror if isinstance(error, OSError) else error
        self._failures[step] = Overloaded(
            f"the checkpoint of {self.branch.full_name} at step {step} cannot be written ({said}): free space at "
            f"{self.folder} and ask again. What was accepted is in the log"
        )
        log.error("%s", self._failures[step])

    def _wait_for_writer(self) -> None:
        if self._writer:
            self._writer.join()
            self._writer = None

    # Copies

    @property
    def log_identity(self) -> str:
        """See `Log`."""
        return self._log.identity

    @property
    def has_failed(self) -> bool:
        """Whether its log's disk has failed, so that nothing is accepted here any more."""
        return self._log.has_failed

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer is not None and self._writer.is_alive()

    def source(self) -> tuple[int, Iterator[Change]]:
        """What a copy begins from: the step of a checkpoint or 0, and the changes since. They are read when asked for.

        The checkpoint is the oldest one, so that the copy can go back as far. It stays until `let_go`. Changes after
        those come by `on_change`.
        """
        first = self._oldest_step()
        self._held.append(first)
        kinds: dict[int, Literal["session", "push"]] = {SESSION: "session", PUSH: "push"}
        records = (each for each in self._log.snapshot() if each.kind == SESSION or each.step > first)
        return first, (Change(kinds[each.kind], each.step, each.pieces) for each in records)

    def let_go(self, step: int) -> None:
        """A copy has loaded the checkpoint that `source` named."""
        self._held.remove(step)

    def restart(self, step: int) -> None:
        """A copy that begins again, from a checkpoint or with step 0 from what the branch began from."""
        with self._changing_rows():
            self._load(step)
        self.is_broken = False
        self.session, self.workers = 0, 1
        self._enter(0, 1)
        self._log.clear(step)
        self._log.applied(step)

    def do(self, change: Change) -> None:
        """A copy does what the primary did. Raises what shows that it cannot have the same rows."""
        if change.kind == "push":
            push = self.read(change.pieces)
            if push.step > self.applied:
                self.admit(push)
                # A primary may admit a push before it has done the step before, and write a checkpoint in between.
                self.advance(push.step - 1)
        elif change.kind == "session":
            self.begin(change.step, int.from_bytes(change.pieces[0], "little"))
        elif change.kind == "rewind":
            self.rewind(change.step)
        else:
            self.advance(change.step)
            if change.step != self.applied:
                raise StoreError(f"the primary is at step {change.step}, its copy at step {self.applied}")
            self._begin_log_file(change.step)
            self._log.forget_before(checkpoints.kept_steps(self.folder, self.branch, self.name)[0])

    def lead(self, timeline: int) -> None:
        """A copy becomes the primary."""
        self._copy, self.timeline = False, timeline
        self.advance()
        self._forget_checkpoints_after(self.applied)

    def close(self) -> None:
        """Let go of the log, once what is written is."""
        self._wait_for_writer()
        self._log.close()
