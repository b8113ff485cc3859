"""Bytes that are no message of their method, and bytes that are no HTTP/2."""

from __future__ import annotations

from contextlib import suppress

from google.protobuf.descriptor import MethodDescriptor

from embedding_service.wire import control_pb2, embedding_pb2
from support.attack.window import Window
from support.hostile import PREFACE, dial

_SERVICES = (
    embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"],
    control_pb2.DESCRIPTOR.services_by_name["ControlService"],
)
METHODS: list[MethodDescriptor] = [method for service in _SERVICES for method in service.methods]
OTHERS = ("/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")


def malformed_messages(window: Window) -> None:
    """On every method of every member: random bytes, and right messages with bytes changed, cut and doubled."""
    channels = [window.channel(address) for address in window.members]
    channels.append(window.channel(window.control, window.member))
    names = [f"/{method.containing_service.full_name}/{method.name}" for method in METHODS] + list(OTHERS)
    while window.open:
        for channel in channels:
            calls = []
            for name in names:
                for message in _messages(window):
                    if name.endswith(("StreamLookup", "Register", "Info")):
                        stream = channel.stream_stream(name)(iter([message]), timeout=5)
                        with window.tried("OK"):
                            next(stream, None)
                        stream.cancel()
                    else:
                        calls.append(channel.unary_unary(name).future(message, timeout=5))
            window.wait(calls)


def _messages(window: Window) -> list[bytes]:
    values = window.values
    right = embedding_pb2.LookupRequest(
        model="m", table="ngram", ids=[values.randrange(1 << 40) for _ in range(values.randrange(9))]
    ).SerializeToString()
    place = values.randrange(len(right))
    return [
        values.randbytes(values.choice((1, 2, 17, 300, 5000))),
        right[:place],
        right[:place] + values.randbytes(1) + right[place + 1 :],
        right[:place] + right,
        b"\xff" * values.randrange(1, 64),
        bytes([8 * values.randrange(1, 16) + values.randrange(8)]) * values.randrange(1, 2000),
    ]


def random_bytes(window: Window) -> None:
    """On the port of every member: noise, alone and behind HTTP/2's preface, some of it left open."""
    kept = []
    while window.open:
        for address in window.members:
            noise = window.values.randbytes(window.values.choice((1, 9, 100, 4096, 60000)))
            with window.tried("sent"):
                connection = dial(address, window.values.choice((None, window.tls)))
                kept.append(connection)
                connection.sendall(window.values.choice((noise, PREFACE + noise, b"GET / HTTP/1.1\r\n\r\n" + noise)))
            if len(kept) > 50:
                with suppress(OSError):
                    kept.pop(window.values.randrange(len(kept))).close()
            window.rest(0.005)
