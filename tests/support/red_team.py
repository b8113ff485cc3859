"""Who tries to get into a secured service, and where: the cells of the red team's table."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import jwt
import psutil

from embedding_service.client.channels import CHANNEL_OPTIONS
from embedding_service.front import CALLER, PEER
from embedding_service.methods import ANYBODY, KNOWN, MEMBERS, RIGHTS
from embedding_service.near.board import VERSION
from embedding_service.security import proofs
from embedding_service.security.access import Access, Shown
from embedding_service.security.authority import Authority
from embedding_service.security.policy import MODEL_RIGHTS
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire import near_pb2 as near
from support.cluster import until
from support.security import OTHER, POLICY, Secured, begin, channel_to, message_of

OPEN = frozenset(path for path, needed in RIGHTS.items() if needed in (ANYBODY, KNOWN))
HEALTH = frozenset(path for path in OPEN if "Health" in path)
ROUTING = frozenset({"embedding.v1.EmbeddingService/ListModels", "embedding.v1.EmbeddingService/GetRouting"})
STATUS = frozenset({"embedding.v1.ControlService/GetStatus"})
PRIVATE = frozenset({"embedding.v1.EmbeddingService/Answer"})
LOOKUPS = frozenset(path for path in RIGHTS if ".EmbeddingService/" in path) - PRIVATE
TRAINING = frozenset(path for path in RIGHTS if ".TrainingService/" in path)
ASKED = OPEN | LOOKUPS | PRIVATE | STATUS
ANSWERED = {grpc.StatusCode.OK}
# What says nothing that could be done. It was read by somebody who may be told why.
UNDERSTOOD = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.OK,
}
MOST_CONNECTIONS = 200
# The shard that a stream of `Register` speaks for, whose member's right ends.
GUEST = "shard-6"


def rights_of(identity: str) -> set[str]:
    """What `POLICY` gives an identity. Nobody has an empty name."""
    about = POLICY.get(identity, {})
    rights = {*about.get("rights", ()), *(right for right in MODEL_RIGHTS if about.get(right))}
    return rights | ({"read"} if "member" in rights else set())


class Showing(NamedTuple):
    """What somebody's calls show, and whose they are. `identity`: in `POLICY`, or empty for nobody."""

    name: str
    identity: str
    metadata: list[tuple[str, str]]


@dataclass
class Caller:
    """Somebody at a port. Without `connects` TLS itself refuses."""

    name: str
    identity: str
    channel: grpc.Channel
    metadata: Sequence[tuple[str, str]] = ()
    connects: bool = True

    def begin(self, path: str) -> Any:
        """A call of a method."""
        return begin(self.channel, path, message_of(path), self.metadata)


@dataclass
class Port:
    """A place where calls are taken. `offers`: the methods that it answers to those who may."""

    name: str
    offers: frozenset[str]
    callers: list[Caller]

    def refusal(self, path: str, caller: Caller) -> grpc.StatusCode | None:
        """How a call has to be refused, by the table of rights. None: it is let in."""
        if not caller.connects:
            return grpc.StatusCode.UNAVAILABLE
        if path not in self.offers:
            return grpc.StatusCode.UNIMPLEMENTED
        needed = RIGHTS[path]
        if needed == ANYBODY:
            return None
        if not caller.identity:
            return grpc.StatusCode.UNAUTHENTICATED
        if needed != KNOWN and not rights_of(caller.identity) & set(needed):
            return grpc.StatusCode.PERMISSION_DENIED
        return None

    def is_right(self, path: str, caller: Caller, code: grpc.StatusCode) -> bool:
        """Whether a call ended as it has to. What is let in is answered where `message_of` has something to ask."""
        if refusal := self.refusal(path, caller):
            return code is refusal
        return code in ANSWERED if path in ASKED else code in UNDERSTOOD


