"""``mapping->invalidate_lock``: no page of a locked range enters the page cache while its blocks change.

FUSE does not take the kernel's lock for its filesystems. So a request that brings pages into the page cache,
a FUSE_READ or a write(2), waits here instead. With the pages revoked, a store through a mapping waits as
well: its page fault sends a FUSE_READ.

A waiting request has its pages locked, and a revoke of these pages waits for the request. So after PATIENCE
the request is let through, and the pages are revoked again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import trio

from daxemu.errors import FsError
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Ino

PATIENCE = 0.05
"""Seconds for which a request waits during a revoke in its file: the revoke may wait for the request."""
MOST_HELD = 32
"""Requests held at the same time; pyfuse3 has tasks for 99, and some must answer the write-back."""
LIMIT = 10.0
"""Time limit of InvalidateLock.invalidate(), in seconds."""

Revoke = Callable[[Ino, int, int], None]
"""(inode, offset, length in bytes): revoke pages; dirty pages are written back first. Blocks."""


@dataclass(eq=False)
class _Held:
    """Waiting request. ``let_go``: the request may go on. ``left``: the request has gone on."""

    ino: Ino
    pages: Range
    is_write: bool
    let_go: trio.Event = field(default_factory=trio.Event)
    left: trio.Event = field(default_factory=trio.Event)


class InvalidateLock:
    """Lock over ranges of files, held while ``Gates.invalidating`` refers to this object.

    Ranges are bytes, of whole pages. Belongs to the trio thread.
    """

    def __init__(self) -> None:
        self._locked: dict[Ino, RangeSet] = {}
        self._todo: dict[Ino, RangeSet] = {}
        """Parts of the locked ranges with pages that may be in the page cache."""
        self._under: Ino | None = None
        """File with a revoke or write-back in progress, which began at ``_since``; None without one."""
        self._since = 0.0
        self._held: list[_Held] = []

    @property
    def is_complete(self) -> bool:
        """True while no page of the locked ranges is in the page cache, and no revoke is in progress."""
        return self._under is None and not any(self._todo.values())

    async def invalidate(self, revoke: Revoke, more: Iterable[tuple[Ino, Range]] = ()) -> None:
        """Lock ``more`` as well, and revoke all locked ranges. Afterwards ``is_complete`` holds until the
        next await. Raises FsError EAGAIN after LIMIT.
        """
        for ino, pages in more:
            self._locked.setdefault(ino, RangeSet()).add(*pages)
            self._todo.setdefault(ino, RangeSet()).add(*pages)
        deadline = trio.current_time() + LIMIT
        while (part := next(self._left_to_do(), None)) is not None:
            if trio.current_time() > deadline:
                raise FsError(errno.EAGAIN, "the file is in too much use: try again")
            ino, pages = part
            for held in self._overlapping(ino, pages):
                self._let_through(held)
            self._todo[ino].remove(*pages)
            await self.while_held(ino, partial(revoke, ino, pages.start, pages.length))

    async def while_held(self, ino: Ino, work: Callable[[], object]) -> None:
        """Call ``work`` in a worker thread; may wait for pages of ``ino`` locked by a waiting request."""
        self._under, self._since = ino, trio.current_time()
        try:
            await trio.to_thread.run_sync(work)
        finally:
            self._under = None

    def _left_to_do(self) -> Iterator[tuple[Ino, Range]]:
        return ((ino, pages) for ino, todo in self._todo.items() for pages in todo)

    def describe_held(self) -> Iterator[str]:
        """Yield a text for each waiting request, for messages."""
        for held in self._held:
            kind = "write" if held.is_write else "read"
            yield f"{kind} of inode {held.ino}, bytes {held.pages.start:#x}+{held.pages.length:#x}"

    def release(self) -> None:
        """Let all waiting requests go on."""
        for held in self._held:
            held.let_go.set()

    # -- waiting requests

    async def before_read(self, ino: Ino, offset: int, length: int) -> None:
        """Wait until a FUSE_READ may be answered."""
        await self._wait(ino, Range(offset, offset + length).outer(PAGE_SIZE), is_write=False)

    async def before_write(self, ino: Ino, offset: int, length: int, *, from_cache: bool) -> None:
        """Wait until a FUSE_WRITE may be done. A write-back of the page cache (``from_cache``) waits only for
        earlier write(2)s to the same pages.
        """
        pages = Range(offset, offset + length).outer(PAGE_SIZE)
        if not from_cache:
            await self._wait(ino, pages, is_write=True)
            return
        for held in self._overlapping(ino, pages):
            if held.is_write:
                self._let_through(held)
                await held.left.wait()

    async def _wait(self, ino: Ino, pages: Range, *, is_write: bool) -> None:
        if not self._concerns(ino, pages):
            return
        held = _Held(ino, pages, is_write)
        if len(self._held) >= MOST_HELD:
            self._let_through(held)
            return
        self._held.append(held)
        try:
            while not held.let_go.is_set():
                with trio.move_on_after(PATIENCE):
                    await held.let_go.wait()
                if self._under == ino and trio.current_time() - self._since >= PATIENCE:
                    # Also for other pages of the file: one folio may hold both these and the revoked pages.
                    self._let_through(held)
        finally:
            self._held.remove(held)
            held.left.set()

    def _concerns(self, ino: Ino, pages: Range) -> bool:
        """Return whether any of ``pages`` is locked and no longer due for a revoke."""
        locked, todo = self._locked.get(ino), self._todo.get(ino)
        if locked is None or todo is None:
            return False
        return any(not todo.covers(*part) for part in locked.overlapping(*pages))

    def _overlapping(self, ino: Ino, pages: Range) -> list[_Held]:
        return [held for held in self._held if held.ino == ino and held.pages.clip(*pages)]

    def _let_through(self, held: _Held) -> None:
        """Let a request go on now; the pages of its answer have to be revoked again."""
        for part in list(self._locked[held.ino].overlapping(*held.pages)):
            self._todo[held.ino].add(*part)
        held.let_go.set()
