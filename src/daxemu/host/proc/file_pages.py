"""Which page of which file a process shows at an address, just now (``find_vma()``).

Addresses are bytes, ``FilePage.pgoff`` counts pages. A process that is gone shows nothing.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from typing import NamedTuple

from daxemu.uapi import PAGE_SHIFT

# uapi/linux/fs.h: PROCMAP_QUERY, since Linux 6.11
_PROCMAP_QUERY = 3 << 30 | 104 << 16 | ord("f") << 8 | 17
_QUERY = struct.Struct("=9Q4I2Q")


class FilePage(NamedTuple):
    """Page ``pgoff`` of a file anywhere on the host."""

    major: int
    minor: int
    ino: int
    pgoff: int


class _Mapping(NamedTuple):
    """Addresses ``[start, end)`` show a file from page ``first`` on."""

    start: int
    end: int
    first: FilePage

    def page_at(self, address: int) -> FilePage:
        return self.first._replace(pgoff=self.first.pgoff + ((address - self.start) >> PAGE_SHIFT))


def page_at(pid: int, address: int) -> FilePage | None:
    """The page of a file that process (or thread) ``pid`` shows at ``address``; None if none."""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
            query = bytearray(_QUERY.pack(_QUERY.size, 0, address, *bytes(12)))
            fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            return None
        return next((m.page_at(address) for m in _mappings(pid) if m.start <= address < m.end), None)
    _, _, _, start, end, _, _, offset, ino, major, minor, *_ = _QUERY.unpack(query)
    return _Mapping(start, end, FilePage(major, minor, ino, offset >> PAGE_SHIFT)).page_at(address)


def find_page(pid: int, page: FilePage, address: int) -> int | None:
    """Where a process shows ``page``: at ``address`` if it is there, else anywhere; None if nowhere."""
    if page_at(pid, address) == page:
        return address
    for mapping in _mappings(pid):
        there = mapping.start + ((page.pgoff - mapping.first.pgoff) << PAGE_SHIFT)
        if mapping.start <= there < mapping.end and mapping.page_at(there) == page:
            return there
    return None


def _mappings(pid: int) -> Iterator[_Mapping]:
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            lines = file.read().rstrip(b"\n").split(b"\n")  # a name may hold "\r"
    except OSError:
        return
    for line in filter(None, lines):
        addresses, _, offset, dev, ino, *_ = line.split(None, 5)
        start, end = addresses.split(b"-")
        major, minor = (int(number, 16) for number in dev.split(b":"))
        first = FilePage(major, minor, int(ino), int(offset, 16) >> PAGE_SHIFT)
        yield _Mapping(int(start, 16), int(end, 16), first)
