"""The client against a real service: rows by content, shapes, dtypes, errors, threads, asyncio."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from support.checkpoints import DIM, HEADS, VOCAB, longcat_table
from support.cluster import Up, free_port
from support.nearness import come_near

from embedding_service import EmbeddingClient, RemoteEmbedding, errors
from embedding_service.formats import FORMATS, get_format

ROWS = len(longcat_table())


@pytest.fixture(scope="module", params=["near", "wired"])
def client(request: pytest.FixtureRequest, service: Up) -> Iterator[EmbeddingClient]:
    """One whose rows are all near, and one without any."""
    near = request.param == "near"
    with EmbeddingClient(service.address, timeout=60, near=near) as client:
        yield come_near(client) if near else client


def expected(model: str, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    row_format = get_format(model)
    stored = row_format.encode(longcat_table()[ids.flatten()])
    return row_format.decode(stored, DIM, dtype=dtype).view(*ids.shape, DIM)


@pytest.mark.parametrize("model", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_equal_the_tables_bit_for_bit(client: EmbeddingClient, model: str, dtype: torch.dtype) -> None:
    ids = torch.randint(0, ROWS, (3, 40), generator=torch.Generator().manual_seed(1))
    rows = client.lookup(f"{model}/ngram", ids, dtype=dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, expected(model, ids, dtype))


def test_quantized_rows_are_within_the_quantizers_bound(client: EmbeddingClient) -> None:
    ids = torch.arange(0, ROWS, 7)
    table = longcat_table()[ids]
    spread = (table.amax(1) - table.amin(1))[:, None]
    for model, steps in (("int8", 255), ("int4", 15)):
        error = (client.lookup(f"{model}/ngram", ids) - table).abs()
        # Half a step, and what rounding scale and bias to fp16 adds (formats/nbit.py).
        assert (error <= spread / steps * 0.5 + (spread + table.abs().amax(1)[:, None]) / 2**11 + 1e-6).all()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3, 4)])
def test_any_shape_of_ids(client: EmbeddingClient, shape: tuple[int, ...]) -> None:
    ids = torch.randint(0, ROWS, shape)
    assert torch.equal(client.lookup("fp32/ngram", ids), expected("fp32", ids))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integer_dtype_of_ids(client: EmbeddingClient, dtype: torch.dtype) -> None:
    ids = torch.tensor([3, 200, 3], dtype=dtype)
    assert torch.equal(client.lookup("fp32@1/ngram", ids), longcat_table()[[3, 200, 3]])


def test_the_whole_table_in_one_call(client: EmbeddingClient) -> None:
    assert torch.equal(client.lookup("fp32/ngram", torch.arange(ROWS)), longcat_table())


def test_more_than_a_request_may_ask_for_is_split(client: EmbeddingClient) -> None:
    ids = torch.arange(ROWS).repeat(80)  # 100 MB of answer, from under 2 MB of different rows
    assert torch.equal(client.lookup("fp32/ngram", ids)[-ROWS:], longcat_table())


def test_ngrams(client: EmbeddingClient) -> None:
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(2))
    tokens[0, 4] = 2  # EOS
    rows = client.lookup_ngrams("fp32", tokens)
    assert rows.shape == (2, 9, 1, HEADS, DIM)
    assert torch.equal(rows, longcat_table()[client.hasher("fp32").row_ids(tokens)])


def test_ngrams_in_steps_equal_the_whole(client: EmbeddingClient) -> None:
    tokens = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    hasher, context, pieces = client.hasher("int8"), None, []
    for piece in tokens.split([5, 1, 1, 4, 1], 1):
        pieces.append(client.lookup_ngrams("int8", piece, context))
        context = hasher.next_context(piece, context)
    assert torch.equal(torch.cat(pieces, 1), client.lookup_ngrams("int8", tokens))


def test_remote_embedding_stands_for_an_embedding(client: EmbeddingClient) -> None:
    ids = torch.randint(0, ROWS, (4, 5))
    local = torch.nn.Embedding.from_pretrained(longcat_table())
    remote = RemoteEmbedding(client, "fp32/ngram")
    assert torch.equal(remote(ids), local(ids))
    assert list(remote.parameters()) == []
    assert "fp32/ngram" in repr(remote)


def test_threads_and_event_loops_share_a_client(client: EmbeddingClient) -> None:
    wrong: list[int] = []

    def check(seed: int) -> None:
        for step in range(15):
            ids = torch.randint(0, ROWS, (60,), generator=torch.Generator().manual_seed(100 * seed + step))
            if not torch.equal(client.lookup("int8/ngram", ids), expected("int8", ids)):
                wrong.append(seed)

    async def check_async() -> None:
        ids = [torch.randint(0, ROWS, (30,)) for _ in range(20)]
        answers = await asyncio.gather(*(client.lookup_async("fp32/ngram", each) for each in ids))
        assert all(torch.equal(answer, longcat_table()[each]) for answer, each in zip(answers, ids, strict=True))
        tokens = torch.randint(0, VOCAB, (1, 6))
        assert torch.equal(await client.lookup_ngrams_async("fp32", tokens), client.lookup_ngrams("fp32", tokens))

    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    asyncio.run(check_async())
    for thread in threads:
        thread.join()
    assert not wrong


def test_models(client: EmbeddingClient) -> None:
    by_name = {model.name: model for model in client.models()}
    assert by_name["int4"].tables == {"ngram": (ROWS, DIM, "int4")}
    assert (by_name["int4"].version, by_name["int4"].family) == ("1", "longcat")


@pytest.mark.parametrize(
    ("table", "ids", "error", "message"),
    [
        ("nope/ngram", torch.tensor([1]), errors.NotFound, "'nope'.*served models: .*fp32@1"),
        ("fp32@3/ngram", torch.tensor([1]), errors.NotFound, "fp32@3"),
        ("fp32/words", torch.tensor([1]), errors.NotFound, "'words'.*ngram"),
        ("fp32", torch.tensor([1]), errors.InvalidRequest, "MODEL/TABLE"),
        ("fp32/ngram", torch.tensor([[0, 1], [2, ROWS]]), errors.OutOfRange, f"id {ROWS} "),
        ("fp32/ngram", torch.tensor([-1]), errors.OutOfRange, "id -1 at position 0"),
        ("fp32/ngram", torch.tensor([1.0]), errors.InvalidRequest, "float32"),
        ("fp32/ngram", torch.tensor([True]), errors.InvalidRequest, "bool"),
        ("fp32/ngram", [1, 2], errors.InvalidRequest, "list"),
        (None, torch.tensor([1]), errors.InvalidRequest, "MODEL/TABLE, got None"),
        ("fp32/ngram", torch.tensor([1]).to_sparse(), errors.InvalidRequest, "dense.*got torch.sparse_coo on cpu"),
        ("fp32/ngram", torch.tensor([[1]]).to_sparse(), errors.InvalidRequest, "dense.*got torch.sparse_coo on cpu"),
        ("fp32/ngram", torch.tensor([1], device="meta"), errors.InvalidRequest, "has values.*on meta"),
    ],
)
def test_bad_lookups(client: EmbeddingClient, table: str, ids: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        client.lookup(table, ids)


def test_bad_dtype(client: EmbeddingClient) -> None:
    with pytest.raises(errors.InvalidRequest, match="float64"):
        client.lookup("fp32/ngram", torch.tensor([1]), dtype=torch.float64)


def test_bad_tokens(client: EmbeddingClient) -> None:
    with pytest.raises(errors.InvalidRequest, match=rf"\[0, 2\] is {VOCAB}"):
        client.lookup_ngrams("fp32", torch.tensor([[1, 2, VOCAB]]))
    with pytest.raises(errors.InvalidRequest, match=r"token_ids.*got list; use torch.tensor\(token_ids\)"):
        client.lookup_ngrams("fp32", [[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest, match=r"context must be a torch.Tensor, got list"):
        client.lookup_ngrams("fp32", torch.tensor([[1, 2]]), [[1]])  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest, match="NAME@VERSION, got None"):
        client.lookup_ngrams(None, torch.tensor([[1, 2]]))  # type: ignore[arg-type]


def test_bad_timeouts(client: EmbeddingClient) -> None:
    ids, nan = torch.tensor([1]), float("nan")
    with pytest.raises(errors.InvalidRequest, match="timeout must be seconds, got nan"):
        client.lookup("fp32/ngram", ids, timeout=nan)
    with pytest.raises(errors.InvalidRequest, match="timeout must be seconds, got nan"):
        asyncio.run(client.lookup_async("fp32/ngram", ids, timeout=nan))
    for timeout in (float("inf"), 1e300):
        assert client.lookup("fp32/ngram", ids, timeout=timeout).shape == (1, DIM)
        assert asyncio.run(client.lookup_async("fp32/ngram", ids, timeout=timeout)).shape == (1, DIM)
    thread = client._transport._watchdog._thread  # has none where all rows are near
    assert thread is None or thread.is_alive()


def test_nobody_at_the_address() -> None:
    address = f"127.0.0.1:{free_port()}"
    with EmbeddingClient(address, timeout=0.5) as client, pytest.raises(errors.Unavailable, match=address):
        client.lookup("fp32/ngram", torch.tensor([1]))


@pytest.mark.parametrize("address", ["localhost", "http://localhost:7070", "localhost:", ":7070", ["a:1", "b"], []])
def test_an_address_is_host_and_port(address: str | list[str]) -> None:
    with pytest.raises(errors.InvalidRequest, match="HOST:PORT"):
        EmbeddingClient(address)


def test_a_second_seed_serves_when_the_first_is_dead(service: Up) -> None:
    with EmbeddingClient([f"127.0.0.1:{free_port()}", service.address]) as client:
        assert client.lookup("fp32/ngram", torch.tensor([5])).shape == (1, DIM)


def test_a_closed_client_says_so(service: Up) -> None:
    client = EmbeddingClient(service.address)
    client.lookup("fp32/ngram", torch.tensor([5]))
    client.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        client.lookup("fp32/ngram", torch.tensor([5]))
