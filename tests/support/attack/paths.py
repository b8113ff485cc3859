"""Method paths that no client would send."""

from __future__ import annotations

from pathlib import Path

from support.attack.window import Window

PATHS = (
    b"/\xff",
    b"",
    b"/",
    b"//",
    b"*",
    b"/\x00",
    b"\xff\xfe/Lookup",
    b"/embedding.v1.EmbeddingService/",
    b"/embedding.v1.EmbeddingService/Lookup\xc3",
    b"/embedding.v1.EmbeddingService/Answer",
    b"/embedding.v1.ControlService/\xed\xa0\x80",
    b"/../../etc/passwd",
    b"http://127.0.0.1/embedding.v1.EmbeddingService/Lookup",
)


def odd_paths(window: Window) -> None:
    """On every member, and on every abstract socket that one of them listens on."""
    addresses = window.members + _abstract_sockets(list(window.pids.values()))
    while window.open:
        for address in addresses:
            for path in (*PATHS, *_drawn(window)):
                with window.tried("sent"):
                    raw = window.raw(address)
                    raw.call(path, b"")
                    window.rest(0.01)
                    raw.close()


def _drawn(window: Window) -> list[bytes]:
    values = window.values
    lengths = (1, 7, 300, 4000, 16 << 10, 60 << 10)
    return [b"/" + values.randbytes(length) for length in lengths] + [b"/" + b"x" * values.randrange(1 << 17)]


def _abstract_sockets(pids: list[int]) -> list[str]:
    """Of these processes alone: others' are none of our business."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue  # closed since
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    named = {f[7] for f in lines if len(f) == 8 and f[6] in inodes and f[7].startswith("@")}
    return [f"unix-abstract:{name[1:]}" for name in sorted(named)]
