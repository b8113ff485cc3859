"""A Ray that starts on this machine and is ours alone."""

from __future__ import annotations

import logging
from typing import Any

import ray

from embedding_service.errors import Unavailable
from embedding_service.foreign import one_line

# Options of `ray.init` for it.
LOCAL_RAY: dict[str, Any] = {
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    # Ray runs actors at niceness 15: beside busy processes of others, they would get a thirtieth of a core.
    "_system_config": {"worker_niceness": 0},
}


def start_ray(**options: Any) -> None:
    """Start a Ray here that is ours alone: `ray.init` with LOCAL_RAY and further options.

    It is tried twice. Ray gives its processes 30 s, which they may not have on a busy machine. Raises Unavailable.
    """
    for is_last in (False, True):
        try:
            ray.init(address="local", logging_level=logging.ERROR, **LOCAL_RAY, **options)
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            if is_last:
                raise Unavailable(
                    f"Ray does not start on this machine ({one_line(error)}): free CPU and memory and try again, or "
                    "name a cluster that runs. /tmp/ray/session_latest/logs has more"
                ) from error
