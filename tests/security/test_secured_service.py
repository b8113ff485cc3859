"""A secured service: what is let in, and what is not. One service for all tests of this file."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import longcat_table
from support.cluster import until
from support.red_team import GUEST, OpenStreams, near_hello, pair_of, ports_of, rights_of, shown_by, tls_spoken
from support.security import (
    HIDDEN,
    POLICY,
    SEEN,
    Secured,
    call,
    channel_to,
    code_of,
    secured_service,
    write_policy,
)
from support.wire_bytes import PACKED, alike, drawn_with_others, messages, varint

from embedding_service import EmbeddingClient, NotFound, PermissionDenied, Unauthenticated, Unavailable
from embedding_service.client import transport
from embedding_service.client.status import get_status
from embedding_service.controller.claims import NOT_THE_STORES
from embedding_service.grpc_codes import PUSHBACK
from embedding_service.methods import RIGHTS
from embedding_service.near.reader import NearReader, Place
from embedding_service.security.access import Access, near_host
from embedding_service.security.authority import URI, Authority, write_private
from embedding_service.security.proofs import Signer
from embedding_service.security.routing import sign_routing
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import training_pb2 as training
from embedding_service.wire.control_pb2_grpc import ControlServiceStub
from embedding_service.wire.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)

pytestmark = [pytest.mark.service, pytest.mark.slow]

TABLE = f"{SEEN}/ngram"


@pytest.fixture(scope="module")
def secured(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_service(tmp_path_factory.mktemp("secured"), store) as running:
        yield running


def test_s1_rows_are_the_same_as_ever(secured: Secured) -> None:
    table = longcat_table()
    ids = torch.arange(0, len(table), 7)
    for access in (secured.token("reader"), secured.certificate("reader"), secured.token("admin")):
        with EmbeddingClient(secured.members.address, tls=access, timeout=60) as client:
            assert torch.equal(client.lookup(TABLE, ids), table[ids])


def test_s2_nothing_is_spoken_to_who_has_another_authority_or_speaks_plain_text(secured: Secured) -> None:
    address, path = secured.members.address, "grpc.health.v1.Health/Check"
    assert call(address, path, secured.ca) is grpc.StatusCode.OK
    false = Authority.create()
    false.issue(secured.folder / "false", ["localhost"])
    for access in (None, Access(secured.folder / "false" / "ca.crt")):
        assert call(address, path, access) is grpc.StatusCode.UNAVAILABLE
    # The members' port wants a certificate that counts, before anything is said.
    old = secured.certificate("shard/old", begins=-2, days=-1)
    wrong = secured.certificate("shard/false", false)
    for access in (secured.ca, secured.token("admin"), old, wrong):
        assert call(secured.members.control, path, access) is grpc.StatusCode.UNAVAILABLE
    assert call(secured.members.control, path, secured.certificate("shard/x")) is grpc.StatusCode.OK


def test_s2_every_port_speaks_tls_1_3_and_refuses_tls_1_2(secured: Secured) -> None:
    members = secured.members
    ports = [(secured.ca, address) for address in (members.client_address, *secured.addresses().values())]
    ports += [(secured.ca, members.address), (secured.certificate("shard/x"), members.control)]
    for access, address in ports:
        assert tls_spoken(address, access, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        assert tls_spoken(address, access, ssl.TLSVersion.TLSv1_2) is None


def test_s3_s4_every_method_is_answered_to_whom_the_table_says_and_to_nobody_else(secured: Secured) -> None:
    """Every method, by every caller, at every port, process and socket: the red team's table."""
    cells, wrong = 0, []
    with ports_of(secured) as ports:
        for path in (*RIGHTS, "embedding.v1.EmbeddingService/Nothing"):
            under_way = [(port, caller, caller.begin(path)) for port in ports for caller in port.callers]
            for port, caller, begun in under_way:
                cells += 1
                code = code_of(begun)
                for pause in range(1, 6):  # a busy machine's connection may break: then nobody has judged the call
                    if code is not grpc.StatusCode.UNAVAILABLE or port.is_right(path, caller, code):
                        break
                    time.sleep(pause)
                    code = code_of(caller.begin(path))
                if not port.is_right(path, caller, code):
                    wrong.append((path, port.name, caller.name, code, port.refusal(path, caller)))
    assert cells > 1000 and not wrong, wrong


