"""Metrics of a replica for Prometheus, by way of Ray: each node's agent exports those of all replicas on it.

Ray puts `ray_` before the names and tags every value with its replica. Tokens a second are `rate()` of the counter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ray.serve.metrics import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
# Seconds between two readings of the counts. Ray's own way to the exporter takes longer.
_INTERVAL = 1.0

_GAUGES = {
    "waiting": ("model_worker_queue_requests", "Requests that wait for a place in the batch."),
    "running": ("model_worker_batch_requests", "Requests in the batch."),
}
_COUNTERS = {
    "requests": ("model_worker_requests", "Choices taken."),
    "refused": ("model_worker_refused_requests", "Choices refused for want of room (429)."),
    "prompt_tokens": ("model_worker_prompt_tokens", "Tokens prefilled."),
    "prefix_tokens": ("model_worker_prefix_tokens", "Tokens of prompts that were kept from others."),
    "generated_tokens": ("model_worker_generated_tokens", "Tokens generated."),
    "drafted_tokens": ("model_worker_drafted_tokens", "Tokens guessed, with --speculate."),
    "accepted_tokens": ("model_worker_accepted_tokens", "Guesses that were right."),
    "lookups": ("model_worker_lookups", "Lookups that the model made."),
    "looked_up_tokens": ("model_worker_looked_up_tokens", "Tokens whose rows were asked of the embedding service."),
    "near_rows": ("model_worker_near_rows", "Rows that were read in place."),
    "wired_rows": ("model_worker_wired_rows", "Rows that shards sent."),
    "cache_hits": ("model_worker_cache_hits", "Rows that the row cache had."),
    "cache_misses": ("model_worker_cache_misses", "Rows that the row cache did not have."),
}


class ReplicaMetrics:
    """Create in a replica's constructor."""

    def __init__(self) -> None:
        self._first_token = Histogram(
            "model_worker_time_to_first_token_seconds",
            "From a request's arrival in the queue to its first token.",
            boundaries=list(_SECONDS),
        )
        self._lookup_wait = Histogram(
            "model_worker_lookup_wait_seconds", "A forward pass's wait for its rows.", boundaries=list(_SECONDS)
        )
        self._gauges = {key: Gauge(*named) for key, named in _GAUGES.items()}
        self._counters = {key: Counter(*named) for key, named in _COUNTERS.items()}
        self._counted = dict.fromkeys(_COUNTERS, 0)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._first_token.observe(seconds)

    def lookup_wait(self, seconds: float) -> None:
        """A forward pass has its rows."""
        self._lookup_wait.observe(seconds)

    def watch(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Read the counts every second, on a thread of its own, until `close`. Those that are not there stay untold."""
        self._thread = threading.Thread(target=self._run, args=(read,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def _run(self, read: Callable[[], Mapping[str, int]]) -> None:
        while not self._stopping.wait(_INTERVAL):
            counts = read()
            for key in self._gauges.keys() & counts.keys():
                self._gauges[key].set(counts[key])
            for key in self._counters.keys() & counts.keys():
                counter, grown = self._counters[key], counts[key] - self._counted[key]
                if grown:
                    counter.inc(grown)
                    self._counted[key] += grown
