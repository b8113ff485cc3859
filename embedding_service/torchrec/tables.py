"""What both collections do: check configs against what is served, and ask for the rows of all tables at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from embedding_service.client.client import EmbeddingClient, ModelDescription
from embedding_service.client.handles import Collect
from embedding_service.client.remote import RemoteModule, wire_dtype
from embedding_service.errors import InvalidRequest, NotFound, OutOfRange

# Versions that may replace each other while a batch is looked up, before that is an error.
_VERSIONS = 3
# A batch is asked for on several threads, and again if its version was replaced. So graphs of torch.compile end here.
outside_graphs = partial(torch.compiler.disable, reason="the tables lie in the service")


class RemoteTables(RemoteModule):
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
        found = [each if self._device is None else each.to(self._device) for each in self._fetch(flat)]
        rows = [self._in_graph(each, collect) for each, collect in zip(found, self._collectors(flat), strict=True)]
        return [_apart(each, [len(part) for part in parts]) for each, parts in zip(rows, ids, strict=True)]

    def _collectors(self, ids: list[Tensor]) -> list[Collect | None]:
        """What takes the gradients of each table's rows: the session that trains them, if there is one."""
        session = self._client.session_of(self._served)
        names = [config.name for config in self._configs]
        return [
            partial(session.add_gradients, name, each.clone()) if session else None
            for name, each in zip(names, ids, strict=True)
        ]

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
        found = [model for model in models if self._model in (model.name, model.full_name)]
        if not found:
            known = ", ".join(model.full_name for model in models) or "none yet"
            raise NotFound(f"no model {self._model!r} is served; served models: {known}")
        if problems := [problem for config in self._configs for problem in _mismatch(config, found[-1])]:
            raise InvalidRequest(
                f"the configs are not of the tables that {found[-1].full_name} has: {'; '.join(problems)}. Correct "
                "them, or name the model@version that they were made for"
            )
        return found[-1].full_name


def _wait(config: BaseEmbeddingConfig, rows: Callable[[], Tensor]) -> Tensor:
    try:
        return rows()
    except OutOfRange as error:
        raise OutOfRange(f"{error} (the ids of {', '.join(config.feature_names)}, one after the other)") from error


def _apart(rows: Tensor, counts: list[int]) -> list[Tensor]:
    """Views of `counts` rows each. Unlike those of Tensor.split, they may be changed in place."""
    ends = list(accumulate(counts))
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


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
