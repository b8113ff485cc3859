"""Large answers that nobody reads."""

from __future__ import annotations

import threading

from embedding_service.wire import embedding_pb2 as wire
from support.attack.window import Window
from support.hostile import LOOKUP

CONNECTIONS, CALLS = 8, 250


def unread_answers(window: Window) -> None:
    """Eight connections at a time, each asking for up to a GiB; they go all at once, and others come."""
    ids = window.values.randrange(15 << 10, 60 << 10)
    message = wire.LookupRequest(model="m", table="ngram", ids=bytes(ids)).SerializeToString()
    while window.open:
        address = window.values.choice(window.shards)
        threads = [threading.Thread(target=_ask, args=(window, address, message)) for _ in range(CONNECTIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _ask(window: Window, address: str, message: bytes) -> None:
    connections = []
    with window.tried("connected"):
        connections.append(raw := window.raw(address))
        for _ in range(CALLS):
            if not window.open:
                break
            with window.tried("asked"):
                raw.call(LOOKUP, message)
            window.rest(0.004)  # flow control: the peer reads what was sent and frees its bytes
    window.rest(3)
    for raw in connections:
        raw.close()
