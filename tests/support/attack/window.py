"""What an attack is given."""

from __future__ import annotations

import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import grpc

from embedding_service.security.access import Access
from support.hostile import Raw

# What an attacker of a secured service has: a client's token, and the certificate of a member that is none of its
# shards.
ATTACKER = "attacker"
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
        control: Where members register.
        secure: The folder of a secured service's files, ATTACKER's among them. Empty for plain text.
        store: The folder that the service reads.
        worker: host:port of a model worker, if there is one.
        worker_ca: The authority's file of one that speaks HTTPS and asks for keys. Empty for plain text.
        pids: Of the members, by name.
        values: Draws all that an attack chooses.
        until: When it ends, by time.monotonic().
        ended: How many calls ended how.
    """

    shards: list[str]
    controller: str
    control: str
    secure: str
    store: Path
    worker: str
    worker_ca: str
    pids: dict[str, int]
    values: random.Random
    until: float
    ended: Counter[str] = field(default_factory=Counter)

    @cached_property
    def client(self) -> Access | None:
        """What calls at clients' ports show."""
        return Access(Path(self.secure, "ca.crt"), token=ATTACKER) if self.secure else None

    @cached_property
    def member(self) -> Access | None:
        """What reports show."""
        own = Path(self.secure, ATTACKER)
        return Access(own / "ca.crt", own / "tls.crt", own / "tls.key") if self.secure else None

    def channel(
        self, address: str, access: Access | None = None, compression: grpc.Compression | None = None
    ) -> grpc.Channel:
        """A connection of its own. `access`: what it shows, that of a client by default."""
        shown = access or self.client
        if shown is None:
            return grpc.insecure_channel(address, OPTIONS, compression)
        return grpc.secure_channel(address, shown.credentials(), OPTIONS, compression)

    def raw(self, address: str) -> Raw:
        """A connection that speaks HTTP/2 as far as it likes, as a client's."""
        shown = [(b"authorization", f"Bearer {ATTACKER}".encode())] if self.secure else []
        return Raw(address, self.tls, shown)

    @cached_property
    def tls(self) -> ssl.SSLContext | None:
        """Of bare connections."""
        if not self.secure:
            return None
        context = ssl.create_default_context(cafile=Path(self.secure, "ca.crt"))
        context.set_alpn_protocols(["h2"])
        return context

    @cached_property
    def worker_tls(self) -> ssl.SSLContext | None:
        """Of connections to the worker."""
        return ssl.create_default_context(cafile=self.worker_ca) if self.worker_ca else None

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
