"""Requests that are refused, after they came, and such that ask for more than there may be."""

from __future__ import annotations

import grpc

from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub
from support.attack.window import Window

MIB = 1 << 20


def refused_requests(window: Window) -> None:
    """Lists of ids of up to 15 MiB, out of range or for more rows than one answer may hold, 12 at a time."""
    values = window.values
    while window.open:
        address = values.choice(window.shards)
        with window.channel(address) as channel:
            lookup = channel.unary_unary("/embedding.v1.EmbeddingService/Lookup")
            calls = [lookup.future(_long_list(window), timeout=20) for _ in range(12)]
            calls += [lookup.future(_small(window).SerializeToString(), timeout=20) for _ in range(20)]
            window.wait(calls)
            asked = [b"\x12" + _length(message) + message for message in (_long_list(window) for _ in range(3))]
            stream = channel.stream_stream("/embedding.v1.EmbeddingService/StreamLookup")(iter(asked), timeout=20)
            for _ in asked:
                with window.tried("an error on the stream"):
                    next(stream)
            stream.cancel()


def _long_list(window: Window) -> bytes:
    """A serialized request, whose ids are numbers of one byte, of five, or of a fixed width."""
    nbytes = window.values.choice((MIB, 4 * MIB, 15 * MIB, 15 * MIB)) // 40 * 40
    field, ids = window.values.choice(
        ((3, b"\0" * nbytes), (3, b"\xff\xff\xff\xff\x07" * (nbytes // 5)), (4, b"\x07" * nbytes), (5, b"\0" * nbytes))
    )
    start = wire.LookupRequest(model="m", table="ngram").SerializeToString()
    return start + bytes([field << 3 | 2]) + _length(ids) + ids


def _length(text: bytes) -> bytes:
    out, value = bytearray(), len(text)
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _small(window: Window) -> wire.LookupRequest:
    """One of all that is refused otherwise."""
    return window.values.choice(
        (
            wire.LookupRequest(model="m", table="ngram", ids=[-1]),
            wire.LookupRequest(model="m", table="ngram", ids_uint32=b"123"),
            wire.LookupRequest(model="m", table="ngram", ids=[1], ids_int64=bytes(8)),
            wire.LookupRequest(model="m" * window.values.randrange(1, 1 << 16), table="ngram"),
            wire.LookupRequest(model="m", table="[/red]\x1b[31m\n"),
            wire.LookupRequest(model="m@1", table="ngram", ids=[1], epoch=(1 << 64) - 1, term=(1 << 64) - 1),
            wire.LookupRequest(model="m@9", table="ngram", ids=[1], epoch=1),
            wire.LookupRequest(model="m", table="ngram", ids=[1], encoding=window.values.randrange(5, 1 << 31)),  # type: ignore[arg-type]
        )
    )


def huge_ngram_lookups(window: Window) -> None:
    """Batches of up to 2^32 - 1 without a token, and token lists that are refused late."""
    values = window.values
    while window.open:
        with window.channel(values.choice(window.shards)) as channel:
            stub = EmbeddingServiceStub(channel)
            asked = [
                wire.LookupNgramsRequest(model="m", batch=values.choice((40_000_000, 1 << 30, (1 << 32) - 1))),
                wire.LookupNgramsRequest(model="m", batch=values.randrange(1 << 20, 1 << 26)),
                wire.LookupNgramsRequest(model="m", token_ids=[-1] * values.randrange(1 << 20), batch=1),
                wire.LookupNgramsRequest(model="m", token_ids=[1] * (1 << 20), batch=1 << 20),
                wire.LookupNgramsRequest(model="m", token_ids=[1], context=[1] * (3 << 20)),
                wire.LookupNgramsRequest(model="m", token_ids=[(1 << 31) - 1] * 64, batch=64),
                wire.LookupNgramsRequest(model="m", token_ids=[-(1 << 31)] * 64),
            ]
            window.wait([stub.LookupNgrams.future(each, timeout=20) for each in asked])


def gzip_bombs(window: Window) -> None:
    """16 MiB of zeros in 16 KB, to shards and controller, several at a time."""
    message = wire.LookupRequest(model="m", table="ngram", ids_uint32=bytes(16 * MIB - 1024)).SerializeToString()
    kinds = (grpc.Compression.Gzip, grpc.Compression.Deflate)
    while window.open:
        address, kind = window.values.choice(window.members), window.values.choice(kinds)
        with window.channel(address, compression=kind) as channel:
            for method in ("Lookup", "GetRouting"):
                lookup = channel.unary_unary(f"/embedding.v1.EmbeddingService/{method}")
                window.wait([lookup.future(message, timeout=20) for _ in range(8)])
