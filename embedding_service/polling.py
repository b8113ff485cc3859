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
_OWN_POLLING = "-event_engine_client,-event_engine_listener"
# The newest release that is known to have these switches.
_NEWEST = (1, 85)


def environment() -> dict[str, str]:
    """What to add to the environment of a process that imports grpc before this package, so that it polls so, too.

    Empty where GRPC_EXPERIMENTS is set already, and for a release of grpc that is not known to have the switches.
    """
    release = tuple(int(number) for number in version("grpcio").split(".")[:2])
    return {} if _VARIABLE in os.environ or release > _NEWEST else {_VARIABLE: _OWN_POLLING}


def load_grpc() -> None:
    """Import grpc so that polling threads wait for sockets themselves.

    It reads the variable once, when it is imported: nothing is changed where it was imported before, nor where
    GRPC_EXPERIMENTS is set. The environment is left as it was: processes started from here may have their own gRPC.
    """
    added = environment()
    if "grpc" in sys.modules or not added:
        return
    os.environ.update(added)
    try:
        importlib.import_module("grpc")
    finally:
        del os.environ[_VARIABLE]
