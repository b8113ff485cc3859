"""Peers that do not keep to the protocol, or do so in bad faith."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress

import grpc

from embedding_service.wire import control_pb2 as control
from embedding_service.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4


def dial(address: str) -> socket.socket:
    """A bare TCP connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def half_a_lookup(address: str, length: int, sent: bytes, *, end: bool) -> bytes:
    """The bytes of a connection with a Lookup whose message is said to have `length` bytes, of which `sent` come.

    `end`: the sender says that this was all.
    """
    return PREFACE + _frame(_SETTINGS, 0, 0, b"") + _call(address, 1, length, sent, end=end)


def unread_lookups(address: str, message: bytes, count: int) -> socket.socket:
    """A connection on which so many Lookup calls were begun, with this serialized request, and no answer is read."""
    connection = dial(address)
    connection.sendall(PREFACE + _frame(_SETTINGS, 0, 0, b""))
    for number in range(count):
        connection.sendall(_call(address, 2 * number + 1, len(message), message, end=True))
        time.sleep(0.002)  # flow control: the shard takes it in and gives its bytes free again, which we do not read
    return connection


def _call(address: str, stream: int, length: int, sent: bytes, *, end: bool) -> bytes:
    """Frames are RFC 9113's, header fields RFC 7541's literals without indexing or Huffman code."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/embedding.v1.EmbeddingService/Lookup",
        ":authority": address,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    data = b"\x00" + struct.pack(">I", length) + sent
    return _frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_DATA, _END_STREAM if end else 0, stream, data)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class Forwarder:
    """An address behind which the process may change, as behind a name. Until it is pointed somewhere it hangs up."""

    def __init__(self) -> None:
        self._target = "127.0.0.1:1"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def point(self, target: str) -> None:
        """Forward TCP connections there from now on; those that are open are cut."""
        self._target = target
        cut, self._open = self._open, []
        for each in cut:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forward nothing any more."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self.point("127.0.0.1:1")

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                incoming, _ = self._listener.accept()
                try:
                    outgoing = dial(self._target)
                except OSError:
                    incoming.close()
                    continue
                outgoing.settimeout(None)
                self._open += [incoming, outgoing]
                for source, sink in ((incoming, outgoing), (outgoing, incoming)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


class BygoneController(ControlServiceServicer):
    """A controller of an old term that tells every shard to hold nothing. `told`: the shards it said so to."""

    def __init__(self, term: int) -> None:
        self.told: list[str] = []
        self._term = term

    def Register(
        self, reports: Iterator[control.ShardReport], context: grpc.ServicerContext
    ) -> Iterator[control.Assignment]:
        for report in reports:
            yield control.Assignment(term=self._term, has_parts=True)
            self.told.append(report.shard_id)


@contextmanager
def bygone_controller(term: int) -> Iterator[tuple[str, BygoneController]]:
    """One that runs in this process, and its address."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    controller = BygoneController(term)
    add_ControlServiceServicer_to_server(controller, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", controller
    finally:
        server.stop(grace=None).wait()
