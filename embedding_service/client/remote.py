"""`RemoteEmbedding`: a module that stands where an nn.Embedding stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from embedding_service.client.client import EmbeddingClient


class RemoteEmbedding(nn.Module):
    """In place of an `nn.Embedding` whose weight lies in the service. It has no parameters and gives no gradients.

    Args:
        client: Shared, not owned: close it yourself.
        table: `model/table` or `model@version/table`.
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, client: EmbeddingClient, table: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self._client = client
        self.table = table
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Integer Tensor[*] -> Tensor[*, dim]; raises what `EmbeddingClient.lookup` raises."""
        return self._client.lookup(self.table, ids, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.table!r}, dtype={self.dtype}"
