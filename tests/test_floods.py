"""What is done about peers that send bytes that are no messages, on sockets and servers in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest
from support.cluster import until
from support.hostile import Raw, further_headers
from support.toy import TOY, Request, ToyServer, toy_server

from embedding_service import floods
from embedding_service.floods import FREE_BYTES, FREE_BYTES_AGAIN, LOOK_SECONDS, LOOKS, Arrivals, FloodGuard
from embedding_service.front.base import MOST_FIELDS
from embedding_service.security.identity import Caller
from embedding_service.sockets import Connection, address_of, connections, cut, keep_out

pytestmark = pytest.mark.slow

ECHO = f"/{TOY}/Echo"
OWN = [("grpc.use_local_subchannel_pool", 1)]


# Sockets


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as listening:
        yield listening


def port_of(listening: socket.socket) -> int:
    return int(listening.getsockname()[1])


def dial(listening: socket.socket, timeout: float = 30) -> socket.socket:
    return socket.create_connection(listening.getsockname()[:2], timeout)


def connections_at(ports: set[int]) -> list[Connection]:
    return [each for each in connections(ports) if each.incoming]


def only(found: list[Connection]) -> Connection:
    (connection,) = found
    return connection


def test_what_came_on_a_connection(listener: socket.socket) -> None:
    ports = {port_of(listener)}
    assert connections_at(ports) == []
    with dial(listener) as theirs, listener.accept()[0] as ours:
        theirs.sendall(b"x" * 1000)
        until(lambda: only(connections_at(ports)).unread == 1000, "what was sent")
        assert len(ours.recv(300)) == 300
        ours.sendall(b"y" * 20)
        until(lambda: only(connections_at(ports)).sent == 20, "the answer's way")
        there = only(connections_at(ports))
        assert (there.read, there.unread, there.file) == (300, 700, ours.fileno())
        host, port = theirs.getsockname()[:2]
        assert there.peer == (f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}")
        assert address_of(there.host) == host
        (outgoing,) = [each for each in connections(ports) if each.file == theirs.fileno()]
        assert (outgoing.incoming, outgoing.read + outgoing.unread, outgoing.sent) == (False, 20, 1000)


def test_a_cut_connection_has_nothing_to_read(listener: socket.socket) -> None:
    with dial(listener) as theirs, listener.accept()[0] as ours, dial(listener) as others, listener.accept()[0] as kept:
        theirs.sendall(b"x" * 100_000)
        others.sendall(b"z")
        ports = {port_of(listener)}
        until(lambda: sum(each.unread for each in connections_at(ports)) == 100_001, "what was sent")
        cut(max(connections_at(ports), key=lambda each: each.unread))
        assert ours.recv(10) == b""
        assert kept.recv(10) == b"z"
        with pytest.raises(OSError):
            for _ in range(1000):
                theirs.sendall(b"x" * 100_000)


def test_what_a_peer_left_behind_that_reset_its_connection_can_be_dropped(listener: socket.socket) -> None:
    ports = {port_of(listener)}
    with listener, dial(listener) as theirs, listener.accept()[0] as ours:
        ours.sendall(b"never read, so that its end is a reset")
        theirs.sendall(b"x" * 100_000)
        until(lambda: only(connections_at(ports)).unread == 100_000, "what was sent")
        theirs.close()
        until(lambda: not only(connections_at(ports)).peer, "its end")
        cut(only(connections_at(ports)))
        with suppress(ConnectionResetError):
            assert ours.recv(10) == b""


def test_another_connection_under_the_same_descriptor_is_not_cut(listener: socket.socket) -> None:
    with dial(listener) as theirs, listener.accept()[0] as ours:
        there = only(connections_at({port_of(listener)}))
        cut(Connection(ours.fileno(), True, "ipv4:192.0.2.1:5", there.read, there.unread, there.sent))
        theirs.sendall(b"x")
        assert ours.recv(1) == b"x"


def test_hosts_are_kept_out_and_let_in_again(listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    named = f"ipv6:%5B{host}%5D" if ":" in host else f"ipv4:{host}"
    others = ("ipv4:192.0.2.1", "ipv6:%5B2001:db8::1%5D", "ipv4:192.0.2.2", "ipv6:%5Bfe80::1%25eth0%5D")
    with dial(listener) as theirs, listener.accept()[0] as ours:
        keep_out({port_of(listener)}, others)
        with dial(listener), listener.accept()[0]:
            pass
        keep_out({port_of(listener)}, (*others, named))
        with pytest.raises(TimeoutError):
            dial(listener, 0.2)
        theirs.sendall(b"x")  # what is open stays open
        assert ours.recv(1) == b"x"
        keep_out({port_of(listener)}, ())
        with dial(listener), listener.accept()[0]:
            pass


# Judgement, on a clock and with connections of the test's own


class Scene:
    """A guard, and the world as it sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrivals = Arrivals()
        self.guard = FloodGuard(self.arrivals)
        self.now = 0.0
        self.spent = {1: 0.0}  # by thread
        self.there: dict[str, list[int]] = {}
        self.forwarded = 0
        self.cut: list[str] = []
        self.out: set[str] = set()
        self.guard._spent = self.spent.copy()
        monkeypatch.setattr(self.guard, "_reading_seconds", self.spent.copy)
        self.ticks = [0, 0]  # own and the kernel's
        monkeypatch.setattr(self.guard, "_ticks", lambda: {1: tuple(self.ticks)})
        monkeypatch.setattr(floods, "connections", lambda ports: self._connections())
        monkeypatch.setattr(floods, "cut", self._cut)
        monkeypatch.setattr(floods, "keep_out", self._keep_out)

    def look(self, *, busy: float, seconds: float = LOOK_SECONDS, kernels: bool = False) -> None:
        """Time passes, of which gRPC's threads took so much, or the kernel for them."""
        self.now += seconds
        self.spent[1] += busy * seconds
        self.ticks[kernels] += 1
        self.guard._look(self.now)

    def bring(self, peer: str, read: int, unread: int = 0) -> None:
        """That many more bytes came."""
        there = self.there.setdefault(peer, [0, 0])
        there[0] += read
        there[1] = unread

    def message(self, peer: str, nbytes: int) -> None:
        """A message that came, and arrived."""
        self.bring(peer, nbytes + 100)
        self.arrivals.count(peer, nbytes)

    def _connections(self) -> list[Connection]:
        there = [Connection(5, True, peer, read, unread, 0) for peer, (read, unread) in self.there.items()]
        return [*there, Connection(6, False, SHARD, self.forwarded, 0, 0)]

    def _cut(self, connection: Connection) -> None:
        self.cut.append(connection.peer)
        del self.there[connection.peer]

    def _keep_out(self, ports: object, hosts: dict[str, float]) -> None:
        self.out = set(hosts)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


