"""A routing signed by the controller, so that nobody else can lead clients astray."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from embedding_service.errors import Unauthenticated
from embedding_service.security.proofs import Signer, check
from embedding_service.wire import embedding_pb2 as wire

_CLAIM = "routing"


def sign_routing(routing: wire.Routing, signer: Signer) -> str:
    """The signature of a whole routing. Raises InvalidRequest."""
    return signer.sign({"iat": int(time.time()), _CLAIM: _digest(routing, model_digests(routing))})


def model_digests(routing: wire.Routing) -> list[bytes]:
    """What is signed of each model."""
    return [hashlib.sha256(each.SerializeToString(deterministic=True)).digest() for each in routing.models]


def check_routing(routing: wire.Routing, known: tuple[int, int], authorities: bytes) -> None:
    """Refuse a routing that is not the controller's.

    Args:
        routing: As somebody gave it. One that is no newer than the asker's comes as its age alone, unsigned.
        known: The asker's age.
        authorities: PEM of who may vouch for the controller.

    Raises:
        Unauthenticated: Says what is wrong.
    """
    if not (routing.models or routing.shards) and (routing.term, routing.epoch) <= known:
        return
    if not routing.signature:
        raise Unauthenticated("the routing is not signed: is the service secured?")
    names, claims = check(routing.signature, authorities)
    if not any(_is_controllers(name) for name in names):
        raise Unauthenticated("the routing is signed by another member than the controller")
    found = model_digests(routing)
    whole = list(routing.digests) or found
    if claims.get(_CLAIM) != _digest(routing, whole) or not _in_order(found, whole):
        raise Unauthenticated("the routing is not what its controller signed")


def _is_controllers(name: str) -> bool:
    return "://" in name and name.endswith("/controller") and not name.endswith("/shard/controller")


def _digest(routing: wire.Routing, models: Sequence[bytes]) -> str:
    rest = wire.Routing()
    rest.CopyFrom(routing)
    for field in ("models", "digests", "signature"):
        rest.ClearField(field)  # type: ignore[arg-type]
    about = hashlib.sha256(rest.SerializeToString(deterministic=True)).digest()
    return hashlib.sha256(about + b"".join(models)).hexdigest()


def _in_order(some: Sequence[bytes], all_of_them: Sequence[bytes]) -> bool:
    rest = iter(all_of_them)
    return all(each in rest for each in some)
