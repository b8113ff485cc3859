"""A routing that is not the controller's is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from embedding_service.errors import Unauthenticated
from embedding_service.placement.routing import Routing
from embedding_service.security.authority import URI, Authority
from embedding_service.security.proofs import Signer, prove
from embedding_service.security.routing import check_routing, sign_routing
from embedding_service.wire import embedding_pb2 as wire


def routing() -> wire.Routing:
    models = [wire.ModelPlacement(model=wire.ModelInfo(name=name, version=v)) for name, v in ("a1", "a2", "b1")]
    shards = [wire.ShardAddress(id="s", address="h:1")]
    return wire.Routing(term=7, epoch=3, shards=shards, models=models, controller="c:1")


class Signed:
    def __init__(self, folder: Path) -> None:
        self.authority = Authority.create()
        self._folder = folder
        self.ca = self.authority.pem

    def by(self, name: str, message: wire.Routing, authority: Authority | None = None) -> wire.Routing:
        (authority or self.authority).issue(self._folder, [f"{URI}/{name}", "localhost"])
        message.signature = sign_routing(message, Signer(self._folder / "tls.crt", self._folder / "tls.key"))
        return message


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return Signed(tmp_path)


def test_s6_the_controllers_routing_counts_and_so_does_a_view_of_it(signed: Signed) -> None:
    whole = signed.by("controller", routing())
    check_routing(wire.Routing.FromString(whole.SerializeToString()), (0, 0), signed.ca)
    for hidden in ({"a1"}, {"b1"}, {"a1", "a2", "b1"}, set()):
        view = Routing(whole).only(lambda name, version, hidden=hidden: name + version not in hidden).message  # type: ignore[misc]
        assert {each.model.name + each.model.version for each in view.models} == {"a1", "a2", "b1"} - hidden
        check_routing(view, (0, 0), signed.ca)


def _move(message: wire.Routing) -> None:
    message.shards[0].address = "elsewhere:1"


def _age(message: wire.Routing) -> None:
    message.term = 2**60


def _swap(message: wire.Routing) -> None:
    first = wire.ModelPlacement.FromString(message.models[0].SerializeToString())
    message.models[0].CopyFrom(message.models[1])
    message.models[1].CopyFrom(first)


def _drop(message: wire.Routing) -> None:
    del message.models[1]


def _rename(message: wire.Routing) -> None:
    message.models[0].model.version = "9"


def _empty(message: wire.Routing) -> None:
    del message.models[:]
    del message.shards[:]
    message.signature = ""


def _repeat(message: wire.Routing) -> None:
    message.models.append(message.models[0])


def _limit(message: wire.Routing) -> None:
    message.limits.response_bytes = 1


@pytest.mark.parametrize("change", [_move, _age, _swap, _drop, _rename, _empty, _repeat, _limit])
@pytest.mark.parametrize("seen", [3, 2])
def test_s6_a_routing_that_was_changed_is_refused(
    signed: Signed, change: Callable[[wire.Routing], None], seen: int
) -> None:
    message = signed.by("controller", routing())
    if seen == 2:
        message = Routing(message).only(lambda name, _: name == "a").message
    change(message)
    if seen == 2 and change is _drop:  # as if one might not see it either, which its own shard may say
        return check_routing(message, (0, 0), signed.ca)
    with pytest.raises(Unauthenticated):
        check_routing(message, (7, 2), signed.ca)
    return None


def test_s6_only_the_controller_signs(signed: Signed, tmp_path: Path) -> None:
    for name in ("shard/a", "shard/controller", "admin"):
        with pytest.raises(Unauthenticated, match="another member"):
            check_routing(signed.by(name, routing()), (0, 0), signed.ca)
    with pytest.raises(Unauthenticated, match="does not count"):
        check_routing(signed.by("controller", routing(), Authority.create()), (0, 0), signed.ca)
    message = signed.by("controller", routing())
    message.signature = prove("localhost", (tmp_path / "tls.crt").read_bytes(), (tmp_path / "tls.key").read_bytes())
    with pytest.raises(Unauthenticated, match="not what its controller signed"):
        check_routing(message, (0, 0), signed.ca)
    with pytest.raises(Unauthenticated, match="not signed"):
        check_routing(routing(), (0, 0), signed.ca)
    check_routing(wire.Routing(term=7, epoch=2), (7, 2), signed.ca)  # "no newer one"
    with pytest.raises(Unauthenticated, match="not signed"):
        check_routing(wire.Routing(term=7, epoch=3), (7, 2), signed.ca)
