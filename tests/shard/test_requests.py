"""Requests of every kind, good and bad, from a thin client that uses the protos alone."""

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.checkpoints import DIM, VOCAB, longcat_table
from support.cluster import Up

from embedding_service import EmbeddingClient
from embedding_service.formats import FORMATS, get_format
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub

pytestmark = pytest.mark.service

ROWS = len(longcat_table())


@pytest.fixture(scope="module")
def channel(service: Up) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> EmbeddingServiceStub:
    return EmbeddingServiceStub(channel)


def request(**fields: Any) -> wire.LookupRequest:
    return wire.LookupRequest(**{"model": "fp32", "table": "ngram", **fields})


def values(answer: wire.LookupResponse) -> torch.Tensor:
    return torch.frombuffer(bytearray(answer.rows), dtype=torch.float32).view(-1, answer.dim)


IDS = [ROWS - 1, 0, 5000, 5000, 1, 700]


@pytest.mark.parametrize(
    "field",
    [
        {"ids": IDS},
        {"ids_int64": np.array(IDS, "<i8").tobytes()},
        {"ids_uint32": np.array(IDS, "<u4").tobytes()},
    ],
    ids=lambda field: next(iter(field)),
)
def test_any_shard_answers_for_rows_of_all_shards(stub: EmbeddingServiceStub, field: dict[str, object]) -> None:
    answer = stub.Lookup(request(**field))
    assert torch.equal(values(answer), longcat_table()[IDS])
    assert (answer.row_bytes, answer.dim, answer.version) == (4 * DIM, DIM, "1")


def test_every_row_from_every_shard_by_forwarding(service: Up) -> None:
    """Each shard alone, asked for the whole table, answers it."""
    routing = EmbeddingServiceStub(grpc.insecure_channel(service.address)).GetRouting(wire.GetRoutingRequest())
    assert len(routing.shards) == 3
    ids = np.arange(ROWS).astype("<u4").tobytes()
    for shard in routing.shards:
        with grpc.insecure_channel(shard.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
            answer = EmbeddingServiceStub(channel).Lookup(request(ids_uint32=ids))
            assert torch.equal(values(answer), longcat_table())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("encoding", "torch_dtype"),
    [
        (wire.ROW_ENCODING_FLOAT32, torch.float32),
        (wire.ROW_ENCODING_FLOAT16, torch.float16),
        (wire.ROW_ENCODING_BFLOAT16, torch.bfloat16),
        (wire.ROW_ENCODING_STORED, None),
    ],
)
def test_encodings(stub: EmbeddingServiceStub, dtype: str, encoding: int, torch_dtype: torch.dtype | None) -> None:
    stored = get_format(dtype).encode(longcat_table()[IDS])
    answer = stub.Lookup(request(model=dtype, ids=IDS, encoding=encoding))
    got = torch.frombuffer(bytearray(answer.rows), dtype=torch.uint8).view(len(IDS), answer.row_bytes)
    if torch_dtype is None:
        assert torch.equal(got, stored)
    else:
        assert torch.equal(got.view(torch_dtype), get_format(dtype).decode(stored, DIM, dtype=torch_dtype))