HONEST, FLOOD, SHARD = "ipv4:192.0.2.1:5", "ipv4:192.0.2.2:6", "ipv4:192.0.2.9:7071"


def test_a_flood_is_cut_and_kept_out_and_honest_peers_are_not(scene: Scene) -> None:
    for _ in range(30):
        scene.bring(FLOOD, 60_000)
        scene.message(HONEST, 1 << 20)
        scene.look(busy=2.0)
        if FLOOD in scene.cut:
            break
    assert set(scene.cut) == {FLOOD}
    assert scene.out == {"ipv4:192.0.2.2"}
    for _ in range(200):
        scene.message(HONEST, 1 << 20)
        scene.look(busy=0.1)
    assert set(scene.cut) == {FLOOD}
    assert not scene.out


def test_nothing_is_cut_while_honest_traffic_explains_what_it_costs(scene: Scene) -> None:
    """Large messages that are still on their way look like a flood, but cost next to nothing."""
    for _ in range(300):
        scene.bring(HONEST, 4 << 20)
        scene.look(busy=2.0)
    assert scene.cut == []


def test_nothing_is_cut_while_answers_of_other_servers_explain_what_it_costs(scene: Scene) -> None:
    for _ in range(300):
        scene.bring(HONEST, 100_000)
        scene.forwarded += 2 << 20
        scene.look(busy=2.0)
    assert scene.cut == []


def test_nothing_is_cut_while_what_comes_on_this_machine_explains_what_it_costs(scene: Scene) -> None:
    for _ in range(300):
        scene.bring(HONEST, 100_000)
        scene.arrivals.count("unix:", 2 << 20)
        scene.look(busy=2.0)
    assert scene.cut == []


def test_time_of_the_kernel_is_no_flood(scene: Scene) -> None:
    """It takes the memory of large answers back, and a large message is on its way."""
    for _ in range(300):
        scene.bring(HONEST, 60_000)
        scene.look(busy=2.0, kernels=True)
    assert scene.cut == []


def test_what_a_thread_took_before_it_was_seen_does_not_count(scene: Scene) -> None:
    """A large message is on its way meanwhile."""
    for number in range(300):
        scene.bring(HONEST, 60_000)
        scene.spent[2 + number] = 0.4
        scene.look(busy=0.08)
    assert scene.cut == []


def test_moments_in_which_the_machine_does_something_else_are_no_flood(scene: Scene) -> None:
    for number in range(300):
        scene.bring(HONEST, 60_000)
        scene.look(busy=2.0 if number % LOOKS else 0.05)
    assert scene.cut == []


def test_many_small_messages_are_no_flood(scene: Scene) -> None:
    for _ in range(300):
        for _ in range(200):
            scene.message(HONEST, 64)
        scene.look(busy=2.0)
    assert scene.cut == []


