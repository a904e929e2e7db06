"""Device bytes behind the file ranges or device ranges of a request."""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio

from daxemu.errors import InvalidArgument, NoDevice
from daxemu.fs.filesystem import Filesystem
from daxemu.host.mappings import Mappings
from daxemu.pmem.inject import check_range
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE, Ino, page_align_down
from daxemu.units import pages_at

Span = tuple[int, int]
"""First byte, and byte after the last. Not a Range: the garbage collector goes through all ranges of a large
request again and again, 36 ms for 190,000, but not through plain tuples of numbers.
"""

BATCH = 128
"""Ranges of one request that are looked up, poisoned or cleared in one step of the event loop."""


def check_present(pmem: Pmem) -> None:
    """Raise NoDevice after a removal."""
    if pmem.dax.is_leaving:
        raise NoDevice("the device was removed: daxemu umount, then mount it again")


async def resolve(
    pmem: Pmem, fs: Filesystem, mappings: Mappings, ino: Ino | None, ranges: list[tuple[int, int]]
) -> tuple[list[Span], int]:
    """Return the device byte ranges behind ``ranges`` of a file, and the number of bytes in holes.

    ``ranges``: (offset, length) in bytes. ``ino`` None is the device itself. Raises InvalidArgument for a
    range outside the file, or if all bytes are holes.
    """
    if not ranges:
        raise InvalidArgument("no range given: give at least one [offset, length]")
    size = pmem.dax.size if ino is None else fs.names.regular(ino)[0].size
    what = "the device" if ino is None else fs.names.path_of(ino)
    asked: list[Span] = []
    async for part in _in_pieces(ranges):
        for offset, length in part:
            check_range(offset, length, size, what)
            asked.append((offset, offset + length))
    if ino is None:
        return asked, 0
    found = await file_ranges(fs, ino, ranges)
    holes = sum(length for _, length in ranges) - sum(end - start for start, end in found)
    if holes:
        # A store through a mapping into a hole gets a block at its write-back.
        await mappings.write_back(ino)
        found = await file_ranges(fs, ino, ranges)
        holes = sum(length for _, length in ranges) - sum(end - start for start, end in found)
    if not found:
        raise InvalidArgument(
            "the range is a hole, with no media behind it: write there first, or see daxemu map FILE"
        )
    return found, holes


async def device_page(fs: Filesystem, mappings: Mappings, ino: Ino, offset: int) -> int | None:
    """Return the device offset of the page of a file that holds byte ``offset``; None for a hole."""
    for attempt in range(2):
        if found := await file_ranges(fs, ino, [(offset, 1)]):
            return page_align_down(found[0][0])
        if attempt == 0:
            await mappings.write_back(ino)
    return None


async def file_ranges(fs: Filesystem, ino: Ino, ranges: list[tuple[int, int]]) -> list[Span]:
    """Return device byte ranges of ranges of a file.

    Up to BATCH ranges with up to BATCH extents each are looked up at one moment. Larger requests are looked
    up in batches with a checkpoint in between: each batch is correct at the moment of its lookup.
    """
    found: list[Span] = []
    async for part in _in_pieces(ranges):
        for offset, length in part:
            end = offset + length
            while offset < end:
                extents = fs.extents_of(ino)
                last = extents.piece(*pages_at(offset, end - offset), BATCH)
                stop = min(end, last * PAGE_SIZE)
                found += [(r.start, r.end) for r in fs.device_ranges(ino, offset, stop - offset)]
                offset = stop
                if offset < end:
                    await trio.lowlevel.checkpoint()
    return found


async def _in_pieces(ranges: list[tuple[int, int]]) -> AsyncIterator[list[tuple[int, int]]]:
    """Yield BATCH ranges at a time, with a checkpoint in between."""
    for first in range(0, len(ranges), BATCH):
        if first:
            await trio.lowlevel.checkpoint()
        yield ranges[first : first + BATCH]
