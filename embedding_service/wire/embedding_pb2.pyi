from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_ENCODING_UNSPECIFIED: _ClassVar[RowEncoding]
    ROW_ENCODING_FLOAT32: _ClassVar[RowEncoding]
    ROW_ENCODING_FLOAT16: _ClassVar[RowEncoding]
    ROW_ENCODING_BFLOAT16: _ClassVar[RowEncoding]
    ROW_ENCODING_STORED: _ClassVar[RowEncoding]
ROW_ENCODING_UNSPECIFIED: RowEncoding
ROW_ENCODING_FLOAT32: RowEncoding
ROW_ENCODING_FLOAT16: RowEncoding
ROW_ENCODING_BFLOAT16: RowEncoding
ROW_ENCODING_STORED: RowEncoding

class LookupRequest(_message.Message):
    __slots__ = ("model", "table", "ids", "ids_int64", "ids_uint32", "encoding", "epoch", "term", "traceparent")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    IDS_INT64_FIELD_NUMBER: _ClassVar[int]
    IDS_UINT32_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    model: str
    table: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    ids_int64: bytes
    ids_uint32: bytes
    encoding: RowEncoding
    epoch: int
    term: int
    traceparent: str
    def __init__(self, model: _Optional[str] = ..., table: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., ids_int64: _Optional[bytes] = ..., ids_uint32: _Optional[bytes] = ..., encoding: _Optional[_Union[RowEncoding, str]] = ..., epoch: _Optional[int] = ..., term: _Optional[int] = ..., traceparent: _Optional[str] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("rows", "row_bytes", "dim", "encoding", "version")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    row_bytes: int
    dim: int
    encoding: RowEncoding
    version: str
    def __init__(self, rows: _Optional[bytes] = ..., row_bytes: _Optional[int] = ..., dim: _Optional[int] = ..., encoding: _Optional[_Union[RowEncoding, str]] = ..., version: _Optional[str] = ...) -> None: ...

class StreamLookupRequest(_message.Message):
    __slots__ = ("request_id", "lookup")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    lookup: LookupRequest
    def __init__(self, request_id: _Optional[int] = ..., lookup: _Optional[_Union[LookupRequest, _Mapping]] = ...) -> None: ...

class StreamLookupResponse(_message.Message):
    __slots__ = ("request_id", "rows", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    rows: LookupResponse
    error: LookupFailure
    def __init__(self, request_id: _Optional[int] = ..., rows: _Optional[_Union[LookupResponse, _Mapping]] = ..., error: _Optional[_Union[LookupFailure, _Mapping]] = ...) -> None: ...

class LookupFailure(_message.Message):
    __slots__ = ("code", "message", "term", "epoch", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    term: int
    epoch: int
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., term: _Optional[int] = ..., epoch: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class LookupNgramsRequest(_message.Message):
    __slots__ = ("model", "token_ids", "batch", "context", "encoding")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    model: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    batch: int
    context: _containers.RepeatedScalarFieldContainer[int]
    encoding: RowEncoding
    def __init__(self, model: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., batch: _Optional[int] = ..., context: _Optional[_Iterable[int]] = ..., encoding: _Optional[_Union[RowEncoding, str]] = ...) -> None: ...

class LookupNgramsResponse(_message.Message):
    __slots__ = ("rows", "batch", "length", "tables", "heads", "dim", "row_bytes", "encoding", "version")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    rows: bytes
    batch: int
    length: int
    tables: int
    heads: int
    dim: int
    row_bytes: int
    encoding: RowEncoding
    version: str
    def __init__(self, rows: _Optional[bytes] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., tables: _Optional[int] = ..., heads: _Optional[int] = ..., dim: _Optional[int] = ..., row_bytes: _Optional[int] = ..., encoding: _Optional[_Union[RowEncoding, str]] = ..., version: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "version", "family", "hash_params", "tables", "base", "checkpoint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    HASH_PARAMS_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    family: str
    hash_params: str
    tables: _containers.RepeatedCompositeFieldContainer[TableInfo]
    base: str
    checkpoint: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., family: _Optional[str] = ..., hash_params: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableInfo, _Mapping]]] = ..., base: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class TableInfo(_message.Message):
    __slots__ = ("name", "rows", "dim", "dtype", "row_bytes", "rows_per_part", "replaced_rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_PART_FIELD_NUMBER: _ClassVar[int]
    REPLACED_ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    dim: int
    dtype: str
    row_bytes: int
    rows_per_part: int
    replaced_rows: int
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., dim: _Optional[int] = ..., dtype: _Optional[str] = ..., row_bytes: _Optional[int] = ..., rows_per_part: _Optional[int] = ..., replaced_rows: _Optional[int] = ...) -> None: ...

class GetRoutingRequest(_message.Message):
    __slots__ = ("term", "epoch")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("term", "epoch", "shards", "models", "limits", "controller", "signature", "digests")
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    term: int
    epoch: int
    shards: _containers.RepeatedCompositeFieldContainer[ShardAddress]
    models: _containers.RepeatedCompositeFieldContainer[ModelPlacement]
    limits: Limits
    controller: str
    signature: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, term: _Optional[int] = ..., epoch: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[ShardAddress, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[ModelPlacement, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., controller: _Optional[str] = ..., signature: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ShardAddress(_message.Message):
    __slots__ = ("id", "address", "topology", "near")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TOPOLOGY_FIELD_NUMBER: _ClassVar[int]
    NEAR_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    topology: str
    near: NearPlace
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., topology: _Optional[str] = ..., near: _Optional[_Union[NearPlace, _Mapping]] = ...) -> None: ...

class NearPlace(_message.Message):
    __slots__ = ("path", "boot_id", "incarnation")
    PATH_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    path: str
    boot_id: str
    incarnation: int
    def __init__(self, path: _Optional[str] = ..., boot_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class ModelPlacement(_message.Message):
    __slots__ = ("model", "tables")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    tables: _containers.RepeatedCompositeFieldContainer[TablePlacement]
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ..., tables: _Optional[_Iterable[_Union[TablePlacement, _Mapping]]] = ...) -> None: ...

class TablePlacement(_message.Message):
    __slots__ = ("parts",)
    PARTS_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[PartOwners]
    def __init__(self, parts: _Optional[_Iterable[_Union[PartOwners, _Mapping]]] = ...) -> None: ...

class PartOwners(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, shards: _Optional[_Iterable[int]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("request_bytes", "response_bytes")
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    request_bytes: int
    response_bytes: int
    def __init__(self, request_bytes: _Optional[int] = ..., response_bytes: _Optional[int] = ...) -> None: ...
