from embedding_service.wire import embedding_pb2 as _embedding_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NearRequest(_message.Message):
    __slots__ = ("version", "incarnation", "next", "reads", "authorization")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    AUTHORIZATION_FIELD_NUMBER: _ClassVar[int]
    version: int
    incarnation: int
    next: bool
    reads: _containers.RepeatedCompositeFieldContainer[NearReads]
    authorization: str
    def __init__(self, version: _Optional[int] = ..., incarnation: _Optional[int] = ..., next: bool = ..., reads: _Optional[_Iterable[_Union[NearReads, _Mapping]]] = ..., authorization: _Optional[str] = ...) -> None: ...

class NearReads(_message.Message):
    __slots__ = ("generation", "rows")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rows: int
    def __init__(self, generation: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class NearAnswer(_message.Message):
    __slots__ = ("refusal", "board", "held", "dropped")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    BOARD_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    board: bool
    held: _containers.RepeatedCompositeFieldContainer[NearPart]
    dropped: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, refusal: _Optional[str] = ..., board: bool = ..., held: _Optional[_Iterable[_Union[NearPart, _Mapping]]] = ..., dropped: _Optional[_Iterable[int]] = ...) -> None: ...

class NearPart(_message.Message):
    __slots__ = ("model", "version", "table", "part", "slot", "generation", "offset", "memory")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    table: _embedding_pb2.TableInfo
    part: int
    slot: int
    generation: int
    offset: int
    memory: bool
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., table: _Optional[_Union[_embedding_pb2.TableInfo, _Mapping]] = ..., part: _Optional[int] = ..., slot: _Optional[int] = ..., generation: _Optional[int] = ..., offset: _Optional[int] = ..., memory: bool = ...) -> None: ...