def test_s4_the_page_answers_to_whom_the_policy_says_and_gives_them_what_they_may_read(secured: Secured) -> None:
    trusting = ssl.create_default_context(cafile=str(secured.folder / "ca.crt"))

    def ask(path: str, token: str, question: dict[str, Any] | None = None) -> httpx.Response:
        method, headers = "POST" if question else "GET", {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{secured.page}/{path}"
        return httpx.request(method, url, headers=headers, json=question, verify=trusting, timeout=60)

    assert ask("", "").status_code == 200  # the files hold nothing
    for path in ("api/overview", "api/parts"):
        codes = {token: ask(path, token).status_code for token in ("", "guess", "reader", "stranger", "admin")}
        assert codes == {"": 401, "guess": 401, "reader": 403, "stranger": 403, "admin": 200}
    asked = {"table": TABLE, "ids": [130]}
    rows = ask("api/lookup", "reader", asked).json()["rows"]
    assert rows[0]["values"] == pytest.approx(longcat_table()[130].tolist(), rel=1e-4)
    assert ask("api/lookup", "", asked).status_code == 401
    assert ask("api/lookup", "stranger", asked).status_code == 403
    hidden = ask("api/lookup", "reader", {"table": f"{HIDDEN}/ngram", "ids": [1]})
    assert hidden.status_code == 404 and HIDDEN not in hidden.json()["error"].partition("served models")[2]
    for name in (SEEN, HIDDEN):
        found = ask("api/ngrams", "reader", {"model": name, "tokens": [3, 14]})
        assert found.status_code == (200 if name == SEEN else 404), found.text
    assert ask("api/what-if", "reader", {"add": 0, "lose": []}).status_code == 403


def test_n5_the_near_socket_lets_in_whom_the_table_says_and_nobody_else(secured: Secured) -> None:
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, torch.arange(3))
        places = [shard.near for shard in client._router.current.message.shards]  # type: ignore[union-attr]
    assert len(places) == 2
    for place in places:
        for shown in shown_by(secured, near_host(place.boot_id, place.path)):
            answer = near_hello(place, dict(shown.metadata).get("authorization", ""))
            assert answer.board is ("read" in rights_of(shown.identity)), (shown, answer)
            assert bool(answer.refusal) is not answer.board


def test_s4_a_model_that_one_may_not_read_looks_like_one_that_is_not_there(secured: Secured) -> None:
    with EmbeddingClient(secured.members.address, tls=secured.token("reader"), timeout=60) as client:
        assert [model.name for model in client.models()] == [SEEN]
        for name in (f"{HIDDEN}/ngram", f"{HIDDEN}@1/ngram", "absent/ngram"):
            with pytest.raises(NotFound) as raised:
                client.lookup(name, torch.arange(3))
            model = name.partition("/")[0]
            branch = "; rows of a branch are read while client.train lasts" if "@" in model else ""
            assert str(raised.value) == f"no model {model!r} is served; served models: {SEEN}@1{branch}"
    # Nor to who asks a shard by himself, with the routing of another one.
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(f"{HIDDEN}/ngram", torch.arange(3))
        term, epoch = client._router.current.age  # type: ignore[union-attr]
    for model in (HIDDEN, f"{HIDDEN}@1", "absent@1"):
        for age in ((0, 0), (term, epoch)):
            request = wire.LookupRequest(model=model, table="ngram", ids=[1], term=age[0], epoch=age[1])
            for address in secured.addresses().values():
                code = call(
                    address,
                    "embedding.v1.EmbeddingService/Lookup",
                    secured.token("reader"),
                    request.SerializeToString(),
                )
                assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT)


