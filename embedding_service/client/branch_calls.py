"""What a trainer's `Session` asks the shards of a branch: tries, shards that come back, pushes that are sent again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import numpy as np
import numpy.typing as npt

from embedding_service.client.gradients import ROWS
from embedding_service.errors import (
    DeadlineExceeded,
    LostUpdates,
    OutOfTurn,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from embedding_service.grpc_codes import error_of
from embedding_service.wire import large
from embedding_service.wire import training_pb2 as wire
from embedding_service.wire.lookup_codec import Bytes

if TYPE_CHECKING:
    from embedding_service.client.transport import GrpcTransport

_SERVICE = "/embedding.v1.TrainingService"
_METHODS: dict[type[Any], tuple[str, Any]] = {
    wire.OpenRequest: ("Open", wire.OpenResponse.FromString),
    wire.BeginRequest: ("Begin", wire.BeginResponse.FromString),
    wire.ReadRequest: ("Read", lambda message: ReadRows.read(message)),
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
_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
# Reads are within the limits of the service, so it has no memory for one at the moment.
_READ_AGAIN = (*_AGAIN, grpc.StatusCode.RESOURCE_EXHAUSTED)


class ReadRows(NamedTuple):
    """What a `ReadResponse` says. `rows`: uint8 [bytes]."""

    rows: Bytes
    step: int

    @staticmethod
    def read(message: bytes) -> ReadRows:
        """Of a serialized message. Raises DecodeError."""
        answer, [rows] = large.read(wire.ReadResponse, message, ROWS)
        return ReadRows(rows, answer.step)


class BranchTable(NamedTuple):
    """A table of the branch. `shares`: int64 [parts], which one each is in."""

    name: str
    rows: int
    dim: int
    rows_per_part: int
    shares: npt.NDArray[np.int64]


@dataclass
class ShareOfBranch:
    """Parts of the branch that lie with one shard. `kept`: pushes that are not on its disk yet, as (step, pieces)."""

    name: str
    shard: str
    address: str
    kept: deque[tuple[int, list[bytes]]] = field(default_factory=deque)
    kept_bytes: int = 0
    durable: int = 0

    def keep(self, step: int, pieces: list[bytes]) -> None:
        """Keep a push until it is on the shard's disk, or others take its room."""
        self.kept.append((step, pieces))
        self.kept_bytes += sum(map(len, pieces))
        while len(self.kept) > 1 and (self.kept[0][0] <= self.durable or self.kept_bytes > _KEPT_BYTES):
            _, dropped = self.kept.popleft()
            self.kept_bytes -= sum(map(len, dropped))


class Begun(NamedTuple):
    """A call under way. `request`: None for a push, whose pieces the share keeps. `address`: Whom it asks."""

    share: ShareOfBranch
    request: Any
    call: Any
    address: str


