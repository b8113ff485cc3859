"""The store as the controller sees it. Threads look at it again and again, and may hang as the store does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from embedding_service.controller.reports import MOST_TERM
from embedding_service.machine import split_address
from embedding_service.store.store import Catalogue, Store
from embedding_service.threads import apart

log = logging.getLogger(__name__)

SCAN_SECONDS = 2.0
# A store that has answered nothing for so long is away until it has been looked at.
STALL_SECONDS = 10.0
# How long the first decision waits for the term that is noted in the store.
TERM_SECONDS = 2.0
# Hidden, so that it is no model. Each service that uses the store has a file of its own in it.
TERM_FOLDER = ".controller"
# A note that is older belongs to a service that is gone. A controller that is there writes a lost one again.
NOTE_DAYS = 90


class StoreWatch:
    """Looks at a store every SCAN_SECONDS, once at a time.

    Args:
        service: Names the service: the address at which its controllers are found. Several may use one store.
        changed: Called after the first look, or STALL_SECONDS without one, and whenever what was found or the noted
            term changed, or the store went or came back.

    Attributes:
        found: The last finding. None while the store cannot be read.
        noted: The term that a controller of this service noted there; 0 where there is none.
        problem: Why it cannot be read, in one line.
    """

    def __init__(self, store: Store, service: str, changed: Callable[[], None]) -> None:
        self.found: Catalogue | None = None
        self.noted = 0
        self.problem = ""
        self._store, self._changed = store, changed
        self._term_name = f"term-{sha256(_named(service).encode()).hexdigest()[:16]}"
        self._last = Catalogue()
        self._said = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(SCAN_SECONDS)

    async def _look(self) -> None:
        looking, began = apart(self._read), time.monotonic()
        while (left := max(began, self._store.answered) + STALL_SECONDS - time.monotonic()) > 0:
            await asyncio.wait([looking], timeout=left)  # a look at many versions takes a while
            if looking.done():
                break
        else:
            self._is_away(f"store {self._store.url} has not answered for {STALL_SECONDS:g} s: is it away?")
            await asyncio.wait([looking])
        try:
            self._found(*looking.result())
        except Exception as error:  # filesystems raise what their libraries do
            reason = " ".join(str(error).split()) or type(error).__name__
            self._is_away(f"store {self._store.url} cannot be read: {reason}")

    def _read(self) -> tuple[Catalogue, int]:
        return self._store.catalogue(self._last), self._read_term()

    def _found(self, found: Catalogue, noted: int) -> None:
        for name, problem in found.problems.items():
            if self._last.problems.get(name) != problem:
                log.warning("%s", problem)
        if self.problem:
            log.info("store %s can be read again", self._store.url)
        changed = self.found is None or (found, noted) != (self.found, self.noted)
        self.found, self.noted, self.problem, self._last = found, noted, "", found
        if changed:
            self._changed()

    def _is_away(self, problem: str) -> None:
        if problem != self.problem:
            log.error("%s", problem)
            self.found, self.problem = None, problem
            self._changed()

    # The term

    async def noted_term(self) -> int:
        """The term that the last controller of this service noted. 0 if there is none, or it cannot be read soon.

        A store that is no folder of this machine notes none. Then the clock and the shards must do.
        """
        return await self._soon(self._read_term)

    async def others_term(self) -> int:
        """The highest term that a controller at another address noted. The service may have been there."""
        return await self._soon(self._read_others_term)

    async def _soon(self, read: Callable[[], int]) -> int:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TERM_SECONDS):
                return await apart(read)
        return 0

    async def note_term(self, term: int) -> bool:
        """Write a term into the store, unless a higher one is there. Returns whether ours is there now."""
        if not self._store.is_local or await self.noted_term() > term:
            return False
        try:
            async with asyncio.timeout(TERM_SECONDS):
                await apart(self._write_term, term)
        except (OSError, TimeoutError) as error:
            why = f"term {term} is not noted in store {self._store.url}: {error or 'no answer'}"
            if why != self._said:
                log.info("%s", why)
                self._said = why
            return False
        if await self.noted_term() != term:
            return False
        self.noted = term  # a look that finds another one is news, be it the one that was found before
        return True

    @property
    def _term_path(self) -> Path:
        return Path(self._store.location(TERM_FOLDER)) / self._term_name

    def _read_term(self) -> int:
        return _term_in(self._term_path) if self._store.is_local else 0

    def _read_others_term(self) -> int:
        if not self._store.is_local:
            return 0
        notes = self._term_path.parent.glob("term*")
        return max((_term_in(path) for path in notes if path != self._term_path), default=0)

    def _write_term(self, term: int) -> None:
        self._term_path.parent.mkdir(exist_ok=True)
        partial = self._term_path.with_name(f"partial-{self._term_name}.{os.getpid()}")
        partial.write_text(f"{term}\n")
        partial.replace(self._term_path)
        for each in self._term_path.parent.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - each.stat().st_mtime > NOTE_DAYS * 86400:
                    each.unlink()


def _term_in(path: Path) -> int:
    """The term in a file. 0 if there is none."""
    with contextlib.suppress(OSError, ValueError), path.open() as file:
        term = int(file.read(32))
        return term if 0 < term <= MOST_TERM else 0
    return 0


def _named(service: str) -> str:
    """Loopback addresses are the same on every machine, and several may use one store."""
    host, _ = split_address(service)
    is_loopback = host in ("localhost", "[::1]") or host.startswith("127.")
    return f"{socket.gethostname()} {service}" if is_loopback else service