def test_s4_refusals_say_what_is_missing(secured: Secured) -> None:
    address = secured.members.address
    with EmbeddingClient(address, tls=secured.ca) as client, pytest.raises(Unauthenticated, match="authorization"):
        client.lookup(TABLE, torch.arange(3))
    said = r"stranger has no right .* read of a model"
    with EmbeddingClient(address, tls=secured.token("stranger")) as client, pytest.raises(PermissionDenied, match=said):
        client.lookup(TABLE, torch.arange(3))
    with pytest.raises(PermissionDenied, match="admin or member"):
        get_status(address, tls=secured.token("reader"))


LOOKUPS = [f"embedding.v1.EmbeddingService/{name}" for name in ("Lookup", "StreamLookup", "LookupNgrams")]
REFUSED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
SENSIBLE = st.builds(
    wire.LookupRequest,
    model=st.sampled_from([SEEN, SEEN, SEEN, f"{SEEN}@1", HIDDEN, "", "\x1b"]),
    table=st.sampled_from(["ngram", "ngram", "ngram", "words", ""]),
    ids=st.lists(st.integers(-1, 2500) | st.just(2**40), max_size=6),
    epoch=st.sampled_from([0, 0, 0, 1, 2**63]),
).map(wire.LookupRequest.SerializeToString)


@pytest.fixture(scope="module")
def channel(secured: Secured) -> Iterator[grpc.Channel]:
    """A connection without a token."""
    with channel_to(secured.members.address, secured.ca) as opened:
        yield opened


@pytest.mark.fuzz
@drawn_with_others
@given(
    drawn=SENSIBLE | SENSIBLE | messages(PACKED | st.binary(max_size=20)),
    path=st.sampled_from(LOOKUPS),
    token=st.sampled_from(["reader", "reader", "reader", "trainer"]) | st.text("abc{}.=", max_size=9),
)
def test_s3_s4_any_bytes_over_tls_bring_the_rows_that_they_ask_for_or_a_refusal(
    secured: Secured, channel: grpc.Channel, drawn: bytes, path: str, token: str
) -> None:
    """And nothing to who has no token that counts, whatever his message is."""
    # One message a call, whatever the method takes: so no thread of the client's has to send them.
    method, shown = channel.unary_stream(f"/{path}"), [("authorization", f"Bearer {token}")]
    streamed = path.endswith("StreamLookup")

    def asked(message: bytes) -> Any:
        sent = b"\x08\x07\x12" + varint(len(message)) + message if streamed else message
        return method(sent, timeout=120, metadata=shown)

    for message, under_way in [(message, asked(message)) for message in alike(drawn)]:
        check_answer(under_way, message, path, token)


def check_answer(under_way: Any, message: bytes, path: str, token: str) -> None:
    """Look at what comes."""
    streamed = path.endswith("StreamLookup")
    try:
        answer = next(under_way)
    except grpc.RpcError as error:
        expected = {"reader": REFUSED, "trainer": {grpc.StatusCode.PERMISSION_DENIED}}
        code = error.code()  # type: ignore[attr-defined]
        assert code in expected.get(token, {grpc.StatusCode.UNAUTHENTICATED}), (message, error)
        return
    under_way.cancel()
    assert token == "reader", message
    if path.endswith("LookupNgrams"):
        wire.LookupNgramsRequest.FromString(message)
        return
    rows = wire.LookupResponse()
    if streamed:
        said = wire.StreamLookupResponse.FromString(answer)
        if said.HasField("error"):
            assert said.error.code in {each.value[0] for each in REFUSED}, message
            return
        rows = said.rows
    else:
        rows = wire.LookupResponse.FromString(answer)
    asked = wire.LookupRequest.FromString(message)
    assert asked.table == "ngram" and asked.model in (SEEN, f"{SEEN}@1"), message
    ids = [*asked.ids, *np.frombuffer(asked.ids_int64, "<i8"), *np.frombuffer(asked.ids_uint32, "<u4")]
    if asked.encoding in (wire.ROW_ENCODING_UNSPECIFIED, wire.ROW_ENCODING_FLOAT32, wire.ROW_ENCODING_STORED):
        assert rows.rows == longcat_table()[torch.tensor(ids, dtype=torch.int64)].numpy().tobytes(), message


