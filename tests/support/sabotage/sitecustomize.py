"""In PYTHONPATH of a process: SIGUSR2 makes the thread that serves its port die at the next event."""

import signal


def break_front(*_: object) -> None:
    from embedding_service.front.polling import PollingFront

    def fail(self: PollingFront, event: object) -> None:
        raise RuntimeError("sabotage")

    PollingFront._handle = fail  # type: ignore[method-assign]


signal.signal(signal.SIGUSR2, break_front)
