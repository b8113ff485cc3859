"""The floor: the fastest simple thing one can write with grpcio. Bytes in, the same rows as bytes out, no messages."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import numpy as np

from benchmarks.data import DIM, Data, Ids, Rows
from benchmarks.peers.base import START_SECONDS, Lookup, Peer, Server, child, receive, wait_for_end

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
UNARY, STREAM = "/floor/Unary", "/floor/Stream"


class RawGrpc(Peer):
    """grpcio with identity serializers: a call for each lookup, or one bidirectional stream."""

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.name = f"raw gRPC {'stream' if stream else 'unary'}"

    @property
    def server_name(self) -> str:
        """One server has both methods."""
        return "raw gRPC"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """One process with grpcio's sync server."""
        with child(_serve, data) as (pid, pipe):
            yield Server(f"127.0.0.1:{receive(pipe, START_SECONDS)}", [pid])

    @contextmanager
    def connect(self, data: Data, target: str) -> Iterator[Lookup]:
        """A channel of its own."""
        with grpc.insecure_channel(target, OPTIONS) as channel:
            grpc.channel_ready_future(channel).result(30)
            if not self.stream:
                call = channel.unary_unary(UNARY)
                yield lambda ids: _rows(call(ids.tobytes()))
                return
            requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            answers = channel.stream_stream(STREAM)(iter(requests.get, None))

            def lookup(ids: Ids) -> Rows:
                requests.put(ids.tobytes())
                return _rows(next(answers))

            yield lookup
            requests.put(None)


def _rows(answer: bytes) -> Rows:
    return np.frombuffer(answer, np.float16).reshape(-1, DIM)


def _serve(pipe: Connection, data: Data) -> None:
    table = data.table()

    def gather(ids: bytes) -> bytes:
        return table.take(np.frombuffer(ids, np.int64), axis=0).tobytes()

    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(lambda ids, context: gather(ids)),
        "Stream": grpc.stream_stream_rpc_method_handler(lambda requests, context: map(gather, requests)),
    }
    server = grpc.server(ThreadPoolExecutor(16), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", methods),))
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    wait_for_end(pipe)
    server.stop(0).wait()
