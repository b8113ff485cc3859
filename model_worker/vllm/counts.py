"""What the plugin looked up, asked of vLLM's own processes."""

from __future__ import annotations

from typing import Any


class RowCounts:
    """An extension of vLLM's worker class (`worker_extension_cls`), for calls by `collective_rpc`."""

    def row_counts(self: Any) -> dict[str, int]:
        """Rows that this process had, by where they came from; those of a row cache, if there is one."""
        served = getattr(self.get_model(), "served", None)
        return served.counts() if served else {}
