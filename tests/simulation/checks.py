"""What must hold after every event. The first thing that does not ends the run."""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_service.client.router import START_OVER_SECONDS, Router
from embedding_service.controller.decisions import routed_parts
from embedding_service.placement.parts import PartKey
from embedding_service.placement.routing import Routing
from simulation.store import rows_of

if TYPE_CHECKING:
    from simulation.clients import Lookup
    from simulation.cluster import Controller, Shard
    from simulation.world import World

# So long after a model was first served, clients may hear that it is not: shards learn of it one after the other.
NEWS_SECONDS = 5.0
# What a lookup may take beyond its deadline: a call is given a millisecond at least.
LATE_SECONDS = 0.05


class Broken(Exception):
    """A promise was not kept. `promise` names it, in the same words for every seed."""

    def __init__(self, promise: str, details: str) -> None:
        super().__init__(f"{promise}: {details}")
        self.promise = promise


class Checks:
    """Is told what happens, and raises Broken.

    Args:
        calm: One thing breaks at a time, and with two copies of everything: nothing may be lost, no lookup fail.
    """

    def __init__(self, world: World, calm: bool, grace: float) -> None:
        self.world, self.calm, self.grace = world, calm, grace
        self.answers = self.failures = 0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Lookup]] = []
        self._ages: dict[tuple[int, int], Controller] = {}
        self._newest: dict[str, tuple[int, int]] = {}  # by controller
        self._named: dict[tuple[str, int], dict[str, dict[PartKey, float]]] = {}
        self._holders: dict[PartKey, set[str]] = {}
        self._since: dict[tuple[str, PartKey], float] = {}
        # Since when each client knows that a model is served, and since when a controller says so.
        self._known_since: dict[tuple[str, str], float] = {}
        self._named_since: dict[str, float] = {}
        self._last_named: dict[str, tuple[int, int]] = {}  # of each version the newest routing that serves it
        self._obeyed: dict[tuple[str, int], tuple[Controller, float, int]] = {}
        self._routers: dict[str, _Age] = {}

    # Controllers

    def controller_begins(self) -> None:
        """Until it publishes, a client that knew nothing before may hear of nothing."""
        self._named_since = {}

    def published(self, controller: Controller, routing: Routing) -> None:
        """A controller published a routing."""
        world = self.world
        world.say("%s: publishes %s: %s", controller.name, routing.age, [model.full_name for model in routing.models])
        if self._ages.setdefault(routing.age, controller) is not controller:
            raise Broken("two routings have one age", f"{routing.age} of {controller.name}")
        self._check_owners(controller, routing)
        for model in routing.models:
            self._named_since.setdefault(model.full_name.partition("@")[0], world.now)
            self._last_named[model.full_name] = max(routing.age, self._last_named.get(model.full_name, (0, 0)))
        who = (controller.name, controller.life)
        if routing.age <= self._newest.get(str(who), (0, 0)):
            raise Broken("the age of a routing went back", f"{routing.age} of {controller.name}")
        self._newest[str(who)] = routing.age
        named = self._named.setdefault(who, {})
        parts = routed_parts(routing.message)
        for shard in named.keys() | parts.keys():
            now = parts.get(shard, set())
            times = named.setdefault(shard, {})
            for key in now:
                if (shard, key) not in self._since:
                    raise Broken("a routing names a shard that never held the part", f"{shard}: {key}")
                times[key] = float("inf")
            for key, until in times.items():
                if key not in now and until == float("inf"):
                    times[key] = world.now

    def _check_owners(self, controller: Controller, routing: Routing) -> None:
        """A new version is there whole; and nobody who holds a part is left out while copies are too few."""
        fleet = controller.state.fleet
        holders = fleet.holders()
        staying = {name for name, shard in fleet.shards.items() if not shard.report.draining}
        copies = min(controller.settings.replicas, len(staying))
        for model in routing.models:
            for table in model.tables.values():
                for part, owners in enumerate(table.owners.tolist()):
                    key = PartKey(model.name, model.version, table.name, part)
                    named = {routing.shard_ids[owner] for owner in owners if owner >= 0}
                    if not named and model.full_name not in self._last_named:
                        raise Broken("a version was served before all of it was there", str(key))
                    others = staying.intersection(holders.get(key[:2], {}).get(key, ())) - named
                    if others and len(named) < copies:
                        raise Broken("a copy that is needed was left out of the routing", f"{key}: {others}")

    # Shards

    def begins(self, shard: Shard) -> None:
        """A shard started."""
        self._routers[shard.name] = _Age(shard.router)

    def ends(self, shard: Shard) -> None:
        """A shard is gone."""
        self._routers.pop(shard.name, None)
        for key in shard.holdings.held:
            self._holders[key].discard(shard.name)

    def holds(self, shard: Shard, key: PartKey) -> None:
        """A shard has loaded a part."""
        self.world.say("%s: holds %s", shard.name, key)
        self._holders.setdefault(key, set()).add(shard.name)
        self._since[shard.name, key] = self.world.now

    def obeys(self, shard: Shard, controller: Controller, sent: float, term: int) -> None:
        """A shard did what this controller told it a moment ago."""
        _, _, before = self._obeyed.get((shard.name, shard.life), (controller, sent, 0))
        if term < before:
            raise Broken("a shard obeyed an earlier controller", f"{shard.name}: {controller.name} of term {term}")
        self._obeyed[shard.name, shard.life] = controller, sent, term

    def drops(self, shard: Shard, key: PartKey) -> None:
        """A shard gives a part up, for it was told to."""
        self.world.say("%s: drops %s", shard.name, key)
        holders = self._holders[key]
        holders.discard(shard.name)
        controller, sent, _ = self._obeyed[shard.name, shard.life]
        named = self._named.get((controller.name, controller.life), {}).get(shard.name, {}).get(key, 0.0)
        if self._since[shard.name, key] <= min(named, sent) and named + self.grace > sent + 1e-6:
            raise Broken("a part was dropped within its grace time", f"{shard.name}: {key}, named until {named:.3f}")
        # What was loaded after the controller spoke is no copy that it could count on.
        if self.calm and not holders and self._since[shard.name, key] <= sent and self._is_served(controller, key):
            raise Broken("the last copy of a served part was dropped", f"{shard.name}: {key}")

    def released(self, shard: Shard, controller: Controller) -> None:
        """A draining shard was told that it may end."""
        self.world.say("%s: drained", shard.name)
        others = [each for each in controller.state.fleet.shards.values() if not each.report.draining]
        if self.calm and others:
            for key in shard.holdings.held:
                if self._holders[key] == {shard.name} and self._is_served(controller, key):
                    raise Broken("a shard was released with the last copy of a served part", f"{shard.name}: {key}")

    def holders(self, key: PartKey) -> set[str]:
        """Who holds a part."""
        return self._holders.get(key, set())

    def _is_served(self, controller: Controller, key: PartKey) -> bool:
        routing = controller.state.routing
        return routing is not None and f"{key.model}@{key.version}" in routing.by_name

    # Lookups

    def watch(self, name: str, router: Router) -> None:
        """A client has this router."""
        self._routers[name] = _Age(router)

    def asked(self, lookup: Lookup) -> None:
        """A lookup began."""
        heapq.heappush(self._due, (lookup.deadline + LATE_SECONDS, next(self._order), lookup))

    def failed(self, lookup: Lookup, why: str, thin: bool = False) -> None:
        """A lookup ended with an error."""
        self.failures += 1
        lookup.is_over = True
        self.world.say("%s: failed after %.3f s: %s", lookup.client.name, self.world.now - lookup.began, why)
        named = self._named_since.get(lookup.model, self.world.now)
        since = self._known_since.get((lookup.client.name, lookup.model), named)
        if self.calm and lookup.began - since > NEWS_SECONDS and not thin and not lookup.version:
            raise Broken("a lookup failed", f"{lookup}: {why}")

    def answered(self, lookup: Lookup, rows: dict[str, Any]) -> None:
        """A lookup ended with rows: uint32 [n, 2] of each table."""
        self.answers += 1
        lookup.is_over = True
        served = [name.partition("@")[2] for name in self._last_named if name.startswith(f"{lookup.model}@")]
        right = {
            version: np.concatenate(
                [
                    (rows[table] == rows_of(lookup.model, version, table)[ids]).all(1)
                    for table, ids in lookup.ids.items()
                ]
            )
            for version in served
        }
        # Several, where all rows are those of a base: they are right by each.
        versions = [version for version, rights in right.items() if rights.all()]
        self.world.say("%s: answered by version %s", lookup.client.name, versions)
        if not versions:
            mixed = np.any(list(right.values()), axis=0).all()
            told = {table: got.tolist() for table, got in rows.items()}
            raise Broken("rows are mixed" if mixed else "a row is wrong", f"{lookup}: {told}")
        if lookup.version and lookup.version not in versions:
            raise Broken("a row is wrong", f"{lookup}: of version {versions}")
        watched = self._routers[lookup.client.name]
        last = max(self._last_named[f"{lookup.model}@{version}"] for version in versions)
        if last < lookup.age and watched.started_over < lookup.began:
            raise Broken("a row is stale", f"{lookup}: of version {versions}, last served by {last}, not {lookup.age}")

    @property
    def run_on(self) -> bool:
        """Whether lookups are under way."""
        return any(not lookup.is_over for _, _, lookup in self._due)

    # After every event

    def after_event(self) -> None:
        """What nobody tells: time that passes, and routings that change."""
        while self._due and (self._due[0][2].is_over or self._due[0][0] < self.world.now):
            lookup = heapq.heappop(self._due)[2]
            if not lookup.is_over:
                raise Broken("a lookup outlived its deadline", f"{lookup}")
        for name, watched in self._routers.items():
            if watched.router.current is not watched.routing:
                watched.changed(name, self.world.now)
                for model in watched.routing.models if watched.routing else ():
                    self._known_since.setdefault((name, model.full_name.partition("@")[0]), self.world.now)


class _Age:
    """A router's routing as it was last seen."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.routing = router.current
        self.since = 0.0
        self.started_over = -1.0

    def changed(self, name: str, now: float) -> None:
        routing, before = self.router.current, self.routing
        if before is not None and (routing is None or routing.age <= before.age):
            if routing is None or routing.age == before.age or now - self.since < START_OVER_SECONDS:
                raise Broken(
                    "the age of a router's routing went back", f"{name}: {before.age} to {routing and routing.age}"
                )
            self.started_over = now
        self.routing, self.since = routing, now
