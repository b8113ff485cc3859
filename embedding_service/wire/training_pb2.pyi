from embedding_service.wire import embedding_pb2 as _embedding_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Optimizer(_message.Message):
    __slots__ = ("kind", "eps", "beta1", "beta2")
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    kind: str
    eps: float
    beta1: float
    beta2: float
    def __init__(self, kind: _Optional[str] = ..., eps: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("branch", "base", "optimizer", "dequantize", "checkpoint_every", "new_session", "copies", "shares")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    DEQUANTIZE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    branch: str
    base: str
    optimizer: Optimizer
    dequantize: bool
    checkpoint_every: int
    new_session: bool
    copies: int
    shares: int
    def __init__(self, branch: _Optional[str] = ..., base: _Optional[str] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., dequantize: bool = ..., checkpoint_every: _Optional[int] = ..., new_session: bool = ..., copies: _Optional[int] = ..., shares: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("session", "base", "optimizer", "family", "hash_params", "tables", "shares")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    HASH_PARAMS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    session: int
    base: str
    optimizer: Optimizer
    family: str
    hash_params: str
    tables: _containers.RepeatedCompositeFieldContainer[BranchTable]
    shares: _containers.RepeatedCompositeFieldContainer[BranchShare]
    def __init__(self, session: _Optional[int] = ..., base: _Optional[str] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., family: _Optional[str] = ..., hash_params: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[BranchTable, _Mapping]]] = ..., shares: _Optional[_Iterable[_Union[BranchShare, _Mapping]]] = ...) -> None: ...

class BranchTable(_message.Message):
    __slots__ = ("name", "rows", "dim", "rows_per_part", "shares")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_PART_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    dim: int
    rows_per_part: int
    shares: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., dim: _Optional[int] = ..., rows_per_part: _Optional[int] = ..., shares: _Optional[_Iterable[int]] = ...) -> None: ...

class BranchShare(_message.Message):
    __slots__ = ("name", "address", "shard")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    shard: str
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., shard: _Optional[str] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("branch", "session", "workers", "at_step", "rewind", "share")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    AT_STEP_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    session: int
    workers: int
    at_step: int
    rewind: bool
    share: str
    def __init__(self, branch: _Optional[str] = ..., session: _Optional[int] = ..., workers: _Optional[int] = ..., at_step: _Optional[int] = ..., rewind: bool = ..., share: _Optional[str] = ...) -> None: ...

class BeginResponse(_message.Message):
    __slots__ = ("applied_step", "durable_step", "accepted_steps", "timeline")
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_STEPS_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    applied_step: int
    durable_step: int
    accepted_steps: _containers.RepeatedScalarFieldContainer[int]
    timeline: int
    def __init__(self, applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., accepted_steps: _Optional[_Iterable[int]] = ..., timeline: _Optional[int] = ...) -> None: ...

class PushPiece(_message.Message):
    __slots__ = ("branch", "session", "worker", "step", "table", "ids", "gradients", "encoding", "last", "learning_rate", "checksum", "share")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    session: int
    worker: int
    step: int
    table: str
    ids: bytes
    gradients: bytes
    encoding: _embedding_pb2.RowEncoding
    last: bool
    learning_rate: float
    checksum: int
    share: str
    def __init__(self, branch: _Optional[str] = ..., session: _Optional[int] = ..., worker: _Optional[int] = ..., step: _Optional[int] = ..., table: _Optional[str] = ..., ids: _Optional[bytes] = ..., gradients: _Optional[bytes] = ..., encoding: _Optional[_Union[_embedding_pb2.RowEncoding, str]] = ..., last: bool = ..., learning_rate: _Optional[float] = ..., checksum: _Optional[int] = ..., share: _Optional[str] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("accepted_step", "applied_step", "durable_step")
    ACCEPTED_STEP_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    accepted_step: int
    applied_step: int
    durable_step: int
    def __init__(self, accepted_step: _Optional[int] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("branch", "table", "ids", "encoding", "at_least_step", "session", "worker", "share")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_STEP_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    table: str
    ids: bytes
    encoding: _embedding_pb2.RowEncoding
    at_least_step: int
    session: int
    worker: int
    share: str
    def __init__(self, branch: _Optional[str] = ..., table: _Optional[str] = ..., ids: _Optional[bytes] = ..., encoding: _Optional[_Union[_embedding_pb2.RowEncoding, str]] = ..., at_least_step: _Optional[int] = ..., session: _Optional[int] = ..., worker: _Optional[int] = ..., share: _Optional[str] = ...) -> None: ...

class ReadResponse(_message.Message):
    __slots__ = ("rows", "step")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    step: int
    def __init__(self, rows: _Optional[bytes] = ..., step: _Optional[int] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("branch", "step", "session", "worker", "share")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    step: int
    session: int
    worker: int
    share: str
    def __init__(self, branch: _Optional[str] = ..., step: _Optional[int] = ..., session: _Optional[int] = ..., worker: _Optional[int] = ..., share: _Optional[str] = ...) -> None: ...

class CheckpointResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("branch", "step", "version", "dtype", "base")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    branch: str
    step: int
    version: str
    dtype: str
    base: str
    def __init__(self, branch: _Optional[str] = ..., step: _Optional[int] = ..., version: _Optional[str] = ..., dtype: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("version", "rows")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    version: str
    rows: int
    def __init__(self, version: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("branch", "share", "shard", "position", "run", "log")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    LOG_FIELD_NUMBER: _ClassVar[int]
    branch: str
    share: str
    shard: str
    position: int
    run: int
    log: str
    def __init__(self, branch: _Optional[str] = ..., share: _Optional[str] = ..., shard: _Optional[str] = ..., position: _Optional[int] = ..., run: _Optional[int] = ..., log: _Optional[str] = ...) -> None: ...

class Followed(_message.Message):
    __slots__ = ("kind", "step", "position", "piece", "last", "run")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Followed.Kind]
        KIND_START: _ClassVar[Followed.Kind]
        KIND_SESSION: _ClassVar[Followed.Kind]
        KIND_PUSH: _ClassVar[Followed.Kind]
        KIND_REWIND: _ClassVar[Followed.Kind]
        KIND_CHECKPOINT: _ClassVar[Followed.Kind]
        KIND_CAUGHT_UP: _ClassVar[Followed.Kind]
    KIND_UNSPECIFIED: Followed.Kind
    KIND_START: Followed.Kind
    KIND_SESSION: Followed.Kind
    KIND_PUSH: Followed.Kind
    KIND_REWIND: Followed.Kind
    KIND_CHECKPOINT: Followed.Kind
    KIND_CAUGHT_UP: Followed.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    kind: Followed.Kind
    step: int
    position: int
    piece: bytes
    last: bool
    run: int
    def __init__(self, kind: _Optional[_Union[Followed.Kind, str]] = ..., step: _Optional[int] = ..., position: _Optional[int] = ..., piece: _Optional[bytes] = ..., last: bool = ..., run: _Optional[int] = ...) -> None: ...
