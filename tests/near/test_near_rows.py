"""Rows read in place: what is read is right, whatever becomes of the parts, the shard and their files.

The rules N1 to N7 and N9 are those of docs/near.md.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.cluster import until
from support.near import NearShard, near_reader, near_shard, read, read_near, stored_rows, wait_for

from embedding_service.address_space import PAGE, AddressSpace, memory_file, most_maps
from embedding_service.errors import InvalidRequest, NoRoom
from embedding_service.near import reader as reader_module
from embedding_service.near.board import BOARD_BYTES, VERSION
from embedding_service.near.reader import NearReader, Place, SomeRows
from embedding_service.shard.near import Rights
from embedding_service.wire import near_pb2 as near


@pytest.fixture
def shard(store: Path, tmp_path: Path) -> Iterator[NearShard]:
    """One that holds all of model fp32, whose rows name themselves, in memory."""
    with near_shard(tmp_path / "near", store, "fp32") as shard:
        shard.hold()
        yield shard


@pytest.fixture
def expected(store: Path) -> np.ndarray:
    return stored_rows(store, "fp32")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter; those of pytest are their owner's alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def some_ids(rows: int, count: int = 500) -> np.ndarray:
    edges = [0, rows - 1, rows // 2, rows // 2, 0]
    return np.concatenate([np.random.default_rng(7).integers(0, rows, count), edges]).astype(np.int64)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def hello(
    shard: NearShard, version: int = VERSION, incarnation: int | None = None, authorization: str = ""
) -> socket.socket:
    """A connection that said what it wants."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(120)
    connection.connect(shard.place.path)
    incarnation = incarnation or shard.place.incarnation
    request = near.NearRequest(version=version, incarnation=incarnation, authorization=authorization)
    connection.send(request.SerializeToString())
    return connection


def shown(who: str, place: Place) -> str:
    """What a reader says to any shard."""
    return who


def files_of(connection: socket.socket) -> tuple[near.NearAnswer, list[int]]:
    """The next answer."""
    packet, files, _, _ = socket.recv_fds(connection, 1 << 18, 64)
    return near.NearAnswer.FromString(packet), files


