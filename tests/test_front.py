"""What a server's front does with calls of every kind, by toy methods in this process."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.cluster import until
from support.hostile import Raw
from support.toy import TOY, Request, ToyServer, toy_server

from embedding_service import serving
from embedding_service.front import PEER, base
from embedding_service.front.base import REQUEST_AT_ONCE_BYTES
from embedding_service.machine import give_freed_memory_back
from embedding_service.methods import Method, Places
from embedding_service.serving import RequestLimits
from embedding_service.shard.held import HeldRows

ECHO = f"/{TOY}/Echo".encode()
STATUS = health_pb2.HealthCheckResponse.ServingStatus


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyServer]:
    with toy_server(str(tmp_path_factory.mktemp("toy") / "private")) as server:
        yield server


@pytest.fixture
def channel(toy: ToyServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(toy.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel


def ask(channel: grpc.Channel, method: str, text: str = "", timeout: float = 120, **options: Any) -> str:
    call = channel.unary_unary(f"/{TOY}/{method}", Request.SerializeToString, Request.FromString)
    return str(call(Request(service=text), timeout=timeout, **options).service)


def texts(*given: str) -> Iterator[object]:
    return iter([Request(service=text) for text in given])


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return str(raised.value.code().name)


# Calls


def test_calls_of_every_kind(toy: ToyServer, channel: grpc.Channel) -> None:
    codec = Request.SerializeToString, Request.FromString
    assert ask(channel, "Echo", "a").startswith("a, ipv4:127.0.0.1:")
    assert ask(channel, "Quick", "quick") == "at once"
    assert ask(channel, "Quick", "slow").startswith("slow, ")
    repeated = channel.unary_stream(f"/{TOY}/Repeat", *codec)(Request(service="100"), timeout=120)
    assert [each.service.strip() for each in repeated] == [str(number) for number in range(100)]
    joined = channel.stream_unary(f"/{TOY}/Join", *codec)(texts("a", "b", "c"), timeout=120)
    assert joined.service == "abc"
    chat = channel.stream_stream(f"/{TOY}/Chat", *codec)(texts("a", "b"), timeout=120)
    assert [each.service for each in chat] == ["A", "B"]
    each = channel.stream_stream(f"/{TOY}/Each", *codec)(texts("q", *("slow",) * 50, "q"), timeout=120)
    answers = [answer.service.partition(",")[0] for answer in each]
    assert sorted(answers) == ["at once"] * 2 + ["slow"] * 50 or sorted(answers) == ["at once"] + ["q"] + ["slow"] * 50


def test_a_handler_s_status_and_trailing_metadata_arrive(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        ask(channel, "Fail", "why")
    assert (raised.value.code(), raised.value.details()) == (grpc.StatusCode.ABORTED, "aborted: why")
    assert dict(raised.value.trailing_metadata())["toy"] == "1"


def test_a_fault_of_ours_is_internal_and_tells_nothing(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        ask(channel, "Fail", "raise")
    assert (raised.value.code(), raised.value.details()) == (
        grpc.StatusCode.INTERNAL,
        "the server failed; its log says how",
    )
    assert "a secret of the process" in caplog.text
    assert code_of(lambda: channel.unary_unary(f"/{TOY}/Quick")(b"break", timeout=120)) == "INTERNAL"
    assert ask(channel, "Quick", "quick") == "at once"


def test_calls_that_are_given_up_or_late_are_ended_behind_too(toy: ToyServer, channel: grpc.Channel) -> None:
    wait = channel.unary_unary(f"/{TOY}/Wait", Request.SerializeToString, Request.FromString)
    calls = [wait.future(Request()) for _ in range(20)]
    until(lambda: toy.toy.waiting == 20, "calls under way")
    for call in calls:
        call.cancel()
    until(lambda: toy.toy.waiting == 0, "their handlers' ends")
    assert code_of(lambda: wait(Request(), timeout=0.1)) == "DEADLINE_EXCEEDED"
    until(lambda: toy.toy.waiting == 0 and not toy.front.calls, "its handler's end")


# Methods that are none


ODD = [
    b"/",
    b"/x",
    b"//",
    b"/a/b/c",
    b"/toy.toy/Echo",
    b"/" + b"x" * 7000,
    *(pytest.param(path, marks=pytest.mark.polling) for path in (b"/\xff", b"/\xc3\x28/\xa0", b"/toy.Toy/\x80cho")),
]


@pytest.mark.parametrize("path", ODD, ids=lambda path: repr(path[:12]))
def test_a_method_that_is_none_is_refused_at_once(toy: ToyServer, channel: grpc.Channel, path: bytes) -> None:
    before = toy.server.refused
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(path)(b"", timeout=120)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert raised.value.details().startswith("there is no method '/")
    assert len(raised.value.details()) < 500
    assert toy.server.refused == before + 1
    assert ask(channel, "Echo", "after").startswith("after")


def test_after_a_name_that_is_no_text_others_are_answered_or_know_that_they_may_ask_again(
    toy: ToyServer, channel: grpc.Channel
) -> None:
    """It ends the asyncio server of some releases of grpc; then another one takes its place."""
    wait = channel.unary_unary(f"/{TOY}/Wait", Request.SerializeToString, Request.FromString)
    with grpc.insecure_channel(toy.address, [("grpc.use_local_subchannel_pool", 1)]) as theirs:
        for _ in range(3):
            under_way = wait.future(Request(service="under way"), timeout=120)
            until(lambda: toy.toy.waiting == 1, "a call under way")
            assert code_of(lambda: theirs.unary_unary(b"/\xff")(b"", timeout=120)) != "OK"
            codes = {code_of_or_ok(channel) for _ in range(20)}
            until(lambda: code_of_or_ok(channel) == "OK", "an answer")
            toy.run(toy.toy.let_go())
            assert {*codes, under_way.code().name} <= {"OK", "UNAVAILABLE"}
    gc.collect()  # grpc's failure is logged when it is forgotten


def test_a_method_that_nobody_wrote_is_refused_as_one_that_is_not_there(
    channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    assert code_of(lambda: ask(channel, "Absent")) == "UNIMPLEMENTED"
    assert not caplog.records


def test_private_methods_are_none_at_other_addresses(toy: ToyServer, channel: grpc.Channel) -> None:
    """Only there is it believed whose a call is."""
    assert code_of(lambda: ask(channel, "Private")) == "UNIMPLEMENTED"
    claim = ((PEER, "ipv4:1.2.3.4:5"),)
    assert "1.2.3.4" not in ask(channel, "Echo", "a", metadata=claim)
    with grpc.insecure_channel(f"unix:{toy.private}") as inside:
        assert ask(inside, "Private", "a", metadata=claim) == "a, ipv4:1.2.3.4:5"
    assert stat.S_ISSOCK(Path(toy.private).stat().st_mode)


# Messages that are none


@pytest.mark.parametrize("method", ["Echo", "Quick", "Fail", "Repeat", "Join", "Chat", "Each"])
def test_malformed_messages_are_invalid_arguments_and_not_worth_a_log(
    toy: ToyServer, channel: grpc.Channel, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    generator = random.Random(method)
    path = f"/{TOY}/{method}"
    before = toy.server.refused
    malformed = [b"\xff", b"\x0a\x05abc", b"\x0a\x02\xff\xfe", b"\x0c", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
    malformed += [b"\x0a" + generator.randbytes(5) + b"\xff\xff" for _ in range(5)]
    caplog.set_level(logging.WARNING)
    for message in malformed:
        with pytest.raises(grpc.RpcError) as raised:
            list(channel.stream_stream(path)(iter([message]), timeout=120))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details() == "the message is malformed: it is no valid protobuf of this method's request"
    assert toy.server.refused == before + len(malformed)
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["Echo", "Quick", "Repeat"])
def test_a_call_without_a_message(channel: grpc.Channel, method: str) -> None:
    call = channel.stream_stream(f"/{TOY}/{method}")
    with pytest.raises(grpc.RpcError, match="the call holds no request") as raised:
        list(call(iter([]), timeout=120))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_large_messages_are_read_one_at_a_time_off_the_polling_thread(toy: ToyServer, channel: grpc.Channel) -> None:
    readers: set[str] = set()
    at_once, most = 0, 0

    def read(message: bytes) -> object:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        readers.add(threading.current_thread().name.partition("_")[0])
        time.sleep(0.01)  # long enough for a second reader to come
        at_once -= 1
        return Request.FromString(message)

    handler = grpc.unary_unary_rpc_method_handler(toy.toy.echo, read, Request.SerializeToString)
    toy.server.offer(f"{TOY}/Large", Method(handler))
    large = Request(service="x" * (REQUEST_AT_ONCE_BYTES + 1)).SerializeToString()
    call = channel.unary_unary(f"/{TOY}/Large", None, Request.FromString)
    calls = [call.future(large, timeout=120) for _ in range(20)]
    assert all(each.result().service.startswith("xxx") for each in calls)
    assert (readers, most) == ({"reading"}, 1)


def test_compressed_messages_are_refused_before_they_are_unpacked(channel: grpc.Channel) -> None:
    bomb = Request(service="\0" * (1 << 20))
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert code_of(lambda: ask(channel, "Echo", bomb.service, compression=compression)) == "UNIMPLEMENTED"  # noqa: B023
    assert ask(channel, "Echo", "plain").startswith("plain")


def endless_headers(raw: Raw) -> None:
    """One call, 8 MiB of header fields, and no end of them."""
    raw.flood(ECHO, [(b"x-more", b"a" * 16_000)] * 512, end_headers=False)


def calls_of_long_headers(raw: Raw) -> None:
    """8 MiB in calls with more than they may have each."""
    for _ in range(512):
        raw.call(ECHO, extra=[(b"x-long", b"a" * 16_000)])


@pytest.mark.parametrize("flood", [endless_headers, calls_of_long_headers])
def test_floods_of_headers_take_no_memory_and_harm_nobody(
    toy: ToyServer, channel: grpc.Channel, flood: Callable[[Raw], None]
) -> None:
    ask(channel, "Echo", "before")
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in range(16):  # 128 MiB, and of our own never more than two or three times 8
        raw = Raw(toy.address)
        with raw.socket, suppress(OSError):  # it may hang up
            threading.Thread(target=read_all, args=(raw.socket,), daemon=True).start()
            flood(raw)
            assert ask(channel, "Echo", "beside").startswith("beside")
            raw.socket.shutdown(socket.SHUT_RDWR)  # its reader would keep it open
    give_freed_memory_back()
    assert process.memory_info().rss - before < 96 << 20
    assert ask(channel, "Echo", "after").startswith("after")


def read_all(connection: socket.socket) -> None:
    with suppress(OSError):
        while connection.recv(1 << 16):
            pass


def test_headers_over_the_limit_end_their_call_alone(channel: grpc.Channel) -> None:
    ask(channel, "Echo", "a", metadata=(("x", "a" * 4000),))
    assert code_of(lambda: ask(channel, "Echo", "a", metadata=(("x", "a" * 17_000),))) == "RESOURCE_EXHAUSTED"
    assert ask(channel, "Echo", "after").startswith("after")


def test_connections_beyond_the_files_for_them_are_closed_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "room_for_connections", lambda: 3)
    with toy_server(str(tmp_path / "private")) as few:
        connections = [Raw(few.address) for _ in range(3)]
        for each in connections:
            assert each.socket.recv(9)  # the server's settings: it took the connection
        with suppress(OSError):  # it may be closed before anything is sent
            assert Raw(few.address).socket.recv(9) == b""
        connections.pop().close()

        def taken_in() -> bool:
            with suppress(OSError):
                connections.append(Raw(few.address))
                return connections[-1].socket.recv(9) != b""
            return False

        until(taken_in, "the place of the one that hung up")
        for each in connections:
            each.close()


# Streams that stay open


def test_places_are_counted_by_host_and_in_all() -> None:
    places = Places(3, 2)
    assert [places.take("a"), places.take("a"), places.take("b")] == ["", "", ""]
    assert places.take("b").startswith("3 such streams are open at this server")
    places.leave("b")
    assert places.take("a").startswith("2 such streams of a are open at this server")
    assert places.take("b") == ""


def room_of(places: Places) -> tuple[int, int]:
    """How many streams have a place in all, and from one host."""
    taken = {host: next(number for number in itertools.count() if places.take(host)) for host in "abc"}
    for host, number in taken.items():
        for _ in range(number):
            places.leave(host)
    return sum(taken.values()), taken["a"]


def test_streams_have_the_places_that_the_rule_names(toy: ToyServer) -> None:
    """Watches and streams of lookups cost little and have many, each kind its own. All others share theirs."""
    HeldRows(lambda *_: None, RequestLimits()).offer_lookups(toy.server, None, None)
    places = {path.decode().rpartition("/")[2]: method.places for path, method in toy.server._methods.items()}
    watches, lookups, chats = places["Watch"], places["StreamLookup"], places["Chat"]
    assert watches and lookups and chats
    assert room_of(watches) == room_of(lookups) == (16_384, 12_288)
    assert watches is not lookups
    assert room_of(chats) == (4_096, 2_048)
    assert all(places[name] is chats for name in ("Repeat", "Join"))
    assert all(places[name] is None for name in ("Echo", "Check", "Lookup"))


def test_streams_beyond_their_places_are_refused_and_come_in_when_others_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STREAMS", (3, 2))
    with toy_server(str(tmp_path / "private")) as few:
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(few.address, options) as channel:
            chat = channel.stream_stream(f"/{TOY}/Chat", Request.SerializeToString, Request.FromString)
            ends = [threading.Event() for _ in range(2)]
            chats = [chat(held_open(end), timeout=120) for end in ends]
            assert [next(each).service for each in chats] == ["A", "A"]
            with pytest.raises(grpc.RpcError, match=r"2 such streams of ipv4:127\.0\.0\.1 are open") as raised:
                next(chat(held_open(ends[0]), timeout=120))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert ask(channel, "Echo", "unary").startswith("unary")
            for end in ends:
                end.set()
            for each in chats:
                assert list(each) == []
            until(lambda: code_of_chat(chat) == "OK", "a place")


def held_open(end: threading.Event) -> Iterator[object]:
    yield Request(service="a")
    end.wait(120)


def code_of_chat(chat: Callable[..., Iterator[Any]]) -> str:
    try:
        return "OK" if [each.service for each in chat(texts("a"), timeout=120)] == ["A"] else "wrong"
    except grpc.RpcError as error:
        return str(error.code().name)


def test_a_client_that_does_not_read_gets_no_more_than_a_stream_holds(toy: ToyServer, channel: grpc.Channel) -> None:
    """The handler waits until what it said was taken."""
    repeat = channel.unary_stream(f"/{TOY}/Repeat", Request.SerializeToString, Request.FromString)
    call = repeat(Request(service="1000000"), timeout=120)
    assert next(call).service.strip() == "0"

    def quiet() -> bool:
        before = toy.toy.said
        time.sleep(0.3)
        return toy.toy.said == before

    until(quiet, "it to say no more")
    assert toy.toy.said < 10_000
    call.cancel()
    until(lambda: not toy.front.calls, "its end")


# Health


def watch(channel: grpc.Channel, service: str = "", **options: Any) -> Iterator[int]:
    for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), **options):
        yield answer.status


def test_health_is_checked_and_watched(toy: ToyServer, channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    toy.run(toy.server.set_serving(False))
    watches = {name: watch(channel, name, timeout=120) for name in ("", TOY, "nobody", serving.ALIVE)}
    first = {name: next(statuses) for name, statuses in watches.items()}
    assert first == {
        "": STATUS.Value("NOT_SERVING"),
        TOY: STATUS.Value("NOT_SERVING"),
        "nobody": STATUS.Value("SERVICE_UNKNOWN"),
        serving.ALIVE: STATUS.Value("SERVING"),
    }
    toy.run(toy.server.set_serving(True))
    assert next(watches[""]) == next(watches[TOY]) == STATUS.Value("SERVING")
    for name in ("", TOY, serving.ALIVE):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=120).status == STATUS.Value("SERVING")
    assert code_of(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=120)) == "NOT_FOUND"


def test_bad_watches(channel: grpc.Channel) -> None:
    assert code_of(lambda: list(watch(channel, "x" * 1000, timeout=120))) == "INVALID_ARGUMENT"
    raw = channel.unary_stream("/grpc.health.v1.Health/Watch")
    assert code_of(lambda: list(raw(b"\xff", timeout=120))) == "INVALID_ARGUMENT"


def test_grpc_s_own_health_checking_takes_and_leaves_a_server(toy: ToyServer) -> None:
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": TOY}}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.use_local_subchannel_pool", 1)]
    toy.run(toy.server.set_serving(True))
    with grpc.insecure_channel(toy.address, options) as channel:
        assert ask(channel, "Echo", "a", wait_for_ready=True).startswith("a")
        toy.run(toy.server.set_serving(False))
        until(lambda: code_of_or_ok(channel) == "UNAVAILABLE", "the channel to leave the server")
        toy.run(toy.server.set_serving(True))
        assert ask(channel, "Echo", "b", wait_for_ready=True).startswith("b")


def code_of_or_ok(channel: grpc.Channel) -> str:
    try:
        ask(channel, "Echo")
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.polling
@pytest.mark.slow
def test_idle_watches_cost_no_thread_and_no_work(toy: ToyServer) -> None:
    """8 connections of 250 each. The clients' own threads end with each call: they are grpc's."""
    channels = [grpc.insecure_channel(toy.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
    tasks = toy.run(count_tasks())
    threads_of_front = {thread.name for thread in threading.enumerate() if "Dummy" not in thread.name}
    calls = [
        channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=120)
        for channel in channels
        for _ in range(250)
    ]
    try:
        for call in calls:
            next(call)
        assert len(toy.front.calls) == len(calls)
        assert toy.run(count_tasks()) == tasks
        assert (
            not {t.name for t in threading.enumerate() if "reading" in t.name or "asyncio" in t.name} - threads_of_front
        )
    finally:
        for channel in channels:
            channel.close()
    until(lambda: not toy.front.calls, "all of them to be forgotten")
    assert not toy.server.health._watches


async def count_tasks() -> int:
    import asyncio

    return len(asyncio.all_tasks())
