"""Pages that a system call brings in: MAP_POPULATE, MAP_LOCKED, MCL_FUTURE, mlock(2).

Counterpart in Linux: populate_vma_page_range() in mm/gup.c. A mapping of the media is never locked
(``vma_is_dax()`` in mlock_fixup()), only brought in: a load for a shared mapping, a store for a private one.

The agent must bring in nothing: its page faults would wait for the task that waits for the agent. After
mlockall(MCL_FUTURE) each mmap(2) does, unless the mapping has no access: see :func:`without_population`.
The pages of a new mapping are brought in by process_vm_readv(2) of a worker thread.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress

import trio

from daxemu.host.direct.syscalls import NR_MMAP, PROT_NONE, Syscall, mprotect, munlock
from daxemu.host.direct.table import Space
from daxemu.host.proc.procfs import read_whole
from daxemu.host.run.filters import Nr
from daxemu.host.run.runner import fault_in
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PFN_PHYS, PHYS_PFN

MCL_FUTURE, MCL_ONFAULT = 2, 4  # uapi/asm-generic/mman.h
MAP_LOCKED, MAP_POPULATE, MAP_NONBLOCK = 0x2000, 0x8000, 0x10000  # uapi/asm-generic/mman.h
MOST_HOLES = 4096
"""Blocks of holes that one call brings in: each is a page of zeros, and an event."""

_POPULATING = {str(number).encode() for number in (Nr.MLOCK, Nr.MLOCK2, Nr.MLOCKALL, Nr.MMAP, Nr.MREMAP)}
_BATCH = 1024  # pages of one call: IOV_MAX of uapi/linux/uio.h

_libc = ctypes.CDLL(None, use_errno=True)


def locks(space: Space, number: int, flags: int) -> None:
    """Note a call of mlock(2), mlock2(2) or mlockall(2) before the kernel carries the call out."""
    space.locks = True
    if number == Nr.MLOCKALL:
        space.locks_future = space.locks_future or bool(flags & MCL_FUTURE)
        space.populates = bool(flags & MCL_FUTURE) and not flags & MCL_ONFAULT


def brings_in(space: Space, flags: int) -> bool:
    """Return True if an mmap(2) with these flags brings in pages."""
    return (
        bool(flags & MAP_LOCKED) or flags & (MAP_POPULATE | MAP_NONBLOCK) == MAP_POPULATE or space.populates
    )


def is_populating(tid: int) -> bool:
    """Return True if the page fault of a thread is of a call that brings in pages. Such a page fault is no
    store: a lazy address is private memory, which the kernel brings in for writing.
    """
    try:
        return read_whole(f"/proc/{tid}/syscall").split(b" ", 1)[0] in _POPULATING
    except OSError:
        return False


def without_population(batch: Sequence[Syscall]) -> list[Syscall]:
    """Return a batch for an address space that locks its later mappings: each is made without access, which
    brings in no page, and then unlocked.
    """
    calls: list[Syscall] = []
    for call in batch:
        if call.number != NR_MMAP or call.args[2] == PROT_NONE:
            calls.append(call)
            continue
        at, length, prot, *rest = call.args
        calls.append(Syscall(NR_MMAP, (at, length, PROT_NONE, *rest)))
        calls += [munlock(at, length), mprotect(at, length, prot)]
    return calls


async def bring_in(space: Space, parts: Iterable[Range], *, copies: bool) -> None:
    """Make the pages at addresses present, each part up to the first page that cannot be. ``copies``: as
    private copies. Precondition: no thread of the program stores there yet.
    """

    def work() -> None:
        with suppress(OSError):  # the process has ended
            for part in parts:
                good = fault_in(space.pid, part.start, PHYS_PFN(part.length))
                if copies:
                    _store(space.pid, part.start, good)

    await trio.to_thread.run_sync(work, abandon_on_cancel=True)


def _store(pid: int, start: int, count: int) -> None:
    """Store the first byte of each page once more, so that the page becomes a private copy."""
    for done in range(0, count, _BATCH):
        batch = min(_BATCH, count - done)
        buffer = ctypes.create_string_buffer(batch)
        first = start + PFN_PHYS(done)
        remote = b"".join(struct.pack("=QQ", first + page * PAGE_SIZE, 1) for page in range(batch))
        local = struct.pack("=QQ", ctypes.addressof(buffer), batch)
        if _libc.process_vm_readv(pid, local, 1, remote, batch, 0) == batch:
            _libc.process_vm_writev(pid, local, 1, remote, batch, 0)
