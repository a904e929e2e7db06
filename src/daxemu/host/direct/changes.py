"""Changes of files that mappings do not show yet, and the locks of files.

The filesystem's upcall for a change is synchronous: the change is noted here, and mappings follow later. A
freed block gets no other owner while any change is noted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import trio

from daxemu.host.direct.locking import acquire, transferable
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import Block, Ino


class FileLocks:
    """Locks of files, each made at the first use of a file. Belongs to the trio thread.

    The lock of a file is held over each decision about its pages, together with the changes of mappings that
    follow from the decision. Acquired before ``Space.lock``.
    """

    def __init__(self) -> None:
        self._locks: dict[Ino, tuple[trio.Semaphore, int]] = {}

    def is_free(self, ino: Ino) -> bool:
        """Return True if no task has the lock of a file, or waits for it."""
        return ino not in self._locks

    @contextmanager
    def taken(self, ino: Ino) -> Iterator[None]:
        """Hold the lock of a file, which another task may release. Precondition: is_free()."""
        lock = transferable()
        lock.acquire_nowait()
        self._locks[ino] = lock, 1
        try:
            yield
        finally:
            lock.release()
            lock, users = self._locks.pop(ino)
            if users > 1:
                self._locks[ino] = lock, users - 1

    @asynccontextmanager
    async def held(self, *inos: Ino) -> AsyncIterator[None]:
        """Hold the locks of files, acquired in the order of the inode numbers."""
        wanted = sorted(set(inos))
        for ino in wanted:
            lock, users = self._locks.get(ino) or (transferable(), 0)
            self._locks[ino] = lock, users + 1
        acquired: list[Ino] = []
        try:
            for ino in wanted:
                await acquire(self._locks[ino][0])
                acquired.append(ino)
            yield
        finally:
            for ino in acquired:
                self._locks[ino][0].release()
            for ino in wanted:
                lock, users = self._locks.pop(ino)
                if users > 1:
                    self._locks[ino] = lock, users - 1


class Holds(Protocol):
    """Delay of the reuse of freed blocks: see fs.allocator.Allocator."""

    @property
    def has_freed(self) -> bool:
        """True if freed blocks are not reused yet."""

    def hold(self) -> int:
        """Begin a hold; return its number."""

    def release(self, hold: int) -> None:
        """End a hold."""


class Changes:
    """Noted changes: for each file the blocks that mappings may show as they were. Belongs to the trio
    thread.

    A hold of the allocator lasts from the first change of a file until mappings have followed.
    """

    def __init__(self, holds: Holds) -> None:
        self._allocator = holds
        self._noted: dict[Ino, RangeSet] = {}
        self._holds: dict[Ino, int] = {}
        """The hold of each file with noted changes."""
        self._under_way: dict[Ino, int] = {}
        self._own: tuple[Ino, list[Range]] | None = None
        self._unnoted: Ino | None = None
        self.has_changes = trio.Event()
        """Set while a change is noted."""
        self._when_settled = trio.Event()

    def note(self, ino: Ino, blocks: Range) -> None:
        """Note a change of file blocks."""
        if self._own is not None and self._own[0] == ino:
            self._own[1].append(blocks)
        elif self._unnoted != ino:
            if ino not in self._noted:
                self._noted[ino] = RangeSet()
                self._holds[ino] = self._allocator.hold()
            self._noted[ino].add(*blocks)
            self.has_changes.set()

    @contextmanager
    def own(self, ino: Ino) -> Iterator[list[Range]]:
        """Context without an await in which changes of a file go to the yielded list: the caller follows
        them. Precondition: within following().
        """
        assert self._own is None
        found: list[Range] = []
        self._own = ino, found
        try:
            yield found
        finally:
            self._own = None

    @contextmanager
    def unnoted(self, ino: Ino) -> Iterator[None]:
        """Context in which changes of a file are not noted: its mappings are write-protected before."""
        self._unnoted = ino
        try:
            yield
        finally:
            self._unnoted = None

    @contextmanager
    def following(self, ino: Ino) -> Iterator[None]:
        """Context in which mappings of a file follow a change: the file counts as changed."""
        hold = self._allocator.hold()
        self._under_way[ino] = self._under_way.get(ino, 0) + 1
        try:
            yield
        finally:
            self._allocator.release(hold)
            self._under_way[ino] -= 1
            if not self._under_way[ino]:
                del self._under_way[ino]
            if self.is_settled():
                self._when_settled.set()
                self._when_settled = trio.Event()

    @contextmanager
    def taken(self, ino: Ino) -> Iterator[list[Range]]:
        """Context in which mappings of a file follow its noted changes, which are yielded and no longer
        noted.
        """
        with self.following(ino):
            noted, hold = self._noted.pop(ino, None), self._holds.pop(ino, None)
            if not self._noted:
                self.has_changes = trio.Event()
            try:
                yield list(noted or ())
            finally:
                if hold is not None:
                    self._allocator.release(hold)

    def is_noted(self, ino: Ino, block: Block) -> bool:
        """Return True if a change of the block is noted."""
        return ino in self._noted and block in self._noted[ino]

    def files(self) -> list[Ino]:
        """Return the files with noted changes."""
        return list(self._noted)

    def is_settled(self, ino: Ino | None = None) -> bool:
        """Return True if mappings of a file, or of all files (None), show the present blocks."""
        if ino is None:
            return not self._noted and not self._under_way
        return ino not in self._noted and ino not in self._under_way

    @property
    def may_free(self) -> bool:
        """True if an allocation that failed may succeed once all_settled() returns."""
        return self._allocator.has_freed and not self.is_settled()

    async def all_settled(self) -> None:
        """Wait until is_settled() of all files."""
        while not self.is_settled():
            await self._when_settled.wait()
