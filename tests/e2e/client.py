"""The load, run in a pod: lookups whose every row is compared with what it must be, and completions beside them.

    python3.11 client.py SERVICE MODEL/TABLE COMPLETIONS_URL REPORT

REPORT is written again each second, as JSON, until SIGTERM. Completions are compared with the first one: the model is
asked at temperature 0, so each must be the same text. Rows of a shard on the same node are read in place.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from support.checkpoints import longcat_table

from embedding_service import EmbeddingClient

LOOKUP_SECONDS = 20.0
COMPLETION_SECONDS = 60.0
# Between lookups and between completions: the machine that runs all the pods may be small.
LOOKUP_PAUSE, COMPLETION_PAUSE = 0.02, 1.0
ROWS = 64

PROMPT = {"model": "model", "prompt": "The function", "max_tokens": 12, "temperature": 0}


class Counts:
    """What happened so far, in order; seconds are those of every call. Only its own thread writes it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.failed: list[str] = []


def look_up(client: EmbeddingClient, table_name: str, counts: Counts, ended: threading.Event) -> None:
    """Random rows, again and again."""
    table = longcat_table()
    random = torch.Generator().manual_seed(1)
    while not ended.wait(LOOKUP_PAUSE):
        ids = torch.randint(0, len(table), (ROWS,), generator=random)
        began = time.monotonic()
        try:
            rows = client.lookup(table_name, ids)
            if not torch.equal(rows, table[ids]):
                counts.wrong.append(f"asked {ids.tolist()}, got tags {rows[:, 0].unique().tolist()}")
        except Exception as error:  # whatever it is, it is a lookup that failed
            counts.failed.append(f"{type(error).__name__}: {error}")
        counts.seconds.append(time.monotonic() - began)


def complete(url: str, counts: Counts, ended: threading.Event) -> None:
    """The same prompt, again and again."""
    expected = None
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    while not ended.wait(COMPLETION_PAUSE):
        began = time.monotonic()
        request = urllib.request.Request(url, json.dumps(PROMPT).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=COMPLETION_SECONDS) as answer:
                text = json.load(answer)["choices"][0]["text"]
            expected = expected or text
            if text != expected:
                counts.wrong.append(f"{text!r}, not {expected!r}")
        except urllib.error.HTTPError as error:
            counts.failed.append(f"{error}: {error.read().decode(errors='replace')}")
        except Exception as error:  # whatever it is, it is a completion that failed
            counts.failed.append(f"{type(error).__name__}: {error}")
        counts.seconds.append(time.monotonic() - began)


def main(address: str, table_name: str, url: str, report: Path) -> None:
    """Both loads until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    lookups, completions = Counts(), Counts()
    client = EmbeddingClient(address, timeout=LOOKUP_SECONDS, near=True)
    threads = [
        threading.Thread(target=look_up, args=(client, table_name, lookups, ended)),
        threading.Thread(target=complete, args=(url, completions, ended)),
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ended.wait(1)
        for thread in threads if ended.is_set() else ():
            thread.join()
        draft = report.with_suffix(".draft")
        draft.write_text(
            json.dumps(
                {"lookups": vars(lookups), "completions": vars(completions), "near": client.statistics._asdict()}
            )
        )
        draft.replace(report)
    client.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
