"""What vLLM's models of all families share: checked tables in the service, and a checkpoint without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from embedding_service import EmbeddingClient, NgramHasher, RemoteEmbedding
from embedding_service.errors import EmbeddingServiceError, InvalidRequest
from model_worker.domains import Domains
from model_worker.rows import check_same_hash, of_the_served

CONFIG_KEY = "embedding_service"
_NEEDED = {"address", "model"}
_OPTIONS = {"near": bool, "topology": str, "cache_bytes": int, "checkpoint": str}
_EXAMPLE = '--additional-config \'{"embedding_service": {"address": "HOST:PORT", "model": "NAME"}}\''

# vLLM ends an engine whose step failed. So a step waits long for a service that is away for a while.
_LOOKUP_SECONDS = 60.0
# Nothing is lost at the start, and a mistyped address should show soon.
_START_SECONDS = 10.0


class ServedTables:
    """The tables of one model in the service.

    address: `HOST:PORT` of any shard.
    name: the model's name in the service, `name` or `name@version`. `name+domain` gives all requests a domain's rows.
    config: the checkpoint's config, as transformers has it.
    tokenizer: for a family that hashes normalized tokens, see `NgramHasher.from_config`.
    near, topology, cache_bytes: see `EmbeddingClient`.
    checkpoint: `name@version` of the import whose dense half the engine has. None: that of the version served now.
    Raises InvalidRequest: the service's tables have another hash than the config says.
    NotFound: the service has no such model, or it belongs to another checkpoint.
    Unavailable: it does not answer.
    """

    def __init__(
        self,
        address: str,
        name: str,
        config: object,
        *,
        near: bool = True,
        topology: str | None = None,
        cache_bytes: int = 0,
        checkpoint: str | None = None,
        tokenizer: object = None,
    ) -> None:
        self.name, _, version = name.partition("@")
        self.client = EmbeddingClient(
            address, timeout=_LOOKUP_SECONDS, near=near, topology=topology, cache_bytes=cache_bytes
        )
        try:
            self.hasher = self.client.hasher(name, timeout=_START_SECONDS)
            checkpoint = checkpoint or self.client.model(name).checkpoint
            self._domains = Domains(self.client, self.name, checkpoint, version or None)
            self.now()
        except EmbeddingServiceError as error:
            raise type(error)(
                f"vLLM was told by {_EXAMPLE} to take the tables {name!r} from {address}: {error}; start the service "
                "(embedding-service up), or correct address and model"
            ) from error
        check_same_hash(NgramHasher.from_config(config, tokenizer), self.hasher, name)

    def now(self) -> str:
        """`name@version` whose rows a lookup gets now. It may change, to a version of the same checkpoint.

        Raises NotFound if what is served belongs to another checkpoint. Its rows would be wrong without a sign.
        """
        return self._domains.resolve(self.name)

    def ask(self, look_up: Callable[[str], Tensor]) -> Tensor:
        """What `look_up` finds for `now()`. If that version was replaced at this moment, for its successor."""
        return of_the_served(self.now, look_up)

    def counts(self) -> dict[str, int]:
        """Rows by where they came from, and those of the row cache."""
        rows, cache = self.client.statistics, self.client.cache
        counts = {"near_rows": rows.near_rows, "wired_rows": rows.wired_rows}
        return counts | ({"cache_hits": cache.stats.hits, "cache_misses": cache.stats.misses} if cache else {})

    @classmethod
    def of(cls, vllm_config: Any, tokenizer: object = None) -> ServedTables | None:
        """The tables that the engine's `additional_config` names, or None. Raises what the constructor does."""
        config = vllm_config.additional_config
        settings = config.get(CONFIG_KEY) if isinstance(config, dict) else None
        if settings is None:
            return None
        if not _are_understood(settings):
            raise InvalidRequest(
                f"additional_config[{CONFIG_KEY!r}] is {settings!r}; say it as {_EXAMPLE}; there may also be "
                '"near": false, "topology": "ZONE", "cache_bytes": BYTES and "checkpoint": "NAME@VERSION"'
            )
        options = {name: value for name, value in settings.items() if name in _OPTIONS}
        hf_config = vllm_config.model_config.hf_config
        return cls(settings["address"], settings["model"], hf_config, tokenizer=tokenizer, **options)

    def check(self, table: str, rows: int, dim: int) -> str:
        """The name of a table, `table`, for a module that would have held [rows, dim].

        Raises InvalidRequest when the service's table has other dimensions.
        """
        served = {each.name: each.rows for each in self.hasher.tables}.get(table)
        full_name = f"{self.now()}/{table}"
        [row] = self.client.lookup(full_name, torch.zeros(1, dtype=torch.int64, device="cpu"), timeout=_START_SECONDS)
        if (served, len(row)) != (rows, dim):
            raise InvalidRequest(
                f"{full_name} in the service is {served} rows of {len(row)} values, this model takes {rows} of {dim}: "
                "it is another model; give the name of the one imported from this checkpoint"
            )
        return table

    def embedding(self, table: str, rows: int, dim: int, dtype: torch.dtype) -> RemoteEmbedding:
        """Stands in place of a module that would have held the table. Raises InvalidRequest for other dimensions."""
        return ServedEmbedding(self, self.check(table, rows, dim), dtype)


class ServedEmbedding(RemoteEmbedding):
    """A table's rows, of the version that the service has now for the engine's checkpoint."""

    def __init__(self, served: ServedTables, table: str, dtype: torch.dtype) -> None:
        super().__init__(served.client, f"{served.now()}/{table}", dtype)
        self._served, self._named = served, table

    def _ask(self, ids: Tensor, context: Tensor | None, dtype: torch.dtype) -> Tensor:
        ask = super()._ask

        def look_up(name: str) -> Tensor:
            self.table = f"{name}/{self._named}"
            return ask(ids, context, dtype)

        return self._served.ask(look_up)


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
        served = ServedTables.of(vllm_config, self.tokenizer(vllm_config))
        with nullcontext() if served is None else self.tables_of(served):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.served = served

    @staticmethod
    def tokenizer(vllm_config: Any) -> Any:
        """What the family hashes normalized tokens with. None: it hashes token ids."""
        return None

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
