"""Python runs this when it starts, where this folder is on its path: kernels are interpreted before vLLM is imported.

vLLM's engine is a process that a Ray replica starts. No test reaches it in another way.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class BeforeVllm(MetaPathFinder):
    """Finds nothing. It is asked first."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "vllm":
            sys.meta_path.remove(self)
            import interpreted

            interpreted.prepare()


sys.meta_path.insert(0, BeforeVllm())
