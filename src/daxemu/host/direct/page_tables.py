"""Changes of what address spaces map, carried out by agents and userfaultfds.

Counterpart in Linux: mm/mmap.c, and unmap_mapping_range() of mm/memory.c. Two changes suffice for every
change of a file: *hide* makes addresses lazy again, so that the next touch is decided by the filesystem, and
*show* maps a run that the filesystem named. Both replace mappings in one step (planner).

Locks: the caller holds ``Space.lock``. Never call from the task that reads the userfaultfd: an agent's
mremap(2) waits until that task has read its event.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice

import trio

from daxemu.host.direct import outside, planner, syscalls
from daxemu.host.direct.agent import AgentReply
from daxemu.host.direct.batches import in_order
from daxemu.host.direct.errors import (
    AddressSpaceGone,
    NotRegistered,
    PagePresent,
    RegisteredElsewhere,
)
from daxemu.host.direct.limits import most_pieces
from daxemu.host.direct.locking import held
from daxemu.host.direct.memory import kill
from daxemu.host.direct.planner import RESERVE, MappingPiece, MappingPlan, Shows
from daxemu.host.direct.private_copies import looking_into, private_copies
from daxemu.host.direct.requests import LARGE, ioctl, run, write_protect
from daxemu.host.direct.table import Area, Space, Table
from daxemu.host.direct.userfaultfd import Userfaultfd
from daxemu.host.proc import maps
from daxemu.host.run import zone
from daxemu.ranges import Range, RangeSet, gaps_between
from daxemu.uapi import Ino

log = logging.getLogger(__name__)

_PIECES_IN_STEP = 512
"""Pieces of a new area that one step of the event loop maps."""


class PageTables:
    """Changes the mappings of address spaces, and keeps the table true. Belongs to the trio thread.

    A change that the kernel refuses raises OSError. AddressSpaceGone: the address space has ended.
    """

    def __init__(self, table: Table, origin: int) -> None:
        """``origin``: byte of the media file with byte 0 of the device."""
        self._table = table
        self._origin = origin
        self._most_pieces = most_pieces()

    def room(self, space: Space) -> int:
        """Return the number of pieces that an address space can show beside those shown."""
        return max(0, self._most_pieces - space.refused - len(space.pieces))

    # -- new mappings

    async def map_new(self, area: Area, pieces: Iterable[MappingPiece]) -> None:
        """Map ``area`` at addresses that no program uses: ``pieces`` at once, the rest lazily.

        Add the area to the table before the first await: a change of the file meanwhile is then noticed.
        Raises OSError, DaxemuError; then nothing is mapped.
        """
        space = area.space
        if not zone.has(area.addresses.start):
            self._table.remove(space, area.addresses)  # what the program unmapped while a page was shown
        self._table.add(area)
        await self._keep_reserve(space)
        rest = iter(pieces)
        chunk = list(islice(rest, _PIECES_IN_STEP))
        batch = planner.in_place(area, chunk, self._origin)
        protected = RangeSet()
        try:
            outside.bequeath(space)
            async with in_order(partial(run, space)) as submit:
                while batch:
                    space.showing_all([piece.addresses for piece in chunk])
                    for piece in chunk:
                        if piece.is_protected:
                            protected.add(*piece.addresses)
                    chunk = list(islice(rest, _PIECES_IN_STEP))
                    await submit(batch, is_last=not chunk)
                    batch = [piece.mmap(piece.addresses.start, self._origin) for piece in chunk]
            await self._carry_out(space, MappingPlan([], area.addresses, list(protected), [], []))
        except (OSError, NotRegistered, RegisteredElsewhere):
            self._table.remove(space, area.addresses)
            with outside.expecting(space, [area.addresses]):
                await run(space, [syscalls.munmap(*_extent(area.addresses))])
            outside.bequeath(space)
            raise

    async def map_over(self, area: Area) -> None:
        """Map ``area`` lazily in place of whatever its addresses map now, as MAP_FIXED does."""
        lazy = [MappingPiece(area, area.addresses, Shows.LAZY)]
        await self._make_lazy(area.space, lazy, keep_copies=False, is_over=True)
        self._table.remove(area.space, area.addresses)
        self._table.add(area)
        outside.bequeath(area.space)

    # -- translations

    async def show(self, pieces: Sequence[MappingPiece]) -> None:
        """Map pieces of one address space, and wake the threads that wait there.

        Private copies stay. If the address space has too many VMAs, other addresses become lazy first. Raises
        OSError, NotRegistered, RegisteredElsewhere; then the addresses map what they mapped before.
        """
        if not pieces:
            return
        space = pieces[0].area.space
        asked, pieces = pieces, outside.as_now(self._table, space, pieces)
        if self.room(space) < len(pieces):
            await self._make_room(space)
        try:
            await self._show(space, pieces)
        except OSError as error:
            if error.errno != errno.ENOMEM or not space.pieces:
                raise
            # The program has many VMAs of its own: three quarters of the pieces that fit are left to daxemu.
            space.refused = self._most_pieces - len(space.pieces) * 3 // 4
            await self._make_room(space)
            await self._show(space, pieces)
        for piece in asked:
            space.wake(piece.addresses)

    async def _show(self, space: Space, pieces: Sequence[MappingPiece]) -> None:
        before = [
            (part, known is space.zeros)
            for piece in pieces
            for known in (space.shown, space.zeros)
            for part in known.overlapping(*piece.addresses)
        ]
        for piece in pieces:
            space.showing(piece.addresses)
        try:
            await self._replace_now(space, pieces)
        except (OSError, NotRegistered, RegisteredElsewhere):
            for piece in pieces:
                space.hiding(piece.addresses)
            for part, is_zeros in before:
                space.showing(part, zeros=is_zeros)
            raise

    def begin_in_place(self, area: Area, page: Range, device: int) -> AgentReply | None:
        """Begin to map a page of a shared area to byte ``device`` of the device: see Agent.begin.

        The caller registers the page next. Precondition: no other file has the block.
        """
        piece = MappingPiece(area, page, Shows.MEDIA, device)
        return area.space.agent.begin([piece.mmap(page.start, self._origin)])

    async def register(self, space: Space, page: Range) -> None:
        """Have the faults of a page reported that begin_in_place() has mapped."""
        try:
            await ioctl(space, lambda: space.uffd_at(page.start).register(*_extent(page)))
        except (OSError, NotRegistered, RegisteredElsewhere) as error:
            await self._end_or_kill(space, error)

    async def hide(self, space: Space, addresses: Range, *, keep_copies: bool = True) -> None:
        """Make the shown parts of ``addresses`` lazy (unmap_mapping_range()).

        ``keep_copies``: private copies stay (``even_cows`` of the kernel is 0).
        """
        there = list(space.shown.overlapping(*addresses))
        if not keep_copies:
            there = list(RangeSet([*there, *space.copied.overlapping(*addresses)]))
        await self._hide_parts(space, there, keep_copies=keep_copies)

    async def _hide_parts(self, space: Space, there: Sequence[Range], *, keep_copies: bool) -> None:
        areas = space.parts(Range(there[0].start, there[-1].end)) if there else []
        pieces = [
            MappingPiece(area, mine, Shows.LAZY)
            for area in areas
            for mine in planner.to_hide(there, area.addresses)
        ]
        if pieces:
            await self._make_lazy(space, pieces, keep_copies=keep_copies)
            for piece in pieces:
                space.hiding(piece.addresses)
                if not keep_copies:
                    space.copied.remove(*piece.addresses)
                space.wake(piece.addresses)

    async def hide_blocks(
        self,
        ino: Ino,
        blocks: Range,
        but: tuple[Space, Range] | None = None,
        *,
        keep_copies: bool = True,
    ) -> None:
        """Make file blocks lazy in every mapping of every process, but at the addresses ``but``: see hide().

        Acquires the lock of each address space. Precondition: the caller holds the lock of the file.
        """

        async def change(space: Space, addresses: Range) -> None:
            kept = but[1].clip(*addresses) if but is not None and but[0] is space else Range(0, 0)
            for part in gaps_between([kept] if kept else [], *addresses):
                await self.hide(space, part, keep_copies=keep_copies)

        await self._in_each_space(ino, blocks, change)

    async def protect_blocks(self, ino: Ino, blocks: Range) -> None:
        """Make each store to file blocks an event, in every shared mapping of every process.

        Acquires the lock of each address space. Precondition: the caller holds the lock of the file.
        """

        async def change(space: Space, addresses: Range) -> None:
            for area in space.parts(addresses):
                if area.is_shared:
                    await self.protect(space, area.addresses)

        await self._in_each_space(ino, blocks, change)

    async def _in_each_space(
        self, ino: Ino, blocks: Range, change: Callable[[Space, Range], Awaitable[None]]
    ) -> None:
        """Change all addresses that map file blocks, with the address space locked, until no space is new.

        fork(2) and mremap(2) hold ``Space.lock`` alone: while this task waits for the lock of a space, they
        make mappings that an earlier look did not find. An address space that cannot follow loses its
        mappings: the blocks may belong to another file next.
        """
        done: set[Space] = set()
        while new := {area.space for area, _ in self._table.mappers(ino, blocks)} - done:
            for space in new:
                done.add(space)
                with suppress(AddressSpaceGone):
                    async with held(space.lock):
                        try:
                            for addresses in space.mapping(ino, blocks):
                                await change(space, addresses)
                        except (OSError, NotRegistered, RegisteredElsewhere) as error:
                            await self._end_or_kill(space, error)

    async def hide_or_end(self, space: Space, addresses: Range) -> bool:
        """Make addresses lazy; if the kernel refuses, end all mappings of the address space, and return
        False.
        """
        try:
            await self.hide(space, addresses)
        except (OSError, NotRegistered, RegisteredElsewhere) as error:
            await self._end_or_kill(space, error)
            return False
        return True

    async def _end_or_kill(self, space: Space, error: Exception) -> None:
        """Make every access of an address space fail; if the kernel refuses that too, kill the process."""
        try:
            log.warning("process %s loses its direct mappings: %s", space.tgid, error)
            await self.end(space)
        except OSError as refused:
            log.warning("process %s is killed: its direct mappings cannot end: %s", space.tgid, refused)
            await kill(space.tgid, space.agent.pid)

    async def protect(self, space: Space, addresses: Range) -> None:
        """Make each store to shown addresses an event, until unprotect()."""
        await self._protect_each(space, list(space.shown.overlapping(*addresses)))

    async def _protect_each(self, space: Space, parts: Sequence[Range]) -> None:
        for number, part in enumerate(parts, 1):
            await write_protect(space, part, on=True)
            if number % _PIECES_IN_STEP == 0:
                await trio.lowlevel.checkpoint()

    async def unprotect(self, space: Space, addresses: Range, *, wake: bool = True) -> None:
        """Let stores to ``addresses`` pass. ``wake``: let the threads go on that wait there."""
        await write_protect(space, addresses, on=False, wake=wake)

    def unprotect_now(self, area: Area, blocks: Range) -> bool:
        """Let stores to shown file blocks of an area pass, and the threads go on that wait there.

        Return False for a range so large that a worker thread must do it: then nothing has changed.
        """
        space, mine = area.space, area.addresses_of(blocks)
        if mine.length > LARGE:
            return False
        for part in list(space.shown.overlapping(*mine)):
            for media in list(space.zeros.gaps(*part)):
                space.uffd_at(media.start).write_protect(*_extent(media), False)
        return True

    async def zeros(self, area: Area, page: Range, *, protected: bool) -> None:
        """Show a page of zeros. ``protected``: a store to the page is an event."""
        uffd = area.space.uffd_at(page.start)
        area.space.showing(page, zeros=True)
        with suppress(PagePresent):  # another thread touched the page first
            await ioctl(area.space, lambda: uffd.copy_zeros(*_extent(page), protected))
        area.space.wake(page)

    async def mark_poison(self, space: Space, page: Range) -> None:
        """Make each access to a page fail, until drop(): SIGBUS, or EFAULT in a system call. Wakes.

        Precondition: the page is not write-protected.
        """
        with suppress(PagePresent):  # marked for another thread, or the page came back
            await ioctl(space, lambda: space.uffd_at(page.start).poison(*_extent(page)))
        space.wake(page)

    async def drop(self, space: Space, addresses: Range) -> None:
        """Remove pages and markers from the page tables, as MADV_DONTNEED does.

        Under a private copy may be a block that the file had before: such addresses become lazy.
        """
        await self._hide_parts(space, list(space.copied.overlapping(*addresses)), keep_copies=False)
        await run(space, [syscalls.madvise(*_extent(addresses), syscalls.MADV_DONTNEED)])

    async def end(self, space: Space) -> None:
        """Make each access to each area fail with BUS_ADRERR, for ever."""
        whole = [MappingPiece(area, area.addresses, Shows.VOID) for area in space.areas.values()]
        for piece in whole:
            space.showing(piece.addresses)
        inside = [piece for piece in whole if zone.has(piece.addresses.start)]
        await run(space, [piece.mmap(piece.addresses.start, self._origin) for piece in inside])
        for piece in whole:
            if not zone.has(piece.addresses.start):
                await self._replace_now(space, [piece], keep_copies=False)
        for piece in whole:
            space.wake(piece.addresses)

    # -- calls of the program

    async def unmap(self, space: Space, addresses: Range) -> None:
        """munmap(2)."""
        self._table.stored(space, addresses)
        with outside.expecting(space, [addresses]):
            await run(space, [syscalls.munmap(*_extent(addresses))])
        self._table.remove(space, addresses)
        outside.bequeath(space)

    async def mprotect(self, space: Space, addresses: Range, prot: int) -> None:
        """mprotect(2)."""
        await run(space, [syscalls.mprotect(*_extent(addresses), prot)])
        self._table.protect(space, addresses, prot)

    async def move(self, space: Space, addresses: Range, to: int) -> None:
        """Move mappings with all pages and copies, as mremap(2) does. Precondition: no direct mapping is at
        ``to``.
        """
        if zone.has(to) != zone.has(addresses.start):
            await self._change_sides(space, addresses, space.uffd_at(to))
        with looking_into(space):
            vmas = [vma.area.clip(*addresses) for vma in maps.within(space.pid, addresses)]
        delta = to - addresses.start
        calls = [syscalls.mremap(vma.start, vma.length, vma.length, vma.start + delta) for vma in vmas]
        there = [Range(vma.start + delta, vma.end + delta) for vma in vmas]
        with outside.expecting(space, [*vmas, *there]):
            await run(space, calls)
        self._table.move(space, addresses, to)
        outside.bequeath(space)

    async def _change_sides(self, space: Space, addresses: Range, uffd: Userfaultfd) -> None:
        """Register ``addresses`` with the userfaultfd of the other side of the zone's border.

        The end of a registration is the end of write protections, so no shared block is shown then.
        """
        await self.hide(space, addresses)
        await ioctl(space, lambda: space.uffd_at(addresses.start).unregister(*_extent(addresses)))
        await ioctl(space, lambda: uffd.register(*_extent(addresses)))

    # -- the machinery

    async def _replace_now(
        self, space: Space, pieces: Sequence[MappingPiece], *, keep_copies: bool = True
    ) -> None:
        """Replace what pieces map now: outside the zone a program unmaps without the supervisor."""
        is_guarded = bool(pieces) and not zone.has(pieces[0].addresses.start)
        replace = partial(self._replace, space, keep_copies=keep_copies, is_guarded=is_guarded)
        await (outside.replaced(self._table, space, pieces, replace) if is_guarded else replace(pieces))

    async def _replace(
        self,
        space: Space,
        pieces: Sequence[MappingPiece],
        *,
        keep_copies: bool = True,
        is_guarded: bool,
    ) -> None:
        private = [piece.addresses for piece in pieces if keep_copies and not piece.area.is_shared]
        for part in private:  # a store waits until the replacement is done
            await write_protect(space, part, on=True)
        kept = private_copies(space, private)
        for part in kept:
            space.copied.add(*part)
        todo = [piece.cut(part) for piece in pieces for part in kept.gaps(*piece.addresses)]
        if todo:
            plan = planner.replacement(todo, space.scratch, self._origin)
            await self._carry_out(space, plan, is_guarded=is_guarded)
        for part in private:
            await write_protect(space, part, on=False)

    async def _carry_out(self, space: Space, plan: MappingPlan, *, is_guarded: bool = False) -> None:
        uffd = space.uffd_at((plan.places or [plan.registered])[0].start)
        try:
            await run(space, plan.batch)
            await ioctl(space, lambda: uffd.register(*_extent(plan.registered)))
            await self._protect_each(space, plan.protected)
            if is_guarded:
                await outside.guarded(self._table, space, list(zip(plan.places, plan.move, strict=True)))
            else:
                with outside.expecting(space, plan.places):
                    await run(space, plan.move)
        except (OSError, NotRegistered, RegisteredElsewhere, outside.Interrupted):
            if plan.move:
                await run(space, [syscalls.munmap(*_extent(plan.registered))])
            raise

    async def _make_room(self, space: Space) -> None:
        """Make the area with the most pieces lazy. Raises OSError."""

        def pieces_of(area: Area) -> int:
            return sum(1 for _ in space.pieces.irange(*area.addresses, inclusive=(True, False)))

        fullest = max(space.areas.values(), key=pieces_of)
        await self._make_lazy(space, [MappingPiece(fullest, fullest.addresses, Shows.LAZY)])
        space.hiding(fullest.addresses)

    async def _make_lazy(
        self,
        space: Space,
        pieces: Sequence[MappingPiece],
        *,
        keep_copies: bool = True,
        is_over: bool = False,
    ) -> None:
        """As _replace_now(), for lazy pieces: in an address space without room, by the reserve. ``is_over``:
        the program asked for the addresses, whatever they map.
        """

        how = partial(self._replace, is_guarded=False) if is_over else self._replace_now
        replace = partial(how, space, pieces, keep_copies=keep_copies)
        try:
            await replace()
        except OSError as error:
            if error.errno != errno.ENOMEM or not space.has_reserve:
                raise
            space.has_reserve = False
            await run(space, [syscalls.munmap(space.scratch.end - RESERVE, RESERVE)])
            await replace()
            await self._keep_reserve(space)

    async def _keep_reserve(self, space: Space) -> None:
        """Make the reserve of an address space, if the address space has room."""
        if not space.has_reserve:
            with suppress(OSError):
                await run(space, planner.reserve(space.scratch.end - RESERVE))
                space.has_reserve = True


def _extent(part: Range) -> tuple[int, int]:
    return part.start, part.length
