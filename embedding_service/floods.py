"""Cuts connections that take everybody's time with bytes that are no messages.

gRPC's core reads header fields, pings and settings on a few threads that read for all connections. It refuses what is
too much only afterwards, and as long as a client has not acknowledged its limits it hands us all that came. So a few
connections that send such bytes without pause would keep all others waiting, for seconds.

A thread looks at short intervals how much of a core gRPC's threads took. Where that is much, it compares what came on
each connection with the messages that we were given from it. Honest connections are never compared while nothing is
wrong: what they cost is a few microseconds a look.

A large message that is on its way looks like a flood, so the time must not be explained by anything else: by what this
process sends, reads from other servers or is given on sockets of this machine, by threads that were not seen before, or
by a moment in which the machine did something else. Nor is it the kernel's time: gRPC itself looks through a flood, and
it is the kernel that takes the memory of dropped answers back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

from embedding_service.sockets import MOST_HOSTS, Connection, address_of, connections, cut, keep_out

log = logging.getLogger(__name__)

# Between two looks, and between those during a flood.
CALM_SECONDS, LOOK_SECONDS = 0.02, 0.01
# A share of a core. Where gRPC's threads take less, they keep nobody waiting.
BUSY = 0.1
# What honest traffic may cost them at most, for a byte and for a message or a call. That is ten times what it does.
BYTE_SECONDS, MESSAGE_SECONDS = 15e-9, 150e-6
# During a flood, these are the most bytes that may come on a connection beyond those of its messages. It is cut after
# that. The second number is for hosts that were cut before. A large message counts when it is whole.
FREE_BYTES, FREE_BYTES_AGAIN = 128 << 10, 32 << 10
# For what a call has besides its messages.
CALL_BYTES = 8 << 10
# For how long a host is remembered, and for how long none of its connections come in once it was cut again.
MEMORY_SECONDS, OUT_SECONDS = 10.0, 1.0
# So many looks in a row must find too much time before anyone is cut.
LOOKS = 3
# For how long it is looked where nothing is found.
DOUBT_SECONDS = 0.05
# After looks that cost so much time and found nothing, that many times it passes before the next one.
REST, LEAST_REST = 50, 0.2
# Between two lists of gRPC's threads.
LIST_SECONDS = 0.5
# Between two lines of the log.
LOG_SECONDS = 10.0
# How gRPC calls the threads that read.
READERS = "event_engine"


class Arrivals:
    """What arrived in calls and messages by peer, counted only during looks. `count` is for the fronts' threads.

    Attributes:
        count_of_all: Calls and messages since `begin`.
        nbytes_of_all: Their bytes.
        blamed: Hosts, as gRPC names them, that sent what they were told not to.
    """

    def __init__(self) -> None:
        self._nbytes: dict[str, int] | None = None
        self.count_of_all = self.nbytes_of_all = 0
        self.blamed: set[str] = set()

    def count(self, peer: str, nbytes: int) -> None:
        """A call or a message came."""
        counted = self._nbytes
        if counted is not None:
            # Frames have a header for each 16 KiB.
            counted[peer] = counted.get(peer, 0) + nbytes + (nbytes >> 10) + 16
            self.count_of_all += 1
            self.nbytes_of_all += nbytes

    def blame(self, host: str) -> None:
        """A host does not keep to what it was told. Only one that has an address can be kept out."""
        if host.startswith(("ipv4:", "ipv6:")):
            self.blamed.add(host)

    def begin(self) -> None:
        """Count from now on."""
        self._nbytes, self.count_of_all, self.nbytes_of_all = {}, 0, 0

    def end(self) -> None:
        """Count no more."""
        self._nbytes = None

    def of(self, peer: str) -> int:
        """Bytes that came from a peer since `begin`, with what they take on the wire."""
        return (self._nbytes or {}).get(peer, 0)


class FloodGuard:
    """The thread that looks, once there is a port to watch.

    Attributes:
        cuts: Connections that were cut.
    """

    def __init__(self, arrivals: Arrivals) -> None:
        self.cuts = 0
        self._arrivals = arrivals
        self._ports: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="floods", daemon=True)
        # CPU that each of gRPC's reading threads took, by the kernel's number of the thread.
        self._spent: dict[int, float] = {}
        self._looked = self._flooded = self._logged = 0.0
        self._listed = -LIST_SECONDS
        # During looks: how many bytes had come when they began, and what there was at the last one.
        self._at_first: dict[str, int] | None = None
        self._there: dict[str, Connection] = {}
        self._moved: dict[tuple[int, str], int] = {}
        self._arrived = self._arrived_bytes = 0
        # How many of the last looks found too much time, and what the threads took before, in ticks.
        self._excesses = 0
        self._ticks_before: dict[int, tuple[int, int]] = {}
        # Bytes that were no messages, by connection, and by host those of connections that have gone.
        self._extras: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        # When hosts were cut, and until when they are out.
        self._cut_at: dict[str, float] = {}
        self._out_until: dict[str, float] = {}

    def watch(self, port: int) -> None:
        """Guard a port of this process, too."""
        self._ports.add(port)
        if not self._thread.ident:
            self._thread.start()

    def stop(self) -> None:
        """End. Everybody may come in again."""
        self._over.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        self._looked, self._spent = time.monotonic(), self._reading_seconds()
        pause = CALM_SECONDS
        while not self._over.wait(pause):
            try:
                pause = self._look(time.monotonic())
            except Exception:
                log.exception("floods are not looked for any more")
                break
        self._arrivals.end()
        if self._out_until:
            keep_out(self._ports, ())

    def _look(self, now: float) -> float:
        """One look; seconds until the next one."""
        before, self._spent = self._spent, self._reading_seconds()
        used = sum(spent - before[each] for each, spent in self._spent.items() if each in before)
        passed, self._looked = now - self._looked, now
        self._keep_out(now)
        if self._at_first is None:
            if used > BUSY * passed:
                self._begin(now)
            return CALM_SECONDS if self._at_first is None else LOOK_SECONDS
        excess = used - self._honest_seconds(self._see())
        self._excesses = self._excesses + 1 if excess > BUSY * passed else 0
        if self._excesses:
            self._flooded = now
            ticks = self._ticks()
            if self._excesses == 1:
                self._ticks_before = ticks
            if self._excesses >= LOOKS and _are_own(self._ticks_before, ticks):
                self._judge(now)
        took = time.monotonic() - now
        if now - self._flooded > (MEMORY_SECONDS if self._cut_at else DOUBT_SECONDS):
            self._end()
            return max(LEAST_REST, REST * took)
        return max(LOOK_SECONDS, took)

    def _begin(self, now: float) -> None:
        self._arrivals.begin()
        self._arrived = self._arrived_bytes = self._excesses = 0
        self._moved = {}
        self._see()
        self._at_first = {peer: each.read for peer, each in self._there.items()}
        self._flooded = now

    def _see(self) -> int:
        """Note who is there. Drop what peers left behind that have gone, for nobody waits for answers to that.

        Returns:
            Bytes that moved on connections of this process since the last time.
        """
        self._there, before, self._moved = {}, self._moved, {}
        for each in connections(self._ports):
            self._moved[each.file, each.peer] = each.read + each.sent
            if not each.incoming:
                continue
            if each.peer:
                self._there[each.peer] = each
            elif each.unread:
                cut(each)
        return sum(moved - before.get(each, 0) for each, moved in self._moved.items())

    def _end(self) -> None:
        self._arrivals.end()
        self._at_first = None
        self._there, self._moved, self._extras = {}, {}, {}
        self._cut_at, self._gone = {}, {}

    def _honest_seconds(self, moved: int) -> float:
        """What gRPC's threads may have taken since the last look, in which so many bytes moved.

        What comes on sockets of this machine is known only when it has arrived.
        """
        arrived, nbytes = self._arrivals.count_of_all, self._arrivals.nbytes_of_all
        messages, self._arrived = arrived - self._arrived, arrived
        moved = max(moved, nbytes - self._arrived_bytes)
        self._arrived_bytes = nbytes
        return BYTE_SECONDS * moved + MESSAGE_SECONDS * messages

    def _judge(self, now: float) -> None:
        """Cut those that brought more than their messages have, and keep their hosts out."""
        assert self._at_first is not None
        extras, self._extras = self._extras, {}
        for each in self._there.values():
            known = self._at_first.get(each.peer)
            # Of one that came during the flood, what gRPC has not read yet counts too.
            came = each.read - known if known is not None else each.read + each.unread
            extra = self._extras[each.peer] = came - self._arrivals.of(each.peer)
            again = now - self._cut_at.get(each.host, -MEMORY_SECONDS) < MEMORY_SECONDS
            if extra > (FREE_BYTES_AGAIN if again else FREE_BYTES):
                cut(each)
                self.cuts += 1
                self._tell(each, extra, now)
                self._cut_at[each.host] = now
                self._arrivals.blame(each.host)
        for peer in extras.keys() - self._extras.keys():
            host = peer.rpartition(":")[0]
            self._gone[host] = self._gone.get(host, 0) + max(extras[peer], 0)
            if self._gone[host] > FREE_BYTES:
                self._gone[host] = 0
                self._cut_at[host] = now
                self._arrivals.blame(host)
        self._keep_out(now)

    def _keep_out(self, now: float) -> None:
        """Keep out those that were blamed, and let others in again."""
        out = {host: until for host, until in self._out_until.items() if until > now}
        while self._arrivals.blamed and len(out) < MOST_HOSTS:
            out[self._arrivals.blamed.pop()] = now + OUT_SECONDS
        if out.keys() != self._out_until.keys():
            keep_out(self._ports, out)
        self._out_until = out

    def _tell(self, connection: Connection, extra: int, now: float) -> None:
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            log.warning(
                "cut a connection of %s, which sent %s bytes that are no messages and kept others waiting: %s were "
                "cut so far",
                address_of(connection.host),
                f"{extra:,}",
                f"{self.cuts:,}",
            )

    def _reading_seconds(self) -> dict[int, float]:
        """CPU that each of gRPC's reading threads took so far. New ones are found within half a second."""
        now = time.monotonic()
        threads = list(self._spent)
        if now - self._listed > LIST_SECONDS:
            self._listed = now
            threads = _readers()
        spent = {}
        for thread in threads:
            with contextlib.suppress(OSError):  # ended since
                # The kernel's number of a thread's CPU clock.
                spent[thread] = time.clock_gettime(~thread << 3 | 6)
        return spent

    def _ticks(self) -> dict[int, tuple[int, int]]:
        """What each of gRPC's reading threads took in its own code, and in the kernel's, in ticks of 10 ms."""
        ticks = {}
        for thread in self._spent:
            with contextlib.suppress(OSError):  # ended since
                # What follows the name, which may have any characters: own time is the 12th field, the kernel's next.
                fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
                ticks[thread] = int(fields[11]), int(fields[12])
        return ticks


def _are_own(before: dict[int, tuple[int, int]], now: dict[int, tuple[int, int]]) -> bool:
    """Whether threads took more time in their own code than in the kernel's."""
    differences = [(now[each][0] - before[each][0], now[each][1] - before[each][1]) for each in now if each in before]
    return sum(own for own, _ in differences) > sum(kernels for _, kernels in differences)


def _readers() -> list[int]:
    """GRPC's threads that read, by the kernel's numbers."""
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # ended since
            if (thread / "comm").read_text().strip() == READERS:
                found.append(int(thread.name))
    return found
