"""Tasks in wait while pages of a file are revoked, and tasks without a wait."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from daxemu.errors import FsError
from daxemu.host.page_cache import invalidate_lock
from daxemu.host.page_cache.invalidate_lock import MOST_HELD, InvalidateLock
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE as PAGE

WHOLE = Range(0, 8 * PAGE)


class Cache:
    """Taking pages away waits for ``locked`` to be set, and lets ``begun`` know."""

    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        self.taken: list[tuple[int, int, int]] = []

    def revoke(self, ino: int, offset: int, length: int) -> None:
        self.begun.set()
        assert self.free.wait(20)
        self.taken.append((ino, offset // PAGE, length // PAGE))


async def begins(cache: Cache) -> None:
    await trio.to_thread.run_sync(cache.begun.wait)


async def finish(what: Awaitable[None], done: list[str], name: str) -> None:
    await what
    done.append(name)


def run(test: Callable[[InvalidateLock, Cache, trio.Nursery, list[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        done: list[str] = []
        lock, cache = InvalidateLock(), Cache()
        async with trio.open_nursery() as nursery:
            with trio.fail_after(20):
                await test(lock, cache, nursery, done)
            lock.release()

    trio.run(main)


def test_no_request_gets_pages_until_the_lock_is_released() -> None:
    async def test(lock: InvalidateLock, cache: Cache, nursery: trio.Nursery, done: list[str]) -> None:
        cache.free.set()
        await lock.invalidate(cache.revoke, [(7, WHOLE)])
        assert cache.taken == [(7, 0, 8)]
        nursery.start_soon(finish, lock.before_read(7, PAGE, 100), done, "read")
        nursery.start_soon(finish, lock.before_write(7, PAGE, 100, from_cache=False), done, "write")
        nursery.start_soon(finish, lock.before_read(7, 8 * PAGE, PAGE), done, "read beyond")
        nursery.start_soon(finish, lock.before_read(8, 0, PAGE), done, "read of another")
        nursery.start_soon(finish, lock.before_write(7, 5 * PAGE, PAGE, from_cache=True), done, "write back")
        await trio.sleep(2 * invalidate_lock.PATIENCE)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(done) == ["read beyond", "read of another", "write back"]
        assert lock.is_complete
        lock.release()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(done) == ["read", "read beyond", "read of another", "write", "write back"]

    run(test)


def test_a_request_that_is_in_the_way_is_let_through_and_its_pages_go_again() -> None:
    async def test(lock: InvalidateLock, cache: Cache, nursery: trio.Nursery, done: list[str]) -> None:
        async def read() -> None:
            await lock.before_read(7, 3 * PAGE, 2 * PAGE)
            cache.free.set()  # the folio is not locked any more

        nursery.start_soon(finish, lock.invalidate(cache.revoke, [(7, WHOLE)]), done, "invalidated")
        await begins(cache)
        await read()
        assert not lock.is_complete
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert done == ["invalidated"]
        assert cache.taken == [(7, 0, 8), (7, 3, 2)]
        assert lock.is_complete

    run(test)


def test_too_many_wait() -> None:
    """Further requests go on: a task must be left to answer write-back."""

    async def test(lock: InvalidateLock, cache: Cache, nursery: trio.Nursery, done: list[str]) -> None:
        cache.free.set()
        await lock.invalidate(cache.revoke, [(7, WHOLE)])
        for _ in range(MOST_HELD + 1):
            nursery.start_soon(finish, lock.before_read(7, 0, PAGE), done, "read")
        await trio.testing.wait_all_tasks_blocked()
        assert done == ["read"]
        assert not lock.is_complete
        await lock.invalidate(cache.revoke)
        assert cache.taken == [(7, 0, 8), (7, 0, 1)]
        assert done == ["read"] * (MOST_HELD + 1)  # the requests had the page locked

    run(test)


def test_write_back_follows_the_write_before_it() -> None:
    async def test(lock: InvalidateLock, cache: Cache, nursery: trio.Nursery, done: list[str]) -> None:
        cache.free.set()
        await lock.invalidate(cache.revoke, [(7, WHOLE)])
        nursery.start_soon(finish, lock.before_write(7, 0, PAGE, from_cache=False), done, "write")
        await trio.testing.wait_all_tasks_blocked()
        await lock.before_write(7, 0, PAGE, from_cache=True)
        assert done == ["write"]
        assert not lock.is_complete

    run(test)


def test_it_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invalidate_lock, "LIMIT", 0.0)

    async def test(lock: InvalidateLock, cache: Cache, nursery: trio.Nursery, done: list[str]) -> None:
        nursery.start_soon(finish, lock.before_read(9, 0, PAGE), done, "another file")
        with pytest.raises(FsError, match="too much use"):
            await lock.invalidate(lambda *_: cache.free.set(), [(7, WHOLE), (8, WHOLE)])

    run(test)
