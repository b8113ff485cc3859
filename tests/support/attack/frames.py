"""Connections and frames in numbers that no client needs."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress

from embedding_service.wire import embedding_pb2 as wire
from support.attack.window import Window, drained
from support.hostile import LOOKUP, dial, further_references, pings

# Above a member's limit of open files, which `__main__` sets.
CONNECTIONS = 1200


def calls_given_up(window: Window) -> None:
    """Lookups that are begun and reset at once, and pings and settings without end."""
    message = wire.LookupRequest(model="m", table="ngram", ids=range(64)).SerializeToString()
    while window.open:
        for address in window.members:
            with window.tried("connected"):
                raw = window.raw(address)
                for _ in range(window.values.randrange(100, 500)):
                    with window.tried("given up"):
                        raw.reset(raw.call(LOOKUP, message))
                drained(raw.socket)
                raw.close()


def header_floods(window: Window) -> None:
    """Up to 4 MB of header fields on a call: without end, very long, very many, of a byte each; and pings."""
    values = window.values
    while window.open:
        for address in window.members:
            kept = []
            for _ in range(4):
                with window.tried("sent"):
                    kept.append(raw := window.raw(address))
                    count, length = values.choice(((1, 4 << 20), (200_000, 1), (1000, 4000), (20, 100), (1, 16 << 10)))
                    fields = [(b"x-%d" % number, b"v" * length) for number in range(count)]
                    ends = values.random() < 0.5
                    raw.flood(LOOKUP, fields, end_headers=ends)
                    more = pings(50_000) if ends else further_references(500_000)
                    raw.socket.sendall(more if values.random() < 0.3 else b"")
            window.rest(0.1)
            for raw in kept:
                raw.close()


def all_files(window: Window) -> None:
    """Connections to one member after the other, more than it may have files; then they go."""
    for address in window.values.sample(window.members, len(window.members)):
        kept = defaultdict(list)
        for _ in range(CONNECTIONS):
            if not window.open:
                break
            with window.tried("connected"):
                kept[address].append(dial(address))
        window.rest(1.5)
        for connection in kept[address]:
            with suppress(OSError):
                connection.close()
