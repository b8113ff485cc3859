"""Modules that are imported when something of them is first used.

torch takes 2 s to import. The command line, `up` and the controller work with the store and never compute, so what
they share with shards and imports names torch by `late`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LateModule:
    """Stands for a module: its attributes are the module's, which is imported for the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next use costs what an attribute of a module costs
        return value


def late(name: str) -> Any:
    """The module of that name. Type checkers are given the real one, under `if TYPE_CHECKING`."""
    return LateModule(name)
