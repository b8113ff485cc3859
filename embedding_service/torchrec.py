"""TorchRec's embedding modules with their tables in the service. Swap the module, and leave the model as it is.

They are used as `torchrec.EmbeddingCollection` and `torchrec.EmbeddingBagCollection` are. The client and the model's
name come before the configs. A batch asks for the rows of all its tables at once, and for each row once. This file
needs torchrec. The rest of the client side does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.modules.embedding_configs import (
    BaseEmbeddingConfig,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
    pooling_type_to_str,
)
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embedding_service.client.client import EmbeddingClient, ModelDescription
from embedding_service.client.remote import RemoteModule, wire_dtype
from embedding_service.errors import InvalidRequest, NotFound, OutOfRange

__all__ = ["RemoteEmbeddingBagCollection", "RemoteEmbeddingCollection"]
# Versions that may replace each other while a batch is looked up, before that is an error.
_VERSIONS = 3
# A batch is asked for on several threads, and again if its version was replaced. So graphs of torch.compile end here.
_outside_graphs = partial(torch.compiler.disable, reason="the tables lie in the service")


class _RemoteTables(RemoteModule):
    """The tables of one model, with a config for each."""

    def __init__(
        self,
        client: EmbeddingClient,
        model: str,
        tables: Sequence[BaseEmbeddingConfig],
        device: torch.device | str | None,
    ) -> None:
        wanted = None if device is None else torch.device(device)
        super().__init__(device=wanted)
        self._client, self._model, self._configs = client, model, tables
        self._device = wanted
        names = [config.name for config in tables]
        if not names or len(set(names)) < len(names):
            raise InvalidRequest(
                f"each config needs a table name of its own, got {', '.join(map(repr, names)) or 'none'}"
            )
        for config in tables:
            config.feature_names = config.feature_names or [config.name]  # as TorchRec does
        self._output_names = get_embedding_names_by_table(list(tables))
        self._served = self._served_version()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Outputs follow the module to another device. They stay float32, as TorchRec's do, made of converted rows."""
        before = self.device
        super()._apply(fn, recurse)
        if self.device != before:
            self._device = self.device
        return self

    @property
    def device(self) -> torch.device:
        """The device of outputs. It is the CPU if they follow the features."""
        return self._stand_in.device

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        tables = ", ".join(f"{each.name} [{each.num_embeddings}, {each.embedding_dim}]" for each in self._configs)
        return f"{self._model!r}, {tables}"

    def _features(self, features: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, dict[str, JaggedTensor]]:
        """The features, which may come as a TensorDict, and each by its name."""
        features = maybe_td_to_kjt(features, None)
        jagged = features.to_dict()
        for config in self._configs:
            for name in config.feature_names:
                if name not in jagged:
                    known = ", ".join(jagged) or "none"
                    raise InvalidRequest(f"table {config.name} needs the feature {name!r}; given are: {known}")
        return features, jagged

    def _rows(self, jagged: Mapping[str, JaggedTensor]) -> list[list[Tensor]]:
        """For each table and each of its features the rows [ids, dim], all of one version of the model."""
        ids = [[jagged[name].values() for name in config.feature_names] for config in self._configs]
        flat = [torch.cat(each) for each in ids]
        rows = [self._in_graph(each if self._device is None else each.to(self._device)) for each in self._fetch(flat)]
        return [_apart(each, [len(part) for part in parts]) for each, parts in zip(rows, ids, strict=True)]

    def _fetch(self, ids: list[Tensor]) -> list[Tensor]:
        """For each table the rows of its ids [n], looked up together in one version."""
        for attempt in range(_VERSIONS):
            served = self._served
            try:
                return self._lookup(served, ids)
            except NotFound:  # that version was replaced
                self._served = self._served_version()
                if self._served == served or attempt == _VERSIONS - 1:
                    raise
        raise AssertionError("unreachable")

    def _lookup(self, served: str, ids: list[Tensor]) -> list[Tensor]:
        names = [f"{served}/{config.name}" for config in self._configs]
        # The last table on this thread, which would only wait. With one table there is no other.
        dtype = self._stand_in.dtype
        sent = wire_dtype(dtype)
        ahead = [self._client.prefetch(*each, dtype=sent) for each in zip(names[:-1], ids[:-1], strict=True)]
        last = partial(self._client.lookup, names[-1], ids[-1], dtype=sent)
        waits: list[Callable[[], Tensor]] = [last, *(each.result for each in ahead)]
        configs = [self._configs[-1], *self._configs[:-1]]
        found = [_wait(config, wait) for config, wait in zip(configs, waits, strict=True)]
        return [rows.to(dtype) for rows in (*found[1:], found[0])]

    def _served_version(self) -> str:
        """`name@version` of what is served now. Raises InvalidRequest if it differs from the configs."""
        models = self._client.models()
        found = [model for model in models if self._model in (model.name, _full_name(model))]
        if not found:
            known = ", ".join(map(_full_name, models)) or "none yet"
            raise NotFound(f"no model {self._model!r} is served; served models: {known}")
        if problems := [problem for config in self._configs for problem in _mismatch(config, found[-1])]:
            raise InvalidRequest(
                f"the configs are not of the tables that {_full_name(found[-1])} has: {'; '.join(problems)}. Correct "
                "them, or name the model@version that they were made for"
            )
        return _full_name(found[-1])


