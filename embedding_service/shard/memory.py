"""This process's memory, as the kernel counts it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# glibc takes no more for the second; larger messages are mapped anew each time.
_KEPT, _LARGEST = 256 << 20, 32 << 20


def available_memory() -> int:
    """Bytes this process may still use: the machine's available memory, or what its cgroup leaves, if less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def offered_memory(tier: str) -> int:
    """Bytes to offer for rows that lie in memory: 80 % of this process's, of the GPU's for `cuda`.

    60 % for `cuda-cached`: it locks more than it offers, for rows are padded there.
    Raises InvalidRequest for `cuda` where there is no GPU.
    """
    if tier == "cuda":
        from embedding_service.rows.cuda import free_memory  # with torch, which not everybody has loaded here

        return free_memory() * 8 // 10
    return available_memory() * (6 if tier == "cuda-cached" else 8) // 10


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory: anonymous, and backed by files (shared memory included)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, file, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, file + shared


def keep_freed_memory() -> None:
    """Have malloc keep what answers took for the next ones, up to 256 MiB.

    By default it gives megabytes back to the kernel at once, and an answer of 6 MB then spends more time on page faults
    than on anything else. One arena for all threads: each would keep so much, and give nothing to the others. Where the
    C library is not glibc nothing changes.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_ARENA_MAX, 1)
