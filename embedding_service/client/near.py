"""Rows that this client reads in place, and when it may: the client's side of rules N1 to N4 (docs/near.md)."""

from __future__ import annotations

import time
import weakref
from typing import TYPE_CHECKING

from embedding_service.client.steps import working
from embedding_service.near.reader import NearReader, Place, Rows, SomeRows
from embedding_service.placement.routing import Ids, Model, Routing, Table
from embedding_service.security.access import Access, Shown, near_host

if TYPE_CHECKING:
    from embedding_service.client.router import Router
    from embedding_service.client.steps import Steps
    from embedding_service.client.wants import Lookup

# A shard that has a newer routing and does not give it: for so long nothing is read in place.
DOUBT_SECONDS = 1.0


class NearRows:
    """Follows the routing, and reads what is near by it. Thread-safe.

    A near shard tells with each lookup, for the price of reading two words, whether it knows a newer routing. So a
    lookup never gives rows of a version that was replaced when it began.
    """

    def __init__(self, access: Access | None = None) -> None:
        """`access`: what says to shards which parts it may read."""
        shown = Shown(access) if access else None
        self._reader = (
            NearReader(lambda place: shown.header(near_host(place.boot_id, place.path))) if shown else NearReader()
        )
        self._followed: Routing | None = None
        self._doubtful_until = 0.0
        self._finalizer = weakref.finalize(self, self._reader.close)

    @property
    def states(self) -> dict[str, str]:
        """Of each shard of this machine: "near", or why its rows, or some of them, come over the wire."""
        return self._reader.states()

    def fetch(self, router: Router, lookup: Lookup, deadline: float) -> Steps[None]:
        """What `Router.fetch` does, for rows that are not near. Those that are, are read while it waits."""
        routing = router.current
        if routing is not None and routing is self._followed and self._reader.newer_than(*routing.age) is None:
            lookup.near = self
        else:
            lookup.near = yield from self._ready(router, deadline)
        yield from working(router.fetch(lookup.model, lookup.wants, deadline), lookup.read_near)
        if not lookup.read_near():
            lookup.near = None
            yield from router.fetch(lookup.model, lookup.wants, deadline)

    def _ready(self, router: Router, deadline: float) -> Steps[NearRows | None]:
        """This, once the routing is as new as that of every near shard; None where that cannot be had."""
        routing = router.current or (yield from router.routing(deadline))
        self._follow(routing)
        shard = self._reader.newer_than(*routing.age)
        if shard is None:
            return self
        if time.monotonic() < self._doubtful_until:
            return None
        yield from router.learn_from(shard, deadline)
        routing = router.current or routing
        self._follow(routing)
        if self._reader.newer_than(*routing.age) is None:
            return self
        self._doubtful_until = time.monotonic() + DOUBT_SECONDS
        return None

    def read(self, model: Model, table: Table, ids: Ids) -> Rows | SomeRows | None:
        """Stored rows of those of `ids` int64 [n], all in range, that are near; None where none is."""
        view, routing = self._reader.view(), self._followed
        if view is None or routing is None or self._reader.newer_than(*routing.age):
            return None  # a shard that became near since
        here = view.tables.get((model.full_name, table.name))
        if here is None or not here.matches(table.rows, table.row_bytes, table.dtype, table.rows_per_part):
            return None
        return self._reader.read(view, here, ids)

    def close(self) -> None:
        """Leave all shards."""
        self._finalizer()

    def abandon(self) -> None:
        """In a child of a fork: the parent goes on with this."""
        self._finalizer.detach()
        self._reader.abandon()

    def _follow(self, routing: Routing) -> None:
        if routing is not self._followed:
            self._followed = routing
            self._reader.follow([_place(shard.id, shard.near) for shard in routing.message.shards])


def _place(shard: str, near: object) -> Place:
    return Place(shard, near.path, near.boot_id, near.incarnation)  # type: ignore[attr-defined]
