"""System calls that make an address space show a file: pure functions from runs of a file to batches.

Two plans exist:

- *In place*: for addresses that no program knows yet. The batch maps, then the range is registered with the
  userfaultfd, then shared blocks are write-protected.
- *Replacement*: for addresses that a program may touch at any moment. The new mapping is made at a scratch
  address, registered and write-protected there, and moved over the old mapping by mremap(MREMAP_FIXED).
  The kernel replaces a mapping in one step, and the registration and the protection move along
  (UFFD_FEATURE_EVENT_REMAP). At no moment can a store reach a shared block, or a touch a page that is
  neither registered nor the file's.

Addresses are bytes. Lengths are in proportion to the extents of a file, never to its pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from daxemu.fs.fault import FaultKind, FileRun
from daxemu.host.direct import syscalls
from daxemu.host.direct.syscalls import Syscall
from daxemu.host.direct.table import Area
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PFN_PHYS

RESERVE = 8 * PAGE_SIZE
"""Bytes of the reserve: eight VMAs. Where the kernel refuses another VMA, the address space gives up the
reserve to make addresses lazy: mremap(2) wants four VMAs (move_vma()), and the replacement of a part of a VMA
takes three.
"""
_PROT_READ = 1

Shows = Enum("Shows", ["LAZY", "MEDIA", "VOID"])
"""What addresses map: anonymous memory without a page, the media, or the empty file (SIGBUS)."""


class MappingPiece(NamedTuple):
    """Addresses of an area that map alike, by one mmap(2).

    ``offset``: byte of the device; 0 unless MEDIA. ``is_protected``: a store is an event of the userfaultfd.
    """

    area: Area
    addresses: Range
    shows: Shows
    offset: int = 0
    is_protected: bool = False

    def cut(self, addresses: Range) -> MappingPiece:
        """Return the piece cut to ``addresses``. Precondition: ``addresses`` are inside."""
        offset = self.offset + addresses.start - self.addresses.start if self.shows is Shows.MEDIA else 0
        return self._replace(addresses=addresses, offset=offset)

    def mmap(self, at: int, origin: int) -> Syscall:
        """Return the call that maps the piece at address ``at``. ``origin``: byte of the media file with byte
        0 of the device.
        """
        area, length = self.area, self.addresses.length
        if self.shows is Shows.MEDIA:
            return syscalls.mmap_media(at, length, area.prot, area.is_shared, origin + self.offset)
        if self.shows is Shows.VOID:
            return syscalls.mmap_void(at, length, area.prot)
        return syscalls.mmap_anonymous(at, length, area.prot)


class MappingPlan(NamedTuple):
    """``batch`` maps; then ``registered`` is registered, and ``protected`` write-protected; then ``move``
    moves the mappings over their places.
    """

    batch: list[Syscall]
    registered: Range
    protected: list[Range]
    move: list[Syscall]


def media_pieces(area: Area, runs: Iterable[FileRun]) -> Iterator[MappingPiece]:
    """Yield the pieces of an area that map the media. Holes, and blocks beyond the end, are left out."""
    first, last = area.blocks
    origin = area.addresses.start - PFN_PHYS(first)
    for run in runs:
        start, end = max(first, run.file_block), min(last, run.file_end)
        if run.kind is FaultKind.MAPPED and start < end:
            addresses = Range(origin + PFN_PHYS(start), origin + PFN_PHYS(end))
            offset = PFN_PHYS(run.dev_block + start - run.file_block)
            is_protected = (run.is_shared or run.is_watched) and area.is_shared
            yield MappingPiece(area, addresses, Shows.MEDIA, offset, is_protected)


def in_place(area: Area, pieces: Sequence[MappingPiece], origin: int) -> list[Syscall]:
    """Return the batch of a new area: lazy, but for ``pieces``.

    Precondition: no program uses the addresses of the area.
    """
    whole = MappingPiece(area, area.addresses, Shows.LAZY)
    maps_all = len(pieces) == 1 and pieces[0].addresses == area.addresses
    batch = [piece.mmap(piece.addresses.start, origin) for piece in ([] if maps_all else [whole])]
    return batch + [piece.mmap(piece.addresses.start, origin) for piece in pieces]


def replacement(pieces: Sequence[MappingPiece], scratch: Range, origin: int) -> MappingPlan:
    """Return the plan that replaces what the addresses of ``pieces`` map now.

    Precondition: the pieces fit into ``scratch``, with a page of distance between two pieces.
    """
    batch, protected, move = [], [], []
    at = scratch.start
    for piece in pieces:
        place = Range(at, at + piece.addresses.length)
        batch.append(piece.mmap(place.start, origin))
        if piece.is_protected:
            protected.append(place)
        move.append(syscalls.mremap(place.start, place.length, place.length, piece.addresses.start))
        at = place.end
    return MappingPlan(batch, Range(scratch.start, at), protected, move)


def reserve(at: int) -> list[Syscall]:
    """Return the batch that makes the reserve: pages without access and pages to read, in turn."""
    pages = range(at + PAGE_SIZE, at + RESERVE, 2 * PAGE_SIZE)
    batch = [syscalls.mmap_anonymous(at, RESERVE, 0)]
    return batch + [syscalls.mprotect(page, PAGE_SIZE, _PROT_READ) for page in pages]
