"""What a lookup costs, from how many requests it takes and what they carry.

    fan-out   f = sum over shards of 1 - product over heads of (1 - share of the head's rows there) ^ tokens
    client    seconds = lookup + crowded lookup * crowd(clients) + table * tables + request * requests + row * rows
                        + byte * bytes + several * bytes if there are several answers a table
    shards    seconds = request * requests + crowded request * crowd(shards) * requests + row * rows
                        + byte * bytes + several * bytes if there are several answers a table

Each head gives a token one row, at random. n random ids of one table are one head and n tokens. Over S equal shards f
is then S * (1 - (1 - 1/S)^n). A shard is asked once, or more often for more than 2 MiB. A lookup of several tables
sends the requests of each. Rows of several answers are copied to their places, and those of one answer lie there
already. crowd(n) is 1 - cores / n, not below 0. It is the share of n processes whose core ran another one, so that its
caches hold that one's data. If every process has a core, it is 0.

CPU seconds are predicted, by the processes' own clocks. They add up over processes, hardly depend on what else runs and
say how many lookups a core can do. A latency is the sum of those that follow on each other, plus waits for cores and a
network. On another machine those waits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedding_service.client.owners import PIECE_BYTES

Floats = npt.NDArray[np.float64]


def fan_out(shares: npt.ArrayLike, tokens: int) -> float:
    """The expected number of shards that hold the rows of `tokens` tokens.

    shares: [heads, shards], the share of a head's rows that each shard holds. A row adds up to 1.
    """
    missed = np.prod((1 - np.asarray(shares, np.float64)) ** tokens, axis=0)
    return float((1 - missed).sum())


def requests_of(shares: npt.ArrayLike, tokens: int, row_bytes: int) -> float:
    """The expected number of requests to those shards. A client asks for at most PIECE_BYTES at a time."""
    shares = np.asarray(shares, np.float64)
    pieces = np.ceil(shares.sum(0) * tokens * row_bytes / PIECE_BYTES)
    return float(((1 - np.prod((1 - shares) ** tokens, axis=0)) * np.maximum(pieces, 1)).sum())


def shares_of(owners: npt.ArrayLike, rows_per_part: int, head_rows: Sequence[int], shards: int) -> Floats:
    """float64 [heads, shards] of a table whose part p lies on shard `owners[p]`, its heads one after the other."""
    owners = np.asarray(owners)
    ends = np.cumsum(head_rows)
    shares = np.zeros((len(head_rows), shards))
    for head, (rows, end) in enumerate(zip(head_rows, ends, strict=True)):
        first = np.maximum(np.arange(len(owners)) * rows_per_part, end - rows)
        last = np.minimum((np.arange(len(owners)) + 1) * rows_per_part, end)
        np.add.at(shares[head], owners, np.maximum(last - first, 0) / rows)
    return shares


CLIENT_TERMS = ("lookup", "crowded lookup", "table", "request", "row", "byte", "byte of several answers")
SHARD_TERMS = ("request", "crowded request", "row", "byte", "byte of several answers")


@dataclass(frozen=True)
class Load:
    """A lookup's tables, expected requests, rows and bytes of rows, and how crowded its cores are (0 to 1)."""

    tables: int
    requests: float
    rows: int
    nbytes: int
    clients_crowd: float = 0.0
    shards_crowd: float = 0.0

    def of_client(self) -> list[float]:
        """The terms of the client's seconds, in the order of CLIENT_TERMS."""
        return [1.0, self.clients_crowd, self.tables, self.requests, self.rows, self.nbytes, self._several]

    def of_shards(self) -> list[float]:
        """The terms of all shards' seconds together, in the order of SHARD_TERMS."""
        return [self.requests, self.requests * self.shards_crowd, self.rows, self.nbytes, self._several]

    @property
    def _several(self) -> int:
        return self.nbytes if self.requests > self.tables + 1e-3 else 0


def crowd(processes: int, cores: int) -> float:
    """The share of processes that find another one's data in their core's caches."""
    return max(0.0, 1 - cores / processes)


def fit(terms: Sequence[Sequence[float]] | Floats, seconds: Sequence[float] | Floats) -> Floats:
    """Coefficients, none below 0, with the least sum of squared relative errors.

    terms: [points, coefficients]. Raises ValueError for fewer points than coefficients.
    """
    matrix, seen = np.asarray(terms, np.float64), np.asarray(seconds, np.float64)
    if len(matrix) < matrix.shape[1]:
        raise ValueError(f"{len(matrix)} points do not tell {matrix.shape[1]} coefficients")
    relative = matrix / seen[:, None]
    kept = np.flatnonzero(matrix.any(axis=0))  # a term that no point has costs nothing
    while True:
        scale = np.linalg.norm(relative[:, kept], axis=0)
        found = np.linalg.lstsq(relative[:, kept] / scale, np.ones(len(seen)), rcond=None)[0] / scale
        if (found >= 0).all():
            break
        kept = np.delete(kept, found.argmin())  # a cost below nothing explains noise
    coefficients = np.zeros(matrix.shape[1])
    coefficients[kept] = found
    return coefficients


@dataclass(frozen=True)
class Model:
    """CPU seconds: `client` in the order of CLIENT_TERMS, `shards` in that of SHARD_TERMS."""

    client: Floats
    shards: Floats

    def of_client(self, load: Load) -> float:
        """The client's, for one lookup."""
        return float(np.dot(self.client, load.of_client()))

    def of_shards(self, load: Load) -> float:
        """All shards' together, for one lookup."""
        return float(np.dot(self.shards, load.of_shards()))
