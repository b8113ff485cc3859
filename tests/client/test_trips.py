"""Pools of streams and trips on them, over streams that answer as a test says."""

import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from support.cluster import until

from embedding_service.client import trips
from embedding_service.client.calls import Call, Failure
from embedding_service.client.streams import Ended
from embedding_service.client.trips import MOST_STREAMS, Pool, Trips, Watchdog
from embedding_service.wire import embedding_pb2 as wire
from embedding_service.wire.lookup_codec import EncodedLookup, Shape

GONE = Ended(grpc.StatusCode.UNAVAILABLE, "connection reset")
MOVED = wire.StreamLookupResponse(error=wire.LookupFailure(code=10, message="moved")).SerializeToString()


class Stream:
    """Answers what it was given, in turn. Once it was ended, that is its answer."""

    def __init__(self) -> None:
        self.answers: list[object] = []
        self.sent: list[bytes] = []
        self.cancelled = ""

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def receive(self) -> object:
        if self.cancelled:
            return Ended(grpc.StatusCode.CANCELLED, self.cancelled)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def cancel(self, code: grpc.StatusCode, why: str) -> None:
        self.cancelled = why


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that pools open, as they do."""
    streams: list[Stream] = []

    def open_stream(channel: object) -> Stream:
        streams.append(Stream())
        return streams[-1]

    monkeypatch.setattr(trips, "open_stream", open_stream)
    return streams


@pytest.fixture
def pool(opened: list[Any]) -> Pool:
    return Pool(None)  # type: ignore[arg-type]


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog()
    yield watchdog
    watchdog.close()


def lookup(timeout: float = 60.0) -> Call:
    return Call("h:1", EncodedLookup(b"asked", b"", b""), timeout, Shape(1, 4, 1, 1, "1"))


def idle(pool: Pool, count: int) -> None:
    """So many streams wait in it, used before."""
    taken = [taken[0] for taken in (pool.take() for _ in range(count)) if taken]
    for stream in taken:
        pool.give_back(stream)


def test_a_pool_opens_so_many_and_gives_out_used_ones_first(pool: Pool, opened: list[Any]) -> None:
    taken = [pool.take() for _ in range(MOST_STREAMS)]
    assert [each and each[1] for each in taken] == [False] * MOST_STREAMS == [False] * 64
    assert pool.take() is None
    pool.give_back(opened[3])
    assert pool.take() == (opened[3], True)
    assert pool.take() is None
    pool.drop(opened[5])
    assert pool.take() == (opened[64], False)
    assert len(opened) == 65


def test_what_is_not_taken_is_not_given_back(pool: Pool, opened: list[Any]) -> None:
    pool.take()
    pool.drop(opened[0])
    pool.give_back(opened[0])
    assert pool.take() == (opened[1], False)
    pool.give_back(opened[1])
    pool.give_back(opened[1])
    assert pool.take() == (opened[1], True)
    assert pool.take() == (opened[2], False)


def test_one_that_ended_is_replaced_with_all_that_waited(pool: Pool, opened: list[Any]) -> None:
    idle(pool, 3)
    taken = pool.take()
    assert taken and taken[1]
    fresh = pool.replace(taken[0])
    assert fresh is opened[3]
    assert [stream.cancelled for stream in opened if stream is not taken[0]] == ["not used any more"] * 2 + [""]
    pool.give_back(taken[0])
    assert pool.take() == (opened[4], False)


def test_a_closed_pool_ends_all_and_opens_none(pool: Pool, opened: list[Any]) -> None:
    idle(pool, 2)
    taken = pool.take()
    assert taken
    pool.close("the client was closed")
    assert sorted(stream.cancelled for stream in opened) == ["not used any more", "the client was closed"]
    assert opened.index(taken[0]) == [stream.cancelled for stream in opened].index("the client was closed")  # type: ignore[arg-type]
    assert pool.take() is None
    assert pool.replace(taken[0]) is None
    assert len(opened) == 2


def test_a_used_stream_that_ended_is_asked_once_more_on_a_fresh_one(
    pool: Pool, opened: list[Any], watchdog: Watchdog
) -> None:
    idle(pool, 1)
    opened[0].answers = [GONE]
    under_way = Trips(watchdog)
    assert under_way.add(lookup(), pool)
    watched: list[object] = []
    real = watchdog.watch

    def watch(due: dict[object, float]) -> None:
        watched.extend(due)
        real(due)  # type: ignore[arg-type]
        if len(opened) == 2:
            opened[1].answers = [MOVED]

    watchdog.watch = watch  # type: ignore[method-assign, assignment]
    [outcome] = under_way.all()
    assert outcome == Failure(grpc.StatusCode.ABORTED, "moved")
    assert opened[1].sent == [b"asked"] and watched == opened
    assert pool.take() == (opened[1], True)
    assert not watchdog._due


@pytest.mark.parametrize("late", [False, True])
def test_a_fresh_stream_that_ended_or_a_late_one_is_a_failure(
    pool: Pool, opened: list[Any], watchdog: Watchdog, late: bool
) -> None:
    if late:
        idle(pool, 1)
    under_way = Trips(watchdog)
    assert under_way.add(lookup(-1.0 if late else 60.0), pool)
    opened[0].answers = [GONE, GONE]
    assert under_way.all() == [Failure(GONE.code, GONE.message)] or opened[0].cancelled  # or the watchdog was first
    assert len(opened) == 1 and opened[0].cancelled
    assert pool.take() == (opened[1], False)


def test_what_is_given_up_leaves_no_stream_taken(pool: Pool, opened: list[Any], watchdog: Watchdog) -> None:
    for in_turn in (False, True):
        del opened[:]
        under_way = Trips(watchdog)
        for _ in range(3):
            under_way.add(lookup(), pool)
        opened[0].answers = [MOVED]
        opened[1].answers = [KeyboardInterrupt()]
        with pytest.raises(KeyboardInterrupt):
            list(under_way.in_turn()) if in_turn else under_way.all()
        assert opened[1].cancelled == opened[2].cancelled == "not used any more"
        assert not pool._taken and not watchdog._due
        pool.close("")
        pool = Pool(None)  # type: ignore[arg-type]


def test_a_late_answer_is_cancelled(watchdog: Watchdog) -> None:
    late, answered = Stream(), Stream()
    watchdog.watch({answered: time.monotonic() + 0.02, late: time.monotonic() + 0.03})  # type: ignore[dict-item]
    watchdog.forget([answered])  # type: ignore[list-item]
    deadline = time.monotonic() + 180
    while not late.cancelled and time.monotonic() < deadline:
        time.sleep(0.005)
    assert late.cancelled == "no answer in time" and not answered.cancelled


def test_the_thread_ends_once_nothing_is_watched_and_another_begins(
    watchdog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that nobody closes leaves none."""
    monkeypatch.setattr(trips, "LINGER_SECONDS", 0.01)
    threads = set()
    for _ in range(3):
        late, answered = Stream(), Stream()
        watchdog.watch({answered: time.monotonic() + 0.02, late: time.monotonic() + 0.03})  # type: ignore[dict-item]
        threads.add(watchdog._thread)
        watchdog.forget([answered])  # type: ignore[list-item]
        until(lambda late=late: late.cancelled, "the late one to be cancelled")  # type: ignore[misc]
        until(lambda: watchdog._thread is None, "the thread to end")
    assert len(threads) == 3
    for thread in threads:
        assert thread
        thread.join()
