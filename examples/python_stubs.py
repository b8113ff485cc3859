"""Looks rows up with grpcio, protobuf and the generated stubs alone: no torch, none of the client's own code.

    python examples/python_stubs.py HOST:PORT MODEL TABLE ID [ID ...]

Any shard's address will do. Of a secured service, EMBEDDING_SERVICE_TLS names the authority's file, as
    EMBEDDING_SERVICE_TLS=DIR/client/ca.crt EMBEDDING_SERVICE_TOKEN=...
Stubs of your own, in place of those two of `embedding_service.wire`, are made by
    python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. embedding/v1/embedding.proto
"""

import array
import os
import sys
from pathlib import Path

import grpc

from embedding_service.wire import embedding_pb2, embedding_pb2_grpc


def open_channel(address: str) -> grpc.Channel:
    """To any shard: by TLS and with a token where the environment says so. Raises OSError."""
    options = [("grpc.enable_http_proxy", 0)]
    authority, token = os.environ.get("EMBEDDING_SERVICE_TLS"), os.environ.get("EMBEDDING_SERVICE_TOKEN")
    if not authority:
        return grpc.insecure_channel(address, options)
    credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
    if token:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    return grpc.secure_channel(address, credentials, options)


def lookup(
    stub: embedding_pb2_grpc.EmbeddingServiceStub, model: str, table: str, ids: list[int]
) -> list[tuple[float, ...]]:
    """Rows in the order of the ids. Raises grpc.RpcError. Its details say what is wrong with the request."""
    answer = stub.Lookup(embedding_pb2.LookupRequest(model=model, table=table, ids=ids), timeout=10)
    values = array.array("f", answer.rows)  # row-major float32, little-endian
    if sys.byteorder == "big":
        values.byteswap()
    return [tuple(values[start : start + answer.dim]) for start in range(0, len(values), answer.dim)]


def main(*arguments: str) -> int:
    if len(arguments) < 4 or not all(each.lstrip("-").isdigit() for each in arguments[3:]):
        print("usage: python examples/python_stubs.py HOST:PORT MODEL TABLE ID [ID ...]", file=sys.stderr)
        return 2
    address, model, table, *ids = arguments
    try:
        with open_channel(address) as channel:
            for row in lookup(embedding_pb2_grpc.EmbeddingServiceStub(channel), model, table, list(map(int, ids))):
                print(*row)
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"EMBEDDING_SERVICE_TLS cannot be read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
