"""What an attack is given."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_metadata_size", 1 << 20),
]


@dataclass
class Window:
    """The time of one class of attack.

    Attributes:
        shards: Their addresses.
        controller: Its address.
        store: The folder that the service reads.
        worker: host:port of a model worker, if there is one.
        pids: Of the members, by name.
        values: Draws all that an attack chooses.
        until: When it ends, by time.monotonic().
        ended: How many calls ended how.
    """

    shards: list[str]
    controller: str
    store: Path
    worker: str
    pids: dict[str, int]
    values: random.Random
    until: float
    ended: Counter[str] = field(default_factory=Counter)

    @property
    def members(self) -> list[str]:
        """All addresses."""
        return [*self.shards, self.controller]

    @property
    def open(self) -> bool:
        """There is time left."""
        return time.monotonic() < self.until

    def rest(self, seconds: float) -> None:
        """Wait, at most until the end."""
        time.sleep(max(0.0, min(seconds, self.until - time.monotonic())))

    def rest_of(self) -> None:
        """Wait for the end: what is open stays open."""
        self.rest(60)

    @contextmanager
    def tried(self, how: str) -> Iterator[None]:
        """Count what is done within as one call, `how` it ended where nothing is raised."""
        try:
            yield
        except grpc.RpcError as error:
            self.ended[error.code().name] += 1
        except TimeoutError:
            self.ended["not taken in time"] += 1
        except OSError:
            self.ended["hung up on"] += 1
        else:
            self.ended[how] += 1

    def wait(self, calls: list[grpc.Future]) -> None:
        """Count how calls end; those that the end of the window finds are given up."""
        for call in calls:
            try:
                call.result(max(0.01, self.until - time.monotonic()))
                self.ended["OK"] += 1
            except grpc.RpcError as error:
                self.ended[error.code().name] += 1
            except (grpc.FutureTimeoutError, grpc.FutureCancelledError):
                call.cancel()
                self.ended["given up"] += 1


def drained(connection: socket.socket) -> None:
    """Read what is there, so that the peer may send more."""
    connection.setblocking(False)
    with suppress(OSError):
        while connection.recv(1 << 16):
            pass
    connection.settimeout(10)