def test_no_ids_are_answered_with_no_rows(stub: EmbeddingServiceStub) -> None:
    answer = stub.Lookup(request())
    assert (answer.rows, answer.dim, answer.row_bytes) == (b"", DIM, 4 * DIM)


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown model": (dict(model="nope", ids=[1]), "NOT_FOUND", "'nope'.*served models: .*fp32@1.*int8@1"),
    "unknown version": (dict(model="fp32@7", ids=[1]), "NOT_FOUND", "'fp32@7'.*fp32@1"),
    "no model": (dict(model="", ids=[1]), "NOT_FOUND", "served models"),
    "unknown table": (dict(table="words", ids=[1]), "NOT_FOUND", "'words'.*its tables: ngram"),
    "negative id": (dict(ids=[3, -1, -5]), "OUT_OF_RANGE", f"id -1 at position 1 .*0 to {ROWS - 1}"),
    "id at the bound": (dict(ids=[0, 1, ROWS]), "OUT_OF_RANGE", f"id {ROWS} at position 2 .*0 to {ROWS - 1}"),
    "enormous id": (dict(ids=[2**62]), "OUT_OF_RANGE", str(2**62)),
    "truncated int64": (dict(ids_int64=b"\0" * 15), "INVALID_ARGUMENT", "15 bytes, not a multiple of 8"),
    "truncated uint32": (dict(ids_uint32=b"\0" * 6), "INVALID_ARGUMENT", "6 bytes, not a multiple of 4"),
    "two id fields": (dict(ids=[1], ids_uint32=b"\0" * 4), "INVALID_ARGUMENT", "ids and ids_uint32"),
    "unknown encoding": (dict(ids=[1], encoding=77), "INVALID_ARGUMENT", "row encoding 77; known: .*STORED"),
    "too many rows": (
        dict(ids_uint32=bytes(4 * 1_100_000)),
        "RESOURCE_EXHAUSTED",
        "1,100,000 rows of 64 bytes .* limit of 67,108,864: ask for at most 1,048,576",
    ),
    "too large a message": (dict(ids_int64=bytes(8 * 2_200_000)), "RESOURCE_EXHAUSTED", "larger than max"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_their_code_and_the_service_goes_on(stub: EmbeddingServiceStub, name: str) -> None:
    fields, code, message = BAD[name]
    with pytest.raises(grpc.RpcError, match=rf"(?s){message}") as caught:
        stub.Lookup(request(**fields))
    assert caught.value.code().name == code
    assert torch.equal(values(stub.Lookup(request(ids=[42]))), longcat_table()[[42]])


SHARD_METHODS = ("Lookup", "StreamLookup", "LookupNgrams", "ListModels", "GetRouting")
CONTROL_METHODS = ("Register", "GetStatus")
OTHERS = (
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
GARBAGE = (b"\xff\xff\xff", b"\x0a\xff\x01", bytes(range(250, 256)) * 40)


def test_garbage_is_an_invalid_argument_of_every_method_and_no_line_of_a_log(
    service: Up, channel: grpc.Channel
) -> None:
    routing = EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest())
    methods = {
        routing.shards[0].address: [f"embedding.v1.EmbeddingService/{name}" for name in SHARD_METHODS],
        routing.controller: [
            *(f"embedding.v1.EmbeddingService/{name}" for name in ("ListModels", "GetRouting")),
            *(f"embedding.v1.ControlService/{name}" for name in CONTROL_METHODS),
        ],
    }
    before = service.output()
    for address, paths in methods.items():
        with grpc.insecure_channel(address) as target:
            for path in (*paths, *OTHERS):
                for garbage in GARBAGE:
                    with pytest.raises(grpc.RpcError) as caught:
                        list(target.stream_stream(f"/{path}")(iter([garbage]), timeout=120))
                    said = (path, garbage, caught.value.details())
                    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, said
                    assert "embedding.v1" not in caught.value.details() and "Error" not in caught.value.details()
    assert len(EmbeddingServiceStub(channel).Lookup(request(ids=[1])).rows) == 4 * DIM
    assert service.output() == before


def test_what_grpc_refuses_by_itself_is_not_logged_either(service: Up, stub: EmbeddingServiceStub) -> None:
    before = service.output()
    for options, code in (
        (dict(compression=grpc.Compression.Gzip), grpc.StatusCode.UNIMPLEMENTED),
        (dict(metadata=(("x", "a" * 17_000),)), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Lookup(request(ids=[1] * 1000), **options)
        assert caught.value.code() is code
    assert service.output() == before


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/\udcff", marks=pytest.mark.polling),
        "/nobody/Home",
        "/embedding.v1.EmbeddingService/Answer",
    ],
)
def test_methods_that_are_none_are_refused_by_every_process(service: Up, channel: grpc.Channel, path: str) -> None:
    routing = EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest())
    for address in (routing.controller, routing.shards[0].address):
        with grpc.insecure_channel(address) as target:
            with pytest.raises(grpc.RpcError) as caught:
                target.unary_unary(path.encode(errors="surrogateescape"))(b"", timeout=120)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert EmbeddingServiceStub(target).ListModels(wire.ListModelsRequest(), timeout=120).models


def test_an_epoch_without_a_version_is_told_what_to_name(stub: EmbeddingServiceStub) -> None:
    lookup = request(ids=[1], epoch=1, term=1)
    with pytest.raises(
        grpc.RpcError, match="must name the version that was routed, as fp32@VERSION, got 'fp32'"
    ) as caught:
        stub.Lookup(lookup)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [answer] = stub.StreamLookup(iter([wire.StreamLookupRequest(request_id=3, lookup=lookup)]))
    assert (answer.request_id, answer.error.code) == (3, grpc.StatusCode.INVALID_ARGUMENT.value[0])


def test_long_lists_of_ids_are_answered_and_refused_as_short_ones(stub: EmbeddingServiceStub) -> None:
    ids = np.random.default_rng(1).integers(0, ROWS, 200_000).tolist()
    assert torch.equal(values(stub.Lookup(request(ids=ids))), longcat_table()[ids])
    [streamed] = stub.StreamLookup(iter([wire.StreamLookupRequest(lookup=request(ids=ids))]))
    assert torch.equal(values(streamed.rows), longcat_table()[ids])
    for bad, code in (([*ids, -1], "OUT_OF_RANGE"), ([0] * 15_000_000, "RESOURCE_EXHAUSTED")):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Lookup(request(ids=bad))
        assert caught.value.code().name == code


