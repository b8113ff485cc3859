"""What a call is: one request to one address, and how it ends without an answer."""

from __future__ import annotations

from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from embedding_service.wire.lookup_codec import EncodedLookup, Shape


class Call(NamedTuple):
    """A request to one address. Its outcome is the answer's message, or an `Answer` for a lookup, or a `Failure`.

    Attributes:
        timeout: Seconds.
        shape: Of a lookup: what its answer should look like.
    """

    address: str
    request: Message | EncodedLookup
    timeout: float
    shape: Shape | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows it asks for."""
        return self.shape.nbytes if self.shape else 0


class Failure(NamedTuple):
    """How a call without an answer ended. `pushback`: seconds after which it may be made again, if the shard says."""

    code: grpc.StatusCode
    message: str
    pushback: float = 0.0


def undecodable(error: DecodeError) -> Failure:
    """The failure of a call whose answer makes no sense."""
    return Failure(grpc.StatusCode.INTERNAL, f"the answer is no message of this service: {error}")