def _wait(config: BaseEmbeddingConfig, rows: Callable[[], Tensor]) -> Tensor:
    try:
        return rows()
    except OutOfRange as error:
        raise OutOfRange(f"{error} (the ids of {', '.join(config.feature_names)}, one after the other)") from error


class RemoteEmbeddingCollection(_RemoteTables, EmbeddingCollectionInterface):
    """In place of a `torchrec.EmbeddingCollection`. Values are float32 and equal to TorchRec's on the same weights.

    That holds after `half()`, `to(dtype)` and the like, too. Rows are converted, and the outputs are float32 made of
    them.

    TorchRec's option for sharding (`use_gather_select`) has no meaning here. There are no gradients, as `RemoteModule`
    says.

    Args:
        client: Shared, not owned: close it yourself.
        model: `name` or `name@version`. If a newer version replaces `name`, that one is taken, if the configs fit.
        tables: A config for each table that is used, by the table's name. `data_type` is ignored: rows are those of the
            served table, decoded.
        device: The device of outputs. None takes that of the features. Moving the module changes it.
        need_indices: Give the ids as the outputs' weights.

    Raises:
        InvalidRequest: a config differs in rows or dim from the served table, or configs from each other.
        NotFound: no such model. Unavailable: nobody there to ask.
    """

    def __init__(
        self,
        client: EmbeddingClient,
        model: str,
        tables: list[EmbeddingConfig],
        device: torch.device | str | None = None,
        need_indices: bool = False,
    ) -> None:
        super().__init__(client, model, tables, device)
        if len({config.embedding_dim for config in tables}) > 1:
            dims = ", ".join(f"{config.name} {config.embedding_dim}" for config in tables)
            raise InvalidRequest(f"all tables of a collection must have the same embedding_dim, got {dims}")
        self._embedding_configs, self._need_indices = tables, need_indices

    @_outside_graphs
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Rows of every id, unpooled.

        Args:
            features: [F, B, lengths], of any integer dtype.

        Returns:
            For each feature a JaggedTensor of float32 [ids, dim] with the feature's lengths. It is `feature@table` if
            several tables have that feature.

        Raises:
            InvalidRequest: a feature is missing. Also what `EmbeddingClient.lookup` raises.
        """
        _, jagged = self._features(features)
        outputs = {}
        for config, names, rows in zip(self._configs, self._output_names, self._rows(jagged), strict=True):
            for feature, name, values in zip(config.feature_names, names, rows, strict=True):
                asked = jagged[feature].to(values.device)
                outputs[name] = JaggedTensor(
                    values.float(), lengths=asked.lengths(), weights=asked.values() if self._need_indices else None
                )
        return outputs

    def need_indices(self) -> bool:
        """Whether outputs carry the ids as their weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Values of a row, the same in all tables."""
        return self._embedding_configs[0].embedding_dim

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """What it was made with."""
        return self._embedding_configs

    def embedding_names_by_table(self) -> list[list[str]]:
        """The keys of the output, for each table."""
        return self._output_names


class RemoteEmbeddingBagCollection(_RemoteTables, EmbeddingBagCollectionInterface):
    """In place of a `torchrec.EmbeddingBagCollection`. Rows are pooled here, by the kernel that TorchRec's uses.

    So on the CPU its float32 values equal TorchRec's on the same weights bit for bit. A float16 table is pooled in
    float32 here and in float16 there. After `half()`, `to(dtype)` and the like, rows are pooled in that dtype, and the
    outputs are float32, as TorchRec's are. There are no gradients, as `RemoteModule` says.

    Args:
        client: Shared, not owned: close it yourself.
        model: `name` or `name@version`. If a newer version replaces `name`, that one is taken, if the configs fit.
        tables: A config for each table that is used, by the table's name. `data_type` is ignored: rows are those of the
            served table, decoded.
        is_weighted: Whether features come with weights. Only for sum pooling.
        device: The device of outputs. None takes that of the features. Moving the module changes it.

    Raises:
        InvalidRequest: a config differs in rows or dim from the served table, or asks for weighted means.
        NotFound: no such model. Unavailable: nobody there to ask.
    """

    def __init__(
        self,
        client: EmbeddingClient,
        model: str,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(client, model, tables, device)
        for config in tables:
            if config.pooling not in ([PoolingType.SUM] if is_weighted else [PoolingType.SUM, PoolingType.MEAN]):
                kinds = "SUM where features are weighted" if is_weighted else "SUM or MEAN"
                raise InvalidRequest(f"pooling of table {config.name} must be {kinds}, got {config.pooling.name}")
        self._bag_configs, self._is_weighted = tables, is_weighted

    @_outside_graphs
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The bags of every feature, pooled. An empty bag gives zeros.

        Args:
            features: [F, B, lengths], of any integer dtype.

        Returns:
            A KeyedTensor of float32 [B, sum of dims], with a key for each feature. It is `feature@table` if several
            tables have that feature.

        Raises:
            InvalidRequest: a feature is missing. Also what `EmbeddingClient.lookup` raises.
        """
        features, jagged = self._features(features)
        pooled = [
            self._pool_bags(config, jagged[feature].to(rows.device), rows).float()
            for config, of_table in zip(self._bag_configs, self._rows(jagged), strict=True)
            for feature, rows in zip(config.feature_names, of_table, strict=True)
        ]
        names = [name for config in self._bag_configs for name in config.feature_names]
        inverse = reorder_inverse_indices(features.inverse_indices_or_none(), names)
        return KeyedTensor(
            keys=[name for names in self._output_names for name in names],
            length_per_key=[each.shape[1] for each in pooled],
            values=process_pooled_embeddings(pooled, inverse.to(pooled[0].device)),
        )

    def is_weighted(self) -> bool:
        """Whether features come with weights."""
        return self._is_weighted

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """What it was made with."""
        return self._bag_configs

    def _pool_bags(self, config: EmbeddingBagConfig, bags: JaggedTensor, rows: Tensor) -> Tensor:
        offsets = bags.offsets()
        return functional.embedding_bag(
            torch.arange(len(rows), dtype=offsets.dtype, device=rows.device),
            rows,
            offsets,
            mode=pooling_type_to_str(config.pooling),
            per_sample_weights=bags.weights().to(rows.dtype) if self._is_weighted else None,
            include_last_offset=True,
        )


def _apart(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Views of `counts` rows each. Unlike those of Tensor.split, they may be changed in place."""
    ends = list(accumulate(counts))
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _full_name(model: ModelDescription) -> str:
    return f"{model.name}@{model.version}"


def _mismatch(config: BaseEmbeddingConfig, model: ModelDescription) -> list[str]:
    """What is wrong with a config, if anything."""
    if config.name not in model.tables:
        return [f"it has no table {config.name!r}, only {', '.join(model.tables)}"]
    rows, dim, _ = model.tables[config.name]
    if (rows, dim) == (config.num_embeddings, config.embedding_dim):
        return []
    return [
        f"{config.name} has {rows} rows of {dim}, its config says num_embeddings={config.num_embeddings}, "
        f"embedding_dim={config.embedding_dim}"
    ]
