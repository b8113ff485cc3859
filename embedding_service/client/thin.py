"""One call to one address, as a thin client in any language makes it: no torch, no routing, no retries.

The command line asks so, because torch takes 2 s to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from embedding_service.client.channels import open_channel
from embedding_service.errors import InvalidRequest, ProtocolError, Unavailable
from embedding_service.grpc_codes import error_of
from embedding_service.machine import split_address
from embedding_service.security.access import access_of
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub


def list_models(address: str, timeout: float = 10.0) -> Sequence[wire.ModelInfo]:
    """What is served now, as any shard of the service says it. Raises ServiceError, InvalidRequest."""
    return _ask(address, lambda stub: stub.ListModels(wire.ListModelsRequest(), timeout=timeout)).models  # type: ignore[no-any-return]


def get_rows(address: str, name: str, ids: Sequence[int], timeout: float = 10.0) -> npt.NDArray[np.float32]:
    """Rows `ids` of MODEL/TABLE, decoded by the shard: float32 [n, dim].

    Raises ServiceError, and InvalidRequest for a name or an address that is not valid.
    """
    model, _, table = name.partition("/")
    if not table:
        raise InvalidRequest(f"table must be named as MODEL/TABLE, got {name!r}")
    request = wire.LookupRequest(model=model, table=table, ids=ids)
    answer = _ask(address, lambda stub: stub.Lookup(request, timeout=timeout))
    if len(answer.rows) != 4 * len(ids) * answer.dim:
        raise ProtocolError(f"{address} answered {len(answer.rows):,} bytes for {len(ids)} rows of {answer.dim} values")
    return np.frombuffer(answer.rows, "<f4").reshape(len(ids), answer.dim)


def _ask(address: str, call: Callable[[EmbeddingServiceStub], Any]) -> Any:
    split_address(address, least=1)
    with open_channel(address, access_of(None, None)) as channel:
        try:
            return call(EmbeddingServiceStub(channel))
        except grpc.RpcError as error:
            found = error_of(error.code(), error.details() or "")
    if isinstance(found, Unavailable):
        raise Unavailable(f"asking {address} failed: {found}; check the address, and `embedding-service status` there")
    raise found
