"""What clients connect to: a port, and how its calls are answered.

A call that can be answered at once is answered where it came in. All others go to a coroutine on the process's event
loop, by one table of methods. A method that is not in the table is refused, whatever bytes its name has.

`polling` is the front that is used, on gRPC's core. `public` takes its place where `grpc_core` says so. `kinds` has the
kinds of calls, the same for both.
"""

from __future__ import annotations

from embedding_service import grpc_core
from embedding_service.front.base import CALLER, PEER, REQUEST_COPIES, UNREAD_BYTES, Front, Kind, Options
from embedding_service.front.polling import PollingFront
from embedding_service.front.public import PublicFront

__all__ = ["CALLER", "PEER", "REQUEST_COPIES", "UNREAD_BYTES", "Front", "Kind", "Options", "open_front"]


async def open_front(
    address: str, options: Options, *, shared: bool = False, private: bool = False, kind: Kind | None = None
) -> Front:
    """Listen at an address.

    Args:
        address: host:port, port 0 takes a free one; or unix:path.
        options: What all fronts of the process have in common.
        shared: Several processes listen on this same port, and the kernel spreads connections over them.
        private: Only processes of this service can reach the address. They pass calls on, and their word on the peer
            counts.
        kind: What the port is for.

    Raises:
        InvalidRequest: Names an address that cannot be had.
    """
    which = PublicFront if grpc_core.why_public() else PollingFront
    front = which(address, options, shared=shared, private=private, kind=kind)
    await front.start()
    return front
