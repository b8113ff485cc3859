"""Peers that do not keep to the protocol, or do so in bad faith."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress

import grpc

from embedding_service.wire import control_pb2 as control
from embedding_service.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LOOKUP = b"/embedding.v1.EmbeddingService/Lookup"
# Of a frame, where nobody asked for more.
_LARGEST = 1 << 14
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _CONTINUATION = 0, 1, 3, 4, 6, 9
_END_STREAM, _END_HEADERS = 1, 4
_CANCEL = 8
Fields = Sequence[tuple[bytes, bytes]]


def dial(address: str, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A bare connection, by TCP or to a socket of this machine (unix-abstract:NAME). `tls`: what TCP carries."""
    kind, _, name = address.partition(":")
    if kind == "unix-abstract":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)
        connection.connect("\0" + name)
        return connection
    host, _, port = address.rpartition(":")
    bare = socket.create_connection((host, int(port)), timeout=60)
    return tls.wrap_socket(bare, server_hostname="localhost") if tls else bare


class Raw:
    """A connection that speaks HTTP/2 as far as it likes, and reads nothing.

    Frames are RFC 9113's, header fields RFC 7541's literals without indexing or Huffman code.

    `shown`: header fields of every call.
    """

    def __init__(self, address: str, tls: ssl.SSLContext | None = None, shown: Fields = ()) -> None:
        self._shown = shown
        self.socket = dial(address, tls)
        self.socket.settimeout(2)
        self._next = 1
        self.socket.sendall(PREFACE + _frame(_SETTINGS, 0, 0, b""))

    def call(self, path: bytes, message: bytes | None = None, *, extra: Fields = (), end: bool = True) -> int:
        """Begin a call of a method, with one message or none. `end`: this was all. Returns its stream."""
        stream = self._next
        self._next += 2
        sent = _headers(stream, path, (*self._shown, *extra))
        if message is not None:
            sent += _data(stream, b"\x00" + struct.pack(">I", len(message)) + message, end=end)
        self.socket.sendall(sent)
        return stream

    def flood(self, path: bytes, fields: Fields, *, end_headers: bool) -> None:
        """Begin a call with further header fields, in as many frames as they take."""
        stream = self._next
        self._next += 2
        self.socket.sendall(_headers(stream, path, (*self._shown, *fields), end_headers=end_headers))

    def reset(self, stream: int) -> None:
        """Give a call up."""
        self.socket.sendall(_frame(_RESET, 0, stream, struct.pack(">I", _CANCEL)))

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def further_headers(fields: Fields) -> bytes:
    """The bytes of further header fields of a connection's first call, whose headers `Raw.flood` did not end."""
    return _frames(_CONTINUATION, 1, _block(fields), end_headers=False)


def further_references(count: int) -> bytes:
    """The same, of as many fields of a byte each: references to the protocol's table."""
    return _frames(_CONTINUATION, 1, b"\xa0" * count, end_headers=False)


def pings(count: int) -> bytes:
    """The bytes of pings that nobody asked for."""
    return _frame(_PING, 0, 0, bytes(8)) * count


def half_a_lookup(length: int, sent: bytes, *, end: bool) -> bytes:
    """The bytes of a connection with a Lookup whose message is said to have `length` bytes, of which `sent` come.

    `end`: the sender says that this was all.
    """
    data = b"\x00" + struct.pack(">I", length) + sent
    return PREFACE + _frame(_SETTINGS, 0, 0, b"") + _headers(1, LOOKUP) + _data(1, data, end=end)


def unread_lookups(address: str, message: bytes, count: int) -> socket.socket:
    """A connection with `count` Lookup calls of this serialized request. No answer is read."""
    raw = Raw(address)
    with suppress(BrokenPipeError, ConnectionResetError):  # a shard may hang up on who reads nothing for long
        for _ in range(count):
            raw.call(LOOKUP, message)
            time.sleep(0.002)  # flow control: the shard takes it in and gives its bytes free again, which is not read
    return raw.socket


def _headers(stream: int, path: bytes, extra: Fields = (), *, end_headers: bool = True) -> bytes:
    """HEADERS, and CONTINUATION frames if one does not suffice."""
    fields: Fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"attack"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *extra,
    )
    return _frames(_HEADERS, stream, _block(fields), end_headers=end_headers)


def _block(fields: Fields) -> bytes:
    return b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in fields)


def _frames(first: int, stream: int, block: bytes, *, end_headers: bool) -> bytes:
    """A block of header fields: one frame of the first kind, then CONTINUATION frames."""
    pieces = [block[start : start + _LARGEST] for start in range(0, len(block), _LARGEST)]
    last = len(pieces) - 1 if end_headers else -1
    return b"".join(
        _frame(_CONTINUATION if number else first, _END_HEADERS if number == last else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )


def _literal(text: bytes) -> bytes:
    """A string, with its length as an integer of a prefix of 7 bits."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    length, out = len(text) - 127, bytearray([127])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(out) + bytes([length]) + text


def _data(stream: int, data: bytes, *, end: bool) -> bytes:
    pieces = [data[start : start + _LARGEST] for start in range(0, len(data), _LARGEST)] or [b""]
    last = len(pieces) - 1
    return b"".join(
        _frame(_DATA, _END_STREAM if end and number == last else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )


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
        """Forward TCP connections there from now on. Open ones are cut."""
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
    """A controller of an old term. It tells every shard to hold nothing. `told`: the shards that it told."""

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
