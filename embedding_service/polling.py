"""Who waits for gRPC's sockets.

By default gRPC has threads of its own for that, which hand what they read to whoever polls a completion queue. Here the
polling thread is ready for its message and for nothing else, and can wait for the socket itself: that takes half of the
time off a small call, and more of the processor's.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version

_VARIABLE = "GRPC_EXPERIMENTS"
_OWN_POLLING = {
    _VARIABLE: "-event_engine_client,-event_engine_listener",
    # Milliseconds. Between a failed call and its next try nobody polls, and a connection that is being made waits for
    # that, past its own time limit: gRPC looks after those itself, by default every 5 s only.
    "GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS": "100",
}
# The newest release that is known to have these switches.
_NEWEST = (1, 85)


def environment() -> dict[str, str]:
    """What to add to the environment of a process that imports grpc before this package, so that it polls so, too.

    Empty where GRPC_EXPERIMENTS is set already, and for a release of grpc that is not known to have the switches.
    """
    release = tuple(int(number) for number in version("grpcio").split(".")[:2])
    if _VARIABLE in os.environ or release > _NEWEST:
        return {}
    return {name: value for name, value in _OWN_POLLING.items() if name not in os.environ}


def load_grpc() -> None:
    """Import grpc so that polling threads wait for sockets themselves.

    It reads the variables once, when it is imported: nothing is changed where it was imported before, nor where
    GRPC_EXPERIMENTS is set. The environment is left as it was: processes started from here may have their own gRPC.
    """
    added = environment()
    if "grpc" in sys.modules or not added:
        return
    os.environ.update(added)
    try:
        importlib.import_module("grpc")
    finally:
        for name in added:
            del os.environ[name]