def test_s5_a_forwarded_lookup_is_authorized_where_it_comes_in(secured: Secured) -> None:
    table = longcat_table()
    request = wire.LookupRequest(model=SEEN, table="ngram", ids=range(0, len(table), 50))
    for address in secured.addresses().values():  # each has to ask the other one
        with grpc.secure_channel(address, secured.token("reader").credentials()) as channel:
            method = channel.unary_unary(
                "/embedding.v1.EmbeddingService/Lookup",
                wire.LookupRequest.SerializeToString,
                wire.LookupResponse.FromString,
            )
            rows = torch.frombuffer(bytearray(method(request, timeout=120).rows), dtype=torch.float32).view(
                -1, table.shape[1]
            )
        assert torch.equal(rows, table[::50])


def all_parts(secured: Secured) -> list[control.PartRef]:
    """As a report that claims all there is names them."""
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, torch.arange(3))
        models = client._router.current.message.models  # type: ignore[union-attr]
    return [
        control.PartRef(model=each.model.name, version=each.model.version, table=table.name, part=part)
        for each in models
        for table, placed in zip(each.model.tables, each.tables, strict=True)
        for part in range(len(placed.parts))
    ]


def test_s6_a_member_registers_as_its_own_shard_alone(secured: Secured) -> None:
    """With a member's certificate of another shard, and with terms that no clock has."""
    [taken] = [address for name, address in secured.addresses().items() if name == "shard-0"]
    sound = {
        "shard_id": "shard-0",
        "address": taken,
        "device": "cpu",
        "tier": "ram",
        "incarnation": 5,
        "memory_limit": 1,
    }
    before = secured.members.status()
    register, other = "embedding.v1.ControlService/Register", secured.certificate("shard/shard-7")
    claims_all = {**sound, "has_parts": True, "parts": all_parts(secured)}
    elsewhere = {**sound, "shard_id": "shard-7", "address": "10.0.0.1:1"}
    for report in (sound, claims_all, elsewhere, {**sound, "term": 2**64 - 1}):
        message = control.ShardReport(**report).SerializeToString()  # type: ignore[arg-type]
        assert call(secured.members.control, register, other, message) is grpc.StatusCode.PERMISSION_DENIED
    own = secured.certificate("shard/shard-0")
    later = 2 * 86_400_000_000 + time.time_ns() // 1_000
    for term in (later, 2**51, 2**64 - 1):
        message = control.ShardReport(**{**sound, "term": term}).SerializeToString()  # type: ignore[arg-type]
        assert call(secured.members.control, register, own, message) is grpc.StatusCode.INVALID_ARGUMENT
    message = control.ShardReport(**sound).SerializeToString()  # type: ignore[arg-type]
    assert call(secured.members.control, register, own, message) is grpc.StatusCode.ALREADY_EXISTS
    # One that comes in soundly, and says such a term later.
    joining = {**sound, "shard_id": "shard-7", "address": "127.0.0.1:1"}
    reports = [control.ShardReport(**{**joining, **more}) for more in ({}, {"term": later})]  # type: ignore[arg-type]
    with (
        grpc.secure_channel(secured.members.control, other.credentials()) as channel,
        pytest.raises(grpc.RpcError, match="a day ahead of this clock"),
    ):
        list(ControlServiceStub(channel).Register(iter(reports), timeout=30))
    until(lambda: len(secured.members.status().shards) == 2, "it to be forgotten")
    assert secured.members.status().term == before.term


def test_s6_a_member_follows_a_branch_as_its_own_shard_alone(secured: Secured) -> None:
    """What a copy says it has counts as kept. So nobody else may say it, nor who has no certificate."""
    [address] = [address for name, address in secured.addresses().items() if name == "shard-0"]
    follow = "embedding.v1.TrainingService/Follow"
    message = training.FollowRequest(branch=f"{SEEN}@live", share="0", shard="shard-1").SerializeToString()
    refused, not_there = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND
    for name, code in (("shard/shard-7", refused), ("controller", refused), ("shard/shard-1", not_there)):
        assert call(address, follow, secured.certificate(name), message) is code, name
    assert call(address, follow, secured.token("admin"), message) is refused