def test_nothing_is_counted_or_cut_while_grpc_has_little_to_do(scene: Scene) -> None:
    for _ in range(100):
        scene.bring(FLOOD, 1 << 20)
        scene.message(HONEST, 1000)
        scene.look(busy=0.2)
    assert (scene.cut, scene.arrivals.of(HONEST)) == ([], 0)


def test_a_host_that_was_cut_has_less_left_and_the_others_as_much_as_before(scene: Scene) -> None:
    scene.look(busy=2.0)
    scene.bring(FLOOD, FREE_BYTES + 1)
    for _ in range(LOOKS):
        assert scene.cut == []
        scene.look(busy=2.0)
    assert scene.cut == [FLOOD]
    again, other = "ipv4:192.0.2.2:7", "ipv4:192.0.2.3:7"
    scene.bring(again, 0, FREE_BYTES_AGAIN + 1)
    scene.bring(other, FREE_BYTES_AGAIN + 1)
    scene.look(busy=2.0)
    assert scene.cut == [FLOOD, again]


def test_a_host_is_kept_out_whose_connections_go_before_they_are_cut(scene: Scene) -> None:
    scene.look(busy=2.0)
    for number in range(20):
        scene.bring(f"ipv4:192.0.2.2:{number}", FREE_BYTES // 8)
        scene.look(busy=2.0)
        scene.there.clear()
    assert (scene.cut, scene.out) == ([], {"ipv4:192.0.2.2"})


# Servers


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[ToyServer]:
    with toy_server(str(tmp_path / "private")) as server:
        yield server


def echo(channel: grpc.Channel, text: str) -> str:
    call = channel.unary_unary(ECHO, Request.SerializeToString, Request.FromString)
    return str(call(Request(service=text), timeout=180, wait_for_ready=True).service)


def flood_without_pause(address: str) -> None:
    """Tiny fields of one call, until the connection is cut."""
    fields = [(b"x", b"v")] * 20_000
    more = further_headers(fields)
    with suppress(OSError):
        raw = Raw(address)
        raw.socket.settimeout(180)
        with raw.socket:
            raw.flood(ECHO.encode(), fields, end_headers=False)
            while True:
                raw.socket.sendall(more)


def test_floods_are_cut_on_a_server_and_neighbours_are_answered(
    toy: ToyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Large messages are no floods. Open connections stay, those of the same host too."""
    text = "a" * 900_000
    with grpc.insecure_channel(toy.address, OWN) as channel:
        for _ in range(30):
            assert echo(channel, text).startswith(text)
        assert toy.server._guard.cuts == 0
        attackers = [threading.Thread(target=flood_without_pause, args=(toy.address,)) for _ in range(2)]
        for each in attackers:
            each.start()
        while any(each.is_alive() for each in attackers):
            assert echo(channel, "beside").startswith("beside")
    assert toy.server._guard.cuts
    assert "127.0.0.1, which sent" in caplog.text
    with grpc.insecure_channel(toy.address, OWN) as channel:  # let in again
        assert echo(channel, text).startswith(text)


def test_who_sends_more_fields_than_it_was_told_is_kept_out_for_a_while(toy: ToyServer) -> None:
    """GRPC hands them over where the peer did not acknowledge its limits."""
    port = {int(toy.address.rpartition(":")[2])}
    with grpc.insecure_channel(toy.address, OWN) as channel:
        echo(channel, "before")
        raw = Raw(toy.address)
        with raw.socket:
            raw.call(ECHO.encode(), b"", extra=[(b"x-%d" % number, b"v") for number in range(2 * MOST_FIELDS)])

            def is_out() -> bool:
                try:
                    socket.create_connection(("127.0.0.1", *port), 0.05).close()  # type: ignore[arg-type]
                except TimeoutError:
                    return True
                return False

            until(is_out, "it to be kept out")
            assert echo(channel, "beside").startswith("beside")
        until(lambda: not is_out(), "it to come in again")


def test_calls_that_wait_for_a_busy_server_are_answered_too(toy: ToyServer) -> None:
    """GRPC would cancel some of 1,000 and all beyond 3,000 that wait, whose callers know nothing of that."""
    answering = threading.Event()
    quick = toy.toy.quick

    def slow(message: bytes, room: int, caller: Caller | None) -> bytes | None:
        answering.set()
        time.sleep(2)
        return quick(message, room, caller)

    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(toy.address, OWN)) for _ in range(8)]
        for channel in channels:
            echo(channel, "ready")
        object.__setattr__(toy.server._methods[f"/{TOY}/Quick".encode()], "at_once", slow)
        first = channels[0].unary_unary(f"/{TOY}/Quick").future(b"", timeout=180)
        assert answering.wait(180)
        calls = [channel.unary_unary(ECHO).future(b"", timeout=180) for _ in range(200) for channel in channels]
        assert all(call.exception() is None for call in calls)
        first.exception()