class BranchCalls:
    """Asks the shards of a branch.

    Args:
        transport: Has the channels.
        seeds: Addresses to ask while no shard of the branch is known.
        name: `model@branch`.
        workers, worker: How many trainers push, and which one this is.
        timeout: Seconds for a call with all its tries.

    Attributes:
        shares, tables: Of the branch, once `describe` was called.
        session: Its number, that fences all before it. 0: none.
        pushed: The last step that was pushed.
    """

    def __init__(
        self,
        transport: GrpcTransport,
        seeds: Callable[[], Sequence[str]],
        name: str,
        *,
        workers: int,
        worker: int,
        timeout: float,
    ) -> None:
        self._transport, self._seeds, self._timeout = transport, seeds, timeout
        self._name, self._workers, self._worker = name, workers, worker
        self.shares: list[ShareOfBranch] = []
        self.tables: dict[str, BranchTable] = {}
        self.session = self.pushed = 0

    def describe(self, request: wire.OpenRequest) -> wire.OpenResponse:
        """Open the branch, and learn its tables and who has which share."""
        about = self._open(request)
        self.tables = {
            table.name: BranchTable(
                table.name, table.rows, table.dim, table.rows_per_part, np.array(table.shares, np.int64)
            )
            for table in about.tables
        }
        self.shares = [ShareOfBranch(each.name, each.shard, each.address) for each in about.shares]
        return about

    def beginning(self, share: ShareOfBranch, rewind_to: int | None = None) -> wire.BeginRequest:
        """What begins this session at a share."""
        return wire.BeginRequest(
            branch=self._name,
            session=self.session,
            workers=self._workers,
            at_step=rewind_to or 0,
            rewind=rewind_to is not None,
            share=share.name,
        )

    # Questions

    def ask(self, share: ShareOfBranch, request: Any) -> Any:
        """Its answer."""
        return self.ask_all([(share, request)])[0]

    def ask_all(self, asked: Sequence[tuple[ShareOfBranch, Any]]) -> list[Any]:
        """Ask all at the same time. One that does not answer is waited for, and told what it may have lost."""
        return self.end(self.begin(asked))

    def begin(self, asked: Sequence[tuple[ShareOfBranch, Any]]) -> list[Begun]:
        """Ask all. `end` gives what they answer."""
        return [
            Begun(share, request, self._call(share.address, request, self._timeout), share.address)
            for share, request in asked
        ]

    def end(self, begun: Sequence[Begun]) -> list[Any]:
        """The answers, None of a push that was sent again. Raises what the shards do, Unavailable and LostUpdates."""
        answers, quiet_at = [], time.monotonic() + _QUIET
        for share, request, call, address in begun:
            try:
                answers.append(self._result(share, call, address, max(quiet_at - time.monotonic(), _FIRST_PAUSE)))
            except grpc.RpcError as error:
                answers.append(self._recover(share, error, request))
        return answers

    # Pushes

    def begin_push(self, share: ShareOfBranch, step: int, made: Iterable[bytes]) -> Begun:
        """Begin a push, make its pieces while those before travel, and keep them."""
        pieces, ready = list[bytes](), SimpleQueue[bytes | None]()
        begun = Begun(share, None, self._push(share, iter(ready.get, None)), share.address)
        try:
            for piece in made:
                pieces.append(piece)
                ready.put(piece)
        finally:
            ready.put(None)
        share.keep(step, pieces)
        return begun

    def end_pushes(self, begun: Sequence[Begun]) -> None:
        """Wait until all shards have what was pushed."""
        for (share, *_), answer in zip(begun, self.end(begun), strict=True):
            if answer is not None:
                share.durable = answer.durable_step

    # Shards that do not answer

    def _result(self, share: ShareOfBranch, call: Any, address: str, patience: float = _QUIET) -> Any:
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

    def _recover(self, share: ShareOfBranch, error: grpc.RpcError, request: Any = None) -> Any:
        """Find a share that did not answer, send it what it does not have, and ask it again. Returns its answer."""
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        has_all = not self.session  # a session's shard may have lost what it was sent
        mended = _READ_AGAIN if isinstance(request, wire.ReadRequest) else _AGAIN
        while True:
            full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # it answers, and lost nothing
            if error.code() not in mended and (has_all or error.code() is not grpc.StatusCode.ABORTED):
                raise _error(error) from None
            if time.monotonic() + pause > deadline:
                if full:
                    raise _error(error) from None
                raise Unavailable(
                    f"shard {share.shard} of {self._name} did not come back within {self._timeout:g} s "
                    f"({error.details()}): start it again, with the disk that has its log, and begin a new session"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                if not full:
                    self._find(share)
                    if not has_all and not isinstance(request, wire.BeginRequest):
                        self._send_again(share)
                    has_all = True
                if request is None:
                    return None
                return self._result(share, self._call(share.address, request, self._timeout), share.address)
            except grpc.RpcError as again:
                has_all = has_all and again.code() not in _AGAIN
                error = again

    def _find(self, share: ShareOfBranch) -> None:
        """Learn where a share is by now, from others first: its shard may hang."""
        try:
            about = self._open(wire.OpenRequest(branch=self._name), last=share.address)
        except (Unavailable, DeadlineExceeded):
            return
        for each in about.shares:
            if each.name == share.name:
                share.shard, share.address = each.shard, each.address or share.address

    def _send_again(self, share: ShareOfBranch) -> None:
        """Push what the shard does not have by now. Raises LostUpdates if that is not here any more."""
        begun = self._result(share, self._call(share.address, self.beginning(share), _ATTEMPT), share.address)
        accepted = begun.accepted_steps[self._worker]
        missing = [(step, pieces) for step, pieces in share.kept if step > accepted]
        if accepted < self.pushed and (not missing or missing[0][0] > accepted + 1):
            raise self.lost(share, accepted + 1, missing[0][0] - 1 if missing else self.pushed)
        for _, pieces in missing:
            share.durable = self._result(share, self._push(share, pieces), share.address).durable_step

    def lost(self, share: ShareOfBranch, first: int, last: int) -> LostUpdates:
        """What says that a share's shard does not have steps any more that it had accepted."""
        index = self.shares.index(share)
        parts = [
            f"{table.name}/{part}" for table in self.tables.values() for part in np.flatnonzero(table.shares == index)
        ]
        return LostUpdates(
            f"shard {share.shard} of {self._name} lost steps {first} to {last}, which it had accepted: begin a session "
            f"at step {first - 1} with the model's own checkpoint of that step, or without at_step",
            parts,
            (first, last),
        )

    # Calls

    def _open(self, request: wire.OpenRequest, last: str = "") -> wire.OpenResponse:
        """Ask the shards that are known, one after the other, until one answers. `last`: the one to be asked last."""
        attempt = _QUIET if last else _ATTEMPT
        deadline, pause = time.monotonic() + self._timeout, _FIRST_PAUSE
        while True:
            addresses = dict.fromkeys([*(share.address for share in self.shares if share.address), *self._seeds()])
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

    def _push(self, share: ShareOfBranch, pieces: Iterable[bytes | None]) -> Any:
        try:
            method = self._transport.channel(share.address).stream_unary(
                f"{_SERVICE}/Push", None, wire.PushResponse.FromString
            )
            return method.future(iter(pieces), timeout=self._timeout)
        except ValueError:  # the connection was dropped since we looked
            return self._push(share, pieces)

    def _call(self, address: str, request: Any, timeout: float) -> Any:
        name, read = _METHODS[type(request)]
        try:
            method = self._transport.channel(address).unary_unary(
                f"{_SERVICE}/{name}", type(request).SerializeToString, read
            )
            return method.future(request, timeout=timeout)
        except ValueError:  # the connection was dropped since we looked
            return self._call(address, request, timeout)


def _error(error: grpc.RpcError) -> Exception:
    """What this package raises for a failed call."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.ABORTED:
        return OutOfTurn(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{details}: this service trains no tables, it is older than its client")
    return error_of(code, details)