def shown_by(secured: Secured, host: str) -> list[Showing]:
    """All that a call may show a server at this host."""

    def bearer(access: Access) -> list[tuple[str, str]]:
        header = Shown(access).header(host)
        return [("authorization", header)] if header else []

    def proof(name: str, authority: Authority | None = None, **days: float) -> list[tuple[str, str]]:
        return bearer(secured.certificate(name, authority, **days))

    pair = pair_of(secured.certificate("shard/shard-8"))
    some_jwt = jwt.encode({"sub": "admin", "aud": host, "exp": 2**33}, "k" * 32, headers={"kid": "k"})
    nobody = {
        "nothing": [],
        "a guess": bearer(secured.token("guess")),
        "a web token that nobody vouches for": bearer(secured.token(some_jwt)),
        "another authority's certificate": proof("shard/false", Authority.create()),
        "an expired certificate": proof("shard/old", begins=-2, days=-1),
        "an expired proof": bearer(secured.token(proofs.sign({"aud": host, "iat": 1, "exp": 2}, *pair))),
        "a proof for another server": bearer(secured.token(proofs.prove("another-shard", *pair))),
        "a certificate that the policy does not know": proof("nobody"),
        "the words of a further process": [(CALLER, "members"), (PEER, "ipv4:127.0.0.1:1")],
    }
    tokens = [each for each, about in POLICY.items() if "tokens" in about and "calls" not in about]
    known = {each: bearer(secured.token(each)) for each in tokens}
    shown = [Showing(name, "", metadata) for name, metadata in nobody.items()]
    shown += [Showing(f"token {name}", name, metadata) for name, metadata in known.items()]
    shown.append(Showing("the reader's certificate", "reader", proof("reader")))
    shown.append(Showing("a member's certificate", "members", proof(f"shard/{OTHER}")))
    claims = [(CALLER, "members"), *bearer(secured.token("stranger"))]
    return [*shown, Showing("stranger with the words of a further process", "stranger", claims)]


@contextmanager
def ports_of(secured: Secured) -> Iterator[list[Port]]:
    """Every port of the service, with its callers connected."""
    members, addresses = secured.members, secured.addresses()
    main = members.processes["shard-1"].popen.pid
    [further] = psutil.Process(main).children()
    shown = shown_by(secured, "127.0.0.1")
    with ExitStack() as stack:

        def opened(address: str, access: Access | None) -> grpc.Channel:
            return stack.enter_context(channel_to(address, access))

        def port(name: str, offers: frozenset[str], channel: grpc.Channel) -> Port:
            callers = [Caller(each.name, each.identity, channel, each.metadata) for each in shown]
            return Port(name, offers, callers)

        processes = stack.enter_context(_channels_by_process(secured, addresses["shard-1"], [main, further.pid]))
        yield [
            port("controller", OPEN | ROUTING | STATUS, opened(members.client_address, secured.ca)),
            port("shard", OPEN | LOOKUPS | TRAINING, opened(addresses["shard-0"], secured.ca)),
            port("first process", OPEN | LOOKUPS | TRAINING, processes[main]),
            port("second process", OPEN | LOOKUPS, processes[further.pid]),
            Port("back", OPEN | LOOKUPS | PRIVATE | TRAINING, _of_the_back(opened(_back(main), None), shown)),
            Port("members' port", OPEN | ROUTING | STATUS | MEMBERS, _of_members_port(secured, stack)),
        ]


def _of_the_back(channel: grpc.Channel, shown: Sequence[Showing]) -> list[Caller]:
    """A further process says whose a call is. Nothing else counts there."""
    callers = [Caller(f"a process: {name}", name, channel, [(CALLER, name)]) for name in POLICY if name != "limited"]
    callers += [Caller(f"a process: {name!r}", "", channel, [(CALLER, name)]) for name in ("", "*", "nobody")]
    tokens = [each for each in shown if CALLER not in dict(each.metadata)]
    return [*callers, *(Caller(each.name, "", channel, each.metadata) for each in tokens)]


def _of_members_port(secured: Secured, stack: ExitStack) -> list[Caller]:
    """TLS asks for a certificate before anything is said, and nothing else counts."""
    address, admin = secured.members.control, [("authorization", "Bearer admin")]
    shut_out = {
        "nothing": secured.ca,
        "token admin": secured.token("admin"),
        "another authority's certificate": secured.certificate("shard/false", Authority.create()),
        "an expired certificate": secured.certificate("shard/old", begins=-2, days=-1),
        "plain text": None,
    }
    callers = []
    for name, access in shut_out.items():
        callers.append(Caller(name, "", stack.enter_context(channel_to(address, access)), (), False))
    for name, identity in (("nobody", ""), ("reader", "reader"), (f"shard/{OTHER}", "members")):
        channel = stack.enter_context(_by_key_alone(address, secured.certificate(name)))
        callers += [Caller(f"certificate {name}", identity, channel)]
        callers += [Caller(f"certificate {name} and a token of admin", identity, channel, admin)]
        callers += [Caller(f"certificate {name}, passed on", identity, channel, [(CALLER, "admin")])]
    return callers


