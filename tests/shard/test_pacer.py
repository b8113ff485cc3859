"""The rate at which parts are read while lookups are served, by a clock that only moves when somebody sleeps."""

from embedding_service.shard.holdings import Pacer

RATE = 1000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def paced(rate: int = RATE) -> tuple[Pacer, Clock]:
    clock = Clock()
    pacer = Pacer(rate, clock.read, clock.sleep)
    pacer.active = True
    return pacer, clock


def test_chunks_never_come_faster_than_the_rate() -> None:
    pacer, clock = paced()
    done = 0
    for chunk in [1, 999, 300, 4096, 17] * 20:
        pacer.wait(chunk)
        done += chunk
        assert done <= RATE * (clock.now - 100.0) + 1e-6
    assert clock.now - 100.0 <= done / RATE + 1e-6  # nor slower


def test_time_in_which_nothing_was_read_is_not_made_up_for() -> None:
    pacer, clock = paced()
    pacer.wait(500)
    clock.now += 60
    idle_until = clock.now
    for _ in range(4):
        pacer.wait(500)
    assert clock.now - idle_until == 2.0


def test_several_loads_share_the_rate() -> None:
    waits: list[float] = []
    pacer = Pacer(RATE, lambda: 100.0, waits.append)  # threads that ask at the same moment
    pacer.active = True
    for _ in range(3):
        pacer.wait(1000)
    assert waits == [1.0, 2.0, 3.0]


def test_the_first_loads_and_those_without_a_rate_do_not_wait() -> None:
    pacer, clock = paced(0)
    pacer.wait(1 << 30)
    assert clock.now == 100.0
    pacer, clock = paced()
    pacer.active = False
    pacer.wait(1 << 30)
    assert clock.now == 100.0
