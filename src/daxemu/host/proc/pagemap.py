"""/proc/PID/pagemap: page tables of a process (Documentation/admin-guide/mm/pagemap.rst).

Addresses are bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

from daxemu.ranges import Range, merged
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PHYS_PFN

# uapi/linux/fs.h
_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
_SCAN_ARG = struct.Struct("=12Q")
_PAGE_REGION = struct.Struct("=3Q")
_REGIONS = 256

_PM_PRESENT = 1 << 63
_PM_SWAP = 1 << 62
_PM_FILE = 1 << 61
_PM_PFN = (1 << 55) - 1
_ENTRY = 8  # bytes
# linux/swapops.h, linux/swap.h: type of a swap entry, and the type of no swap file
_SWAP_TYPE, _SWP_PTE_MARKER = 31, 31
_CHUNK = 1 << 16  # pages looked at in one read(2) where PAGEMAP_SCAN is missing


class PageEntry(NamedTuple):
    """64-bit word of one page."""

    word: int

    @property
    def present(self) -> bool:
        """The page is in the page tables."""
        return bool(self.word & _PM_PRESENT)

    @property
    def swapped(self) -> bool:
        """The page is swapped out."""
        return bool(self.word & _PM_SWAP)

    @property
    def is_marker(self) -> bool:
        """The page is not there, but marked, as by a write-protection of userfaultfd(2). Such a page counts
        as swapped out. Needs CAP_SYS_ADMIN.
        """
        return not self.present and self.swapped and self.word & _SWAP_TYPE == _SWP_PTE_MARKER

    @property
    def is_file(self) -> bool:
        """The page is a file's (or shared memory), not a private copy."""
        return bool(self.word & _PM_FILE)

    @property
    def pfn(self) -> int:
        """Page frame number of a present page; 0 without CAP_SYS_ADMIN."""
        return self.word & _PM_PFN


class Pagemap:
    """Open pagemap of a process; a context manager that closes the file.

    Raises FileNotFoundError or ProcessLookupError where the process is gone, PermissionError where the caller
    may not look into the process.
    """

    def __init__(self, pid: int | str) -> None:
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Pagemap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def entries(self, address: int, nr_pages: int) -> list[PageEntry]:
        """Return the entries of ``nr_pages`` pages from ``address`` on; fewer if the address space ends."""
        return list(map(PageEntry, self._words(address, nr_pages)))

    def present_in(self, start: int, end: int, *, copies: bool = False) -> Iterator[Range]:
        """Yield the address ranges in ``[start, end)`` with pages of the file itself present.

        With ``copies``, yield the address ranges of private copies instead, swapped out or not.

        The time is in proportion to the page tables (PAGEMAP_SCAN, Linux 6.7); before that release, to the
        range.
        """
        try:
            yield from merged(self._scan(start, end, copies))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            yield from merged(self._read(start, end, copies))

    def has_present(self, start: int, end: int) -> bool:
        """Return True if any page of the file itself is present in ``[start, end)``. Raises OSError."""
        try:
            return next(self._scan(start, end, most=1), None) is not None
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return next(self._read(start, end, copies=False), None) is not None

    def can_scan(self) -> bool:
        """Return whether this kernel has PAGEMAP_SCAN."""
        try:
            list(self._scan(0, PAGE_SIZE))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return False
        return True

    def _words(self, address: int, nr_pages: int) -> array[int]:
        raw = os.pread(self._fd, nr_pages * _ENTRY, PHYS_PFN(address) * _ENTRY)
        return array("Q", raw[: len(raw) // _ENTRY * _ENTRY])

    def _scan(self, start: int, end: int, copies: bool = False, most: int = 0) -> Iterator[Range]:
        regions = array("B", bytes(_REGIONS * _PAGE_REGION.size))
        address, _ = regions.buffer_info()
        # inverted, all of, any of, returned
        categories = (0, _PAGE_IS_PRESENT | _PAGE_IS_FILE, 0, _PAGE_IS_FILE)
        if copies:
            categories = (_PAGE_IS_FILE, _PAGE_IS_FILE, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, _PAGE_IS_FILE)
        while start < end:
            argument = bytearray(
                _SCAN_ARG.pack(_SCAN_ARG.size, 0, start, end, 0, address, _REGIONS, most, *categories)
            )
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument, True)
            filled = memoryview(regions)[: count * _PAGE_REGION.size]
            for first, last, _ in _PAGE_REGION.iter_unpack(filled):
                yield Range(first, last)
            walked = _SCAN_ARG.unpack(argument)[4]
            if walked <= start:
                return
            start = walked

    def _read(self, start: int, end: int, copies: bool) -> Iterator[Range]:
        there = _PM_PRESENT | _PM_SWAP if copies else _PM_PRESENT
        for low in range(start, end, _CHUNK * PAGE_SIZE):
            high = min(end, low + _CHUNK * PAGE_SIZE)
            for index, word in enumerate(self._words(low, PHYS_PFN(high - low))):
                if word & there and bool(word & _PM_FILE) != copies:
                    yield Range(low + index * PAGE_SIZE, low + (index + 1) * PAGE_SIZE)