def test_s3_a_revoked_token_is_refused_within_two_seconds_on_open_streams_too(secured: Secured) -> None:
    """Streams of every method, at every process, that nobody uses when the policy changes."""
    table = longcat_table()
    access, member = secured.token("second"), secured.certificate(f"guest/{GUEST}")
    policy = secured.folder / "policy.toml"
    kept = policy.read_text()
    more = {
        "second": {"tokens": ["second"], "read": [SEEN]},
        "guest": {"certificates": [f"{URI}/guest/*"], "rights": ["member"]},
    }
    write_policy(secured.folder, {**POLICY, **more})
    with OpenStreams() as open_streams, EmbeddingClient(secured.members.address, tls=access) as client:

        def lets_in() -> bool:
            try:
                return torch.equal(client.lookup(TABLE, torch.arange(3)), table[:3])
            except Unauthenticated:
                return False

        try:
            until(lets_in, "the new token")
            addresses = [secured.members.address] * 4 + list(secured.addresses().values())
            for address in addresses:
                open_streams.open(address, "embedding.v1.EmbeddingService/StreamLookup", access)
                open_streams.open(address, "grpc.health.v1.Health/Watch", access)
            for address in (addresses[-1], secured.members.client_address):
                open_streams.open(address, "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", access)
            open_streams.open(secured.members.control, "embedding.v1.ControlService/Register", member)
            write_policy(secured.folder, POLICY)
            for path, stream in open_streams.streams:
                if not path.startswith("grpc.health"):
                    with pytest.raises(grpc.RpcError) as raised:
                        next(stream)
                    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED, path
            assert all(stream.is_active() for path, stream in open_streams.streams if path.startswith("grpc.health"))
            until(lambda: not lets_in(), "the end of near rows too")
        finally:
            policy.write_text(kept)
    until(lambda: GUEST not in secured.addresses(), "the end of the guest")


def test_s9_what_is_served_and_who_drains_is_noted(secured: Secured) -> None:
    def noted(action: str) -> list[tuple[str, str]]:
        lines = map(json.loads, (secured.folder / "audit.jsonl").read_text().splitlines())
        return [(each["who"], each.get("model") or each.get("shard")) for each in lines if each["action"] == action]

    assert {(SEEN, "controller"), (HIDDEN, "controller")} <= {(of.partition("@")[0], who) for who, of in noted("serve")}
    with OpenStreams() as open_streams:
        member = secured.certificate(f"shard/{GUEST}")
        open_streams.open(secured.members.control, "embedding.v1.ControlService/Register", member)
        assert ("members", GUEST) in noted("drain")
    until(lambda: GUEST not in secured.addresses(), "the end of the guest")


class _Astray(EmbeddingServiceServicer):
    """A shard that a stranger has taken over. It says that it holds all there is, in a routing newer than any."""

    def __init__(self, routing: wire.Routing, address: str, files: Access) -> None:
        self.asked = 0
        self._routing = wire.Routing(term=2**51, epoch=1, limits=routing.limits, models=routing.models)
        self._routing.shards.add(id="shard-0", address=address)
        for model in self._routing.models:
            for table in model.tables:
                for part in table.parts:
                    part.shards[:] = [0]
        assert files.certificate and files.key
        self._routing.signature = sign_routing(self._routing, Signer(files.certificate, files.key))

    def GetRouting(self, request: wire.GetRoutingRequest, context: Any) -> wire.Routing:
        self.asked += 1
        return self._routing


def test_s6_a_shard_that_was_taken_over_leads_no_client_astray(secured: Secured) -> None:
    table, files = longcat_table(), secured.certificate("shard/shard-0")
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, torch.arange(3))
        routing = client._router.current.message  # type: ignore[union-attr]
    server = grpc.server(ThreadPoolExecutor(4))
    certificate, key = pair_of(files)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    astray = _Astray(routing, f"127.0.0.1:{port}", files)
    add_EmbeddingServiceServicer_to_server(astray, server)
    server.start()
    try:
        addresses = [f"127.0.0.1:{port}", secured.members.address]
        with EmbeddingClient(addresses, tls=secured.token("reader"), timeout=60) as client:
            for _ in range(20):
                assert torch.equal(client.lookup(TABLE, torch.arange(50)), table[:50])
                client._router._looks_at = 0.0
        assert astray.asked
        said = "signed by another member"
        with EmbeddingClient(addresses[0], tls=files, timeout=2) as client, pytest.raises(Unavailable, match=said):
            client.lookup(TABLE, torch.arange(3))
    finally:
        server.stop(None).wait()


