"""Rows of every id, unpooled."""

from __future__ import annotations

import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embedding_service.client.client import EmbeddingClient
from embedding_service.errors import InvalidRequest
from embedding_service.torchrec.tables import RemoteTables, outside_graphs


class RemoteEmbeddingCollection(RemoteTables, EmbeddingCollectionInterface):
    """In place of a `torchrec.EmbeddingCollection`. Values are float32 and equal to TorchRec's on the same weights.

    That holds after `half()`, `to(dtype)` and the like, too. Rows are converted, and the outputs are float32 made of
    them.

    TorchRec's option for sharding (`use_gather_select`) has no meaning here. Gradients are as `RemoteModule`
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

    @outside_graphs
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