@pytest.mark.parametrize("tier", ["ram", "mmap"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_n1_near_rows_are_the_stored_bytes(store: Path, tmp_path: Path, dtype: str, tier: str) -> None:
    with near_shard(tmp_path / "near", store, dtype, tier) as shard, near_reader(shard) as reader:
        shard.hold()
        wait_for(reader, shard.key)
        until(lambda: reader.states() == {"shard-1": "near"}, "it to be called near")
        for ids in (some_ids(shard.table.rows), some_ids(shard.table.rows, 3000), np.array([5]), np.empty(0, np.int64)):
            rows = read_near(reader, shard.key, ids)
            assert np.array_equal(rows, stored_rows(store, dtype)[ids])


def test_n1_a_shard_of_another_machine_is_not_tried(shard: NearShard) -> None:
    reader = NearReader()
    reader.follow([shard.place._replace(boot_id="of another machine"), shard.place._replace(path="")])
    assert reader.states() == {}
    assert reader.view() is None
    reader.close()


def test_n2_rows_of_a_dropped_part_are_left_out_and_come_back(shard: NearShard, expected: np.ndarray) -> None:
    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        ids = np.arange(shard.table.rows)
        shard.drop(1)

        def some() -> SomeRows | None:
            """None while the reader makes another view of it."""
            view = reader.view()
            rows = reader.read(view, view.tables[shard.key], ids) if view else None
            return rows if isinstance(rows, SomeRows) and rows.read() else None

        rows = until(some, "the parts that are left")
        left = ids[ids // shard.table.rows_per_part != 1]
        assert np.array_equal(rows.positions, left)
        assert rows.stored is not None
        assert np.array_equal(rows.stored, expected[left])
        shard.hold(1)
        wait_for(reader, shard.key)
        again = read_near(reader, shard.key, ids)
        assert np.array_equal(again, expected)


def test_n2_no_row_is_wrong_while_parts_come_and_go(shard: NearShard, expected: np.ndarray) -> None:
    """Whole tables are read by three threads while parts are dropped and loaded again: a wrong row names itself."""
    outcomes: Counter[str] = Counter()
    done = threading.Event()

    def look(reader: NearReader, seed: int) -> None:
        random = np.random.default_rng(seed)
        while not done.is_set():
            ids = random.integers(0, shard.table.rows, 2000)
            rows = read(reader, shard.key, ids)
            right = rows is not None and np.array_equal(rows, expected[ids])
            outcomes["none" if rows is None else "right" if right else "wrong"] += 1

    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        threads = [threading.Thread(target=look, args=(reader, seed)) for seed in range(3)]
        for thread in threads:
            thread.start()
        parts = len(shard.table.parts)
        for turn in range(40):
            shard.drop(turn % parts, (turn + 1) % parts)
            shard.hold(turn % parts, (turn + 1) % parts)
            if turn % 10 == 0:
                before = outcomes["right"]
                until(lambda before=before: outcomes["right"] > before, "right rows")  # type: ignore[misc]
        done.set()
        for thread in threads:
            thread.join()
    assert outcomes["wrong"] == 0
    assert outcomes["right"] > 0
    assert outcomes["none"] > 0


def test_n2_a_part_that_the_loop_holds_and_drops_at_once_is_handed_to_nobody(shard: NearShard) -> None:
    """As a fold does whose version goes at that moment."""
    part, path = shard.table.parts[0], shard._store.part_path(shard.manifest, shard.table.parts[0])
    key = shard.part(0)._replace(model="gone")
    before = open_files()

    def hold_and_drop() -> None:
        shard.server.hold(key, shard.table, shard.rows.location(part, path))
        shard.server.drop(key)

    shard.on_loop(hold_and_drop)
    shard.on_loop(lambda: None)  # what was queued is done
    assert open_files() == before
    with hello(shard) as connection:
        files = files_of(connection)[1]
        connection.send(near.NearRequest(next=True).SerializeToString())
        answer, parts = files_of(connection)
        for file in (*files, *parts):
            os.close(file)
    assert {each.model for each in answer.held} == {"fp32"}


@contextmanager
def two_shards(store: Path, folder: Path) -> Iterator[tuple[NearShard, NearShard, NearReader]]:
    """Two of one machine that hold nothing yet, and a reader that follows both."""
    with (
        near_shard(folder / "one", store, "fp32", incarnation=1) as one,
        near_shard(folder / "two", store, "fp32", incarnation=2) as two,
        near_reader(one, two) as reader,
    ):
        yield one, two, reader


def test_n2_a_part_that_two_shards_hold_stays_near_when_one_goes(
    store: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    with two_shards(store, tmp_path) as (one, two, reader):
        one.hold()
        wait_for(reader, one.key)
        two.hold(0, 1, 2)
        until(lambda: reader.states() == {"shard-1": "near", "shard-2": "near"}, "both to be near")
        one.stop()
        ids = np.arange(3 * one.table.rows_per_part)

        def there() -> bool:
            rows = read(reader, one.key, ids)
            assert rows is None or np.array_equal(rows, expected[ids])
            return rows is not None

        until(there, "the other shard's parts")


def test_n2_a_part_that_moves_away_and_back_is_read_where_it_is(
    store: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    with two_shards(store, tmp_path) as (one, two, reader):
        one.hold()
        wait_for(reader, one.key)
        ids = np.arange(one.table.rows)

        def reads_by(shard: NearShard) -> int:
            rows = read(reader, one.key, ids)
            assert rows is None or np.array_equal(rows, expected[ids])
            return shard.accesses[1]

        for there, here in ((two, one), (one, two)):
            there.hold(1)
            here.drop(1)
            before = there.accesses[1]
            until(lambda: reads_by(there) > before, "its rows to be read there")  # noqa: B023


def test_n3_a_reader_sees_that_a_shard_has_a_newer_routing(shard: NearShard) -> None:
    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        shard.flip(7, 3)
        until(lambda: reader.newer_than(7, 2) == "shard-1", "the newer routing to be seen")
        until(lambda: reader.newer_than(6, 9) == "shard-1", "the newer term to be seen")
        assert reader.newer_than(7, 3) is None
        assert reader.newer_than(8, 1) is None


@pytest.mark.slow
def test_n4_a_shard_that_hangs_is_not_near_until_it_goes_on(shard: NearShard, expected: np.ndarray) -> None:
    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        with shard.hanging():
            until(lambda: reader.view() is None, "the silence to be noticed")
            assert read(reader, shard.key, np.arange(9)) is None
        wait_for(reader, shard.key)
        rows = read_near(reader, shard.key, np.arange(9))
        assert np.array_equal(rows, expected[:9])


def test_n4_what_is_mapped_is_given_back_when_the_shard_is_gone(shard: NearShard) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("embedding-rows")

    before = mapped()  # of the shard, and of clients of other tests
    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        assert mapped() > before
        shard.stop()
        until(lambda: mapped() < before, "the memory to be unmapped")
        until(lambda: reader.view() is None and reader.states()["shard-1"] != "near", "the state to say so")


def test_n5_the_socket_is_this_users_alone(shard: NearShard) -> None:
    status = Path(shard.place.path).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_n5_another_user_gets_nothing_though_the_socket_lets_it_in(shard: NearShard, open_folder: Path) -> None:
    Path(shard.place.path).rename(open_folder / "near")
    (open_folder / "near").chmod(0o666)
    shard.place = shard.place._replace(path=str(open_folder / "near"))
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = b"?"
        try:
            os.setuid(65534)
            answer, files = files_of(hello(shard))
            outcome = f"{answer.refusal} {len(files)}".encode()
        finally:
            os.write(there, outcome)
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(here, 1000) == b"user 65534 is neither this shard's nor root 0"
    os.close(here)
    os.close(there)


def test_n5_a_client_learns_only_of_models_that_it_may_read(store: Path, tmp_path: Path, expected: np.ndarray) -> None:
    def rights_of(authorization: str) -> Rights:
        if authorization not in ("all", "some"):
            raise InvalidRequest(f"nobody is {authorization!r}")
        return lambda key: authorization == "all" or key.model != "secret"

    with near_shard(tmp_path / "near", store, "fp32", rights_of=rights_of) as shard:
        secret = shard.part(0)._replace(model="secret")
        shard.hold()
        place = shard.rows.location(shard.table.parts[0], shard._store.part_path(shard.manifest, shard.table.parts[0]))
        shard.server.hold(secret, shard.table, place)
        readers = {who: NearReader(partial(shown, who)) for who in ("all", "some", "none")}
        for reader in readers.values():
            reader.follow([shard.place])
        for who in ("all", "some"):
            wait_for(readers[who], shard.key)
            rows = read_near(readers[who], shard.key, np.arange(shard.table.rows))
            assert np.array_equal(rows, expected)
        until(lambda: "nobody is 'none'" in readers["none"].states()["shard-1"], "the refusal")
        wait_for(readers["all"], ("secret@1", shard.key[1]), whole=False)
        view = until(readers["some"].view, "a view")
        assert list(view.tables) == [shard.key]
        with hello(shard, authorization="some") as connection:
            files_of(connection)
            told: list[near.NearAnswer] = []
            for _ in range(2):
                connection.send(near.NearRequest(next=True).SerializeToString())
                if told:  # nothing is said of what it was not told of
                    shard.on_loop(lambda: shard.server.drop(secret))
                    shard.drop(2)
                answer, files = files_of(connection)
                told.append(answer)
                for file in files:
                    os.close(file)
            assert {part.model for answer in told for part in answer.held} == {"fp32"}
            assert len(told[1].dropped) == 1
        for reader in readers.values():
            reader.close()


def test_a_shard_refuses_another_version_and_a_client_that_means_another_shard(shard: NearShard) -> None:
    for options, why in (({"version": 9}, "version 1, the client 9"), ({"incarnation": 5}, "another shard")):
        with hello(shard, **options) as connection:  # type: ignore[arg-type]
            answer, files = files_of(connection)
            assert why in answer.refusal
            assert not files
            assert connection.recv(9) == b""


def test_a_reader_says_why_a_shard_is_not_near(shard: NearShard, tmp_path: Path) -> None:
    reader = NearReader()
    absent = shard.place._replace(shard="absent", path=str(tmp_path / "nobody"))
    another = shard.place._replace(shard="another", incarnation=99)
    reader.follow([absent, another, shard.place])
    wait_for(reader, shard.key)
    until(lambda: "another shard" in reader.states()["another"], "the refusal")
    until(lambda: "No such file or directory" in reader.states()["absent"], "the missing socket")
    reader.close()


def test_n6_a_hostile_client_cannot_change_a_row(shard: NearShard, expected: np.ndarray) -> None:
    """It may be root: the memory is sealed for everybody."""
    with hello(shard) as connection:
        answer, files = files_of(connection)
        assert answer.board
        connection.send(near.NearRequest(next=True).SerializeToString())
        held, parts = files_of(connection)
        assert len(held.held) == len(parts) > 0
        for file in (*files, *parts):
            with pytest.raises(OSError, match="not permitted"):
                mmap.mmap(os.open(f"/proc/self/fd/{file}", os.O_RDWR), 4096)
            for change in (lambda fd: os.pwrite(fd, b"x", 0), lambda fd: os.ftruncate(fd, 0)):
                writable = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
                with pytest.raises(PermissionError):
                    change(writable)
                os.close(writable)
            libc = ctypes.CDLL(None, use_errno=True)
            page = mmap.mmap(file, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
            address = np.frombuffer(page, np.uint8).ctypes.data
            assert libc.mprotect(ctypes.c_void_p(address), 4096, 3) == -1
            os.close(file)
    assert np.array_equal(shard.rows.gather(np.arange(shard.table.rows), "stored"), expected)


def test_n2_a_client_that_takes_nothing_holds_nobody_up(shard: NearShard, expected: np.ndarray) -> None:
    """It asks again and again and reads no answer, while parts come and go for another."""
    with hello(shard) as connection, near_reader(shard) as reader:
        connection.setblocking(False)
        for _ in range(200):
            try:
                connection.send(near.NearRequest(next=True).SerializeToString())
            except OSError:
                break
        for _ in range(5):
            shard.drop(0, 1)
            shard.hold(0, 1)
        wait_for(reader, shard.key)
        ids = np.arange(shard.table.rows)
        # What it has mapped may be of a hold before the last one, and then its rows are not used.
        rows = read_near(reader, shard.key, ids)
        assert np.array_equal(rows, expected)


def test_n2_a_client_that_keeps_what_it_mapped_holds_up_no_drop(shard: NearShard, expected: np.ndarray) -> None:
    """It reads on what it has, and the board says that it is not to."""
    with hello(shard) as connection:
        _, [board] = files_of(connection)
        connection.send(near.NearRequest(next=True).SerializeToString())
        answer, files = files_of(connection)
        part = answer.held[0]
        rows = mmap.mmap(files[0], part.offset + 4096, mmap.MAP_SHARED, mmap.PROT_READ)
        words = np.frombuffer(mmap.mmap(board, BOARD_BYTES, mmap.MAP_SHARED, mmap.PROT_READ), np.int64)
        assert words[part.slot] == part.generation
        shard.drop(part.part)
        assert words[part.slot] == 0
        assert rows[part.offset : part.offset + 64] == expected[part.part * shard.table.rows_per_part].tobytes()
        shard.hold(part.part)
        assert words[part.slot] not in (0, part.generation)
        for file in (board, *files):
            os.close(file)


def test_a_hundred_clients_are_near_at_once_and_nothing_is_kept_of_those_that_end(
    shard: NearShard, expected: np.ndarray
) -> None:
    before = open_files()
    readers = [NearReader() for _ in range(100)]
    for reader in readers:
        reader.follow([shard.place])
    ids = some_ids(shard.table.rows)
    for reader in readers:
        wait_for(reader, shard.key)
        rows = read_near(reader, shard.key, ids)
        assert np.array_equal(rows, expected[ids])
    until(lambda: shard.server.clients == 100, "all of them at once")
    for reader in readers:
        reader.close()
    until(lambda: shard.server.clients == 0 and open_files() <= before, "the shard to forget them")


def test_a_client_that_is_killed_leaves_nothing_behind(shard: NearShard) -> None:
    before, there = open_files(), shard.accesses
    child = os.fork()
    if child == 0:
        with near_reader(shard) as reader:
            wait_for(reader, shard.key)
            while True:
                read(reader, shard.key, np.arange(9))
                time.sleep(0.01)
    until(lambda: there[0] > 0, "the client to read")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: shard.server.clients == 0 and open_files() <= before, "the shard to forget it")


def test_a_process_without_room_for_maps_says_so(shard: NearShard) -> None:
    """It may have few addresses more, as by `ulimit -v`."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "?"
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (16 << 20),) * 2)
            reader = NearReader()
            reader.follow([shard.place])
            outcome = f"{reader.states()} {reader.view()}"
            reader.close()
        finally:
            os.write(there, outcome.encode())
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(here, 1000).decode()
    assert re.fullmatch(r"\{'shard-1': 'this process has no room: mapping [\d,]+ bytes failed: .*'\} None", said), said
    os.close(here)
    os.close(there)


def test_a_reader_without_files_for_a_while_is_near_once_there_are_some(shard: NearShard, tmp_path: Path) -> None:
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "?"
        try:
            reader = NearReader()
            reader.follow([shard.place._replace(path=str(tmp_path / "nobody"))])
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            reader.follow([shard.place])
            until(lambda: reader.states()["shard-1"].endswith(": Too many open files"), "that to be said")
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            wait_for(reader, shard.key)
            outcome = str(reader.states())
        finally:
            os.write(there, outcome.encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(here, 1000).decode() == "{'shard-1': 'near'}"
    os.close(here)
    os.close(there)


def test_a_reader_goes_on_after_what_nobody_foresaw(shard: NearShard, caplog: pytest.LogCaptureFixture) -> None:
    class Unforeseen(Exception):
        pass

    fails = True

    def authorization(place: Place) -> str:
        if fails and place.shard == "another":
            raise Unforeseen("by nobody")
        return ""

    reader = NearReader(authorization)
    reader.follow([shard.place])
    wait_for(reader, shard.key)
    reader.follow([shard.place, shard.place._replace(shard="another")])
    until(lambda: set(reader.states().values()) == {"Unforeseen: by nobody"}, "it to be said")
    assert reader.view() is None
    assert "near rows come over the wire until" in caplog.text
    fails = False
    wait_for(reader, shard.key)
    until(lambda: set(reader.states().values()) == {"near"}, "both to be near")
    reader.close()


def test_n9_parts_beyond_a_share_of_a_process_maps_come_over_the_wire_until_there_is_room(
    shard: NearShard, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "SHARE_OF_MAPS", most_maps() // 2)
    monkeypatch.setattr(reader_module, "LONGEST_PAUSE", 0.1)
    ids, per_part = np.arange(shard.table.rows), shard.table.rows_per_part
    left = len(shard.table.parts) - 2
    with near_reader(shard) as reader:
        states = reader.states
        until(lambda: states()["shard-1"].startswith(f"near but for {left} parts: this process maps no"), "the parts")
        view = until(reader.view, "a view")
        rows = reader.read(view, view.tables[shard.key], ids)
        assert isinstance(rows, SomeRows)
        assert rows.read()
        assert rows.stored is not None
        assert np.array_equal(np.unique(ids[rows.positions] // per_part), [0, 1])
        assert np.array_equal(rows.stored, expected[rows.positions])
        shard.drop(0, *range(3, left + 2))  # one that is mapped, and all but one that are left
        until(lambda: states()["shard-1"] == "near", "the part that was left")
        here = ids[np.isin(ids // per_part, (1, 2))]
        found = read_near(reader, shard.key, here)
        assert np.array_equal(found, expected[here])


@pytest.mark.skipif(most_maps() > 1 << 18, reason="a process may have more maps than a test should make")
def test_n9_a_process_without_maps_drops_parts_and_is_near_again(shard: NearShard) -> None:
    here, there = os.pipe()
    go_on, goes_on = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "?"
        try:
            with near_reader(shard) as reader:
                table = wait_for(reader, shard.key)
                space = AddressSpace(2 * most_maps() * PAGE)
                file = memory_file("filling", PAGE)
                with suppress(NoRoom):
                    for page in range(2 * most_maps()):
                        space.map_file(page * PAGE, PAGE, file, 0)
                os.write(there, b"full")
                until(lambda: not table.is_unchanged(), "the drop")
                without = partial(wait_for, reader, shard.key, whole=False)
                until(lambda: without() is not table and not without().complete, "a view without the part")
                del space
                os.write(there, b"free")
                os.read(go_on, 1)
                wait_for(reader, shard.key)
                outcome = str(reader.states())
        finally:
            os.write(there, outcome.encode())
            os._exit(0)
    assert os.read(here, 1000) == b"full"
    shard.drop(1)
    assert os.read(here, 1000) == b"free"
    shard.hold(1)
    os.write(goes_on, b".")
    assert os.read(here, 1000).decode() == "{'shard-1': 'near'}"
    os.waitpid(child, 0)
    for end in (here, there, go_on, goes_on):
        os.close(end)


def test_a_view_is_made_anew_only_of_tables_that_changed(shard: NearShard) -> None:
    """Or a shard with many parts would cost their square."""
    part, path = shard.table.parts[0], shard._store.part_path(shard.manifest, shard.table.parts[0])
    other = shard.part(0)._replace(model="other")
    other_key = ("other@1", shard.key[1])
    with near_reader(shard) as reader:
        shard.server.hold(other, shard.table, shard.rows.location(part, path))

        def the_other_stays() -> bool:
            """Not where a shard misses its beat, for then all tables go."""
            table, another = wait_for(reader, shard.key), wait_for(reader, other_key, whole=False)
            shard.drop(1)
            until(lambda: wait_for(reader, shard.key, whole=False) is not table, "the drop")
            stays = wait_for(reader, other_key, whole=False) is another
            shard.hold(1)
            return stays

        until(the_other_stays, "a view with the other table as it was")
        shard.on_loop(lambda: shard.server.drop(other))


def test_n7_rows_that_are_read_count_for_their_parts(shard: NearShard) -> None:
    with near_reader(shard) as reader:
        wait_for(reader, shard.key)
        per_part = shard.table.rows_per_part
        for _ in range(5):
            read_near(reader, shard.key, np.array([0, 1, per_part]))
        until(lambda: shard.accesses == {0: 10, 1: 5}, f"the report, got {shard.accesses}")
        assert shard.server.rows == 15


def test_a_file_that_is_cut_short_costs_its_rows_and_no_process(store: Path, tmp_path: Path) -> None:
    """The shard itself ends when it reads such rows; a client must not."""
    copy = tmp_path / "store"
    shutil.copytree(store / "fp16", copy / "fp16")
    with near_shard(tmp_path / "near", copy, "fp16", "mmap") as shard, near_reader(shard) as reader:
        shard.hold()
        wait_for(reader, shard.key)
        ids = np.arange(len(shard.table.parts)) * shard.table.rows_per_part + 100
        read_near(reader, shard.key, ids)
        part = shard._store.part_path(shard.manifest, shard.table.parts[0])
        os.truncate(part, 4096)
        assert read(reader, shard.key, ids) is None
        rows = read_near(reader, shard.key, ids[1:])
        assert np.array_equal(rows, stored_rows(store, "fp16")[ids[1:]])


def test_a_child_of_a_fork_and_its_parent_read_files_apart(store: Path, tmp_path: Path) -> None:
    """What a thread copies rows of files into is its process's own."""
    right = stored_rows(store, "fp16")
    with near_shard(tmp_path / "near", store, "fp16", "mmap") as shard, near_reader(shard) as reader:
        shard.hold()
        wait_for(reader, shard.key)
        ids = np.random.default_rng(1).integers(0, shard.table.rows, (2, 300, 500))
        read_near(reader, shard.key, ids[0][0])
        outcomes: Counter[str] = Counter()
        child = os.fork()
        try:
            for each in ids[int(child == 0)]:
                rows = read(reader, shard.key, each)
                right_rows = rows is not None and np.array_equal(rows, right[each])
                outcomes["none" if rows is None else "right" if right_rows else "wrong"] += 1
        finally:
            if child == 0:
                os._exit(int(outcomes["wrong"] > 0 or outcomes["right"] == 0))
        _, status = os.waitpid(child, 0)
        assert (outcomes["wrong"], status) == (0, 0)


def test_a_socket_that_nobody_listens_at_gives_way_and_one_in_use_does_not(
    shard: NearShard, store: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="somebody listens there; give another path"):
        NearShard(Path(shard.place.path), store, "fp16")
    with pytest.raises(InvalidRequest, match="at most 107 bytes"):
        NearShard(tmp_path / ("x" * 200), store, "fp16")
    left = tmp_path / "left"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(left))
    with near_shard(left, store, "fp16") as another:
        another.hold(0)