def test_a_sender_that_routes_by_itself_is_sent_away_where_the_rows_are_not(service: Up) -> None:
    routing = EmbeddingServiceStub(grpc.insecure_channel(service.address)).GetRouting(wire.GetRoutingRequest())
    table = next(model for model in routing.models if model.model.name == "fp32").tables[0]
    part = next(index for index, owners in enumerate(table.parts) if 0 not in owners.shards)
    with grpc.insecure_channel(routing.shards[0].address) as channel:
        first_row = part * next(m for m in routing.models if m.model.name == "fp32").model.tables[0].rows_per_part
        with pytest.raises(grpc.RpcError) as caught:
            EmbeddingServiceStub(channel).Lookup(request(model="fp32@1", ids=[first_row], epoch=routing.epoch))
    assert caught.value.code() is grpc.StatusCode.ABORTED
    trailers = dict(caught.value.trailing_metadata())
    assert (int(trailers["embedding-term"]), int(trailers["embedding-epoch"])) == (routing.term, routing.epoch)


def test_rows_that_are_held_are_answered_whatever_epoch_led_there(service: Up) -> None:
    routing = EmbeddingServiceStub(grpc.insecure_channel(service.address)).GetRouting(wire.GetRoutingRequest())
    [model] = [model for model in routing.models if model.model.name == "fp32"]
    part = next(index for index, owners in enumerate(model.tables[0].parts) if 0 in owners.shards)
    row = part * model.model.tables[0].rows_per_part
    with grpc.insecure_channel(routing.shards[0].address) as channel:
        for age in ({"epoch": 1}, {"term": routing.term, "epoch": routing.epoch + 5}, {"term": 2**51, "epoch": 1}):
            answer = EmbeddingServiceStub(channel).Lookup(request(model="fp32@1", ids=[row], **age))
            assert torch.equal(values(answer), longcat_table()[[row]])


def test_a_stream_answers_each_request_once_and_outlives_bad_ones(stub: EmbeddingServiceStub) -> None:
    def requests() -> Iterator[wire.StreamLookupRequest]:
        for number in range(200):
            model = "nope" if number % 10 == 3 else "fp32"
            yield wire.StreamLookupRequest(
                request_id=number, lookup=request(model=model, ids=[number, ROWS - 1 - number])
            )

    answers = {answer.request_id: answer for answer in stub.StreamLookup(requests(), timeout=60)}
    assert sorted(answers) == list(range(200))
    for number, answer in answers.items():
        if number % 10 == 3:
            assert answer.error.code == grpc.StatusCode.NOT_FOUND.value[0]
            assert "nope" in answer.error.message
        else:
            assert torch.equal(values(answer.rows), longcat_table()[[number, ROWS - 1 - number]])


def test_ngrams_are_hashed_by_the_service_as_by_the_client(stub: EmbeddingServiceStub, client: EmbeddingClient) -> None:
    tokens = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(5))
    context = torch.tensor([[-1, -1, -1], [5, 6, 7], [-1, 2, 9]])
    answer = stub.LookupNgrams(
        wire.LookupNgramsRequest(
            model="int8", token_ids=tokens.flatten().tolist(), batch=3, context=context.flatten().tolist()
        )
    )
    shape = (answer.batch, answer.length, answer.tables, answer.heads, answer.dim)
    got = torch.frombuffer(bytearray(answer.rows), dtype=torch.float32).view(shape)
    assert torch.equal(got, client.lookup_ngrams("int8", tokens, context))


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        (dict(model="nope", token_ids=[1]), "NOT_FOUND", "nope"),
        (dict(token_ids=[1, 2, 3], batch=2), "INVALID_ARGUMENT", "3 tokens, not a multiple of the batch of 2"),
        (dict(token_ids=[1, VOCAB]), "INVALID_ARGUMENT", rf"\[0, 1\] is {VOCAB}"),
        (dict(token_ids=[1, -2]), "INVALID_ARGUMENT", "-2"),
        (dict(token_ids=[1] * 200_000), "RESOURCE_EXHAUSTED", "over this service's limit"),
    ],
)
def test_bad_ngram_requests(stub: EmbeddingServiceStub, fields: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.LookupNgrams(wire.LookupNgramsRequest(**{"model": "fp32", **fields}))
    assert caught.value.code().name == code


def test_models_are_listed_with_their_tables(stub: EmbeddingServiceStub) -> None:
    models = {model.name: model for model in stub.ListModels(wire.ListModelsRequest()).models}
    assert set(models) == set(FORMATS)
    table = models["int8"].tables[0]
    assert (table.name, table.rows, table.dim, table.dtype, table.row_bytes) == ("ngram", ROWS, DIM, "int8", DIM + 4)


def test_health_and_reflection_on_every_process(service: Up) -> None:
    routing = EmbeddingServiceStub(grpc.insecure_channel(service.address)).GetRouting(wire.GetRoutingRequest())
    for address in [routing.controller, *(shard.address for shard in routing.shards)]:
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            services = ProtoReflectionDescriptorDatabase(channel).get_services()
            assert "embedding.v1.EmbeddingService" in services
            assert ("embedding.v1.ControlService" in services) == (address == routing.controller)


def test_nothing_listens_beyond_loopback(service: Up) -> None:
    import psutil

    processes = service.family()
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 7  # a port for the controller, two for each shard
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
