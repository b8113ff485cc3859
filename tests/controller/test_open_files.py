"""A server may have as many connections as its machine lets it have, whatever limit it was started with."""

from pathlib import Path

import pytest
from support.cluster import Process, free_port

pytestmark = pytest.mark.service


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(store: Path, tmp_path: Path) -> None:
    limited = ("prlimit", "--nofile=256:4096")
    listen = f"--listen=127.0.0.1:{free_port()}"
    process = Process(tmp_path / "log", "controller", f"--store={store}", listen, within=limited)
    try:
        process.wait_for("listening on")
        limits = Path(f"/proc/{process.popen.pid}/limits").read_text()
    finally:
        process.end()
    [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3] == "4096"
