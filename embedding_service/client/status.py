"""Asks the controller how the service is, from any of its addresses."""

from __future__ import annotations

import grpc

from embedding_service.client.channels import open_channel
from embedding_service.errors import EmbeddingServiceError, Unavailable
from embedding_service.grpc_codes import error_of
from embedding_service.machine import split_address
from embedding_service.security.access import Access, access_of
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.control_pb2_grpc import ControlServiceStub
from embedding_service.wire.embedding_pb2_grpc import EmbeddingServiceStub


def get_status(address: str, timeout: float = 5.0, tls: Access | bool | None = None) -> control.Status:
    """The controller's view. `address` is the controller's or any shard's, which names the controller.

    `tls`: as of `EmbeddingClient`.

    Raises ServiceError if neither can be reached, InvalidRequest if it is no address.
    """
    split_address(address, least=1)
    access = access_of(tls, None)
    try:
        return _ask(address, timeout, access)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise _unreachable(address, error) from None
    try:
        with open_channel(address, access) as channel:
            routing = EmbeddingServiceStub(channel).GetRouting(wire.GetRoutingRequest(), timeout=timeout)
    except grpc.RpcError as error:
        raise error_of(error.code(), error.details() or "") from None
    try:
        return _ask(routing.controller, timeout, access)
    except grpc.RpcError as error:
        raise _unreachable(routing.controller, error) from None


def _ask(address: str, timeout: float, access: Access | None) -> control.Status:
    with open_channel(address, access) as channel:
        return ControlServiceStub(channel).GetStatus(control.GetStatusRequest(), timeout=timeout)


def _unreachable(address: str, error: grpc.RpcError) -> EmbeddingServiceError:
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return error_of(error.code(), error.details() or "")
    return Unavailable(f"no controller answers at {address} ({error.code().name}: {error.details()})")