def test_s2_files_that_are_replaced_count_on_both_sides_and_no_lookup_is_lost(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_OUTDATED_SECONDS", float("inf"))
    table, folder, ids = longcat_table(), secured.folder, torch.arange(0, 3000, 11)
    access = secured.certificate("reader")
    hosts = ["localhost", "127.0.0.1"]

    def replace_all(**days: float) -> None:
        authority = Authority.load(folder)
        for name in ("shard-0", "shard-1"):
            authority.issue(folder / name, [f"{URI}/shard/{name}", name, *hosts], **days)
        authority.issue(folder / "controller", [f"{URI}/controller", *hosts], **days)
        secured.certificate("reader", None, **days)
        write_policy(folder, POLICY)

    def look_up(client: EmbeddingClient) -> None:
        assert torch.equal(client.lookup(TABLE, ids), table[ids])

    with EmbeddingClient(secured.members.address, tls=access, timeout=60) as one:
        for _ in range(20):
            replace_all()
            look_up(one)
            with EmbeddingClient(secured.members.address, tls=access, timeout=60) as another:
                look_up(another)
        replace_all(begins=-2, days=-1)
        with EmbeddingClient(secured.members.address, tls=access, timeout=1) as another, pytest.raises(Unavailable):
            look_up(another)
        replace_all()
        until(lambda: _connects(secured, access), "certificates that count again")
        look_up(one)

        def all_are_new() -> bool:
            look_up(one)
            return not one._transport._outdated

        until(all_are_new, "the end of connections that show files of before")


def _connects(secured: Secured, access: Access) -> bool:
    code = call(secured.members.address, "embedding.v1.EmbeddingService/ListModels", access)
    return code is grpc.StatusCode.OK


def test_n5_near_rows_are_those_of_models_that_one_may_read(secured: Secured) -> None:
    table, ids = longcat_table(), torch.arange(0, 3000, 7)
    for access in (secured.token("reader"), secured.certificate("reader")):
        with EmbeddingClient(secured.members.address, tls=access, near=True, timeout=60) as client:

            def is_near() -> bool:
                wired = client.statistics.wired_rows
                assert torch.equal(client.lookup(TABLE, ids), table[ids])
                return client.statistics.wired_rows == wired

            until(is_near, "rows that are near")
            view = until(client._near._reader.view, "a view")  # type: ignore[union-attr]
            assert {model for model, _ in view.tables} == {f"{SEEN}@1"}
    # A client that did not say whose it is, where the routing of another one leads.
    reader = NearReader()
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, ids)
        near = [shard.near for shard in client._router.current.message.shards]  # type: ignore[union-attr]
    reader.follow([Place(str(n), each.path, each.boot_id, each.incarnation) for n, each in enumerate(near)])
    try:
        until(lambda: all("authorization" in said for said in reader.states().values()), "refusals")
        assert reader.view() is None
    finally:
        reader.close()


def test_a_client_of_plain_text_hears_that_nobody_answers(secured: Secured) -> None:
    with EmbeddingClient(secured.members.address, tls=False, timeout=1) as client, pytest.raises(Unavailable):
        client.lookup(TABLE, torch.arange(3))


def own_rows(secured: Secured, shard: str) -> range:
    """Rows of a part that this shard has."""
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, torch.arange(3))
        routing = client._router.current.message  # type: ignore[union-attr]
    [model] = [each for each in routing.models if each.model.name == SEEN]
    number = [each.id for each in routing.shards].index(shard)
    part = next(part for part, owners in enumerate(model.tables[0].parts) if number in owners.shards)
    per_part = model.model.tables[0].rows_per_part
    return range(part * per_part, (part + 1) * per_part)


