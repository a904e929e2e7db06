"""Lock and wait that pyfuse3's main loop is given: which task runs, and when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from daxemu.host.fuse import loop as fuse_loop
from daxemu.host.fuse.loop import FuseLoop, ReadLock


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The two ends of one."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


async def hold(lock: ReadLock, taken: trio.Event, release: trio.Event) -> None:
    """Take the lock and keep it."""
    async with lock:
        taken.set()
        await release.wait()


def test_one_holds_the_lock_and_the_next_has_it_when_that_one_waits() -> None:
    async def main() -> None:
        lock, taken, release = ReadLock(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(hold, lock, taken, release)
                await trio.testing.wait_all_tasks_blocked()
                assert lock.waiting == 1
                assert not taken.is_set()
            await taken.wait()
            assert lock.waiting == 0
            release.set()

    trio.run(main)


def test_the_last_holder_takes_the_lock_again_without_a_turn_of_the_loop() -> None:
    async def main() -> None:
        lock, taken, release = ReadLock(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(hold, lock, taken, release)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                async with lock:
                    assert not taken.is_set()
            await taken.wait()  # but the wake-up is not lost
            release.set()

    trio.run(main)


def test_a_cancelled_wait_leaves_the_lock_usable() -> None:
    async def main() -> None:
        lock = ReadLock()
        async with trio.open_nursery() as nursery, lock:
            nursery.start_soon(hold, lock, trio.Event(), trio.Event())
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert lock.waiting == 0
        async with lock:
            pass

    trio.run(main)


async def count_turns(turns: list[float]) -> None:
    """Count the iterations of the event loop."""
    while True:
        await trio.lowlevel.checkpoint()
        turns.append(time.monotonic())


def turns_during(pipe: tuple[int, int], waits: int, *, reader: bool) -> int:
    """Return how often another task runs during ``waits`` waits for something readable. ``reader``: another
    reader would go on reading.
    """
    read_end, write_end = pipe
    os.write(write_end, b"x")

    async def main() -> int:
        loop, turns = FuseLoop(), list[float]()
        async with trio.open_nursery() as nursery:
            async with loop.lock:
                if reader:
                    nursery.start_soon(hold, loop.lock, trio.Event(), trio.Event())
                    await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(count_turns, turns)
                await loop.wait_readable(read_end)
                before = len(turns)
                for _ in range(waits):
                    await loop.wait_readable(read_end)
            nursery.cancel_scope.cancel()
        return len(turns) - before

    return trio.run(main)


def test_requests_that_are_there_are_taken_in_a_row(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuse_loop, "BURST", 3600 * 10**9)
    assert turns_during(pipe, 100, reader=True) == 0


def test_after_a_burst_others_have_their_turn(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_loop, "BURST", 0)
    assert turns_during(pipe, 100, reader=True) >= 99


def test_without_another_reader_each_wait_is_a_turn(pipe: tuple[int, int]) -> None:
    assert turns_during(pipe, 100, reader=False) >= 99


@pytest.mark.parametrize(("reads", "set_size"), [(False, 1024), (False, 0), (True, 0)])
def test_what_comes_later_is_waited_for(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, reads: bool, set_size: int
) -> None:
    monkeypatch.setattr(fuse_loop, "READS", reads)
    monkeypatch.setattr(fuse_loop, "FD_SETSIZE", set_size)
    read_end, write_end = pipe
    loop = FuseLoop()
    loop._is_idle.value = 1  # as answers.c sets it after a wait in vain

    async def write() -> None:
        await trio.testing.wait_all_tasks_blocked()
        os.write(write_end, b"x")

    async def main() -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await loop.wait_readable(read_end)
        return os.read(read_end, 10)

    assert trio.run(main) == b"x"
