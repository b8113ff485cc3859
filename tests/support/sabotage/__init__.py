"""Breaking the server of a process that has this folder in its PYTHONPATH; see `sitecustomize`."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import grpc
import psutil


def python_path() -> str:
    """The PYTHONPATH of processes that may be broken."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


def broken(victim: psutil.Process, address: str) -> bool:
    """Break a process's server, and call it, so that it finds out. True once it has ended.

    To be asked again: a call may reach another one of a shard's processes.
    """
    try:
        if victim.status() == psutil.STATUS_ZOMBIE:
            return True
        victim.send_signal(signal.SIGUSR2)
    except psutil.NoSuchProcess:
        return True
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options) as channel, suppress(grpc.RpcError):
        channel.unary_unary("/embedding.v1.EmbeddingService/ListModels")(b"", timeout=5)
    return False
