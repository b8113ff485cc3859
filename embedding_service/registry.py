"""How a room knows its variants: formats, tiers, families, importers. Each is one file and one line in a registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from embedding_service.errors import InvalidRequest
from embedding_service.foreign import shown

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by name, each of which is imported when it is first asked for.

    Args:
        kind: What they are, for errors.
        base: The class that all of them extend, as "module:Class".
        homes: Where each one is, as "module:Class".

    Attributes:
        homes: The same, for those who import by themselves.
    """

    def __init__(self, kind: str, base: str, homes: Mapping[str, str]) -> None:
        self._kind, self._base, self.homes = kind, base, homes
        self._loaded: dict[str, type[T]] = {}

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)

    def __contains__(self, name: object) -> bool:
        return name in self.homes

    def find(self, name: str) -> type[T]:
        """The class of that name. Raises InvalidRequest, naming the known ones."""
        if name not in self.homes:
            raise InvalidRequest(f"unknown {self._kind} {shown(name)}; known: {', '.join(self)}")
        return self[name]

    def _load(self, name: str) -> type[T]:
        entry: type[T] = _import(self.homes[name])
        if not issubclass(entry, _import(self._base)):
            raise TypeError(f"{self._kind} {name!r} is {self.homes[name]}, which does not extend {self._base}")
        return entry


def _import(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)
