"""How calls are answered, by any server: methods, and what their handlers may ask and say."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from embedding_service.security.identity import Caller

# Seconds.
FAR_FUTURE = 1e9

# Answers a serialized request of a caller with at most this many bytes, or None. It runs on the polling thread and must
# not wait. Without a policy there is no caller.
AtOnce = Callable[[bytes, int, Caller | None], bytes | None]

# Where there is a policy: the rights of which a call needs one. A method that is not here is nobody's.
ANYBODY, KNOWN = ("anybody",), ("known",)
RIGHTS: dict[str, tuple[str, ...]] = {
    # Says whether a process serves. Probes and load balancers have no token.
    "grpc.health.v1.Health/Check": ANYBODY,
    "grpc.health.v1.Health/Watch": ANYBODY,
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": KNOWN,
    # Which models: checked where the table is looked up.
    "embedding.v1.EmbeddingService/Lookup": ("read",),
    "embedding.v1.EmbeddingService/StreamLookup": ("read",),
    "embedding.v1.EmbeddingService/LookupNgrams": ("read",),
    "embedding.v1.EmbeddingService/Answer": ("read",),
    "embedding.v1.EmbeddingService/ListModels": ("read",),
    "embedding.v1.EmbeddingService/GetRouting": ("read",),
    # Of which branches: checked where the branch is looked up.
    "embedding.v1.TrainingService/Open": ("train",),
    "embedding.v1.TrainingService/Begin": ("train",),
    "embedding.v1.TrainingService/Push": ("train",),
    "embedding.v1.TrainingService/Read": ("train",),
    "embedding.v1.TrainingService/Checkpoint": ("train", "publish"),
    "embedding.v1.TrainingService/Publish": ("publish",),
    "embedding.v1.TrainingService/Follow": ("member",),
    "embedding.v1.ControlService/Register": ("member",),
    "embedding.v1.ControlService/GetStatus": ("admin", "member"),
}
# What only the port of members answers, where there is one.
MEMBERS = frozenset({"embedding.v1.ControlService/Register"})


class Places:
    """Streams that may be open at a time, in all and from one host. Thread-safe."""

    def __init__(self, most: int, of_a_host: int) -> None:
        self._most, self._of_a_host = most, of_a_host
        self._taken: Counter[str] = Counter()
        self._all = 0
        self._lock = threading.Lock()

    def take(self, host: str) -> str:
        """Take a place for a host. Returns why there is none, or an empty text."""
        with self._lock:
            if self._all >= self._most:
                return f"{self._most:,} such streams are open at this server: try again later or use another one"
            if self._taken[host] >= self._of_a_host:
                return f"{self._of_a_host:,} such streams of {host} are open at this server: end some first"
            self._taken[host] += 1
            self._all += 1
            return ""

    def leave(self, host: str) -> None:
        """Give a place back."""
        with self._lock:
            self._all -= 1
            self._taken[host] -= 1
            if not self._taken[host]:
                del self._taken[host]


@dataclass(frozen=True)
class Method:
    """How the calls of a method are answered.

    Attributes:
        handler: As generated code registers it with grpc.aio: a coroutine function or an async generator of (request
            or requests, context), and what reads and writes messages.
        at_once: Asked before `handler`, on the polling thread.
        each: Both sides stream, and every message is a call of its own. `handler` answers one message.
        watch: In place of `handler`: takes a message, and answers whenever there is something to say.
        places: Streams of it that may be open.
        private: Offered at private addresses only.
        rights: See `RIGHTS`. None: nobody's.
        members: Offered at the members' port only, where there is one.
    """

    handler: Any = None
    at_once: AtOnce | None = None
    each: bool = False
    watch: Watched | None = None
    places: Places | None = None
    private: bool = False
    rights: tuple[str, ...] | None = None
    members: bool = False


class Watched:
    """Answers calls that wait, without a thread or a task for each. Both methods run on the polling thread."""

    def begin(self, message: bytes, tell: Tell) -> Callable[[], None]:
        """Take a call's request. Calls `tell` with the answers, from any thread. Returns what ends that.

        Raises InvalidRequest.
        """
        raise NotImplementedError


# Sends an answer to a watch. It replaces the one before if that was not taken yet.
Tell = Callable[[bytes], None]


class Aborted(Exception):
    """A handler ended its call with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class Context:
    """What a handler may ask and say about its call: the part of grpc.aio.ServicerContext that this service uses.

    Attributes:
        caller: Whose the call is. None without a policy.
        traceparent: The client's span, as a unary call's metadata says it.
    """

    def __init__(self, peer: str, due: float, caller: Caller | None = None, traceparent: str = "") -> None:
        self.caller = caller
        self.traceparent = traceparent
        self._peer = peer
        self._due = due
        self._done: list[Callable[[Any], object]] = []
        self.trailing: Sequence[tuple[str, str]] = ()

    def peer(self) -> str:
        """Whose connection it is."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Seconds until the client's deadline. None without one: grpc then says one in the far future."""
        seconds = self._due - time.time()
        return None if seconds > FAR_FUTURE else max(seconds, 0.001)

    def set_trailing_metadata(self, trailing: Sequence[tuple[str, str]]) -> None:
        """What is sent with the call's end."""
        self.trailing = trailing

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Sequence[tuple[str, str]] = ()
    ) -> NoReturn:
        """End the call. Raises what its handler must let pass."""
        self.trailing = trailing_metadata or self.trailing
        raise Aborted(code, details)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call it on the event loop when the answer was taken, or nobody waits for it any more."""
        self._done.append(callback)

    def finish(self) -> None:
        """The answer was taken."""
        done, self._done = self._done, []
        for callback in done:
            callback(self)
