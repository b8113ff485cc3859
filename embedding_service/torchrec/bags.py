"""Rows of bags of ids, pooled."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType, pooling_type_to_str
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embedding_service.client.client import EmbeddingClient
from embedding_service.errors import InvalidRequest
from embedding_service.torchrec.tables import RemoteTables, outside_graphs


class RemoteEmbeddingBagCollection(RemoteTables, EmbeddingBagCollectionInterface):
    """In place of a `torchrec.EmbeddingBagCollection`. Rows are pooled here, by the kernel that TorchRec's uses.

    So on the CPU its float32 values equal TorchRec's on the same weights bit for bit. A float16 table is pooled in
    float32 here and in float16 there. After `half()`, `to(dtype)` and the like, rows are pooled in that dtype, and the
    outputs are float32, as TorchRec's are. Gradients are as `RemoteModule` says.

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

    @outside_graphs
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
