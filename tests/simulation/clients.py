"""Who asks: clients with routers of their own, and thin ones. Every row that they get is looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_service.client.calls import Failure
from embedding_service.client.router import Router
from embedding_service.client.wants import StoredRows, Want
from embedding_service.errors import EmbeddingServiceError
from embedding_service.placement.routing import Model
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import Answer, encode_lookup
from simulation.steps import drive
from simulation.store import MODELS, ROW_BYTES, ROWS_PER_PART
from simulation.world import Process, World

if TYPE_CHECKING:
    from simulation.checks import Checks


class Lookup:
    """One lookup: what was asked, and by when it must end.

    Attributes:
        age: Of the router's routing when it began; (0, 0) where rows are right that are no newer.
    """

    def __init__(self, client: Client, model: str, version: str, ids: dict[str, Any], deadline: float) -> None:
        self.client, self.model, self.version, self.ids, self.deadline = client, model, version, ids, deadline
        self.began = client.world.now
        self.is_over = False
        routing = client.router.current
        self.age = routing.age if routing and not version else (0, 0)

    @property
    def name(self) -> str:
        """What is asked for."""
        return f"{self.model}@{self.version}" if self.version else self.model

    def __str__(self) -> str:
        ids = {table: ids.tolist() for table, ids in self.ids.items()}
        return f"{self.client.name}: lookup of {self.name} {ids} until {self.deadline:.2f}"


class Client(Process):
    """A process with a client in it."""

    def __init__(self, world: World, name: str, seeds: Sequence[str], checks: Checks) -> None:
        super().__init__(world, name)
        self.checks = checks
        self.router: Router = Router(seeds, clock=world.clock, chance=random.Random(world.chance.random()))
        self.begin()

    def ask(self, model: str, version: str, draw: random.Random, seconds: float, ahead: bool = False) -> None:
        """Look rows up, as `EmbeddingClient` does."""
        lookup = Lookup(self, model, version, _draw_ids(model, draw), self.world.now + seconds)
        self.checks.asked(lookup)
        self.world.say("%s", lookup)

        def wants_of(model: Model) -> list[Want]:
            return [
                Want(model.table(table), ids, wire.ROW_ENCODING_STORED, ROW_BYTES, StoredRows(len(ids), ROW_BYTES))
                for table, ids in lookup.ids.items()
            ]

        def done(outcome: Any) -> None:
            if isinstance(outcome, EmbeddingServiceError):
                self.checks.failed(lookup, f"{type(outcome).__name__}: {outcome}")
            else:
                rows = {want.table.name: want.sink.rows.view(np.uint32) for want in outcome}
                self.checks.answered(lookup, rows)

        drive(self.router.fetch(lookup.name, wants_of, lookup.deadline), self, done)

    def ask_thinly(self, model: str, address: str, draw: random.Random, seconds: float) -> None:
        """Have one shard fetch all rows of one table."""
        table, ids = draw.choice(list(_draw_ids(model, draw).items()))
        lookup = Lookup(self, model, "", {table: ids}, self.world.now + seconds)
        lookup.age = (0, 0)
        self.checks.asked(lookup)
        self.world.say("%s, thin, at %s", lookup, address)
        request = encode_lookup(model, table, wire.ROW_ENCODING_STORED, 0, 0, ids, MODELS[model][table] * ROWS_PER_PART)

        def done(outcome: Any) -> None:
            if isinstance(outcome, Answer):
                self.checks.answered(lookup, {table: outcome.rows.reshape(-1, ROW_BYTES).view(np.uint32)})
            else:
                assert isinstance(outcome, Failure)
                self.checks.failed(lookup, f"{outcome.code.name}: {outcome.message}", thin=True)

        self.world.call(self, address, request, seconds, done)


def _draw_ids(model: str, draw: random.Random) -> dict[str, Any]:
    """Of each table a few rows, in any order; some twice."""
    return {
        table: np.array([draw.randrange(parts * ROWS_PER_PART) for _ in range(draw.randint(1, 5))], np.int64)
        for table, parts in MODELS[model].items()
    }
