"""Answers to madvise(2) on direct mappings.

Counterpart in Linux: mm/madvise.c. An advice about content or children is carried out here, because lazy
addresses are anonymous memory for the kernel. Any other advice is the kernel's.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from daxemu.errors import DaxemuError
from daxemu.host.direct.dontfork import set_forked
from daxemu.host.direct.errors import CallRefused
from daxemu.host.direct.locking import held
from daxemu.host.direct.page_tables import PageTables
from daxemu.host.direct.syscalls import MADV_DOFORK, MADV_DONTFORK, MADV_DONTNEED
from daxemu.host.direct.table import Space
from daxemu.host.mappings import HardwareError
from daxemu.host.proc import status
from daxemu.host.run.runner import fault_in
from daxemu.host.run.seccomp import CONTINUE, Answer
from daxemu.ranges import Range
from daxemu.uapi import (
    CAP_SYS_ADMIN,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MADV_HWPOISON,
    MADV_REMOVE,
    MADV_SOFT_OFFLINE,
    PAGE_SIZE,
    Ino,
    page_align_up,
)
from daxemu.units import PFN_PHYS, PHYS_PFN

# uapi/asm-generic/mman-common.h
MADV_FREE, MADV_WIPEONFORK, MADV_DONTNEED_LOCKED = 8, 18, 24


class PunchOps(Protocol):
    """The part of the filesystem that advice needs."""

    def fallocate(self, ino: Ino, mode: int, offset: int, length: int) -> None:
        """See Filesystem.fallocate."""


class Advice:
    """Answers madvise(2) on one mount. Belongs to the trio thread."""

    def __init__(
        self,
        fs: PunchOps,
        page_tables: PageTables,
        settled: Callable[[Ino], Awaitable[None]],
        hardware_error: HardwareError,
    ) -> None:
        """``settled``: wait until every mapping follows the changes of a file."""
        self._fs = fs
        self._page_tables = page_tables
        self._settled = settled
        self._hardware_error = hardware_error

    async def answer(
        self, tid: int, space: Space, address: int, length: int, advice: int, *, simulated: bool
    ) -> Answer:
        """Return the answer to madvise(2) of a thread. ``simulated``: a failure poisons nothing.

        Raises CallRefused, OSError, DaxemuError.
        """
        advice &= 0xFFFFFFFF
        where = Range(address, address + page_align_up(length))
        poisons = advice in (MADV_HWPOISON, MADV_SOFT_OFFLINE)
        if not space.overlapping(where):
            # The kernel must never poison real memory behind a mapping.
            return Answer(error=errno.EINVAL) if poisons else CONTINUE
        if address % PAGE_SIZE:
            raise CallRefused(errno.EINVAL)
        if poisons:
            return await self._inject(tid, space, where, advice == MADV_SOFT_OFFLINE, simulated)
        if advice in (MADV_FREE, MADV_WIPEONFORK):  # for anonymous memory only, as lazy addresses are
            raise CallRefused(errno.EINVAL)
        if advice == MADV_REMOVE:
            return await self._remove(space, where)
        if advice in (MADV_DONTNEED, MADV_DONTNEED_LOCKED):
            async with held(space.lock):
                await self._page_tables.drop(space, where)
            return _covered(space, where)
        if advice in (MADV_DONTFORK, MADV_DOFORK):
            async with held(space.lock):
                await set_forked(space, where, is_forked=advice == MADV_DOFORK)
            return _covered(space, where)
        return CONTINUE

    async def _remove(self, space: Space, where: Range) -> Answer:
        """madvise(MADV_REMOVE): punch a hole (madvise_remove())."""
        for part in space.parts(where):
            if not part.is_shared or not part.may_write:
                raise CallRefused(errno.EACCES)
            mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            try:
                self._fs.fallocate(part.ino, mode, PFN_PHYS(part.block), part.addresses.length)
            except DaxemuError as error:
                raise CallRefused(error.errno) from error
            await self._settled(part.ino)
        return _covered(space, where)

    async def _inject(self, tid: int, space: Space, where: Range, soft: bool, simulated: bool) -> Answer:
        """madvise(MADV_HWPOISON): one failure for each part of a file (madvise_inject_error())."""
        if not _is_capable(tid):
            raise CallRefused(errno.EPERM)
        at = where.start
        for part in space.parts(where):
            start, pages = part.addresses.start, PHYS_PFN(part.addresses.length)
            if start != at:
                break
            good = await trio.to_thread.run_sync(fault_in, tid, start, pages)
            offset, length = PFN_PHYS(part.block), PFN_PHYS(good)
            failed = await self._hardware_error(
                tid, start, part.ino, offset, length, soft=soft, simulated=simulated
            )
            if failed:
                raise CallRefused(failed)
            at = start + length
            if good < pages:
                break
        return Answer(0) if at == where.end else Answer(error=errno.EFAULT)


def _covered(space: Space, where: Range) -> Answer:
    """Return the answer after an advice was carried out: ENOMEM if any address has no direct mapping."""
    return Answer(0) if space.covers(where) else Answer(error=errno.ENOMEM)


def _is_capable(tid: int) -> bool:
    """``capable(CAP_SYS_ADMIN)``. In the emulated machine root has the capability, too."""
    found = status.find(tid)
    return found is not None and (found.euid == 0 or found.has_capability(CAP_SYS_ADMIN))
