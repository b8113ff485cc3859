"""Blocking calls that may never return, such as those to a store that stalls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def apart(function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
    """Call a function in a thread of its own. Nobody waits for that thread when the process ends.

    The threads of `asyncio.to_thread` are few, and the process waits for them. If one hangs, the process cannot end. A
    call whose future is cancelled goes on all the same.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def call() -> None:
        try:
            outcome = function(*arguments), None
        except BaseException as error:
            outcome = None, error  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=call, daemon=True, name=getattr(function, "__name__", "apart")).start()
    return future
