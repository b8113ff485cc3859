"""This process's memory, as the kernel counts it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# glibc takes no more for the second. Larger messages are mapped again each time.
_KEPT, _LARGEST = 256 << 20, 32 << 20


# Bytes that a process takes for itself: Python, torch, gRPC.
_PROCESS = 256 << 20
# Bytes of requests and answers under way in a process. The least has room for a few of the largest.
_LEAST_UNDER_WAY, _MOST_UNDER_WAY = 128 << 20, 1 << 30


def available_memory() -> int:
    """Bytes that this process may still use: the machine's available memory, or what its containers leave, if less."""
    left = [limit - used for limit, used in containers()]
    return max(min([_machine("MemAvailable"), *left]), 0)


def memory_for_requests(rows: int, processes: int) -> int:
    """Bytes of requests and answers that may be under way in one of a shard's processes.

    Three quarters of what the machine or the container leaves besides `rows` bytes of rows and the processes
    themselves, within bounds, in equal shares. The rest is for what is not counted: small messages, and those not yet
    whole.
    """
    limit = min([_machine("MemTotal"), *(limit for limit, _ in containers())])
    left = limit - rows - processes * _PROCESS
    return min(max(left * 3 // 4 // processes, _LEAST_UNDER_WAY), _MOST_UNDER_WAY)


def _machine(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def containers(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that this process is in and that has a limit.

    Pages of files that the kernel drops when memory is short are not in use: logs and checkpoints leave many. In a
    container the root of the mount is often its own group, even if the path says otherwise.
    """
    groups = dict(line.split(":", 2)[1:] for line in own.read_text().splitlines()) if own.exists() else {}
    found = []
    for kind, folder, limit_file, use_file, pages in (
        ("", root, "memory.max", "memory.current", "inactive_file"),
        ("memory", root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        path = Path(groups.get(kind, "/"))
        for group in {folder, *(folder / each.relative_to("/") for each in (path, *path.parents))}:
            limit, use = group / limit_file, group / use_file
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                found.append((int(text), max(0, int(use.read_text()) - _count(group / "memory.stat", pages))))
    return found


def _count(stat: Path, field: str) -> int:
    """A field of a file of counts. 0: it is not there."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[0] == field), 0)


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory: anonymous, and backed by files (shared memory included)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, file, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, file + shared


def keep_freed_memory() -> None:
    """Have malloc keep the memory of answers for the next ones, up to 256 MiB.

    By default it gives megabytes back to the kernel at once. An answer of 6 MB then spends more time on page faults
    than on anything else. All threads share one arena. Otherwise each would keep as much, and give nothing to the
    others. If the C library is not glibc, nothing changes.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_ARENA_MAX, 1)
