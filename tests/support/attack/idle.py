"""Calls that stay open and do nothing."""

from __future__ import annotations

from grpc_health.v1 import health_pb2

from support.attack.window import Window
from support.hostile import Raw

# A member takes 256 calls on a connection.
CALLS = 250


def idle_watches(window: Window) -> None:
    """Up to 10,000 watches of the health, as gRPC's own client-side health checking leaves them open."""
    message = health_pb2.HealthCheckRequest(service=window.values.choice(("", "alive", "unknown"))).SerializeToString()
    _open(window, window.shards, b"/grpc.health.v1.Health/Watch", message, window.values.randint(17, 40))


def idle_streams(window: Window) -> None:
    """Streams of lookups that ask for nothing, and registrations that report nothing."""
    _open(window, window.shards, b"/embedding.v1.EmbeddingService/StreamLookup", None, window.values.randint(9, 17))
    _open(window, [window.controller], b"/embedding.v1.ControlService/Register", None, 4)
    _open(window, window.shards, b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", None, 4)
    window.rest_of()


def unknown_streams(window: Window) -> None:
    """Streams of methods that there are not."""
    for number in range(window.values.randint(9, 17)):
        path = f"/embedding.v1.EmbeddingService/Unknown{number}".encode()
        _open(window, window.members, path, b"" if number % 2 else None, 1)
    window.rest_of()


def _open(window: Window, addresses: list[str], path: bytes, message: bytes | None, connections: int) -> None:
    for number in range(connections):
        if not window.open:
            return
        address = addresses[number % len(addresses)]
        with window.tried("connected"):
            raw = window.raw(address)
            _KEPT.append(raw)
            for _ in range(CALLS):
                with window.tried("open"):
                    raw.call(path, message, end=False)
    window.rest(1)


_KEPT: list[Raw] = []
