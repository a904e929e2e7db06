"""Proof that all processes with a page mapped were found: the kernel counts the mappings of each page frame.

Counterpart in Linux: page_mapcount(), at which rmap_walk() stops. /proc/kpagecount shows the count to root.
If the count equals the mappings found, no other process has the page, except processes that share the memory
of a found process (CLONE_VM without CLONE_THREAD): shared memory counts once, and kcmp(2) finds the sharers.

The proof must never miss a victim: an unreadable count, or an unclear one, means "not all".
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cmp_to_key

from daxemu.host import victims
from daxemu.host.proc.pagemap import Pagemap
from daxemu.mm.memory_failure import Task
from daxemu.ranges import Range
from daxemu.uapi import Ino

MAX_PAGES = 64
"""Pages of a failure up to which counts are compared; for larger ones the walk of all processes is faster."""

_NR_KCMP = {"x86_64": 312, "aarch64": 272}.get(platform.machine(), -1)
_KCMP_VM = 1  # uapi/linux/kcmp.h
_EQUAL, _LESS, _GREATER = 0, 1, 2

# Documentation/admin-guide/mm/pagemap.rst
_KPF_COMPOUND = 1 << 15 | 1 << 16  # of a large folio some kernels only know the average

_Frames = dict[tuple[Ino, int], Counter[int]]
"""By page of a file: its frames, with the number of mappings found of each."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Unclear(Exception):
    """The counts prove nothing: look at all processes."""


class Mms:
    """Address spaces, by a process of each, in the kernel's order of them (``struct mm_struct``)."""

    def __init__(self, pids: Sequence[int]) -> None:
        ordered = sorted(pids, key=cmp_to_key(_order))
        self.pids = [pid for at, pid in enumerate(ordered) if not at or _order(ordered[at - 1], pid)]

    def living_in(self, pids: Sequence[int]) -> list[int]:
        """Return the processes of ``pids`` in one of the address spaces, and the processes that kcmp(2)
        cannot compare.
        """
        found: list[int] = []
        # One search for all processes: each round compares one address space with many, and divides the many.
        todo = [(0, len(self.pids), pids)]
        while todo:
            low, high, some = todo.pop()
            if low == high or not some:
                continue
            middle = (low + high) // 2
            parts: dict[int, list[int]] = {_LESS: [], _GREATER: []}
            for pid, order in zip(some, _compare(self.pids[middle], some), strict=True):
                parts.get(order, found).append(pid)
            todo += [(low, middle, parts[_GREATER]), (middle + 1, high, parts[_LESS])]
        return found


def _order(one: int, other: int) -> int:
    (order,) = _compare(one, [other])
    if order not in (_EQUAL, _LESS, _GREATER):
        raise _Unclear(f"kcmp of {one} and {other}: {order}")
    return {_EQUAL: 0, _LESS: -1, _GREATER: 1}[order]


def _compare(one: int, others: Sequence[int]) -> Sequence[int]:
    """Return kcmp(2) of the address spaces of ``one`` and of each other process."""
    if victims.MISSING is not None:
        return [_libc.syscall(_NR_KCMP, one, other, _KCMP_VM, 0, 0) for other in others]
    orders = array("i", others)
    address, count = orders.buffer_info()
    victims.library().daxemu_compare(one, ctypes.c_void_p(address), count)
    return orders


def all_found(tasks: Sequence[Task], wanted: Mapping[Ino, Sequence[Range]]) -> Mms | None:
    """Return the address spaces of ``tasks`` if no other process has a ``wanted`` page present; None if
    that is not certain.
    """
    if not tasks or sum(pages.length for ranges in wanted.values() for pages in ranges) > MAX_PAGES:
        return None
    pages = {(ino, page) for ino, ranges in wanted.items() for part in ranges for page in range(*part)}
    try:
        mms = Mms([task.pid for task in tasks])
        owners = [task for task in tasks if task.pid in set(mms.pids)]
        frames = _frames(owners, pages)
        if frames.keys() != pages or any(len(counts) != 1 for counts in frames.values()):
            return None
        expected: Counter[int] = Counter()
        for counts in frames.values():
            expected.update(counts)
        # Second look: the count of a frame reused for another page would prove nothing.
        if _mapcounts(expected) == expected and _frames(owners, pages) == frames:
            return mms
    except (_Unclear, OSError):
        pass
    return None


def _frames(tasks: Sequence[Task], pages: set[tuple[Ino, int]]) -> _Frames:
    frames: _Frames = {}
    for task in tasks:
        with Pagemap(task.pid) as pagemap:
            for run in task.present:
                for index, entry in enumerate(pagemap.entries(run.address, run.nr_pages), run.index):
                    if not (entry.present and entry.is_file and entry.pfn):
                        raise _Unclear("no frame")
                    if (run.mapping, index) in pages:
                        frames.setdefault((run.mapping, index), Counter())[entry.pfn] += 1
    return frames


def _mapcounts(frames: Counter[int]) -> Counter[int]:
    found: Counter[int] = Counter()
    for name in ("kpageflags", "kpagecount"):
        file = os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for pfn in frames:
                (value,) = struct.unpack("=Q", os.pread(file, 8, pfn * 8))
                if name == "kpagecount":
                    found[pfn] = value
                elif value & _KPF_COMPOUND:
                    raise _Unclear("part of a large folio")
        except struct.error as error:
            raise OSError(errno.EIO, f"/proc/{name} is short") from error
        finally:
            os.close(file)
    return found
