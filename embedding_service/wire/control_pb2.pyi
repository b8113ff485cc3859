from embedding_service.wire import embedding_pb2 as _embedding_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PartRef(_message.Message):
    __slots__ = ("model", "version", "table", "part")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    table: str
    part: int
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., table: _Optional[str] = ..., part: _Optional[int] = ...) -> None: ...

class ShardReport(_message.Message):
    __slots__ = ("shard_id", "address", "device", "tier", "memory_limit", "has_parts", "parts", "part_accesses", "failures", "term", "epoch", "served", "models", "incarnation", "near", "obeyed", "stats", "draining", "topology")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    HAS_PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PART_ACCESSES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEAR_FIELD_NUMBER: _ClassVar[int]
    OBEYED_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    shard_id: str
    address: str
    device: str
    tier: str
    memory_limit: int
    has_parts: bool
    parts: _containers.RepeatedCompositeFieldContainer[PartRef]
    part_accesses: _containers.RepeatedScalarFieldContainer[int]
    failures: _containers.RepeatedCompositeFieldContainer[PartFailure]
    term: int
    epoch: int
    served: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedCompositeFieldContainer[_embedding_pb2.ModelInfo]
    incarnation: int
    near: _embedding_pb2.NearPlace
    obeyed: int
    stats: ShardStats
    draining: bool
    topology: str
    def __init__(self, shard_id: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., tier: _Optional[str] = ..., memory_limit: _Optional[int] = ..., has_parts: bool = ..., parts: _Optional[_Iterable[_Union[PartRef, _Mapping]]] = ..., part_accesses: _Optional[_Iterable[int]] = ..., failures: _Optional[_Iterable[_Union[PartFailure, _Mapping]]] = ..., term: _Optional[int] = ..., epoch: _Optional[int] = ..., served: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[_Union[_embedding_pb2.ModelInfo, _Mapping]]] = ..., incarnation: _Optional[int] = ..., near: _Optional[_Union[_embedding_pb2.NearPlace, _Mapping]] = ..., obeyed: _Optional[int] = ..., stats: _Optional[_Union[ShardStats, _Mapping]] = ..., draining: bool = ..., topology: _Optional[str] = ...) -> None: ...

class PartFailure(_message.Message):
    __slots__ = ("part", "message")
    PART_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    part: PartRef
    message: str
    def __init__(self, part: _Optional[_Union[PartRef, _Mapping]] = ..., message: _Optional[str] = ...) -> None: ...

class ShardStats(_message.Message):
    __slots__ = ("pid", "uptime_seconds", "lookups", "rows", "row_bytes", "forwarded_rows", "errors", "lookups_per_second", "rows_per_second", "held_bytes", "anonymous_bytes", "file_bytes", "near_rows", "near_rows_per_second", "p50_seconds", "p99_seconds", "branches")
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORWARDED_ROWS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    ANONYMOUS_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NEAR_ROWS_FIELD_NUMBER: _ClassVar[int]
    NEAR_ROWS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    P50_SECONDS_FIELD_NUMBER: _ClassVar[int]
    P99_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    pid: int
    uptime_seconds: float
    lookups: int
    rows: int
    row_bytes: int
    forwarded_rows: int
    errors: int
    lookups_per_second: float
    rows_per_second: float
    held_bytes: int
    anonymous_bytes: int
    file_bytes: int
    near_rows: int
    near_rows_per_second: float
    p50_seconds: float
    p99_seconds: float
    branches: _containers.RepeatedCompositeFieldContainer[BranchStatus]
    def __init__(self, pid: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., lookups: _Optional[int] = ..., rows: _Optional[int] = ..., row_bytes: _Optional[int] = ..., forwarded_rows: _Optional[int] = ..., errors: _Optional[int] = ..., lookups_per_second: _Optional[float] = ..., rows_per_second: _Optional[float] = ..., held_bytes: _Optional[int] = ..., anonymous_bytes: _Optional[int] = ..., file_bytes: _Optional[int] = ..., near_rows: _Optional[int] = ..., near_rows_per_second: _Optional[float] = ..., p50_seconds: _Optional[float] = ..., p99_seconds: _Optional[float] = ..., branches: _Optional[_Iterable[_Union[BranchStatus, _Mapping]]] = ...) -> None: ...

class BranchStatus(_message.Message):
    __slots__ = ("branch", "share", "base", "applied_step", "durable_step", "losses", "in_sync", "shares")
    BRANCH_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_STEP_FIELD_NUMBER: _ClassVar[int]
    DURABLE_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    branch: str
    share: str
    base: str
    applied_step: int
    durable_step: int
    losses: int
    in_sync: int
    shares: int
    def __init__(self, branch: _Optional[str] = ..., share: _Optional[str] = ..., base: _Optional[str] = ..., applied_step: _Optional[int] = ..., durable_step: _Optional[int] = ..., losses: _Optional[int] = ..., in_sync: _Optional[int] = ..., shares: _Optional[int] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("term", "has_parts", "parts", "routing", "released", "number")
    TERM_FIELD_NUMBER: _ClassVar[int]
    HAS_PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    term: int
    has_parts: bool
    parts: _containers.RepeatedCompositeFieldContainer[PartRef]
    routing: _embedding_pb2.Routing
    released: bool
    number: int
    def __init__(self, term: _Optional[int] = ..., has_parts: bool = ..., parts: _Optional[_Iterable[_Union[PartRef, _Mapping]]] = ..., routing: _Optional[_Union[_embedding_pb2.Routing, _Mapping]] = ..., released: bool = ..., number: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("term", "epoch", "shards", "models", "problems")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardStatus]
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardStatus, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping]]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("kind", "message")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Problem.Kind]
        KIND_WAITING: _ClassVar[Problem.Kind]
        KIND_STORE: _ClassVar[Problem.Kind]
        KIND_PLACEMENT: _ClassVar[Problem.Kind]
        KIND_SHARD: _ClassVar[Problem.Kind]
        KIND_SKIPPED: _ClassVar[Problem.Kind]
        KIND_COPIES: _ClassVar[Problem.Kind]
    KIND_UNSPECIFIED: Problem.Kind
    KIND_WAITING: Problem.Kind
    KIND_STORE: Problem.Kind
    KIND_PLACEMENT: Problem.Kind
    KIND_SHARD: Problem.Kind
    KIND_SKIPPED: Problem.Kind
    KIND_COPIES: Problem.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: Problem.Kind
    message: str
    def __init__(self, kind: _Optional[_Union[Problem.Kind, str]] = ..., message: _Optional[str] = ...) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("shard_id", "address", "device", "tier", "memory_limit", "parts", "parts_missing", "stats", "draining", "topology")
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_MISSING_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    shard_id: str
    address: str
    device: str
    tier: str
    memory_limit: int
    parts: int
    parts_missing: int
    stats: ShardStats
    draining: bool
    topology: str
    def __init__(self, shard_id: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., tier: _Optional[str] = ..., memory_limit: _Optional[int] = ..., parts: _Optional[int] = ..., parts_missing: _Optional[int] = ..., stats: _Optional[_Union[ShardStats, _Mapping]] = ..., draining: bool = ..., topology: _Optional[str] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "parts", "parts_ready", "bytes", "serving")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_READY_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    model: _embedding_pb2.ModelInfo
    parts: int
    parts_ready: int
    bytes: int
    serving: bool
    def __init__(self, model: _Optional[_Union[_embedding_pb2.ModelInfo, _Mapping]] = ..., parts: _Optional[int] = ..., parts_ready: _Optional[int] = ..., bytes: _Optional[int] = ..., serving: bool = ...) -> None: ...
