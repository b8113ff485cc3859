"""One class of attack in a process of its own: what it opens ends with it, and it waits behind those it attacks.

The window comes as JSON in the only argument; how its calls ended goes out the same way.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.attack import accidents, answers, frames, idle, malformed, paths, reports, requests, strangers, worker
from support.attack.window import Window

ATTACKS: dict[str, Callable[[Window], None]] = {
    "odd method paths": paths.odd_paths,
    "malformed protobuf": malformed.malformed_messages,
    "random bytes": malformed.random_bytes,
    "idle watches": idle.idle_watches,
    "idle streams": idle.idle_streams,
    "unknown streams": idle.unknown_streams,
    "refused requests": requests.refused_requests,
    "huge n-gram lookups": requests.huge_ngram_lookups,
    "gzip bombs": requests.gzip_bombs,
    "answers nobody reads": answers.unread_answers,
    "calls given up": frames.calls_given_up,
    "header floods": frames.header_floods,
    "all files used up": frames.all_files,
    "forged reports": reports.forged_reports,
    "huge reports": reports.huge_reports,
    "shards come and go": reports.come_and_go,
    "accidents in the store": accidents.accidents,
    "store away": accidents.store_away,
}
SECURED_ATTACKS: dict[str, Callable[[Window], None]] = {
    "half a handshake": strangers.half_handshakes,
    "tokens of nobody": strangers.tokens_of_nobody,
    "certificates of nobody": strangers.certificates_of_nobody,
}
WORKER_ATTACKS: dict[str, Callable[[Window], None]] = {
    "worker: half-sent requests": worker.half_sent_requests,
    "worker: all files used up": worker.all_files,
    "worker: huge prompts": worker.huge_prompts,
}
SECURED_WORKER_ATTACKS: dict[str, Callable[[Window], None]] = {
    "worker: half a handshake": worker.half_handshakes,
    "worker: keys of nobody": worker.keys_of_nobody,
}
# A connection is a file.
FILES = 8192


def main(given: dict[str, Any]) -> None:
    """Run the class that is named, and say how its calls ended."""
    os.nice(10)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    name = given.pop("name")
    print("begun", flush=True)
    window = Window(
        values=random.Random(f"{given.pop('seed')} {name}"),
        until=time.monotonic() + given.pop("seconds"),
        store=Path(given.pop("store")),
        **given,
    )
    try:
        (ATTACKS | SECURED_ATTACKS | WORKER_ATTACKS | SECURED_WORKER_ATTACKS)[name](window)
    finally:
        print(json.dumps(window.ended), flush=True)
        os._exit(0)  # without waiting for what it left open


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
