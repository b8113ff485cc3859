"""A Ray actor that holds the rows, on a local Ray."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.data import Data
from benchmarks.peers.base import START_SECONDS, Lookup, Peer, Server, Unusable, child, receive, wait_for_end

ACTOR = "rows"
NAMESPACE = "benchmark"


class RayActor(Peer):
    """`ray.get` of an actor's method."""

    name = "Ray actor"

    @contextmanager
    def serve(self, data: Data, folder: Path) -> Iterator[Server]:
        """A Ray of one node and one actor."""
        token = secrets.token_hex(32)
        with child(_serve, data, token) as (pid, pipe):
            address = receive(pipe, START_SECONDS)
            yield Server((address, token), [process.pid for process in psutil.Process(pid).children(recursive=True)])

    @contextmanager
    def connect(self, data: Data, target: tuple[str, str]) -> Iterator[Lookup]:
        """The process becomes a driver, and all its threads share that."""
        address, token = target
        ray = _import_ray(token)
        if not ray.is_initialized():
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
        actor = ray.get_actor(ACTOR)
        yield lambda ids: ray.get(actor.gather.remote(ids))


class _Rows:
    """The actor."""

    def __init__(self, data: Data) -> None:
        torch.set_num_threads(1)
        self._rows = data.tensor()

    def gather(self, ids: Any) -> Any:
        """float16 [n, dim] of ids int64 [n], as numpy arrays, which Ray sends without a copy."""
        return self._rows.index_select(0, torch.tensor(ids)).numpy()


def _import_ray(token: str) -> Any:
    # Read when ray is imported: the first keeps a Ray that starts here on the loopback address.
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    try:
        import ray
    except ImportError as error:
        raise Unusable(str(error)) from None
    return ray


def _serve(pipe: Connection, data: Data, token: str) -> None:
    ray = _import_ray(token)
    folder = tempfile.mkdtemp(prefix="ray-")  # sockets lie in it, whose paths must be short
    try:
        context = ray.init(
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            num_cpus=1,
            namespace=NAMESPACE,
            object_store_memory=256 << 20,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        actor = ray.remote(_Rows).options(name=ACTOR, num_cpus=1).remote(data)
        ray.get(actor.gather.remote(data.first_rows))
        pipe.send(context.address_info["gcs_address"])
        wait_for_end(pipe)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
