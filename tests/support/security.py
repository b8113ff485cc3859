"""Policies for tests, and a secured service."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from grpc_reflection.v1alpha import reflection_pb2

from embedding_service.client.channels import CHANNEL_OPTIONS
from embedding_service.security.access import Access
from embedding_service.security.authority import URI, Authority, write_private
from embedding_service.security.policy import digest_of
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from support.cluster import Members, free_port

# What may be read, and what not.
SEEN, HIDDEN = "fp32", "int8"
POLICY: dict[str, dict[str, Any]] = {
    "members": {"certificates": [f"{URI}/controller", f"{URI}/shard/*"], "rights": ["member"]},
    "admin": {"tokens": ["admin"], "rights": ["admin", "metrics"], "read": ["*"]},
    "reader": {"tokens": ["reader"], "certificates": [f"{URI}/reader"], "read": [SEEN]},
    "trainer": {"tokens": ["trainer"], "train": ["*"]},
    "publisher": {"tokens": ["publisher"], "publish": ["*"]},
    "limited": {"tokens": ["limited"], "read": [SEEN], "calls": 3, "rows_per_second": 5000},
    "stranger": {"tokens": ["stranger"], "rights": ["metrics"]},
    # Nobody, for no token of an issuer counts. A call without any identity must not be taken for it.
    "subject": {"subjects": ["*"], "rights": ["admin", "member"], "read": ["*"], "train": ["*"]},
}
HOSTS = ("localhost", "127.0.0.1")
# A member that is none of the service's shards.
OTHER = "shard-9"


def write_policy(
    folder: Path, identities: Mapping[str, Mapping[str, Any]], about: Mapping[str, str] | None = None
) -> Path:
    """A policy file. `tokens` are given as they are, and written as their digests. `about` is the table [jwt]."""
    lines = []
    for name, each in identities.items():
        given = {**each, "tokens": [f"sha256:{digest_of(token)}" for token in each.get("tokens", ())]}
        lines += [f"[identities.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]
    if about:
        lines += ["[jwt]", *(f"{key} = {json.dumps(value)}" for key, value in about.items())]
    write_private(folder / "policy.toml", "\n".join(lines).encode())
    return folder / "policy.toml"


class Secured(NamedTuple):
    """A running service, and its folder."""

    members: Members
    folder: Path
    page: str

    @property
    def ca(self) -> Access:
        """What a client without a token shows."""
        return Access(self.folder / "ca.crt")

    def token(self, token: str) -> Access:
        return replace(self.ca, token=token)

    def certificate(self, name: str, authority: Authority | None = None, **days: float) -> Access:
        """A certificate of a further name, made now."""
        where = self.folder / "more" / name.replace("/", "-")
        ours = Authority.load(self.folder)
        (authority or ours).issue(where, [f"{URI}/{name}", *HOSTS], **days)
        return replace(self.ca, certificate=where / "tls.crt", key=where / "tls.key")

    def addresses(self) -> dict[str, str]:
        return {shard.shard_id: shard.address for shard in self.members.status().shards}


@contextmanager
def secured_service(folder: Path, store: Path, shards: int = 2) -> Iterator[Secured]:
    """Shards with `POLICY`; the second one is two processes."""
    policy = write_policy(folder, POLICY).read_text()
    port = free_port()
    audit = folder / "secure" / "audit.jsonl"
    more = {"controller": [f"--http-port={port}", f"--audit={audit}"], "shard-1": ["--processes=2"]}
    more = {name: each for name, each in more.items() if shards > 1 or name != "shard-1"}
    members = Members(folder, store, shards, 1, 64 << 20, folder / "secure", policy, more)
    members.access = Access(folder / "secure" / "ca.crt", token="admin")
    try:
        members.restart()
        yield Secured(members, folder / "secure", f"https://127.0.0.1:{port}")
    finally:
        members.end()


def channel_to(address: str, access: Access | None) -> grpc.Channel:
    """A connection of its own. `access` None: plain text."""
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    if access is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, access.credentials(), options)


def begin(channel: grpc.Channel, path: str, message: bytes, metadata: Any = ()) -> Any:
    """A call of one message."""
    return channel.stream_stream(f"/{path}")(iter([message]), timeout=120, metadata=metadata)


def code_of(under_way: Any) -> grpc.StatusCode:
    """How a call of one message ends, or that it was answered."""
    try:
        next(under_way, None)
        under_way.cancel()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


def call(address: str, path: str, access: Access | None, message: bytes = b"") -> grpc.StatusCode:
    """How a call of one message ends, on a connection of its own."""
    with channel_to(address, access) as channel:
        return code_of(begin(channel, path, message))


def message_of(path: str) -> bytes:
    """A message that the method answers. `Register` refuses it where it let its caller in: it has no device."""
    lookup = wire.LookupRequest(model=SEEN, table="ngram", ids=[0])
    streamed = wire.StreamLookupRequest(request_id=1, lookup=lookup)
    about = {
        "Lookup": lookup,
        "StreamLookup": streamed,
        "Answer": streamed,
        "LookupNgrams": wire.LookupNgramsRequest(model=SEEN, token_ids=[1, 2]),
        "ServerReflectionInfo": reflection_pb2.ServerReflectionRequest(list_services=""),
        "Register": control.ShardReport(shard_id=OTHER, address="127.0.0.1:1", incarnation=1, memory_limit=1),
    }.get(path.rpartition("/")[2])
    return about.SerializeToString() if about else b""  # type: ignore[no-any-return]


# Rounds after which a token of the policy is used, and after which it is in the policy no more. A shard that hung for
# some seconds takes a moment until it has read the policy.
USED_AFTER, GONE_AFTER = 10, 30


class Rotation:
    """Replaces certificates with their keys, a token and the policy every second, as somebody who renews them would.

    Args:
        folder: Of `up --secure`.

    Attributes:
        client: What a client with a certificate of its own shows.
        thin: What a client with a token in a file shows.
        rounds: How often all were replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.rounds = 0
        self._members: set[str] = set()
        self._replacing = threading.Lock()
        self._folder = folder
        self._authority = Authority.load(folder)
        self._policy = (folder / "policy.toml").read_text()
        own = folder / "rotated"
        self.client = Access(own / "ca.crt", own / "tls.crt", own / "tls.key")
        self.thin = Access(own / "ca.crt", token_file=own / "token")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rotation")
        self.replace_all()

    def __enter__(self) -> Rotation:
        self._thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """A shard gets its files within the `with`, of somebody else. Its certificate is replaced from then on."""
        with self._replacing:
            yield
            self._members.add(name)

    def replace_all(self) -> None:
        """New certificates for everybody, another token in the policy, and a known one in the token's file."""
        with self._replacing:
            names = {"controller": "controller", "rotated": "admin"}
            names |= {name: f"shard/{name}" for name in self._members}
            for folder, name in names.items():
                self._authority.issue(self._folder / folder, [f"{URI}/{name}", *HOSTS])
            newest = self.rounds
            tokens = [f"sha256:{digest_of(_token(each))}" for each in range(max(0, newest - GONE_AFTER), newest + 1)]
            thin = f'[identities.thin]\nread = ["*"]\ntokens = {json.dumps(tokens)}\n'
            write_private(self._folder / "policy.toml", (self._policy + thin).encode())
            write_private(self._folder / "rotated" / "token", _token(max(0, newest - USED_AFTER)).encode())
            self.rounds += 1

    def _run(self) -> None:
        while not self._over.wait(1.0):
            self.replace_all()


def _token(number: int) -> str:
    return f"thin-{number}"
