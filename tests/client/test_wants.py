"""Rows that come in pieces, in any order, end where they were asked: as bytes, and decoded."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.checkpoints import DIM, longcat_table

from embedding_service import EmbeddingClient
from embedding_service.client import owners, wants
from embedding_service.client.wants import DecodedRows, StoredRows, decoder
from embedding_service.formats import FORMATS, get_format

ROWS = len(longcat_table())
CPU = torch.device("cpu")
# Positions of ten rows: one whole, runs, runs with gaps between them, and what two shards failed to answer.
PIECES: list[list[list[int]]] = [
    [list(range(10))],
    [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]],
    [[4, 7, 8], [0, 2, 9], [1], [3, 5, 6]],
    [[0, 2, 4, 1, 3, 5], [9, 6], [7, 8]],
]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_pieces_give_what_the_whole_gives(name: str, dtype: torch.dtype, pieces: list[list[int]]) -> None:
    row_format = get_format(name)
    stored = row_format.encode(torch.randn(10, 64, generator=torch.Generator().manual_seed(1)))
    decoded = DecodedRows(10, decoder(name, 64, dtype, CPU))
    kept = StoredRows(10, stored.shape[1])
    for piece in pieces[::-1]:
        for sink in (decoded, kept):
            sink.put(np.array(piece), stored[piece].numpy())
    assert torch.equal(decoded.values, row_format.decode(stored, 64, dtype=dtype))
    assert np.array_equal(kept.rows, stored.numpy())


def test_rows_in_one_message_stay_in_it() -> None:
    message = np.arange(64, dtype=np.uint8).reshape(4, 16)
    kept, decoded = StoredRows(4, 16), DecodedRows(4, decoder("fp16", 8, torch.float16, CPU))
    for sink in (kept, decoded):
        sink.put(None, message)
    assert kept.rows is message
    assert decoded.values.data_ptr() == message.ctypes.data


def test_what_needs_no_decoding_is_not_cut() -> None:
    assert not StoredRows(4, 16).decodes
    assert not DecodedRows(4, decoder("bf16", 8, torch.bfloat16, CPU)).decodes
    assert DecodedRows(4, decoder("bf16", 8, torch.float32, CPU)).decodes
    assert DecodedRows(4, decoder("int8", 8, torch.float16, CPU)).decodes
    assert DecodedRows(4, decoder("fp16", 8, torch.float16, torch.device("meta"))).decodes


def test_nothing_asked_is_nothing_found() -> None:
    assert DecodedRows(0, decoder("int8", 8, torch.float32, CPU)).values.shape == (0, 8)
    assert StoredRows(0, 12).rows.shape == (0, 12)


@pytest.mark.parametrize("order", [torch.arange, torch.randperm])
@pytest.mark.parametrize("model", ["fp32", "int8", "int4"])
def test_a_lookup_in_pieces_from_several_shards(
    client: EmbeddingClient, monkeypatch: pytest.MonkeyPatch, model: str, order: Callable[[int], torch.Tensor]
) -> None:
    monkeypatch.setattr(owners, "PIECE_BYTES", 4 << 10)
    monkeypatch.setattr(wants, "FEW_BYTES", 1 << 10)
    ids, row_format = order(ROWS), get_format(model)
    expected = row_format.decode(row_format.encode(longcat_table()), DIM)[ids]
    assert torch.equal(client.lookup(f"{model}/ngram", ids), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", FORMATS)
def test_rows_on_a_gpu_are_those_on_the_cpu(client: EmbeddingClient, model: str, dtype: torch.dtype) -> None:
    ids = torch.randint(0, ROWS, (7, 30))
    expected = client.lookup(f"{model}/ngram", ids, dtype=dtype)
    for rows in (
        client.lookup(f"{model}/ngram", ids.cuda(), dtype=dtype),
        client.prefetch(f"{model}/ngram", ids.cuda(), dtype=dtype).result(),
    ):
        assert rows.is_cuda
        assert torch.equal(rows.cpu(), expected)
