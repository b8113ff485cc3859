"""What every n-gram family shares: how a hasher is found, and what token ids it takes."""

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from embedding_service.errors import InvalidRequest, StoreError
from embedding_service.foreign import shown
from embedding_service.machine import read_object
from embedding_service.registry import Registry

NO_TOKEN = -1
"""In token ids: there is no token here. Left padding before a sequence starts; look-back stops at it."""


@dataclass(frozen=True)
class TableShape:
    """One table of a model: its heads' rows stacked in head order, then padding rows that no id names, if any."""

    name: str
    rows: int
    head_rows: tuple[int, ...]


class NgramHasher(ABC):
    """Turns token ids into row ids the way one model family does. Immutable and thread-safe.

    A family subclasses it with `family` set and the abstract methods filled in. `FAMILIES` names the class.

    Attributes:
        model_types, architectures: The values of these keys in configs of the family. Either is enough.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, vocab_size: int, context_length: int, tables: tuple[TableShape, ...]) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.tables = tables

    @staticmethod
    def from_config(config: object, tokenizer: object = None) -> "NgramHasher":
        """The hasher of a model.

        config: a transformers config, the same as a mapping, or the path of a checkpoint folder or its config.json.
        tokenizer: for a family that hashes normalized tokens (engram), see `token_map.token_map_of`. If config is a
        path, it is the tokenizer beside it by default. Other families ignore it. Raises InvalidRequest for an unknown
        family, a config that lacks keys or a missing tokenizer. Raises StoreError for a path without a readable config
        or tokenizer.
        """
        keys = _config_keys(config)
        if tokenizer is None and isinstance(config, (str, Path)):
            tokenizer = Path(config) if Path(config).is_dir() else Path(config).parent
        for family in _families().values():
            if family.recognizes(keys):
                params = {**family.params_of(keys), **family.params_of_tokenizer(tokenizer)}
                return family.from_params(family.family, params)
        raise InvalidRequest(
            f"no n-gram family for model_type={shown(keys.get('model_type'))}, "
            f"architectures={shown(keys.get('architectures'))}; "
            f"known families: {', '.join(_families())}"
        )

    @staticmethod
    def from_params(family: str, params: Mapping[str, Any]) -> "NgramHasher":
        """The hasher that gave these `family` and `params()`. Raises InvalidRequest for others."""
        hasher = _families().find(family)
        try:
            return hasher(**params)
        except TypeError as error:  # a name too many or too few, or a value of the wrong type
            raise InvalidRequest(f"hash parameters of family {family!r} do not fit: {error}") from None

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config is of this family. Raises InvalidRequest if it cannot tell."""
        architectures = config.get("architectures") or ()
        if not isinstance(architectures, (list, tuple)) or not all(isinstance(name, str) for name in architectures):
            raise InvalidRequest(f"architectures must be a list of names, got {shown(architectures)}")
        return config.get("model_type") in cls.model_types or not set(cls.architectures).isdisjoint(architectures)

    @classmethod
    @abstractmethod
    def params_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `params()`, from the config of a model of this family."""

    @classmethod
    def params_of_tokenizer(cls, tokenizer: object) -> dict[str, Any]:
        """Further values of `params()` that only the tokenizer knows. Most families have none."""
        return {}

    @abstractmethod
    def params(self) -> dict[str, Any]:
        """Everything that decides the ids, JSON-able. These are the keyword arguments of this class."""

    @abstractmethod
    def _hash(self, tokens: Tensor) -> Tensor:
        """int64 [B, context_length + S] tokens, S > 0, in range, the context first -> int64 [B, S, L, H] row ids."""

    @property
    def num_tables(self) -> int:
        """L, the tables a token reads from."""
        return len(self.tables)

    @property
    def num_heads(self) -> int:
        """H, the rows a token reads from each table."""
        return len(self.tables[0].head_rows)

    def row_ids(self, token_ids: Tensor, context: Tensor | None = None) -> Tensor:
        """The rows of their tables that each token reads.

        token_ids: int64 [B, S], each in [0, vocab_size), or NO_TOKEN for padding. A padded position gets valid ids
        without a meaning. The caller masks what it reads there.
        context: int64 [B, C], the tokens directly before, None at a sequence's start. Any C will do. Missing tokens
        count as NO_TOKEN, and only the last context_length tokens count. Returns int64 [B, S, L, H] on the device of
        token_ids, head offsets added. Raises InvalidRequest for a wrong type, dtype or shape and for a token out of
        range, naming its position. On an accelerator the range check waits for the device.
        """
        tokens = self._with_context(token_ids, context)
        if not token_ids.numel():
            return token_ids.new_empty(*token_ids.shape, self.num_tables, self.num_heads)
        return self._hash(tokens)

    def next_context(self, token_ids: Tensor, context: Tensor | None = None) -> Tensor:
        """The context of the tokens after these: int64 [B, context_length], padded on the left with NO_TOKEN.

        Takes and raises what `row_ids` does. Feeding a sequence in chunks with the context carried along gives the ids
        of feeding it whole.
        """
        tokens = self._with_context(token_ids, context)
        return tokens[:, tokens.shape[1] - self.context_length :].clone()

    def _with_context(self, token_ids: Tensor, context: Tensor | None) -> Tensor:
        """Exactly context_length tokens of context, then the tokens, all checked."""
        _check_tensor("token_ids", token_ids)
        missing = self.context_length
        tokens = token_ids
        if context is not None:
            _check_tensor("context", context)
            if context.shape[0] != token_ids.shape[0]:
                raise InvalidRequest(
                    f"context has {context.shape[0]} sequences, token_ids {token_ids.shape[0]}; give one context each"
                )
            context = context[:, max(0, context.shape[1] - self.context_length) :].to(token_ids.device)
            missing -= context.shape[1]
            tokens = torch.cat((context, token_ids), 1)
        if missing:
            tokens = pad(tokens, (missing, 0), value=NO_TOKEN)
        self._check_range(tokens)
        return tokens

    def _check_range(self, tokens: Tensor) -> None:
        if not tokens.numel():
            return
        low, high = torch.aminmax(tokens)
        if low.item() >= NO_TOKEN and high.item() < self.vocab_size:
            return
        row, column = ((tokens < NO_TOKEN) | (tokens >= self.vocab_size)).nonzero()[0].tolist()
        # A position counts in token_ids. In the context it is negative, and -1 is the token directly before.
        position = column - self.context_length
        raise InvalidRequest(
            f"{'token_ids' if position >= 0 else 'context'}[{row}, {position}] is {int(tokens[row, column])}, "
            f"not in [0, {self.vocab_size}) nor {NO_TOKEN} (no token)"
        )

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self.params().items())
        return f"{type(self).__name__}({arguments})"


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a model. If it also sees and hears, keys nested under text_config override the outer ones."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InvalidRequest(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise InvalidRequest(f"{name} must be int64, got {value.dtype}; convert it with .long()")
    if value.dim() != 2:
        raise InvalidRequest(f"{name} must be [batch, length], got the shape {list(value.shape)}")


def _config_keys(config: object) -> Mapping[str, Any]:
    if isinstance(config, (str, Path)):
        return _read_config(Path(config))
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise InvalidRequest(f"config must be a transformers config, a mapping or a path, got {type(config).__name__}")


def _read_config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        return read_object(file)
    except OSError as error:
        raise StoreError(f"cannot read the config {file}: {error.strerror}; is {path} a checkpoint?") from error
    except ValueError as error:
        raise StoreError(f"the config {file} {error}") from error


def _families() -> Registry["NgramHasher"]:
    from embedding_service.ngram import FAMILIES  # which names the subclasses of this file's class

    return FAMILIES
