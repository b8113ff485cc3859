"""Clients and forks of their process, as PyTorch's DataLoader makes them on Linux.

gRPC's threads do not live on in a child, and locks that they held stay held there. So before a fork every client lets
its calls end and drops its connections. Afterwards parent and child connect again when they are used. Other libraries
may use gRPC as they like, so a child finds out whether its gRPC works before it relies on it.

Neither do torch's threads live on. OpenMP remembers those that the forking thread used. In the child that thread waits
for them for ever, or writes to memory that was theirs (SIGSEGV). Other threads of the child begin with new ones, so
lookups of that thread are done on one of the client's own.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from contextlib import suppress
from typing import Protocol

import grpc
import torch

from embedding_service.client.channels import open_channel
from embedding_service.errors import Unavailable

# Seconds that a fork waits for calls under way. Then they are cancelled, and asked again after the fork.
PATIENCE = 0.5
# Seconds after which gRPC is taken not to work in a child. It answers in a few milliseconds.
SIGN_OF_LIFE = 3.0


class Forkable(Protocol):
    """An object that is told of forks."""

    def before_fork(self, deadline: float) -> None:
        """Leave gRPC, by `deadline` on time.monotonic's clock, and begin no calls."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Begin with new connections and locks: threads that used the old ones are not here."""


class _Hooks:
    """This process's knowledge of forks. `broken` is the error of a child whose gRPC does not work."""

    def __init__(self) -> None:
        self.watched: weakref.WeakSet[Forkable] = weakref.WeakSet()
        self.registered = False
        self.idle: grpc.Channel | None = None
        self.unproved = False
        self.broken: Unavailable | None = None
        self.lock = threading.Lock()


_process = _Hooks()
# Of a child: its thread that is a copy of the forking one.
_forked_thread: int | None = None


def _remember_thread() -> None:
    global _forked_thread
    _forked_thread = threading.get_ident()


os.register_at_fork(after_in_child=_remember_thread)


def in_child() -> bool:
    """Whether this process is a fork of another one."""
    return _forked_thread is not None


def must_leave_thread() -> bool:
    """Whether torch may wait for threads of the parent on this one. A DataLoader's workers have it use none."""
    if _forked_thread != threading.get_ident() or torch.get_num_threads() == 1:
        return False
    with suppress(Unavailable):
        check_grpc()  # before there are more threads, for gRPC's own may have left something on their stacks
    return True


def watch(client: Forkable) -> None:
    """Tell it of forks for as long as it lives."""
    _process.watched.add(client)
    if not _process.registered:
        _process.registered = True
        # Opened first. With GRPC_ENABLE_FORK_SUPPORT=1 gRPC registers hooks too, and later hooks run earlier. The
        # channel never connects. While there is a channel, gRPC stays up and stops its threads for a fork. Without one
        # it goes down on a thread of its own, and a child that is forked just then would wait for that thread for ever.
        _process.idle = open_channel("127.0.0.1:1", None)
        os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)


def check_grpc() -> None:
    """Once in a child of a fork: raise Unavailable, naming the remedy, if gRPC cannot be used."""
    if not _process.unproved:
        return
    with _process.lock:
        if _process.broken is None and _process.unproved:
            if _shows_life():
                _process.unproved = False
            else:
                _process.broken = Unavailable(
                    "gRPC does not work in this process, a fork of one in which something else was using gRPC: start "
                    "processes with 'forkserver' or 'spawn' instead (multiprocessing.get_context, or a DataLoader's "
                    "multiprocessing_context), or before anything uses gRPC"
                )
    if _process.broken is not None:
        raise Unavailable(str(_process.broken))


def _before() -> None:
    deadline = time.monotonic() + PATIENCE
    for client in list(_process.watched):
        client.before_fork(deadline)


def _after_in_parent() -> None:
    for client in list(_process.watched):
        client.after_fork_in_parent()


def _after_in_child() -> None:
    _process.lock = threading.Lock()
    _process.unproved = True
    for client in list(_process.watched):
        client.after_fork_in_child()


def _shows_life() -> bool:
    """Whether gRPC connects to a port of ours and notices that it is hung up on. It may as well block for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SIGN_OF_LIFE)
        noticed = threading.Event()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=_call, args=(address, noticed), name="sign-of-life", daemon=True).start()
        try:
            listener.accept()[0].close()
        except TimeoutError:
            return False
    return noticed.wait(SIGN_OF_LIFE)


def _call(address: str, noticed: threading.Event) -> None:
    with open_channel(address, None) as channel:
        try:
            channel.unary_unary("/")(b"", timeout=SIGN_OF_LIFE)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                noticed.set()
