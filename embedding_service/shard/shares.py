"""The shares of branches that this shard has: as their primary, or as a copy that follows one.

`training.seats` says who has what. This looks there every second, and does its part: it opens shares, follows
primaries, lets copies in, drops those that lag, and hands shares over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import grpc

from embedding_service.client.router import Router
from embedding_service.errors import EmbeddingServiceError, InvalidRequest, Unavailable
from embedding_service.grpc_codes import error_of
from embedding_service.security.access import Access
from embedding_service.serving import cancel
from embedding_service.shard.copies import Copies, Link, pieces_of
from embedding_service.shard.following import follow_once
from embedding_service.shard.opened import Opened
from embedding_service.store.store import Store
from embedding_service.training.branch import (
    Branch,
    branch_folder,
    branches,
    leaving_shards,
    read_address,
    read_branch,
    say_leaving,
    say_trained,
    split_name,
    write_address,
)
from embedding_service.training.seats import Seat, change_seat, duty_of, read_seat, read_seats
from embedding_service.training.share import Share, share_bytes
from embedding_service.wire import control_pb2 as control
from embedding_service.wire import training_pb2 as wire

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
# Seconds that a push waits for a copy that says nothing. Then the copy is dropped.
PATIENCE = 10.0
# Seconds that a shard has to follow when it was asked to, and for which it is not asked again if it did not.
_COMING_SECONDS = 30.0


class Memory(Protocol):
    """What a shard may use. `Holdings` says it."""

    def reserve(self, nbytes: int, what: str) -> None:
        """Take some. Raises Overloaded."""

    def release(self, nbytes: int) -> None:
        """Give some back."""


class Shares:
    """All shares that this shard has.

    Args:
        shard: Its id.
        logs: Folder for logs; None: the branch's own, in the store.
        sync: See `training.log.Log`.
        memory: Where the shares' bytes are taken from. None: only the machine limits them.
        why_not: Why this process trains nothing; empty if it does.
        access: What connections to other shards show.
        patience: Seconds that a push waits for a copy that says nothing.
        look_seconds: Between two looks at the seats.

    Attributes:
        address: Where others reach this shard, to be set once it listens.
    """

    def __init__(
        self,
        store: Store,
        shard: str,
        router: Router,
        logs: Path | None,
        sync: float,
        *,
        memory: Memory | None = None,
        why_not: str = "",
        access: Access | None = None,
        patience: float = PATIENCE,
        look_seconds: float = _LOOK_SECONDS,
    ) -> None:
        self._store, self._shard, self._router = store, shard, router
        self._logs, self._sync, self._why_not, self._access = logs, sync, why_not, access
        self._patience, self._look_seconds, self._memory = patience, look_seconds, memory
        self.address = ""
        self._draining = False
        self._open: dict[tuple[str, str], Opened] = {}
        self._turns: dict[tuple[str, str], asyncio.Lock] = {}
        self._look = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # What was said last of a share, by what was tried.
        self._told: dict[tuple[str, str, str], str] = {}
        self._loop = asyncio.get_running_loop()

    # What is asked

    def statuses(self) -> list[control.BranchStatus]:
        """How far the shares are that this shard leads, in the order of their names. May be called on any thread."""
        led = {key: opened for key, opened in list(self._open.items()) if opened.copies is not None}
        return [
            control.BranchStatus(
                branch=name,
                share=share,
                base=opened.branch.base,
                applied_step=opened.share.applied,
                durable_step=opened.share.durable,
                losses=opened.share.timeline,
                in_sync=len(opened.seat.in_sync),
                shares=len(opened.branch.shares),
            )
            for (name, share), opened in sorted(led.items(), key=lambda item: item[0])
        ]

    async def leading(self, name: str, share: str) -> Opened:
        """A share that this shard leads. Raises NotFound, InvalidRequest, Unavailable if another shard does."""
        if self._why_not:
            raise Unavailable(self._why_not)
        opened = self._open.get((name, share))
        if opened is None or opened.copies is None:
            branch = await asyncio.to_thread(read_branch, self._store, name)
            if share not in branch.shares:
                raise InvalidRequest(f"no share {share!r} in {name}; its shares: {', '.join(branch.shares)}")
            seat = await asyncio.to_thread(read_seat, self._folder(branch), branch, share)
            if seat.primary != self._shard:
                raise Unavailable(f"share {share} of {name} is at shard {seat.primary}: ask that one")
            try:
                opened = await self._take_up(branch, share)
            except OSError as error:
                raise Unavailable(f"{name}: {error}") from error
        if opened is None:
            raise Unavailable(f"share {share} of {name} is on its way to another shard: ask again")
        opened.check_leads()
        return opened

    async def copied(self, opened: Opened) -> None:
        """Wait until all copies in sync have what was done by now. Raises Unavailable if this is no primary then.

        Copies that say nothing for a while are dropped.
        """
        copies = opened.copies
        if copies is None:
            opened.check_leads()
            return
        position, began = copies.position, time.monotonic()
        while opened.copies is copies and (lagging := copies.lagging(opened.required, position)):
            heard = max([began, *(link.moved for link in copies.links.values() if link.shard in lagging)])
            if (left := heard + self._patience - time.monotonic()) <= 0:
                await self._drop(opened, lagging)
                continue
            with contextlib.suppress(TimeoutError):
                await opened.until(
                    lambda: opened.copies is not copies or not copies.lagging(opened.required, position), left
                )
        if opened.copies is not copies:
            opened.check_leads()
            raise Unavailable(f"share {opened.name} of {opened.branch.full_name} changed hands: ask again")

    async def follow(self, requests: AsyncIterator[wire.FollowRequest]) -> AsyncGenerator[wire.Followed]:
        """What a copy is sent."""
        first = await anext(requests, None)
        if first is None:
            raise InvalidRequest("the call holds no request")
        opened = await self.leading(first.branch, first.share)
        if first.shard not in opened.seat.holders:
            await self._adopt(opened, await asyncio.to_thread(self._seat_of, opened))
        opened.check_leads()
        copies = opened.copies
        assert copies
        if first.shard not in opened.seat.holders:
            raise InvalidRequest(f"shard {first.shard} is to have no copy of share {first.share} of {first.branch}")
        link, changes, held = copies.links.get(first.shard), None, contextlib.ExitStack()
        if link is None or first.run != copies.run or not link.resume(first.position):
            if first.shard in opened.seat.in_sync:  # it begins again, and has not all until it has caught up
                await self._change(opened, **opened.seat.demoting(first.shard))
            step, changes, link = await self._source(opened, copies, first)
            held.callback(opened.share.let_go, step)
        stream = link.take_stream()
        hearing = asyncio.create_task(copies.hear(link, requests))
        try:
            if changes is not None:
                yield wire.Followed(kind=wire.Followed.KIND_START, step=step, run=copies.run, last=True)
                while change := await asyncio.to_thread(next, changes, None):
                    for piece in pieces_of(change):
                        yield piece
                yield wire.Followed(kind=wire.Followed.KIND_CAUGHT_UP, position=link.began_at, last=True)
            async for position, change in link.changes(stream):
                if link.acked is not None:  # it has loaded all
                    held.close()
                for piece in pieces_of(change, position):
                    yield piece
        finally:
            held.close()
            self._look.set()  # it may have ended because another shard leads
            await cancel([hearing])

    async def _source(self, opened: Opened, copies: Copies, first: wire.FollowRequest) -> tuple[int, Any, Link]:
        """Where a copy begins, and its link: of the same moment, between two changes."""
        made: asyncio.Future[Link] = self._loop.create_future()

        def begin() -> tuple[int, Any]:
            step, changes = opened.share.source()
            self._loop.call_soon_threadsafe(lambda: made.set_result(copies.link(first.shard, first.log)))
            return step, changes

        step, changes = await opened.on(begin)
        return step, changes, await made

    # What it does by itself

    async def run(self) -> None:
        """Look at the seats, until cancelled."""
        known: set[str] = set()
        if self._why_not:
            await asyncio.Event().wait()
        while True:
            self._look.clear()
            try:
                names = await asyncio.to_thread(branches, self._store)
                await self._close_removed(names)
                for name in names:
                    if name not in known:
                        await asyncio.to_thread(say_leaving, self._folder_of(name), self._shard, self._draining)
                        known.add(name)
                    await self._look_at_branch(await asyncio.to_thread(read_branch, self._store, name))
            except Exception as error:
                self._say(("", ""), "look", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_seconds):
                    await self._look.wait()

    async def drain(self) -> None:
        """Hand all over. Return when no share is here, or no other shard is there for one."""
        self._draining = True
        for name in await asyncio.to_thread(branches, self._store):
            await asyncio.to_thread(say_leaving, self._folder_of(name), self._shard, True)
        self._look.set()
        while any([await self._others(name) for name, _ in list(self._open)]):
            await asyncio.sleep(self._look_seconds / 4)
        for turn in list(self._turns.values()):  # what is being closed is closed, and its log removed
            async with turn:
                continue

    async def _others(self, name: str) -> set[str]:
        """Other shards that may have shares of a branch."""
        routing = self._router.current
        there = set(routing.shard_ids) if routing else set()
        return there - {self._shard} - await asyncio.to_thread(leaving_shards, self._folder_of(name))

    async def close(self) -> None:
        """Bring the logs to disk."""
        await cancel(list(self._tasks))
        for key in list(self._open):
            await self._close(key)

    async def _look_at_branch(self, branch: Branch) -> None:
        for share in branch.shares:
            key = branch.full_name, share
            try:
                if (before := self._open.get(key)) and before.branch != branch:  # another one of its name
                    await self._close(key)
                opened = await self._take_up(branch, share)
                if opened is None and key not in self._open:
                    await self._stand_in(branch, share)
                elif opened := self._open.get(key):
                    await self._do_duty(opened)
                self._told.pop((*key, "look"), None)
            except Exception as error:  # the other shares are looked at all the same
                self._say(key, "look", error)

    def _say(self, key: tuple[str, str], tried: str, error: Exception) -> None:
        if self._told.get((*key, tried)) != str(error):  # it is tried again and again
            foreseen = isinstance(error, EmbeddingServiceError | OSError)
            log.warning("%s: %s", "/".join(key), error, exc_info=None if foreseen else error)
            self._told[*key, tried] = str(error)

    async def _take_up(self, branch: Branch, share: str) -> Opened | None:
        """Be what the seat says: primary, copy, or neither. Returns the share if this shard leads it."""
        key = branch.full_name, share
        async with self._turns.setdefault(key, asyncio.Lock()):
            opened = self._open.get(key)
            if opened and opened.moving:
                return opened
            if opened and opened.share.is_broken:
                log.warning("%s/%s failed while its rows changed, and is opened again", *key)
                await self._close(key)
                opened = None
            seat = await asyncio.to_thread(read_seat, self._folder(branch), branch, share)
            if seat.primary == self._shard:
                if opened is None:
                    opened = await self._open_primary(branch, share, seat)
                elif opened.copies is None and opened.loaded:
                    await self._lead(opened, seat)
                elif opened.copies is None:  # it has only its log
                    await self._close(key)
                    opened = await self._open_primary(branch, share, seat)
                if opened:
                    await self._adopt(opened, seat)
                return opened
            if opened and (opened.following is None or opened.following.done()):
                if opened.following is None:
                    log.info("%s/%s is at shard %s now", *key, seat.primary)
                await self._close(key)
                opened = None
            if self._shard not in seat.holders:
                if opened:
                    await self._close(key)
                await asyncio.to_thread(shutil.rmtree, self._place(branch, share), True)
            elif opened:
                opened.seat = seat
            elif self._knows(seat.primary) is not False and not self._draining:
                await self._open_copy(branch, share, seat)
            return None

    def _knows(self, shard: str) -> bool | None:
        """Whether a shard is there. None: nobody has said yet which are."""
        routing = self._router.current
        return None if routing is None else shard in routing.shard_ids

    async def _open_primary(self, branch: Branch, share: str, seat: Seat) -> Opened | None:
        others = [shard for shard in seat.in_sync if shard != self._shard]
        if others:  # they have all that was accepted; what is here may be less, if the machine died
            if self._knows(others[0]) is None:
                raise Unavailable(f"no routing yet, so nobody knows who has share {share} of {branch.full_name}")
            if there := [shard for shard in others if self._knows(shard)]:
                give_way = {"primary": there[0], **seat.demoting(self._shard)}
                await asyncio.to_thread(partial(change_seat, self._folder(branch), branch, share, seat, **give_way))
                return None
        opened = await self._opened(branch, share, seat, copy=False)
        opened.seat = await asyncio.to_thread(self._seat_of, opened)
        opened.copies = Copies(opened.wake)
        return opened

    async def _open_copy(self, branch: Branch, share: str, seat: Seat) -> None:
        opened = await self._opened(branch, share, seat, copy=True)
        opened.following = asyncio.create_task(self._follow(opened))

    async def _opened(self, branch: Branch, share: str, seat: Seat, *, copy: bool) -> Opened:
        opened = Opened(branch, share, self._loop)
        opened.seat = seat
        make = partial(
            Share,
            self._store,
            branch,
            share,
            self._place(branch, share),
            self._sync,
            shard=self._shard,
            copy=copy,
            on_applied=opened.on_applied,
            on_change=opened.on_change,
        )
        nbytes = share_bytes(branch, share)
        if self._memory:
            self._memory.reserve(nbytes, f"share {share} of {branch.full_name}")
        try:
            await asyncio.to_thread(write_address, self._folder(branch), self._shard, self.address)
            await opened.make(make)
        except BaseException:
            self._release(opened)
            await opened.close()
            raise
        self._open[branch.full_name, share] = opened
        return opened

    async def _lead(self, opened: Opened, seat: Seat) -> None:
        """The copy becomes the primary."""
        if opened.following:
            await cancel([opened.following])
            opened.following = None
        opened.seat = seat
        await opened.on(opened.share.lead, seat.timeline)
        opened.copies = Copies(opened.wake)
        log.info("%s/%s is led here, from step %d on", opened.branch.full_name, opened.name, opened.share.applied)

    async def _close(self, key: tuple[str, str]) -> None:
        if opened := self._open.pop(key, None):
            try:
                await opened.close()
            finally:
                self._release(opened)

    def _release(self, opened: Opened) -> None:
        if self._memory:
            self._memory.release(share_bytes(opened.branch, opened.name))

    async def _close_removed(self, names: list[str]) -> None:
        """Close shares of branches that are not there any more, and remove their logs."""
        for name, share in [key for key in self._open if key[0] not in names]:
            branch = self._open[name, share].branch
            log.info("%s was removed", name)
            await self._close((name, share))
            if self._logs:
                await asyncio.to_thread(shutil.rmtree, self._place(branch, share), True)

    # Seats

    def _folder(self, branch: Branch) -> Path:
        return branch_folder(self._store, branch.model, branch.name)

    def _folder_of(self, name: str) -> Path:
        return branch_folder(self._store, *split_name(name))

    def _place(self, branch: Branch, share: str) -> Path:
        logs = self._logs / branch.full_name / branch.made if self._logs else self._folder(branch) / "logs"
        return logs / share / self._shard

    def _seat_of(self, opened: Opened) -> Seat:
        return read_seat(self._folder(opened.branch), opened.branch, opened.name)

    async def _changed(self, opened: Opened, seat: Seat, **changes: Any) -> Seat:
        change = partial(change_seat, self._folder(opened.branch), opened.branch, opened.name, seat, **changes)
        return await asyncio.to_thread(change)

    async def _change(self, opened: Opened, **changes: Any) -> None:
        """Change the seat of a share that this shard leads. If it was changed by others, take up what it is then."""
        try:
            seat = await self._changed(opened, opened.seat, **changes)
        except Unavailable:
            await self._adopt(opened, await asyncio.to_thread(self._seat_of, opened))
            raise
        await self._adopt(opened, seat)

    async def _adopt(self, opened: Opened, seat: Seat) -> None:
        if seat.epoch < opened.seat.epoch:
            return
        opened.seat = seat
        if opened.copies is None:
            return
        if seat.primary != self._shard:  # it was deposed: what it has and others have not does not count
            opened.copies = None
            self._look.set()
        else:
            opened.admitting &= set(seat.joining)
            for shard in set(opened.copies.links) - set(seat.holders):
                opened.copies.drop(shard)
        opened.wake()

    async def _drop(self, opened: Opened, shards: list[str]) -> None:
        gone = set(shards)
        log.warning("%s/%s: %s have not what was accepted and are dropped", opened.branch.full_name, opened.name, gone)
        with contextlib.suppress(Unavailable):
            await self._change(opened, **opened.seat.without(*gone))

    async def _stand_in(self, branch: Branch, share: str) -> None:
        """Take the place of a primary that is gone, with what this shard's log has, if that was in sync."""
        seat = await asyncio.to_thread(read_seat, self._folder(branch), branch, share)
        if self._shard in seat.in_sync and self._knows(seat.primary) is False and not self._draining:
            await self._take_over(branch, share, seat)

    async def _take_over(self, branch: Branch, share: str, seat: Seat) -> None:
        identity = self._place(branch, share) / "identity"
        if not identity.exists() or identity.read_text() != seat.in_sync[self._shard]:
            raise Unavailable(
                f"shard {seat.primary} is gone, and what {self._shard} had in sync is lost: start it again"
            )
        log.warning("%s/%s: shard %s is gone, %s leads", branch.full_name, share, seat.primary, self._shard)
        change = partial(change_seat, self._folder(branch), branch, share, seat)
        await asyncio.to_thread(partial(change, primary=self._shard, **seat.without(seat.primary)))
        await self._take_up(branch, share)

    async def _do_duty(self, opened: Opened) -> None:
        told = opened.share.session, sum(opened.share.accepted)
        if opened.copies and told != opened.told and opened.share.session:
            await asyncio.to_thread(say_trained, self._folder(opened.branch))
            opened.told = told
        routing = self._router.current
        if routing is None or opened.moving:
            return
        seats = await asyncio.to_thread(read_seats, self._folder(opened.branch), opened.branch)
        seats[opened.name] = opened.seat
        able = await self._others(opened.branch.full_name) - self._not_coming(opened)
        duty = duty_of(
            opened.name,
            seats,
            self._shard,
            routing.shard_ids,
            able,
            opened.branch.copies,
            draining=self._draining or opened.share.has_failed,
        )
        if duty is None:
            self._admit_all(opened)
        elif duty.kind == "take over":
            await self._take_over(opened.branch, opened.name, opened.seat)
        elif duty.kind == "recruit":
            opened.asked[duty.shard] = time.monotonic()
            await self._change(opened, joining=(*opened.seat.joining, duty.shard))
        elif duty.kind == "drop":
            await self._change(opened, **opened.seat.without(duty.shard))
        else:
            await self._hand_over(opened, duty.shard)

    def _not_coming(self, opened: Opened) -> set[str]:
        """Shards that were asked to join and did not."""
        links, now = opened.copies.links if opened.copies else {}, time.monotonic()
        for shard, asked in list(opened.asked.items()):
            if shard in links or now - asked > 2 * _COMING_SECONDS:
                del opened.asked[shard]
        return {shard for shard, asked in opened.asked.items() if now - asked > _COMING_SECONDS}

    def _admit_all(self, opened: Opened) -> None:
        for shard in opened.seat.joining:
            link = opened.copies.links.get(shard) if opened.copies else None
            if link and link.is_near and shard not in opened.admitting:
                task = asyncio.create_task(self._admit(opened, shard))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _admit(self, opened: Opened, shard: str) -> None:
        """Let a copy in: from here on pushes wait for it, and once it has what they did not wait for, it is in sync."""
        opened.admitting.add(shard)
        try:
            await self.copied(opened)
            if opened.copies and shard in opened.seat.joining and shard in opened.copies.links:
                without = opened.seat.without(shard)
                in_sync = {**without["in_sync"], shard: opened.copies.links[shard].log}
                await self._change(opened, in_sync=in_sync, joining=without["joining"])
                log.info("%s/%s: %s is in sync", opened.branch.full_name, opened.name, shard)
                self._look.set()
        except EmbeddingServiceError as error:
            log.warning("%s/%s: %s is not let in: %s", opened.branch.full_name, opened.name, shard, error)
        finally:
            opened.admitting.discard(shard)
            opened.wake()

    async def _hand_over(self, opened: Opened, target: str) -> None:
        """Let a copy in sync lead. Pushes that come on the way are asked for again."""
        if opened.share.is_writing or opened.copies is None:
            return
        copies = opened.copies
        opened.moving = True
        try:
            await opened.on(lambda: None)  # what was begun is done, and handed out
            await self.copied(opened)
            seat = opened.seat
            if target in seat.in_sync:
                stays = not self._draining and len(seat.holders) <= opened.branch.copies
                leaving = seat.demoting(self._shard) if stays else seat.without(self._shard)
                await self._change(opened, primary=target, **leaving)
                for shard in list(copies.links):
                    copies.drop(shard)
        finally:
            opened.moving = False

    # Following

    async def _follow(self, opened: Opened) -> None:
        """Have what the primary has, for as long as this is a copy."""
        key = opened.branch.full_name, opened.name
        while True:
            position = opened.position
            failure: Exception | None = None
            try:
                address = await asyncio.to_thread(read_address, self._folder(opened.branch), opened.seat.primary)
                await follow_once(opened, self._shard, address, self._access)
            except grpc.aio.AioRpcError as error:
                failure = error_of(error.code(), error.details() or "")
            except Exception as error:
                opened.run, failure = 0, error  # what is here may not be what the primary has
            if opened.position != position:  # it had gone on
                self._told.pop((*key, "follow"), None)
            if failure:
                self._say(key, "follow", failure)
            self._look.set()
            await asyncio.sleep(self._look_seconds / 4)
