"""How long a shard may take before its rows are asked of another owner too: hedging, within a budget."""

from __future__ import annotations

import threading
from collections import deque

# A round of calls takes unusually long if it takes twice as long as 95 % of the last ones did.
QUANTILE, TIMES = 0.95, 2.0
WINDOW, LEARN = 512, 64
# A shorter time is never unusual. A process that waits for a core or collects garbage takes that long now and then.
FLOOR_SECONDS = 0.05
# What is unusual while too little was measured, as for a client whose rows are near until a shard hangs.
FIRST_SECONDS = 0.25
# Bytes a second. Rows that come slower than that are late, whatever their number.
SLOWEST = 20 << 20
# The share of all calls that may be asked again. The burst is for all that wait for a shard when it hangs.
SHARE, BURST = 0.02, 32.0
NEVER = float("inf")


class Patience:
    """Learns what is usual and keeps the budget. Thread-safe.

    Attributes:
        took: Where the caller notes the seconds of each round that was answered. It calls `learn` at `LEARN` of them.
        usual: Seconds that a shard may take.
        seconds: The same while the budget lasts, then `NEVER`.
    """

    def __init__(self) -> None:
        self.took: list[float] = []
        self.usual = self.seconds = FIRST_SECONDS
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._budget = BURST
        self._lock = threading.Lock()

    def learn(self) -> None:
        """Take in what was noted."""
        with self._lock:
            took, self.took = self.took, []
            self._window.extend(took)
            self._budget = min(BURST, self._budget + SHARE * len(took))
            usual = sorted(self._window)[int(QUANTILE * len(self._window))]
            self.usual = max(FLOOR_SECONDS, TIMES * usual)
            self._weigh()

    def spend(self, calls: int, waited: float) -> None:
        """Count `calls` that are made in place of some that took longer than `waited` seconds.

        That time counts as measured. Otherwise a service that became slow as a whole would stay unusually slow.
        """
        with self._lock:
            self._window.append(waited)
            self._budget -= calls
            self._weigh()

    def _weigh(self) -> None:
        self.seconds = self.usual if self._budget >= 1 else NEVER