def test_s7_what_is_over_a_quota_is_refused_and_comes_when_the_client_waited(secured: Secured) -> None:
    table, access = longcat_table(), secured.token("limited")
    [address] = [address for name, address in secured.addresses().items() if name == "shard-0"]
    wanted = wire.LookupRequest(model=SEEN, table="ngram", ids=range(5000))
    with grpc.secure_channel(address, access.credentials()) as channel:
        stub = EmbeddingServiceStub(channel)

        def refused(ask: Callable[..., object], request: object) -> grpc.RpcError | None:
            try:
                ask(request, timeout=30)
            except grpc.RpcError as error:
                return error
            return None

        ngrams = wire.LookupNgramsRequest(model=SEEN, token_ids=[1, 2] * 500)
        error: Any = until(lambda: refused(stub.LookupNgrams, ngrams), "n-grams over the quota")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # Each way to answer counts by itself: rows of several shards, and those that are answered at once.
        for asked_for in (wanted, wire.LookupRequest(model=SEEN, table="ngram", ids=own_rows(secured, "shard-0"))):
            until(lambda asked_for=asked_for: refused(stub.Lookup, asked_for) is None, "the quota to be back")  # type: ignore[misc]
            error = until(lambda asked_for=asked_for: refused(stub.Lookup, asked_for), "a lookup over the quota")  # type: ignore[misc]
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "limited has used its quota" in error.details()
        assert 0 < int(dict(error.trailing_metadata())[PUSHBACK]) < 60_000
        # On a stream too, and calls that are open count.
        asked = wire.StreamLookupRequest(request_id=7, lookup=wanted)
        over = threading.Event()

        def requests() -> Iterator[wire.StreamLookupRequest]:
            for _ in range(1000):
                yield asked
            over.wait()

        def nothing() -> Iterator[wire.StreamLookupRequest]:
            over.wait()
            yield from ()

        streams = [stub.StreamLookup(requests(), timeout=120)]
        failure = next(answer.error for answer in streams[0] if answer.HasField("error"))
        assert failure.code == error.code().value[0] and failure.retry_after_ms > 0
        streams += [stub.StreamLookup(nothing(), timeout=120) for _ in range(3)]
        ends: Any = until(lambda: next((each for each in streams if each.done()), None), "one stream too many")
        assert ends.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "3 calls open" in ends.details()
        over.set()
        for each in streams:
            each.cancel()
    with EmbeddingClient(secured.members.address, tls=access, near=False, timeout=120) as client:
        for begin in range(0, len(table), 1000):
            assert torch.equal(client.lookup(TABLE, torch.arange(begin, len(table))[:1000]), table[begin:][:1000])


class _Forged(EmbeddingServiceServicer):
    """A member that claims to hold what it does not have: each of its rows is zeros."""

    def __init__(self, row_bytes: int) -> None:
        self.asked = 0
        self._row_bytes = row_bytes

    def Lookup(self, request: wire.LookupRequest, context: Any) -> wire.LookupResponse:
        self.asked += 1
        return wire.LookupResponse(rows=bytes(self._row_bytes * len(request.ids)))


