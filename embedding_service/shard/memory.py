"""This process's memory, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Bytes this process may still use: the machine's available memory, or what its cgroup leaves, if less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(available, 0)


def resident_bytes() -> tuple[int, int]:
    """This process's resident memory: anonymous, and backed by files (shared memory included)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    anonymous, file, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return anonymous, file + shared
