"""Locks that cost no step of the event loop while no other task has them.

``trio.Lock.acquire`` lets all other tasks run, even if the lock is free. A page fault takes four locks, and a
step of the event loop costs 20 to 40 us: more than all the system calls of the fault.
"""

from __future__ import annotations

from types import TracebackType

import trio


async def acquire(lock: trio.Lock) -> None:
    """Acquire a lock. A checkpoint only if another task has the lock."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


class held:
    """Context in which a lock is held."""

    def __init__(self, lock: trio.Lock) -> None:
        self._lock = lock

    async def __aenter__(self) -> None:
        await acquire(self._lock)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
