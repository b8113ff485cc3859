"""A shard goes away without a word and comes back, under a load. It hangs, or its network is cut.

As a command it is the latter's half that must run within a network namespace of its own (`two_networks`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.chaos import TABLE
from support.checkpoints import longcat_table
from support.cluster import Cluster, cluster, until
from support.load import Load

PLAIN = "--insecure"
OPTIONS = ("--expect-shards=3", "--replicas=2", "--lost-after=2", "--grace=1", PLAIN)
HERE, THERE = "10.83.0.1", "10.83.0.2"
LINK_HERE, LINK_THERE = "here", "there"


def check_absence(running: Cluster, name: str, leave: Callable[[], None], come_back: Callable[[], None]) -> None:
    """Lookups go on without the shard, the controller forgets it, and takes and uses it again when it is back."""
    until(lambda: running.is_whole(2), "two copies")
    with Load(list(running.addresses.values()), TABLE, longcat_table(), pause=0.005) as load:
        leave()
        running.wait_until(lambda status: name not in [shard.shard_id for shard in status.shards], f"{name} forgotten")
        before = load.lookups
        until(lambda: load.lookups > before + 50, f"lookups without {name}")
        come_back()
        until(lambda: running.is_whole(2), f"{name} back and two copies")
        answered = answered_by(running, name)
        until(lambda: answered_by(running, name) > answered, f"lookups answered by {name}")
    load.check()


def answered_by(running: Cluster, name: str) -> int:
    """Lookups that a shard answered since its start, as the controller knows; 0 while it cannot be asked."""
    return sum(shard.stats.lookups for shard in running.status().shards if shard.shard_id == name)


def ip(*arguments: str) -> None:
    """Run iproute2's `ip`; raises subprocess.CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_networks() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with one link between them, HERE to THERE; gone afterwards.

    Raises OSError or subprocess.CalledProcessError where this is not possible.
    """
    here, there = (f"absence-{os.getpid()}-{side}" for side in ("here", "there"))
    made: list[str] = []
    try:
        for namespace in (here, there):
            ip("netns", "add", namespace)
            made.append(namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", here, "link", "add", LINK_HERE, "type", "veth", "peer", "name", LINK_THERE, "netns", there)
        for namespace, link, address in ((here, LINK_HERE, HERE), (there, LINK_THERE, THERE)):
            ip("-n", namespace, "address", "add", f"{address}/30", "dev", link)
            ip("-n", namespace, "link", "set", link, "up")
        yield here, there
    finally:
        for namespace in made:
            ip("netns", "delete", namespace)


def inside(namespace: str) -> list[str]:
    """The words that run a command within a network namespace."""
    return ["ip", "netns", "exec", namespace]


def main(folder: str, store: str, there: str) -> None:
    """Controller, two shards and the load are here; the third shard is in the namespace `there`."""
    with cluster(Path(folder), store, *OPTIONS, host=HERE) as running:
        running.start_shard("a", PLAIN)
        running.start_shard("b", PLAIN)
        running.start_shard("c", PLAIN, host=THERE, within=inside(there))
        check_absence(
            running,
            "c",
            leave=lambda: ip("-n", there, "link", "set", LINK_THERE, "down"),
            come_back=lambda: ip("-n", there, "link", "set", LINK_THERE, "up"),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
