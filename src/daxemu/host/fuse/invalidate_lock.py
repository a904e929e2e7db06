"""``mapping->invalidate_lock``: pages are taken away for what comes in their place, and nobody gets others
meanwhile.

The kernel has one, and FUSE does not take it for us. So what brings pages into the cache, a FUSE_READ or a
write(2), waits here instead; with the pages gone, a store through a mapping waits as well, in its page fault.

A request that waits has its pages locked, and taking those away waits for it. Such a request is let through
after PATIENCE, and the pages that it brought are taken away again.
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
"""Seconds that a request waits while pages of its file are taken away; longer, and it may be in the way."""
MOST_HELD = 32
"""Requests that wait; pyfuse3 has tasks for 99, and someone must answer the writing back."""
LIMIT = 10.0
"""Seconds for all of it."""

Revoke = Callable[[Ino, int, int], None]
"""(inode, offset, length): take these pages away, dirty ones written back. Blocks."""


@dataclass(eq=False)
class _Held:
    """A request that waits. ``left``: it waits no more, and is answered before anything else happens."""

    ino: Ino
    pages: Range
    is_write: bool
    let_go: trio.Event = field(default_factory=trio.Event)
    left: trio.Event = field(default_factory=trio.Event)


class InvalidateLock:
    """Held while it is ``Gates.invalidating``. Ranges are bytes, of whole pages. Belongs to the trio
    thread.
    """

    def __init__(self) -> None:
        self._locked: dict[Ino, RangeSet] = {}
        self._todo: dict[Ino, RangeSet] = {}
        """What may be in the page cache."""
        self._under: Ino | None = None
        """The file that somebody takes pages of, or writes them back, just now; and since when."""
        self._since = 0.0
        self._held: list[_Held] = []

    @property
    def is_complete(self) -> bool:
        """Whether nothing of what is locked is in the page cache."""
        return self._under is None and not any(self._todo.values())

    async def invalidate(self, revoke: Revoke, more: Iterable[tuple[Ino, Range]] = ()) -> None:
        """Lock ``more``, and take everything locked out of the page cache; it is complete until the next
        await. Raises FsError EAGAIN if that takes too long.
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
        """Do what may wait for pages of ``ino`` that a request has locked which waits here."""
        self._under, self._since = ino, trio.current_time()
        try:
            await trio.to_thread.run_sync(work)
        finally:
            self._under = None

    def _left_to_do(self) -> Iterator[tuple[Ino, Range]]:
        return ((ino, pages) for ino, todo in self._todo.items() for pages in todo)

    def describe_held(self) -> Iterator[str]:
        """The requests that wait, for people."""
        for held in self._held:
            kind = "write" if held.is_write else "read"
            yield f"{kind} of inode {held.ino}, bytes {held.pages.start:#x}+{held.pages.length:#x}"

    def release(self) -> None:
        """Let everybody go on."""
        for held in self._held:
            held.let_go.set()

    # -- those who wait

    async def before_read(self, ino: Ino, offset: int, length: int) -> None:
        """Wait until a FUSE_READ may be answered."""
        await self._wait(ino, Range(offset, offset + length).outer(PAGE_SIZE), is_write=False)

    async def before_write(self, ino: Ino, offset: int, length: int, *, from_cache: bool) -> None:
        """Wait until a FUSE_WRITE may be done. What the page cache writes back need not wait, but for a
        write(2) to the same pages that came before it.
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
                    # Whatever its pages: they may be in one folio with those that are waited for.
                    self._let_through(held)
        finally:
            self._held.remove(held)
            held.left.set()

    def _concerns(self, ino: Ino, pages: Range) -> bool:
        """Whether any of ``pages`` is locked, and will not be taken away later in any case."""
        locked, todo = self._locked.get(ino), self._todo.get(ino)
        if locked is None or todo is None:
            return False
        return any(not todo.covers(*part) for part in locked.overlapping(*pages))

    def _overlapping(self, ino: Ino, pages: Range) -> list[_Held]:
        return [held for held in self._held if held.ino == ino and held.pages.clip(*pages)]

    def _let_through(self, held: _Held) -> None:
        """It is answered with what there is now, and that has to go again."""
        for part in list(self._locked[held.ino].overlapping(*held.pages)):
            self._todo[held.ino].add(*part)
        held.let_go.set()