def _by_key_alone(address: str, access: Access) -> grpc.Channel:
    """A connection whose calls show no proof: TLS has seen the certificate."""
    certificate, key = pair_of(access)
    credentials = grpc.ssl_channel_credentials(access.authorities(), key, certificate)
    return grpc.secure_channel(address, credentials, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


@contextmanager
def _channels_by_process(secured: Secured, address: str, pids: Sequence[int]) -> Iterator[dict[int, grpc.Channel]]:
    """A connection to each of the processes that share a port: the kernel chooses, so some are opened."""
    found: dict[int, grpc.Channel] = {}
    with ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS):
            before = _own_ports(address)
            channel = stack.enter_context(channel_to(address, secured.ca))
            grpc.channel_ready_future(channel).result(timeout=20)
            own = _own_ports(address) - before
            found.update((pid, channel) for pid in pids if own & _ports_at(pid, address))
            if len(found) == len(pids):
                break
        assert len(found) == len(pids), f"{MOST_CONNECTIONS} connections reached {[*found]} of {pids}"
        yield found


def _own_ports(address: str) -> set[int]:
    """Of this process's connections to an address."""
    port = int(address.rpartition(":")[2])
    return {
        each.laddr.port for each in psutil.Process().net_connections("tcp") if each.raddr and each.raddr.port == port
    }


def _ports_at(pid: int, address: str) -> set[int]:
    """Whence a process's connections at an address come."""
    port = int(address.rpartition(":")[2])
    every = psutil.Process(pid).net_connections("tcp")
    return {each.raddr.port for each in every if each.raddr and each.laddr.port == port}


def _back(pid: int) -> str:
    """Where a shard's further processes reach it."""
    [path] = {each.laddr for each in psutil.Process(pid).net_connections("unix") if str(each.laddr).endswith("/main")}
    return f"unix:{path}"


class OpenStreams:
    """Calls that are open and do nothing. `streams`: each with its method."""

    def __init__(self) -> None:
        self.streams: list[tuple[str, Any]] = []
        self._stack = ExitStack()
        self._over = threading.Event()

    def __enter__(self) -> OpenStreams:
        return self

    def __exit__(self, *about: object) -> None:
        self._over.set()
        self._stack.close()

    def open(self, address: str, path: str, access: Access) -> None:
        """Open one that was answered once, as soon as its caller is let in."""
        self.streams.append((path, until(lambda: self._opened(address, path, access), f"{path} at {address}")))

    def _opened(self, address: str, path: str, access: Access) -> Any:
        channel = self._stack.enter_context(channel_to(address, access))
        stream = channel.stream_stream(f"/{path}")(self._asked(path), timeout=120)
        try:
            next(stream)
        except grpc.RpcError:
            return None
        return stream

    def _asked(self, path: str) -> Iterator[bytes]:
        if path in MEMBERS:  # a shard that holds nothing and leaves
            report = control.ShardReport(shard_id=GUEST, address="127.0.0.1:1", device="cpu", tier="ram")
            report.memory_limit, report.incarnation = 1, 1
            report.draining = report.has_parts = True
            yield report.SerializeToString()
        else:
            yield message_of(path)
        self._over.wait()


def near_hello(place: wire.NearPlace, authorization: str) -> near.NearAnswer:
    """What the near socket says to somebody who shows this."""
    request = near.NearRequest(version=VERSION, incarnation=place.incarnation, authorization=authorization)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(place.path)
        connection.send(request.SerializeToString())
        packet, files, _, _ = socket.recv_fds(connection, 64 << 10, 64)
    for file in files:
        socket.close(file)
    return near.NearAnswer.FromString(packet)


def tls_spoken(address: str, access: Access, version: ssl.TLSVersion) -> str | None:
    """What a port speaks with a client that knows this version alone. None: nothing."""
    context = ssl.create_default_context(cafile=access.ca)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if access.certificate:
        context.load_cert_chain(access.certificate, access.key)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        try:
            with context.wrap_socket(raw, server_hostname="localhost") as spoken:
                return spoken.version()
        except (ssl.SSLError, ConnectionError):
            return None


def pair_of(access: Access) -> tuple[bytes, bytes]:
    """PEM of a certificate and of its key."""
    assert access.certificate and access.key
    return access.certificate.read_bytes(), access.key.read_bytes()
