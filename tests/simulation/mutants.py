"""Faults that the simulator must find: each breaks one rule in the real code, for as long as it is entered."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from embedding_service.client.router import Router
from embedding_service.controller import decisions
from embedding_service.controller.state import ControllerState
from embedding_service.wire import embedding_pb2 as wire

Mutant = Callable[[], AbstractContextManager[Any]]


def takes_any_age() -> AbstractContextManager[Any]:
    """A router takes a routing whatever its age."""
    return patch.object(Router, "adopt", lambda self, routing: setattr(self, "_routing", routing))


def knows_no_grace() -> AbstractContextManager[Any]:
    """A controller has parts dropped as soon as the routing names them no more."""
    real = ControllerState.__init__

    def begin(self: Any, settings: Any, *arguments: Any) -> None:
        real(self, replace(settings, grace=0.0), *arguments)

    return patch.object(ControllerState, "__init__", begin)


def moves_without_waiting() -> AbstractContextManager[Any]:
    """A part leaves its old place in the routing before any new place holds it."""
    real = decisions.place_version

    def place(manifest: Any, target: Any, holders: Any, *others: Any) -> wire.ModelPlacement:
        planned = {key: [name for name in names if name in target.get(key, names)] for key, names in holders.items()}
        return real(manifest, target, planned, *others)

    return patch.object(decisions, "place_version", place)


def takes_an_empty_store_for_empty() -> AbstractContextManager[Any]:
    """Whatever cannot be found in the store is given up."""
    return patch.object(decisions, "known_versions", lambda found, before, served: found.manifests if found else {})


def lives_on_beside_another() -> AbstractContextManager[Any]:
    """A controller does not mind that another one came later."""
    return patch.object(ControllerState, "_end", lambda self, term: None)


def serves_too_soon() -> AbstractContextManager[Any]:
    """A version takes over before all its parts are held."""

    def choose(catalog: Any, served: Any, held: Any, copying: Any) -> Any:
        newest = [versions[-1] for _, versions in sorted(catalog.items())]
        return newest, newest

    return patch.object(decisions, "choose_versions", choose)


MUTANTS: dict[str, Mutant] = {
    "the age of a router's routing went back": takes_any_age,
    "a part was dropped within its grace time": knows_no_grace,
    "not in order after the last fault": lives_on_beside_another,
    "a copy that is needed was left out of the routing": moves_without_waiting,
    "a lookup failed": takes_an_empty_store_for_empty,
    "a version was served before all of it was there": serves_too_soon,
}
