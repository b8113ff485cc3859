"""The name of a part, for all rooms that place, hold or ask for one."""

from __future__ import annotations

from typing import NamedTuple

from embedding_service.wire.control_pb2 import PartRef


class PartKey(NamedTuple):
    """One part of a table of one model version."""

    model: str
    version: str
    table: str
    part: int

    def __str__(self) -> str:
        return f"{self.model}@{self.version}/{self.table}/part-{self.part:05d}"

    def to_wire(self) -> PartRef:
        """As the control protocol sends it."""
        return PartRef(model=self.model, version=self.version, table=self.table, part=self.part)

    @classmethod
    def from_wire(cls, ref: PartRef) -> PartKey:
        """As the control protocol brought it."""
        return cls(ref.model, ref.version, ref.table, ref.part)
