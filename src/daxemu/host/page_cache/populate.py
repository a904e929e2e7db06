"""System calls that populate a mapping for the caller: ``__mm_populate()`` of mm/gup.c.

Linux' filemap_fault() answers VM_FAULT_RETRY after a failed read, and __mm_populate() begins anew each time:
over an unreadable page, mmap(MAP_POPULATE) and mlock(2) never return. SIGKILL is the only signal that ends
the loop. No error from a FUSE filesystem ends the loop; a page does. This module finds threads in such a
call, the addresses at which such a thread may get the page, and the moment when the page is present.

Addresses and lengths are bytes, page indices count pages of the file.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from daxemu.host.proc import maps
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.present import collect_tasks, mapped_runs
from daxemu.host.proc.procfs import GONE, read_whole
from daxemu.mm.to_kill import Task
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import PFN_PHYS, PHYS_PFN

# asm/unistd.h
_MACHINE = platform.machine()
_CALLS = {
    "x86_64": {
        9: "mmap",
        25: "mremap",
        149: "mlock",
        151: "mlockall",
        216: "remap_file_pages",
        325: "mlock2",
    },
    "aarch64": {
        216: "mremap",
        222: "mmap",
        228: "mlock",
        230: "mlockall",
        234: "remap_file_pages",
        284: "mlock2",
    },
}.get(_MACHINE, {})
# asm/unistd_32.h; 90 is old_mmap(), 192 is mmap2()
_CALLS_32 = {
    "x86_64": {
        90: "mmap",
        150: "mlock",
        152: "mlockall",
        163: "mremap",
        192: "mmap",
        257: "remap_file_pages",
        376: "mlock2",
    },
}.get(_MACHINE, {})
_END_32 = 1 << 32  # bytes: a 32-bit thread has nothing beyond
_EI_CLASS, _ELFCLASS64 = 4, 2  # uapi/linux/elf.h
SAYS_ENOMEM = frozenset(("mlock", "mlock2"))
"""Calls that fail with ENOMEM for a page that cannot be read; the other calls ignore the page."""

_SPINS = 100  # looks without a sleep: a thread needs some 20 microseconds from the answer to the page
_NAP = 0.0005  # seconds between later looks


class PopulatingCall(NamedTuple):
    """System call that populates."""

    number: int
    name: str


class Sleeping(NamedTuple):
    """System call that a thread sleeps in: ``call`` is None unless the call populates."""

    call: PopulatingCall | None


def look(tid: int) -> Sleeping | None:
    """Return the system call that a thread sleeps in; None for a running thread or an unreadable /proc."""
    try:
        words = read_whole(f"/proc/{tid}/syscall").split()
    except GONE:
        return None
    if not words or not words[0].lstrip(b"-").isdigit():
        return None
    number = int(words[0])
    calls = _CALLS_32 if number in _CALLS_32 and _is_32_bit(tid, words) else _CALLS
    return Sleeping(PopulatingCall(number, calls[number]) if number in calls else None)


def _is_32_bit(tid: int, words: Sequence[bytes]) -> bool:
    """Return whether a thread made its system call as a 32-bit call. Of /proc/TID/syscall (``words``), only
    stack pointer and program counter show a 32-bit call, and a 64-bit thread can have both below 4 GiB, too.
    """
    if any(int(word, 16) >= _END_32 for word in words[-2:]):
        return False
    try:
        with open(f"/proc/{tid}/exe", "rb") as program:
            return program.read(_EI_CLASS + 1)[_EI_CLASS:] != bytes([_ELFCLASS64])
    except OSError:
        return True


class PopulatedArea(NamedTuple):
    """Address range, in bytes, that maps consecutive pages of a file from ``page`` on, none of them present.
    ``copies``: the mapping is private and writable, so a populating call copies pages.
    """

    address: int
    length: int
    page: FilePage
    copies: bool


def areas_without(pid: int, dev: tuple[int, int], ino: Ino, pages: Range) -> list[PopulatedArea]:
    """Return the areas in which a process maps ``pages`` of a file with none present; empty for a dead
    process.
    """
    found: list[PopulatedArea] = []
    try:
        with Pagemap(pid) as pagemap:
            for vma in maps.read(pid, dev):
                part = pages.clip(*vma.pages)
                if vma.ino != ino or not part:
                    continue
                start, end = vma.addresses_of(part)
                taken = RangeSet(pagemap.present_in(start, end))
                for copy in pagemap.present_in(start, end, copies=True):
                    taken.add(*copy)
                for low, high in taken.gaps(start, end):
                    page = FilePage(*dev, ino, vma.page_at(low))
                    found.append(PopulatedArea(low, high - low, page, vma.copies))
    except GONE:
        return []
    return found


def others_mapping(pid: int, dev: tuple[int, int], ino: Ino, pages: Range) -> list[Task]:
    """Return the processes except ``pid`` and the caller with mappings of ``pages`` of a file, present or
    not.
    """
    return collect_tasks(dev, {ino: [pages]}, frozenset({pid, os.getpid()}), mapped_runs)


def having_present(tasks: Sequence[Task]) -> list[int]:
    """Return the ids of the processes with any page of ``Task.present`` in the page tables just now."""
    found: list[int] = []
    for task in tasks:
        with suppress(*GONE), Pagemap(task.pid) as pagemap:
            for run in task.present:
                end = run.address + PFN_PHYS(run.nr_pages)
                if any(pagemap.present_in(run.address, end)):
                    found.append(task.pid)
                    break
    return found


def copied(pid: int, areas: Sequence[PopulatedArea]) -> Iterator[tuple[int, FilePage, int]]:
    """Yield the private copies of a process in ``areas``: (address, page of the file, bytes)."""
    try:
        with Pagemap(pid) as pagemap:
            for area in areas:
                if not area.copies:
                    continue
                end = area.address + area.length
                for low, high in pagemap.present_in(area.address, end, copies=True):
                    index = area.page.pgoff + PHYS_PFN(low - area.address)
                    yield low, area.page._replace(pgoff=index), high - low
    except GONE:
        return


def wait_until_present(
    pid: int, areas: Sequence[PopulatedArea], is_over: Callable[[], bool], patience: float
) -> None:
    """Block until a process has the last page of any area present, ``is_over`` is true or ``patience``
    seconds are over.
    """
    deadline = time.monotonic() + patience
    looks = 0
    try:
        with Pagemap(pid) as pagemap:
            while not is_over() and time.monotonic() < deadline:
                if any(_has(pagemap, area.address + area.length - PAGE_SIZE) for area in areas):
                    return
                looks += 1
                time.sleep(0 if looks < _SPINS else _NAP)
    except GONE:
        return


def _has(pagemap: Pagemap, address: int) -> bool:
    return any(entry.present or entry.swapped for entry in pagemap.entries(address, 1))
