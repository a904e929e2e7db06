"""Answers to system calls on direct mappings: mmap, munmap, mprotect, mremap, msync; madvise by ``advice``.

Counterpart in Linux: mm/mmap.c, mm/mprotect.c, mm/mremap.c, mm/msync.c; the order of the checks is theirs.
Each call ends in one of: a value, an errno, or CONTINUE (the kernel carries the call out). A change of
mappings is made by the agent of the address space under ``Space.lock``, never by CONTINUE: the table and the
mappings would disagree for a moment, and a replacement could bring an unmapped address back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, Protocol

from daxemu.errors import DaxemuError, Shutdown
from daxemu.fs.extents import ExtentMap
from daxemu.fs.fault import FaultKind, FileRun
from daxemu.host.direct import limits, planner, populate
from daxemu.host.direct.advice import Advice, PunchOps
from daxemu.host.direct.changes import FileLocks
from daxemu.host.direct.errors import CallRefused
from daxemu.host.direct.locking import held
from daxemu.host.direct.outside import is_outside, reserve
from daxemu.host.direct.page_tables import PageTables
from daxemu.host.direct.table import PROT_WRITE, Area, Space, Table
from daxemu.host.mappings import HardwareError
from daxemu.host.run import zone
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.ranges import Range
from daxemu.uapi import (
    MADV_HWPOISON,
    MADV_SOFT_OFFLINE,
    PAGE_SIZE,
    PMD_SIZE,
    U64_MAX,
    Ino,
    page_align_down,
    page_align_up,
)
from daxemu.units import PHYS_PFN

EAGER = 12_000
"""Runs of a file up to which a new mapping maps them all at once: 0.14 s for 10,000. Beyond, and
where the address space has less than twice the room, runs are mapped when touched.
"""

_RUNS = 512
"""Runs of a file looked up in one step of the event loop: 12,000 runs took 45 ms, shared ones more."""
_EAGER_OVER = 256
"""As EAGER, for a mapping over another one: each run is moved to its place, which is an event."""

# uapi/asm-generic/mman-common.h, uapi/linux/mman.h
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0x0F
MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN = 0x10, 0x20, 0x100
MAP_SYNC, MAP_FIXED_NOREPLACE = 0x80000, 0x100000
_VALIDATED = 0xFC0FF9F3 | MAP_SYNC
"""Flags that MAP_SHARED_VALIDATE accepts: LEGACY_MAP_MASK of linux/mman.h, and MAP_SYNC as on DAX."""
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MS_ASYNC, MS_INVALIDATE, MS_SYNC = 1, 2, 4
_PROT = 7
_NO_KEY = 0xFFFFFFFF
"""Argument of pkey_mprotect(2) that makes the call an mprotect(2)."""
_TASK_SIZE = (1 << 47) - PAGE_SIZE
_MAX_FILE = (1 << 63) - 1


class OpenFile(NamedTuple):
    """File behind a descriptor of a process: inode, and flags of open(2)."""

    ino: Ino
    flags: int

    @property
    def can_read(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def can_write(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)


def open_file(tid: int, fd: int) -> OpenFile:
    """Return the open file of a thread, from /proc, without a request to the file's filesystem.

    Raises OSError: the thread is gone, has no such descriptor, or has one of O_PATH.
    """
    with open(f"/proc/{tid}/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    flags = int(fields["flags"], 8)
    if flags & os.O_PATH:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return OpenFile(int(fields["ino"]), flags)


class Files(PunchOps, Protocol):
    """The part of the filesystem that mappings need."""

    def is_regular(self, ino: Ino) -> bool:
        """See MappedFiles.is_regular."""

    def runs(self, ino: Ino, blocks: Range) -> Iterable[FileRun]:
        """See MappedFiles.runs."""

    def extents_of(self, ino: Ino) -> ExtentMap:
        """See Filesystem.extents_of."""

    def fsync(self) -> None:
        """See SuperBlock.fsync."""


class Calls:
    """Answers the calls on one mount. Belongs to the trio thread."""

    def __init__(
        self,
        fs: Files,
        table: Table,
        page_tables: PageTables,
        locks: FileLocks,
        settled: Callable[[Ino], Awaitable[None]],
        synced: Callable[[Ino], Awaitable[None]],
        readable: Callable[[Ino, Range], list[Range]],
        is_wanted: Callable[[Ino], bool],
        hardware_error: HardwareError,
    ) -> None:
        """``is_wanted``: return whether the pages of a file are mapped one by one (PageFaults.are_wanted)."""
        self._fs = fs
        self._table = table
        self._page_tables = page_tables
        self._locks = locks
        self._synced = synced
        self._readable = readable
        self._is_wanted = is_wanted
        self._advice = Advice(fs, page_tables, settled, hardware_error)

    async def answer(self, call: NotifiedCall, space: Space | None, *, simulated: bool = False) -> Answer:
        """Return the answer to a call other than mmap(2) of a file. ``space``: the caller's address space;
        None if the caller has no direct mapping. ``simulated``: a failure by madvise(2) poisons nothing.
        """
        if space is None:
            # The kernel must never poison real memory behind a mapping.
            poisons = call.nr == Nr.MADVISE and call.args[2] & 0xFFFFFFFF in (
                MADV_HWPOISON,
                MADV_SOFT_OFFLINE,
            )
            return Answer(error=errno.EINVAL) if poisons else CONTINUE
        try:
            return await self._answer(call, space, simulated=simulated)
        except (CallRefused, DaxemuError, OSError) as error:
            return Answer(error=error.errno or errno.ENOMEM)

    async def _answer(self, call: NotifiedCall, space: Space, *, simulated: bool) -> Answer:
        match call.nr:
            case Nr.MUNMAP:
                async with held(space.lock):
                    return await self._munmap(space, *call.args[:2])
            case Nr.MPROTECT:
                async with held(space.lock):
                    return await self._mprotect(space, *call.args[:3])
            case Nr.PKEY_MPROTECT:
                if call.args[3] & 0xFFFFFFFF != _NO_KEY:
                    return Answer(error=errno.EINVAL)
                async with space.lock:
                    return await self._mprotect(space, *call.args[:3])
            case Nr.MREMAP:
                async with held(space.lock):
                    return await self._mremap(call.tid, space, *call.args[:5])
            case Nr.MSYNC:
                return await self._msync(space, *call.args[:3])
            case Nr.MADVISE:
                return await self._advice.answer(call.tid, space, *call.args[:3], simulated=simulated)
            case Nr.MMAP:
                return await self._map_anonymous_over(space, *call.args[:4])
            case Nr.MLOCK | Nr.MLOCK2 | Nr.MLOCKALL:
                populate.locks(space, call.nr, call.args[0])
        return CONTINUE

    # -- mmap

    def check_mmap(self, call: NotifiedCall, file: OpenFile) -> int:
        """Return the errno of an mmap(2) that the arguments forbid; 0 if none (do_mmap())."""
        address, length, prot, flags, _, offset = call.args
        how = flags & MAP_TYPE
        if offset % PAGE_SIZE or not length:
            return errno.EINVAL
        if page_align_up(length) > _TASK_SIZE:
            return errno.ENOMEM
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE) and (address % PAGE_SIZE):
            return errno.EINVAL
        if offset + page_align_up(length) > U64_MAX or offset > _MAX_FILE - length:
            return errno.EOVERFLOW
        if how == MAP_SHARED_VALIDATE and flags & ~_VALIDATED & 0xFFFFFFFF:
            return errno.EOPNOTSUPP
        if how not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE) or flags & MAP_GROWSDOWN:
            return errno.EINVAL
        if how != MAP_PRIVATE and prot & PROT_WRITE and not file.can_write:
            return errno.EACCES
        if not file.can_read:
            return errno.EACCES
        return 0 if self._fs.is_regular(file.ino) else errno.ENODEV

    async def mmap(self, call: NotifiedCall, file: OpenFile, space: Space) -> Answer:
        """Map a file (mmap(2)). Precondition: check_mmap() has returned 0."""
        address, length, prot, flags, _, offset = call.args
        is_shared = flags & MAP_TYPE != MAP_PRIVATE
        size = page_align_up(length)
        may_write = not is_shared or file.can_write
        try:
            async with self._locks.held(file.ino), held(space.lock):
                start = await self._place(space, address, size, flags)
                where = Range(start, start + size)
                self._check_limits(call.tid, space, where, flags)
                area = Area(space, where, file.ino, PHYS_PFN(offset), prot & _PROT, is_shared, may_write)
                if space.overlapping(where):
                    await self._page_tables.map_over(area)
                    with suppress(OSError):  # the area stays lazy
                        runs = self._runs(area, _EAGER_OVER)
                        await self._page_tables.show(list(planner.media_pieces(area, runs)))
                else:
                    await self._map_new(area)
        except (CallRefused, DaxemuError, OSError) as error:
            return Answer(error=error.errno or errno.ENOMEM)
        if populate.brings_in(space, flags):
            parts = [area.addresses_of(blocks) for blocks in self._readable(area.ino, area.blocks)]
            copies = not is_shared and bool(prot & PROT_WRITE) and not flags & MAP_FIXED
            await populate.bring_in(space, parts, copies=copies)
        return Answer(start)

    def _check_limits(self, tid: int, space: Space, where: Range, flags: int) -> None:
        """Raise CallRefused for a new mapping that the program's limits forbid."""
        replaced = sum(part.addresses.length for part in space.parts(where))
        is_asked = bool(flags & populate.MAP_LOCKED)
        is_locked = is_asked or space.locks_future
        if error := limits.refusal(tid, where.length, replaced, is_locked=is_locked, asks_for_lock=is_asked):
            raise CallRefused(error)

    async def _map_new(self, area: Area) -> None:
        """Map an area at once, or lazily. Raises OSError, DaxemuError."""
        runs = self._runs(area, min(EAGER, self._page_tables.room(area.space) // 2))
        try:
            await self._page_tables.map_new(area, planner.media_pieces(area, runs))
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            await self._page_tables.map_new(area, [])  # one VMA

    def _runs(self, area: Area, most: int) -> Iterator[FileRun]:
        """Return the runs to map at once, at most ``most``: none of a file with more extents, after a
        shutdown, or of a file whose pages are mapped one by one. The caller may wait between two runs: the
        file is looked at anew after _RUNS runs.
        """
        if self._is_wanted(area.ino) or self._fs.extents_of(area.ino).count(*area.blocks) > most:
            return iter(())
        runs = self._runs_in_pieces(area.ino, area.blocks)
        return islice((run for run in runs if run.kind is FaultKind.MAPPED), most)

    def _runs_in_pieces(self, ino: Ino, blocks: Range) -> Iterator[FileRun]:
        at = blocks.start
        while at < blocks.end:
            piece: list[FileRun] = []
            with suppress(Shutdown):  # mmap(2) asks no filesystem: the page faults fail
                piece = list(islice(self._fs.runs(ino, Range(at, blocks.end)), _RUNS))
            if not piece:
                return
            yield from piece
            at = piece[-1].file_end

    async def _place(self, space: Space, address: int, size: int, flags: int) -> int:
        """Return the address of a new mapping; a place outside the zone that must be free is taken. Raises
        CallRefused.
        """
        where = Range(address, address + size)
        if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
            if where.end > _TASK_SIZE:
                raise CallRefused(errno.ENOMEM)
            if not _is_in(space.zone, where) and not is_outside(where):
                raise CallRefused(errno.ENODEV)  # the place of other mounts and of agents
            if flags & MAP_FIXED_NOREPLACE and not await self._is_free(space, where):
                raise CallRefused(errno.EEXIST)
            if is_outside(where):
                await space.open_outside()
            return address
        if address:
            hint = max(page_align_down(address), page_align_up(_mmap_min_addr()))  # round_hint_to_min()
            where = Range(hint, hint + size)
            fits = _is_in(space.zone, where) or (is_outside(where) and where.end <= _TASK_SIZE)
            if fits and await self._is_free(space, where):
                return hint
        place = space.free_place(size, PMD_SIZE if size >= PMD_SIZE else PAGE_SIZE)
        if place is None:
            raise CallRefused(errno.ENOMEM)
        return place

    async def _is_free(self, space: Space, where: Range) -> bool:
        """Return True if no memory is at ``where``; outside the zone the place is taken by then."""
        if space.overlapping(where):
            return False
        if not is_outside(where):
            return True
        await space.open_outside()
        return await reserve(space, where)

    async def _map_anonymous_over(
        self, space: Space, address: int, length: int, _prot: int, flags: int
    ) -> Answer:
        """mmap(MAP_ANONYMOUS | MAP_FIXED) in the zone: the kernel replaces direct mappings."""
        where = Range(address, address + page_align_up(length))
        if flags & MAP_FIXED and address % PAGE_SIZE == 0 and space.overlapping(where):
            async with held(space.lock):
                await self._page_tables.unmap(space, where)
        return CONTINUE

    # -- munmap, mprotect, mremap: with Space.lock

    async def _munmap(self, space: Space, address: int, length: int) -> Answer:
        where = Range(address, address + page_align_up(length))
        if address % PAGE_SIZE or not where or where.end > _TASK_SIZE:
            raise CallRefused(errno.EINVAL)
        if not space.overlapping(where):
            return CONTINUE
        await self._page_tables.unmap(space, where)
        return Answer(0)

    async def _mprotect(self, space: Space, address: int, length: int, prot: int) -> Answer:
        where = Range(address, address + page_align_up(length))
        if address % PAGE_SIZE:
            raise CallRefused(errno.EINVAL)
        areas = space.overlapping(where)
        if not areas or prot & ~_PROT:
            return CONTINUE
        if prot & PROT_WRITE and any(not area.may_write for area in areas):
            raise CallRefused(errno.EACCES)
        await self._page_tables.mprotect(space, where, prot)
        return Answer(0)

    async def _mremap(
        self, tid: int, space: Space, address: int, old: int, new: int, flags: int, target: int
    ) -> Answer:
        old, new = page_align_up(old), page_align_up(new)
        known = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
        if space.at(address) is None and not (flags & MREMAP_FIXED and zone.has(target)):
            return CONTINUE
        if address % PAGE_SIZE or not new or flags & ~known or flags & MREMAP_DONTUNMAP:
            raise CallRefused(errno.EINVAL)
        if flags & MREMAP_FIXED and (
            not flags & MREMAP_MAYMOVE
            or target % PAGE_SIZE
            or Range(target, target + new).clip(address, address + old)
        ):
            raise CallRefused(errno.EINVAL)
        area = space.at(address)
        if area is None:
            place = Range(target, target + new)
            if flags & MREMAP_FIXED and zone.has(target) and space.overlapping(place):
                await self._page_tables.unmap(space, place)  # outside the zone the kernel reports this
            return CONTINUE
        if not old:
            raise CallRefused(errno.EINVAL)
        where = Range(address, address + old)
        if where.end > area.addresses.end:
            raise CallRefused(errno.EFAULT)
        if new > old:
            self._check_limits(tid, space, Range(where.end, where.end + new - old), 0)
        if flags & MREMAP_FIXED:
            place = Range(target, target + new)
            if place.end > _TASK_SIZE:
                raise CallRefused(errno.EINVAL)
            if not _is_in(space.zone, place) and not is_outside(place):
                raise CallRefused(errno.ENOMEM)
            if is_outside(place):
                await space.open_outside()
            if space.overlapping(place):
                await self._page_tables.unmap(space, place)
            return await self._moved(space, where, new, target)
        if new <= old:
            if new < old:
                await self._page_tables.unmap(space, Range(address + new, address + old))
            return Answer(address)
        added = Range(address + old, address + new)
        fits = added.end <= space.zone.end or (not zone.has(address) and is_outside(added))
        if where.end == area.addresses.end and fits and await self._is_free(space, added):
            await self._grow(area, added)
            return Answer(address)
        if not flags & MREMAP_MAYMOVE:
            raise CallRefused(errno.ENOMEM)
        free = space.free_place(new, PMD_SIZE if new >= PMD_SIZE else PAGE_SIZE)
        if free is None:
            raise CallRefused(errno.ENOMEM)
        return await self._moved(space, where, new, free)

    async def _moved(self, space: Space, where: Range, new: int, to: int) -> Answer:
        if new < where.length:
            await self._page_tables.unmap(space, Range(where.start + new, where.end))
            where = Range(where.start, where.start + new)
        await self._page_tables.move(space, where, to)
        if new > where.length and (area := space.at(to)) is not None:
            await self._grow(area, Range(to + where.length, to + new))
        return Answer(to)

    async def _grow(self, area: Area, added: Range) -> None:
        """Map more of the file, lazily, behind an area."""
        block = area.block + PHYS_PFN(area.addresses.length)
        more = Area(area.space, added, area.ino, block, area.prot, area.is_shared, area.may_write)
        await self._page_tables.map_new(more, [])
        if added.start - 1 in area.space.unforked:
            area.space.unforked.add(*added)

    # -- msync

    async def _msync(self, space: Space, address: int, length: int, flags: int) -> Answer:
        """msync(2): the stores are on the media already, and are shown to the filesystem here. The metadata
        is committed.
        """
        if address % PAGE_SIZE or flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC):
            raise CallRefused(errno.EINVAL)
        if flags & MS_ASYNC and flags & MS_SYNC:
            raise CallRefused(errno.EINVAL)
        where = Range(address, address + page_align_up(length))
        if not where:
            return Answer(0)
        areas = space.overlapping(where)
        if not areas:
            return CONTINUE
        self._table.stored(space, where)
        if flags & MS_SYNC:
            try:
                for ino in {area.ino for area in areas if area.is_shared}:
                    await self._synced(ino)
                self._fs.fsync()
            except DaxemuError as error:
                raise CallRefused(error.errno) from error
        return Answer(0) if space.covers(where) else CONTINUE


def _is_in(zone: Range, addresses: Range) -> bool:
    return zone.start <= addresses.start and addresses.end <= zone.end


def _mmap_min_addr() -> int:
    with open("/proc/sys/vm/mmap_min_addr", encoding="ascii") as file:
        return int(file.read())
