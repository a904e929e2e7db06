"""/proc/PID/maps: the mappings of a process (proc_pid_maps(5)).

Addresses are bytes, ``pgoff`` counts pages. The path, which ends a line, may hold any byte: the kernel
escapes a newline only.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

from daxemu.host.proc.procfs import cut_short, read_whole
from daxemu.ranges import Range
from daxemu.uapi import Ino
from daxemu.units import PFN_PHYS, PHYS_PFN

# uapi/linux/fs.h: PROCMAP_QUERY, since Linux 6.11
_PROCMAP_QUERY = 3 << 30 | 104 << 16 | ord("f") << 8 | 17
_QUERY = struct.Struct("=9Q4I2Q")
_VM_FLAGS = ((1, b"r"), (2, b"w"), (4, b"x"))
_VM_SHARED = 8
_COVERING_OR_NEXT = 0x10


class Vma(NamedTuple):
    """Mapping: the addresses ``[start, end)`` show a file from page ``pgoff`` on. A private mapping may show
    copies of pages.

    Without a file, ``dev`` is (0, 0) and ``ino`` 0.
    """

    start: int
    end: int
    pgoff: int
    ino: Ino
    dev: tuple[int, int]
    mode: bytes
    """Four letters: ``r``, ``w``, ``x`` (or ``-``), and ``s`` (shared) or ``p`` (private)."""

    @property
    def area(self) -> Range:
        """Addresses of the mapping."""
        return Range(self.start, self.end)

    @property
    def nr_pages(self) -> int:
        """Length of the mapping, in pages."""
        return PHYS_PFN(self.end - self.start)

    @property
    def pages(self) -> Range:
        """Pages of the file that the mapping covers."""
        return Range(self.pgoff, self.pgoff + self.nr_pages)

    @property
    def private(self) -> bool:
        """A store copies the page (MAP_PRIVATE)."""
        return self.mode[3:] == b"p"

    @property
    def writable(self) -> bool:
        """Shared, and for writing: stores reach the file."""
        return self.mode[1:2] == b"w" and not self.private

    @property
    def copies(self) -> bool:
        """Private, and for writing: a store copies the page."""
        return self.mode[1:2] == b"w" and self.private

    @property
    def executable(self) -> bool:
        """For executing."""
        return self.mode[2:3] == b"x"

    def page_at(self, address: int) -> int:
        """Return the page of the file at an address of the mapping."""
        return self.pgoff + PHYS_PFN(address - self.start)

    def pages_at(self, addresses: Range) -> Range:
        """Return the pages of the file at addresses of the mapping."""
        return Range(self.page_at(addresses.start), self.page_at(addresses.end))

    def addresses_of(self, pages: Range) -> Range:
        """Return the addresses of pages of the file."""
        return Range(self.address_of(pages.start), self.address_of(pages.end))

    def address_of(self, page: int) -> int:
        """Return the address of a page of the file; outside ``area`` where the mapping lacks the page."""
        return self.start + PFN_PHYS(page - self.pgoff)


def parse(raw: bytes, dev: tuple[int, int] | None = None) -> Iterator[Vma]:
    """Yield the mappings in ``raw``; with ``dev`` (major, minor), only those of files on that device.

    Raises ProcessLookupError where the last line is not whole.
    """
    if raw and raw[-1:] != b"\n":
        raise cut_short("maps")
    shown = b"" if dev is None else b"%02x:%02x" % dev
    if shown not in raw:
        return
    for line in raw.split(b"\n"):
        # A path may hold the numbers of the device, too.
        if shown in line and line and (fields := line.split(None, 5))[3] == (shown or fields[3]):
            addresses, mode, offset, device, ino, *_ = fields
            start, _, end = addresses.partition(b"-")
            major, _, minor = device.partition(b":")
            numbers = (int(major, 16), int(minor, 16)) if dev is None else dev
            yield Vma(int(start, 16), int(end, 16), PHYS_PFN(int(offset, 16)), int(ino), numbers, mode)


def read(pid: int, dev: tuple[int, int] | None = None) -> Iterator[Vma]:
    """Yield the mappings of a process; with ``dev``, only those of files on that device.

    Raises FileNotFoundError or ProcessLookupError where the process is gone, PermissionError where the caller
    may not look into the process.
    """
    return parse(read_whole(f"/proc/{pid}/maps"), dev)


def find_vma(pid: int, address: int) -> Vma | None:
    """``find_vma()``: return the mapping that holds ``address``; None if none does, or the process is gone.

    Asks the kernel for one mapping (PROCMAP_QUERY, Linux 6.11); before that release, reads all mappings.
    """
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            return _queried(file, address, 0)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            return None
        return _find_in_text(pid, address)


def within(pid: int, addresses: Range) -> Iterator[Vma]:
    """Yield the mappings that overlap ``addresses``, in order. Asks the kernel for these alone.

    Raises the exceptions of :func:`read`.
    """
    at = addresses.start
    with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
        while at < addresses.end:
            try:
                found = _queried(file, at, _COVERING_OR_NEXT)
            except FileNotFoundError:  # nothing is mapped from here on
                return
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                yield from (vma for vma in read(pid) if vma.area.clip(*addresses))
                return
            if found.start >= addresses.end:
                return
            yield found
            at = found.end


def _queried(file: FileIO, address: int, flags: int) -> Vma:
    """Return the answer to PROCMAP_QUERY. Raises FileNotFoundError if no mapping answers the query."""
    query = bytearray(_QUERY.pack(_QUERY.size, flags, address, *bytes(12)))
    fcntl.ioctl(file, _PROCMAP_QUERY, query)
    _, _, _, start, end, flags, _, offset, ino, major, minor, *_ = _QUERY.unpack(query)
    letters = b"".join(letter if flags & bit else b"-" for bit, letter in _VM_FLAGS)
    mode = letters + (b"s" if flags & _VM_SHARED else b"p")
    return Vma(start, end, PHYS_PFN(offset), ino, (major, minor), mode)


def _find_in_text(pid: int, address: int) -> Vma | None:
    try:
        return next((vma for vma in read(pid) if vma.start <= address < vma.end), None)
    except OSError:
        return None
