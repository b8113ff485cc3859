"""Memory is given back only when nobody reads it any more."""

import threading

from embedding_service.rows.base import _Readers


def test_actions_wait_for_earlier_readers_only() -> None:
    readers, done = _Readers(), []
    readers.when_gone(lambda: done.append("nobody"))
    assert done == ["nobody"]
    with readers.reading():
        readers.when_gone(lambda: done.append("first"))
        with readers.reading():
            assert done == ["nobody"]
            readers.when_gone(lambda: done.append("second"))
        assert done == ["nobody"]
    assert done == ["nobody", "first", "second"]


def test_later_readers_do_not_keep_an_action_waiting() -> None:
    readers, done = _Readers(), []
    early, late = readers.reading(), readers.reading()
    early.__enter__()
    readers.when_gone(lambda: done.append("gone"))
    late.__enter__()
    early.__exit__(None, None, None)
    assert done == ["gone"]
    late.__exit__(None, None, None)


def test_many_threads_never_see_a_released_generation() -> None:
    readers, released, seen = _Readers(), set(), []
    current = [0]

    def read() -> None:
        for _ in range(300):
            with readers.reading():
                mine = current[0]
                seen.append(mine in released)

    def release() -> None:
        for _ in range(300):
            old, current[0] = current[0], current[0] + 1
            readers.when_gone(lambda old=old: released.add(old))

    threads = [threading.Thread(target=read) for _ in range(4)] + [threading.Thread(target=release)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(seen)
    assert released == set(range(300))
