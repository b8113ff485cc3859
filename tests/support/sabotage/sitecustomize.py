"""In PYTHONPATH of a process: SIGUSR2 makes the thread that serves its port die at the next event."""

import signal


def break_front(*_: object) -> None:
    from embedding_service.front import Front

    def fail(self: Front, event: object) -> None:
        raise RuntimeError("sabotage")

    Front._handle = fail  # type: ignore[method-assign]


signal.signal(signal.SIGUSR2, break_front)
