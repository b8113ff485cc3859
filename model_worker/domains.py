"""Which tables of the service a worker serves: its own, and those of domains over the same base."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Protocol

from embedding_service.client.client import ModelDescription
from embedding_service.errors import NotFound, ServiceError, Unavailable

# Between two times that the service is asked for the tables that there are.
ASKED_SECONDS = 1.0
# And it has so long to answer.
PATIENCE_SECONDS = 2.0


class Service(Protocol):
    """What an `EmbeddingClient` says of models."""

    def models(self, *, timeout: float | None = None) -> list[ModelDescription]:
        """What is served now."""

    def model(self, name: str) -> ModelDescription:
        """The newest served version of a model, or NAME@VERSION. Raises NotFound."""


class Domains:
    """The tables that a worker may use: its own, NAME, and every served model NAME+DOMAIN.

    All belong to the dense half of one checkpoint. A version does if it was imported from that checkpoint, or published
    over a version that was. Another one's rows would be wrong without anybody noticing. So a version that replaces the
    one before is used if it belongs to the checkpoint, and is refused otherwise.

    service: says what is served.
    name: the model whose tables the worker has.
    checkpoint: NAME@VERSION of the import whose dense half the worker has.
    version: use no other version of `name` than this one. None: the newest.
    """

    def __init__(self, service: Service, name: str, checkpoint: str, version: str | None = None) -> None:
        self._service, self._name, self._checkpoint = service, name, checkpoint
        self._own = f"{name}@{version}" if version else name
        self._lock = threading.Lock()
        self._asked = -ASKED_SECONDS
        self._others: list[str] = []
        self._away: ServiceError | None = None

    def names(self) -> list[str]:
        """All that there are. While the service is away, those of before."""
        with suppress(ServiceError):
            self._ask()
        return [self._name, *self._others]

    def has(self, name: str) -> bool:
        """Whether a request may name it. Raises ServiceError where only the service knows, and it is away."""
        if name == self._name or name in self._others:
            return True
        if not name.startswith(f"{self._name}+"):
            return False
        self._ask()
        return name in self._others

    def resolve(self, name: str) -> str:
        """NAME@VERSION of the tables that lookups for `name` get now. Raises NotFound if there are none."""
        found = self._service.model(self._own if name == self._name else name)
        if found.checkpoint != self._checkpoint:
            raise NotFound(
                f"the rows of {found.full_name} belong to the checkpoint that was imported as {found.checkpoint}, and "
                f"this worker has that of {self._checkpoint}: start one with the other checkpoint"
            )
        return found.full_name

    def of_another(self, name: str) -> str:
        """Why a served model NAME+DOMAIN is none of this worker's. Empty: it is not served."""
        try:
            found = self._service.model(name)
        except NotFound:
            return ""
        return (
            f"{found.full_name} goes with the checkpoint that was imported as {found.checkpoint}, and this worker has "
            f"that of {self._checkpoint}"
        )

    def _ask(self) -> None:
        """Learn which others there are, unless that was just asked. Raises ServiceError."""
        with self._lock:
            if time.monotonic() - self._asked >= ASKED_SECONDS:
                try:
                    self._others, self._away = self._found(), None
                except ServiceError as error:
                    self._away = error
                self._asked = time.monotonic()
            if self._away:
                raise Unavailable(str(self._away))

    def _found(self) -> list[str]:
        newest = {model.name: model for model in self._service.models(timeout=PATIENCE_SECONDS)}
        ours = {name for name, model in newest.items() if model.checkpoint == self._checkpoint}
        return sorted(name for name in ours if name.startswith(f"{self._name}+"))
