"""A model worker's HTTP side: HTTPS, with a key, where it is secured."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from support.attack.strangers import break_off, tokens
from support.attack.window import ATTACKER, Window
from support.hostile import dial

CONNECTIONS = 200
# Above the limit of open files, which `__main__` sets.
MANY_CONNECTIONS = 1200


def half_sent_requests(window: Window) -> None:
    """Connections whose headers or bodies stop half-way, more than the worker has places, and headers without end."""
    values, kept = window.values, []
    body = json.dumps({"model": "small", "prompt": [5, 6], "max_tokens": 4}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {window.worker}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {ATTACKER}\r\nContent-Length: {len(body)}\r\n"
    ).encode()
    chunked = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    for number in range(CONNECTIONS):
        starts = (head[: values.randrange(1, len(head))], head + b"\r\n" + body[: values.randrange(len(body))])
        sent = values.choice((*starts, starts[1], chunked + b"\r\n20\r\n" + body[:9]))
        if number % 50 == 0:
            sent = head + b"X-A: " + b"a" * (4 << 20)
        with window.tried("left half sent"):
            connection = dial(window.worker, window.worker_tls)
            kept.append(connection)
            connection.sendall(sent)
    window.rest_of()
    for connection in kept:
        with suppress(OSError):
            connection.close()


def all_files(window: Window) -> None:
    """More connections than a process of the worker may have files, again and again. Some ask half a question."""
    while window.open:
        kept = []
        for number in range(MANY_CONNECTIONS):
            if not window.open:
                break
            with window.tried("connected"):
                asks = number % 4 == 0
                kept.append(connection := dial(window.worker, window.worker_tls if asks else None))
                if asks:
                    connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        window.rest(1.5)
        for connection in kept:
            with suppress(OSError):
                connection.close()


def huge_prompts(window: Window) -> None:
    """Texts of 7 MB and a million ids, four at a time, and numbers at the ends of what may be said."""
    values = window.values
    longest = "".join(values.choices("ab 日é", k=1000)) * 7000
    bodies = [
        {"prompt": longest},
        {"prompt": [values.randrange(500)] * 1_000_000},
        {"prompt": "a" * (7 << 20)},
        {"prompt": [5, 6], "temperature": 1e-300, "max_tokens": 2},
        {"prompt": [5, 6], "max_tokens": 1 << 62},
        {"prompt": "\ud800"},
    ]
    with ThreadPoolExecutor(4) as threads:
        while window.open:
            list(threads.map(lambda body: _post(window, {"model": "small", "max_tokens": 1, **body}), bodies))


def half_handshakes(window: Window) -> None:
    """Connections that begin TLS and stop, more than the worker may have files."""
    while window.open:
        break_off(window, window.worker, window.worker_ca, MANY_CONNECTIONS)


def keys_of_nobody(window: Window) -> None:
    """Guesses without end, and tokens of every wrong kind."""
    with ThreadPoolExecutor(4) as threads:
        while window.open:
            asked = threads.map(lambda key: _post(window, {"model": "small", "prompt": [5, 6]}, key), tokens(window))
            list(asked)


def _post(window: Window, body: dict, key: str = ATTACKER) -> None:
    import httpx

    if not window.open:
        return
    tls = window.worker_tls
    try:
        answer = httpx.post(
            f"{'https' if tls else 'http'}://{window.worker}/v1/completions",
            content=json.dumps(body).encode(),
            headers={"content-type": "application/json", "authorization": f"Bearer {key}"},
            verify=tls or False,
            timeout=30,
        )
        window.ended[str(answer.status_code)] += 1
    except httpx.HTTPError as error:
        window.ended[type(error).__name__] += 1
