"""Driving the router's steps by events."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from embedding_service.client.steps import Aside, Pause
from embedding_service.errors import EmbeddingServiceError
from simulation.world import Process


def drive(steps: Any, process: Process, done: Callable[[Any], None]) -> None:
    """Take the steps in a process; `done` gets what they return, or the error they raise."""
    _Driver(steps, process, done).go_on(None)


class _Driver:
    __slots__ = ("_answers", "_done", "_missing", "_process", "_steps")

    def __init__(self, steps: Any, process: Process, done: Callable[[Any], None]) -> None:
        self._steps, self._process, self._done = steps, process, done
        self._answers: list[Any] = []
        self._missing = 0

    def go_on(self, answers: Any) -> None:
        while True:
            try:
                step = self._steps.send(answers)
            except StopIteration as end:
                self._done(end.value)
                return
            except EmbeddingServiceError as error:
                self._done(error)
                return
            if isinstance(step, Pause):
                self._process.after(step.seconds, self.go_on, None)
                return
            if not isinstance(step, Aside):
                break
            self._ask(step.call, step.done)
            answers = None
        calls = step.calls
        self._answers, self._missing = [None] * len(calls), len(calls)
        if not calls:
            self.go_on([])
        for number, call in enumerate(calls):
            self._ask(call, partial(self._take, number))

    def _ask(self, call: Any, done: Callable[[Any], None]) -> None:
        self._process.world.call(self._process, call.address, call.request, call.timeout, done)

    def _take(self, number: int, answer: Any) -> None:
        self._answers[number] = answer
        self._missing -= 1
        if not self._missing:
            self.go_on(self._answers)
