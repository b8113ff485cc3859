"""Events that the controller's state is told, and instructions that it gives. Nothing else passes in or out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from embedding_service.errors import EmbeddingServiceError
from embedding_service.placement.demand import Node, PartDemand, Placement
from embedding_service.placement.routing import Routing
from embedding_service.store.store import Catalogue
from embedding_service.wire import control_pb2 as control

# A shard's registration, as the world names it. The state only compares it.
Stream = Hashable

# Events


@dataclass(frozen=True)
class Joined:
    """A stream began. This is its first report."""

    stream: Stream
    report: control.ShardReport


@dataclass(frozen=True)
class Reported:
    """A later report on a stream."""

    stream: Stream
    report: control.ShardReport


@dataclass(frozen=True)
class Left:
    """A stream ended."""

    stream: Stream


@dataclass(frozen=True)
class Looked:
    """What a look at the store found. None: it is away, and `problem` says why. `noted`: the term in it; 0 for none."""

    found: Catalogue | None
    problem: str = ""
    noted: int = 0


@dataclass(frozen=True)
class TermRead:
    """Answers `ReadTerm`: the term that this service noted in the store, 0 for none, and the clock in microseconds.

    `others` is the highest one that controllers at other addresses noted.
    """

    noted: int
    clock: int
    others: int = 0


@dataclass(frozen=True)
class TermNoted:
    """Answers `NoteTerm`: whether the term is there now."""

    is_there: bool


@dataclass(frozen=True)
class Planned:
    """Answers `Plan` with a placement, or why there is none. PlacementError: the parts do not fit."""

    outcome: Placement | Exception


@dataclass(frozen=True)
class Renew:
    """What signs the routing was replaced: publish it once more, so that everybody gets it with the new signature."""


@dataclass(frozen=True)
class Tick:
    """Time passed. A decision begins only at a tick, and goes on only at an answer."""


Event = Joined | Reported | Left | Looked | TermRead | TermNoted | Planned | Renew | Tick

# Instructions


@dataclass(frozen=True)
class Tell:
    """There is news for a shard. Take `ControllerState.message` as soon as its stream can carry one."""

    stream: Stream


@dataclass(frozen=True)
class Dismiss:
    """End a stream. `why` is the error that it ends with. None: as a stream ends."""

    stream: Stream
    why: EmbeddingServiceError | None = None


@dataclass(frozen=True)
class Publish:
    """This is the routing from now on."""

    routing: Routing


@dataclass(frozen=True)
class ReadTerm:
    """Answer with `TermRead`."""


@dataclass(frozen=True)
class NoteTerm:
    """Write the term into the store, unless a higher one is there. Answer with `TermNoted`."""

    term: int


@dataclass(frozen=True)
class Plan:
    """Place `replicas` copies of the parts on the nodes. Answer with `Planned`."""

    parts: Sequence[PartDemand]
    nodes: Sequence[Node]
    replicas: int


@dataclass(frozen=True)
class End:
    """A controller that came later is there: end, and say so."""

    why: EmbeddingServiceError


Question = ReadTerm | NoteTerm | Plan
Instruction = Tell | Dismiss | Publish | End | Question
