"""Looks rows up with grpcio, protobuf and the generated stubs alone: no torch, none of the client's own code.

    python examples/python_stubs.py HOST:PORT MODEL TABLE ID [ID ...]

Any shard's address will do. Stubs of your own, in place of those two of `embedding_service.wire`, are made by
    python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. embedding/v1/embedding.proto
"""

import array
import sys

import grpc

from embedding_service.wire import embedding_pb2, embedding_pb2_grpc


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
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            for row in lookup(embedding_pb2_grpc.EmbeddingServiceStub(channel), model, table, list(map(int, ids))):
                print(*row)
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
