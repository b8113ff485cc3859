"""The fast front: the thread that polls gRPC's queue answers at once what it can.

grpc's servers for Python hand every message from a polling thread to a worker or an event loop, and the answer back.
For a small lookup that costs more than everything else together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from embedding_service.front.base import (
    ENDING_TICK,
    STOP_GRACE,
    Front,
    Kind,
    Options,
    cannot_listen,
    channel_arguments,
    with_port,
)
from embedding_service.front.kinds import take
from embedding_service.grpc_core import Event, Port, ServerCall
from embedding_service.sockets import hang_up
from embedding_service.threads import apart

log = logging.getLogger(__name__)

# How often the polling thread looks up from an idle queue.
TICK = 0.1


class PollingFront(Front):
    """A port and the thread that serves it. See `Front`."""

    def __init__(
        self,
        address: str,
        options: Options,
        *,
        shared: bool = False,
        private: bool = False,
        kind: Kind | None = None,
    ) -> None:
        super().__init__(address, options, private=private, kind=kind)
        self._port = Port(channel_arguments(options.request_bytes, shared=shared, ages=self.has_tls))
        self._thread = threading.Thread(target=self._live, name="front", daemon=True)
        self._stopped = self._shut = False

    async def start(self) -> None:
        """See `Front`."""
        bound = self._port.bind(self.address, self.credentials())
        if not bound:
            raise cannot_listen(self.address)
        self.address = with_port(self.address, bound)
        self._port.start()
        self._port.next_call(self._take)
        self._thread.start()

    async def stop(self) -> None:
        """See `Front`."""
        self.ending = True
        if self._thread.ident:
            await apart(self._thread.join)  # those of `to_thread` may all be stuck

    def _live(self) -> None:
        try:
            self._run()
        except BaseException as error:
            log.critical("the thread that serves %s died", self.address, exc_info=True)
            self.to_loop(self.options.died, error)
            # A process that lives and serves nothing is worse than none. Its event loop may be stuck too.
            time.sleep(3 * STOP_GRACE)
            os._exit(1)

    def _run(self) -> None:
        while not self.ending:
            self._look(TICK)
        self.begin_to_end()
        while not self.has_ended():
            self._look(ENDING_TICK)
        self._shut = True
        # gRPC cancels the calls that it took in and did not pass on. Their callers must not hear of that, because
        # they would not know that they may ask again. For them the connection is closed, which is UNAVAILABLE.
        hang_up(self.address)
        self._port.shut_down(self._on_stopped)
        give_up = time.monotonic() + STOP_GRACE
        while self.calls or not self._stopped:
            self._look(ENDING_TICK)
            if time.monotonic() > give_up:
                log.warning("%d calls do not end", len(self.calls))
                return
        for event in self._port.destroy():
            self._handle(event)

    def _look(self, seconds: float) -> None:
        """Wait for an event, and handle it. Keeps nothing of it, because a call that has ended must go."""
        event = self._port.poll(time.time() + seconds)
        if event is not None:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if event.tag == self._take:
            self._ask_for_next(event.outcome)
        self.tell(event.tag, event.outcome)

    def _ask_for_next(self, call: Any) -> None:
        """A new call came, or the server is shut down. Raises if no further call would come."""
        if not self._shut:
            if call is None:
                raise RuntimeError("gRPC gives no more calls")
            self._port.next_call(self._take)

    def _take(self, call: ServerCall | None) -> None:
        if call is not None:
            take(self, call)

    def _on_stopped(self, _: None) -> None:
        self._stopped = True
