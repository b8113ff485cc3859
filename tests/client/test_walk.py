"""How far a reader has to walk to follow one lookup through the client: which functions run, and in which files.

Against two gRPC servers in this process that answer as shards do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import embedding_service
from embedding_service import EmbeddingClient
from embedding_service.formats import get_format
from embedding_service.wire import embedding_pb2 as wire

PACKAGE = str(Path(embedding_service.__file__).parent)
MOST_CHANGES = 20


def walk(action: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of each entry into a function of this package on the calling thread, resumed ones too."""
    entries: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            entries.append((code.co_filename.removeprefix(PACKAGE)[1:], code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return entries


def stretches(entries: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Entries that follow each other in one file, as one."""
    return [(file, [name for _, name in each]) for file, each in groupby(entries, key=lambda entry: entry[0])]


ROWS, DIM = 64, 16
ROW_BYTES = get_format("int8").row_bytes(DIM)
STORED = np.random.default_rng(1).integers(0, 100, (ROWS, ROW_BYTES)).astype(np.uint8)


@contextmanager
def two_shards() -> Iterator[str]:
    """The address of one of two; each has half of the rows of the int8 table m/t."""
    routing = wire.Routing(term=1, epoch=1)

    def answer_each(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for message in requests:
            request = wire.StreamLookupRequest.FromString(message).lookup
            rows = STORED[np.frombuffer(request.ids_uint32, "<u4")].tobytes()
            answer = wire.LookupResponse(
                rows=rows, row_bytes=ROW_BYTES, dim=DIM, version="1", encoding=wire.ROW_ENCODING_STORED
            )
            yield wire.StreamLookupResponse(rows=answer).SerializeToString()

    methods = {
        "GetRouting": grpc.unary_unary_rpc_method_handler(lambda request, context: routing.SerializeToString()),
        "StreamLookup": grpc.stream_stream_rpc_method_handler(answer_each),
    }
    servers = [grpc.server(ThreadPoolExecutor(4)) for _ in range(2)]
    for number, server in enumerate(servers):
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("embedding.v1.EmbeddingService", methods),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        routing.shards.add(id=f"s{number}", address=f"127.0.0.1:{port}")
    table = wire.TableInfo(name="t", rows=ROWS, dim=DIM, dtype="int8", row_bytes=ROW_BYTES, rows_per_part=ROWS // 2)
    owners = wire.TablePlacement(parts=[wire.PartOwners(shards=[0]), wire.PartOwners(shards=[1])])
    info = wire.ModelInfo(name="m", version="1", tables=[table])
    routing.models.add(model=info, tables=[owners])
    try:
        for server in servers:
            server.start()
        yield routing.shards[0].address
    finally:
        for server in servers:
            server.stop(None).wait()


def test_a_lookup_changes_file_at_most_20_times(capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.tensor([3, 40, 1, 0, 63, 33, 7, 50, 9, 45])
    with two_shards() as address, EmbeddingClient(address, timeout=60, near=False) as client:
        for _ in range(3):  # connections, streams and what is remembered of requests
            client.lookup("m/t", ids)
        rows: list[torch.Tensor] = []
        entries = walk(lambda: rows.append(client.lookup("m/t", ids)))
    assert torch.equal(rows[0], get_format("int8").decode(torch.from_numpy(STORED[ids.numpy()]), DIM))
    way = stretches(entries)
    files = {file for file, _ in way}
    told = "\n".join(f"{file:32} {', '.join(names)}" for file, names in way)
    with capsys.disabled():
        print(f"\n{len(entries)} entries, {len(files)} files, {len(way) - 1} changes of file\n{told}")
    assert len(way) - 1 <= MOST_CHANGES, told