def test_s6_a_member_that_claims_all_parts_is_asked_for_none(secured: Secured) -> None:
    table, files = longcat_table(), secured.certificate("shard/shard-9")
    with EmbeddingClient(secured.members.address, tls=secured.token("admin")) as client:
        client.lookup(TABLE, torch.arange(3))
        placements = list(client._router.current.message.models)  # type: ignore[union-attr]
    server, over = grpc.server(ThreadPoolExecutor(4)), threading.Event()
    certificate, key = pair_of(files)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    forged = _Forged(table.shape[1] * 4)
    add_EmbeddingServiceServicer_to_server(forged, server)
    server.start()
    about = {"shard_id": "shard-9", "address": f"127.0.0.1:{port}", "device": "cpu", "tier": "ram", "incarnation": 9}
    parts = [
        control.PartRef(model=each.model.name, version=each.model.version, table=info.name, part=part)
        for each in placements
        for info, owners in zip(each.model.tables, each.tables, strict=True)
        for part in range(len(owners.parts))
    ]

    def reports() -> Iterator[control.ShardReport]:
        yield control.ShardReport(**about, memory_limit=64 << 20, has_parts=True, parts=parts)  # type: ignore[arg-type]
        number = 0
        while not over.wait(0.2):
            number += 1
            yield control.ShardReport(**about, memory_limit=64 << 20, obeyed=number)  # type: ignore[arg-type]

    def is_named() -> bool:
        said = [problem.message for problem in secured.members.status().problems]
        return any("shard-9" in message and NOT_THE_STORES in message for message in said)

    try:
        with (
            grpc.secure_channel(secured.members.control, files.credentials()) as channel,
            EmbeddingClient(secured.members.address, tls=secured.token("reader"), timeout=60) as client,
        ):
            assignments = ControlServiceStub(channel).Register(reports())
            assert next(assignments).term
            until(is_named, "the shard whose rows are not the store's")
            for _ in range(20):
                assert torch.equal(client.lookup(TABLE, torch.arange(len(table))), table)
                client._router._looks_at = 0.0
            named = {shard.address for shard in client._router.current.message.shards}  # type: ignore[union-attr]
            assert forged.asked and about["address"] in named
            owners = [
                part.shards
                for model in client._router.current.message.models  # type: ignore[union-attr]
                for placed in model.tables
                for part in placed.parts
            ]
            ninth = [shard.id for shard in client._router.current.message.shards].index("shard-9")  # type: ignore[union-attr]
            assert owners and not any(ninth in shards for shards in owners)
    finally:
        over.set()
        server.stop(None).wait()


def test_s6_a_controller_that_starts_again_believes_what_was_signed(secured: Secured) -> None:
    table, ids = longcat_table(), torch.arange(0, 3000, 7)
    before = secured.members.status().term
    with EmbeddingClient(secured.members.address, tls=secured.token("reader"), timeout=60) as client:
        secured.members.restart_member("controller")

        def is_new() -> bool:
            assert torch.equal(client.lookup(TABLE, ids), table[ids])
            try:
                status = secured.members.status()
            except Unavailable:
                return False
            return status.term > before and all(model.serving for model in status.models) and len(status.models) > 0

        until(is_new, "the routing of the controller that started again")
        assert torch.equal(client.lookup(TABLE, ids), table[ids])


def test_s2_an_authority_is_replaced_while_the_service_runs(secured: Secured) -> None:
    """Both are believed, then certificates of the new one come, then the old one goes: no process starts again."""
    table, ids, folder = longcat_table(), torch.arange(0, 3000, 13), secured.folder
    old, new = Authority.load(folder), Authority.create()
    hosts = ["localhost", "127.0.0.1"]
    members = {"controller": [f"{URI}/controller", *hosts]}
    members |= {name: [f"{URI}/shard/{name}", name, *hosts] for name in ("shard-0", "shard-1")}
    alone = replace(secured.token("reader"), ca=folder / "alone.crt")

    def believe(*authorities: Authority) -> None:
        for name in (*members, "."):
            write_private(folder / name / "ca.crt", b"".join(each.pem for each in authorities))

    def is_right(access: Access, timeout: float = 10) -> bool:
        try:
            with EmbeddingClient(secured.members.address, tls=access, near=False, timeout=timeout) as client:
                return torch.equal(client.lookup(TABLE, ids), table[ids])
        except (Unavailable, Unauthenticated):
            return False

    def change(to: Authority, before: Authority) -> None:
        write_private(folder / "alone.crt", to.pem)
        believe(before, to)
        for name, names in members.items():
            to.issue(folder / name, names)
        believe(before, to)
        # Who believes the new one alone is given a routing that it signed.
        until(lambda: is_right(alone), "the new authority")
        believe(to)
        until(lambda: is_right(alone), "the new authority alone")

    pids = {shard.stats.pid for shard in secured.members.status().shards}
    try:
        change(new, old)
        before = replace(alone, ca=folder / "before.crt")
        write_private(folder / "before.crt", old.pem)
        assert not is_right(before, 1)
    finally:
        change(old, new)
    assert {shard.stats.pid for shard in secured.members.status().shards} == pids
