"""Redis: a key for each row, MGET of many, replies parsed by hiredis."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.data import DIM, ROW_BYTES, Data, Ids, Rows
from benchmarks.peers.base import Lookup, Peer, Server, Unusable, command, listening
from embedding_service.machine import free_port

CHUNK_ROWS = 8192
# SET key value, as it goes over the wire. All have one size, so that numpy writes many at once.
_SET = np.dtype([("set", "S17"), ("key", "<i8"), ("size", "S8"), ("value", f"V{ROW_BYTES}"), ("end", "S2")])


class Redis(Peer):
    """redis-server without persistence, and redis-py with hiredis."""

    name = "Redis MGET"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """One redis-server, filled."""
        try:
            import hiredis  # noqa: F401
            import redis  # noqa: F401
        except ImportError as error:
            raise Unusable(f"{error}: pip install -r requirements/bench.txt") from None
        if not shutil.which("redis-server"):
            raise Unusable("no redis-server: apt-get install redis-server")
        port = free_port()
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
        with command(["redis-server", *options], folder / "redis.log", lambda: listening(port)) as running:
            _fill(port, data)
            yield Server(port, [running.pid])

    @contextmanager
    def connect(self, data: Data, target: int) -> Iterator[Lookup]:
        """A connection of its own."""
        import redis

        with redis.Redis(port=target) as connection:

            def lookup(ids: Ids) -> Rows:
                keys = ids.tobytes()
                rows = connection.mget([keys[begin : begin + 8] for begin in range(0, len(keys), 8)])
                return np.frombuffer(b"".join(rows), np.float16).reshape(-1, DIM)

            yield lookup


def _fill(port: int, data: Data) -> None:
    table = data.table()
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as replies:
        for begin in range(0, data.rows, CHUNK_ROWS):
            rows = table[begin : begin + CHUNK_ROWS]
            commands = np.empty(len(rows), _SET)
            commands["set"], commands["size"], commands["end"] = (
                b"*3\r\n$3\r\nSET\r\n$8\r\n",
                b"\r\n$%d\r\n" % ROW_BYTES,
                b"\r\n",
            )
            commands["key"] = np.arange(begin, begin + len(rows))
            commands["value"] = rows.view(f"V{ROW_BYTES}")[:, 0]
            connection.sendall(commands.tobytes())
            if replies.read(5 * len(rows)) != b"+OK\r\n" * len(rows):
                raise Unusable("redis-server refused rows")
