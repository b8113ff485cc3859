"""What vLLM's models of all families share: checked tables in the service, and a checkpoint without them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from embedding_service import EmbeddingClient, NgramHasher, RemoteEmbedding
from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from model_worker.rows import check_same_hash

CONFIG_KEY = "embedding_service"
_NEEDED, _OPTIONS = {"address", "model"}, {"near": bool, "topology": str}
_EXAMPLE = '--additional-config \'{"embedding_service": {"address": "HOST:PORT", "model": "NAME"}}\''

# vLLM ends an engine whose step failed. So a step waits long for a service that is away for a while.
_LOOKUP_SECONDS = 60.0
# Nothing is lost at the start, and a mistyped address should show soon.
_START_SECONDS = 10.0


class ServedTables:
    """The tables of one model in the service.

    address: `HOST:PORT` of any shard.
    name: the model's name in the service, `name` or `name@version`.
    config: the checkpoint's config, as transformers has it.
    near, topology: see `EmbeddingClient`.
    Raises InvalidRequest: the service's tables have another hash than the config says.
    NotFound: the service has no such model.
    Unavailable: it does not answer.
    """

    def __init__(
        self, address: str, name: str, config: object, *, near: bool = True, topology: str | None = None
    ) -> None:
        self.name = name
        self.client = EmbeddingClient(address, timeout=_LOOKUP_SECONDS, near=near, topology=topology)
        try:
            self.hasher = self.client.hasher(name, timeout=_START_SECONDS)
        except EmbeddingServiceError as error:
            raise type(error)(
                f"vLLM was told by {_EXAMPLE} to take the tables {name!r} from {address}: {error}; start the service "
                "(embedding-service up), or correct address and model"
            ) from error
        check_same_hash(NgramHasher.from_config(config), self.hasher, name)

    @classmethod
    def of(cls, vllm_config: Any) -> ServedTables | None:
        """The tables that the engine's `additional_config` names, or None. Raises what the constructor does."""
        config = vllm_config.additional_config
        settings = config.get(CONFIG_KEY) if isinstance(config, dict) else None
        if settings is None:
            return None
        if not _are_understood(settings):
            raise InvalidRequest(
                f"additional_config[{CONFIG_KEY!r}] is {settings!r}; say it as {_EXAMPLE}; there may also be "
                '"near": false and "topology": "ZONE"'
            )
        options = {name: value for name, value in settings.items() if name in _OPTIONS}
        return cls(settings["address"], settings["model"], vllm_config.model_config.hf_config, **options)

    def check(self, table: str, rows: int, dim: int) -> str:
        """The full name, `model/table`, of a table for a module that would have held [rows, dim].

        Raises InvalidRequest when the service's table has other dimensions.
        """
        served = {each.name: each.rows for each in self.hasher.tables}.get(table)
        full_name = f"{self.name}/{table}"
        [row] = self.client.lookup(full_name, torch.zeros(1, dtype=torch.int64, device="cpu"), timeout=_START_SECONDS)
        if (served, len(row)) != (rows, dim):
            raise InvalidRequest(
                f"{full_name} in the service is {served} rows of {len(row)} values, this model takes {rows} of {dim}: "
                "it is another model; give the name of the one imported from this checkpoint"
            )
        return full_name

    def embedding(self, table: str, rows: int, dim: int, dtype: torch.dtype) -> RemoteEmbedding:
        """Stands in place of a module that would have held the table. Raises InvalidRequest for other dimensions."""
        return RemoteEmbedding(self.client, self.check(table, rows, dim), dtype)


class TablesElsewhere:
    """A base to put before a model class of vLLM. The model gets the service's tables in place of its own.

    Every tensor-parallel rank looks up for itself.

    table_tensors: matches the names of the tables' tensors in the checkpoint.
    tables_of: within it, modules that would hold a table get their rows from the service.
    served: None if the engine's settings name no service.
    """

    table_tensors: ClassVar[re.Pattern[str]]
    tables_of: ClassVar[staticmethod[[ServedTables], AbstractContextManager[None]]]
    served: ServedTables | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        served = ServedTables.of(vllm_config)
        with nullcontext() if served is None else self.tables_of(served):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.served = served

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Asked by vLLM's loader. It reads no file that holds unused tensors alone."""
        return self.served is not None and self.table_tensors.search(name) is not None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load as the model does, without the tables. In a mapped file that holds others too, they stay on disk."""
        wanted = ((name, weight) for name, weight in weights if not self.is_unused_checkpoint_weight(name))
        return super().load_weights(wanted)  # type: ignore[misc,no-any-return]


def _are_understood(settings: object) -> bool:
    return (
        isinstance(settings, dict)
        and _NEEDED <= settings.keys() <= _NEEDED | _OPTIONS.keys()
        and all(isinstance(settings[name], kind) for name, kind in _OPTIONS.items() if name in settings)
    )


@contextmanager
def swapped(module: ModuleType, **stand_ins: object) -> Iterator[None]:
    """Within the `with`, names of a module mean something else."""
    originals = {name: getattr(module, name) for name in stand_ins}
    vars(module).update(stand_ins)
    try:
        yield
    finally:
        vars(module).update(originals)
