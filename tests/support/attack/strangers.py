"""Who has nothing that counts, at ports that speak TLS."""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jwt

from embedding_service.security.access import Access
from embedding_service.security.authority import URI, Authority
from embedding_service.security.proofs import prove
from embedding_service.wire import embedding_pb2 as wire
from support.attack.window import Window
from support.hostile import dial
from support.security import HOSTS

# Above a member's limit of open files, which `__main__` sets.
CONNECTIONS = 1200
LOOKUP = "/embedding.v1.EmbeddingService/Lookup"


def half_handshakes(window: Window) -> None:
    """Connections that begin TLS and stop, at every member."""
    while window.open:
        for address in [*window.members, window.control]:
            break_off(window, address, str(Path(window.secure, "ca.crt")), CONNECTIONS // 4)


def break_off(window: Window, address: str, ca: str, count: int) -> None:
    """Handshakes that stop, each at another byte, or that say more than a hello may have. All are then let go."""
    hello, kept = _hello(ca), []
    for _ in range(count):
        if not window.open:
            break
        place = window.values.randrange(len(hello))
        noise = window.values.randbytes(window.values.choice((1, 300, 60_000)))
        sent = window.values.choice((hello[:place], hello[:place] + noise, b"\x16\x03\x01\xff\xff" + noise, hello))
        with window.tried("begun"):
            kept.append(connection := dial(address))
            connection.sendall(sent)
    window.rest(0.5)
    for connection in kept:
        with suppress(OSError):
            connection.close()


def _hello(ca: str) -> bytes:
    """What a client of TLS says first."""
    context = ssl.create_default_context(cafile=ca)
    said = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said, server_hostname="localhost").do_handshake()
    return said.read()


def tokens_of_nobody(window: Window) -> None:
    """Guesses without end, and JSON web tokens and proofs of every wrong kind, some of them very long."""
    message = wire.LookupRequest(model="m", table="ngram", ids=[1]).SerializeToString()
    assert window.client
    nobody = replace(window.client, token=None)
    while window.open:
        for address in window.members:
            with window.channel(address, nobody) as channel:
                lookup = channel.unary_unary(LOOKUP)
                shown = [[("authorization", f"Bearer {token}")] for token in tokens(window)]
                window.wait([lookup.future(message, timeout=20, metadata=each) for each in shown])


def tokens(window: Window) -> Iterator[str]:
    """That count nowhere."""
    values = window.values
    yield from (f"guess-{values.random()}" for _ in range(200))
    yield "x" * values.choice((1, 8 << 10, 60 << 10))
    claims = {
        "sub": "system:serviceaccount:a:b",
        "aud": "localhost",
        "iss": "us",
        "exp": values.choice((1, 2**33, 2**63)),
    }
    yield jwt.encode(claims, "k" * 32, headers={"kid": values.choice(("k", "", "k" * 1000))})
    yield jwt.encode(claims, "", "none")
    for chain in (
        [],
        ["!"],
        ["QUJD"] * 500,
        [base64.b64encode(values.randbytes(4000)).decode()],
        "QUJD",
        {"a": 1},
        None,
    ):
        head = _part({"alg": values.choice(("ES256", "none", "HS256", 1)), "typ": "JWT", "x5c": chain})
        yield f"{head}.{_part(claims)}.{_base64(values.randbytes(64))}"
    yield "ey" + "." * values.randrange(1, 4)
    yield f"{_base64(b'[' * 6000)}.{_part(claims)}.AAAA"


def _part(content: object) -> str:
    return _base64(json.dumps(content).encode())


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def certificates_of_nobody(window: Window) -> None:
    """Of another authority, expired, and of a client: at the members' port, and as proofs at the others."""
    ours = Authority.load(Path(window.secure))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Authority.create().issue(folder / "other", [f"{URI}/shard/a", *HOSTS])
        ours.issue(folder / "old", [f"{URI}/shard/a", *HOSTS], begins=-2, days=-1)
        ours.issue(folder / "client", [f"{URI}/nobody", *HOSTS])
        shown = [
            Access(Path(window.secure, "ca.crt"), each / "tls.crt", each / "tls.key")
            for each in sorted(folder.iterdir())
        ]
        message = wire.LookupRequest(model="m", table="ngram", ids=[1]).SerializeToString()
        while window.open:
            for access in shown:
                with window.channel(window.control, access) as channel:
                    stream = channel.stream_stream("/embedding.v1.ControlService/Register")(iter([b""]), timeout=5)
                    with window.tried("answered"):
                        next(stream)
                assert access.certificate and access.key
                proof = prove("127.0.0.1", access.certificate.read_bytes(), access.key.read_bytes())
                for address in window.members:
                    with window.channel(address, Access(access.ca)) as channel:
                        lookup = channel.unary_unary(LOOKUP)
                        metadata = [("authorization", f"Bearer {proof}")]
                        window.wait([lookup.future(message, timeout=5, metadata=metadata) for _ in range(20)])
