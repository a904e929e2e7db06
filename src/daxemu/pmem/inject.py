"""Poison, clear and scrub the media: the counterpart of ``ndctl inject-error`` and of an address range scrub.

Offsets and lengths are device bytes. Every range is rounded out to 512-byte sectors; the result is the
rounded range.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from daxemu.errors import InvalidArgument
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import ByteRange, Range, RangeSet
from daxemu.uapi import page_align_down, page_align_up
from daxemu.units import PHYS_PFN, bytes_of_sectors, sectors_of

CORRUPT_PIECE = 1 << 20
"""Bytes corrupted in one step, which takes 4 ms.

``random`` makes 4 bytes at once. The piece is a multiple of 4, so the bytes made from a seed do not depend on
the pieces.
"""


def check_range(offset: int, length: int, size: int, what: str) -> None:
    """Raise InvalidArgument unless ``[offset, offset + length)`` is inside the ``size`` bytes of ``what``."""
    if offset < 0:
        raise InvalidArgument(f"offset {offset} is negative: give an offset from 0 to {size - 1} of {what}")
    if length <= 0:
        raise InvalidArgument(f"length {length} is not positive: give at least one byte of {what}")
    if offset + length > size:
        raise InvalidArgument(f"{offset:#x}+{length:#x} is past the end of {what}, which has {size:#x} bytes")


def inject(pmem: Pmem, offset: int, length: int, *, latent: bool = False) -> ByteRange:
    """Poison one byte range, as :func:`inject_all`. Return the poisoned range."""
    (poisoned,) = inject_all(pmem, [Range(offset, offset + length)], latent=latent)
    return poisoned


def inject_all(pmem: Pmem, ranges: Sequence[ByteRange], *, latent: bool = False) -> list[ByteRange]:
    """Poison byte ranges. Return the poisoned range of each. Unless ``latent``, badblocks gets the sectors.

    Raises InvalidArgument for a range outside the device, NoSpace if the poison cannot be recorded; then no
    range has changed. No process is signalled: :func:`failed_pages` gives the arguments for memory_failure().
    """
    for start, end in ranges:
        check_range(start, end - start, pmem.dax.size, "the device")
    poisoned = pmem.dax.add_poison(*ranges)
    if not latent:
        pmem.badblocks.populate(sectors_of(r) for r in poisoned)
    return poisoned


def uninject(pmem: Pmem, offset: int, length: int) -> list[ByteRange]:
    """Clear the poison in a range. Return the byte ranges that were poisoned, and are zero now.

    The old data is lost: hardware clears poison by a write, and the only data to write is zeros. Whole pages
    are given back to the host, and must be reserved again before use. Raises InvalidArgument for a range
    outside the device.
    """
    check_range(offset, length, pmem.dax.size, "the device")
    cleared = pmem.dax.clear_poison(offset, length)
    for part in cleared:
        whole = Range(page_align_up(part.start), page_align_down(part.end))
        if not whole:
            whole = Range(part.end, part.end)
        else:
            pmem.dax.discard(whole.start, whole.length)
        for edge in (Range(part.start, whole.start), Range(whole.end, part.end)):
            if edge:
                pmem.dax.reserve(edge.start, edge.length)
                pmem.dax.zero(edge.start, edge.length)
    return cleared


def scrub(pmem: Pmem) -> list[ByteRange]:
    """Address range scrub: add latent poison to badblocks. Return the byte ranges added."""
    return [new for part in scrub_in_pieces(pmem, 1024) for new in part]


def scrub_in_pieces(pmem: Pmem, count: int) -> Iterator[list[ByteRange]]:
    """As :func:`scrub`, at most ``count`` ranges of poison at a time, in order of the offsets."""
    if pmem.badblocks.count == pmem.media.poison.total:
        return  # badblocks is a subset of the poison, so equal sizes mean equal sets
    for poisoned in pmem.dax.poisoned_in_pieces(Range(0, pmem.dax.size), count):
        new = pmem.badblocks.populate(sectors_of(r) for r in poisoned)
        yield [bytes_of_sectors(r) for r in new]


def corrupt(pmem: Pmem, offset: int, length: int, seed: int) -> None:
    """Change every byte of the range, except poison, to other bytes made from ``seed``. No poison is added.

    Raises InvalidArgument for a range outside the device.
    """
    for _ in corrupt_in_pieces(pmem, offset, length, seed):
        pass


def corrupt_in_pieces(pmem: Pmem, offset: int, length: int, seed: int) -> Iterator[ByteRange]:
    """As :func:`corrupt`, and yield each piece of at most CORRUPT_PIECE bytes after the change."""
    check_range(offset, length, pmem.dax.size, "the device")
    noise = random.Random(seed)
    for at in range(offset, offset + length, CORRUPT_PIECE):
        piece = Range(at, min(at + CORRUPT_PIECE, offset + length))
        flips = np.maximum(np.frombuffer(noise.randbytes(piece.length), np.uint8), 1)
        for part in RangeSet(pmem.dax.poisoned(*_span(piece))).gaps(*piece):
            pmem.dax.reserve(part.start, part.length)
            for some in pmem.dax.pieces(part.start, part.length):
                view = pmem.dax.direct_access(some.start, some.length)
                _flip(view, flips[some.start - at : some.end - at])
        yield piece


def _span(part: ByteRange) -> tuple[int, int]:
    return part.start, part.length


def _flip(media: memoryview, flips: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """XOR ``flips`` into ``media`` in place. No view of the media outlives the call."""
    np.bitwise_xor(np.frombuffer(media, np.uint8), flips, out=np.frombuffer(media, np.uint8))


def failed_pages(pmem: Pmem, poisoned: ByteRange) -> tuple[int, int]:
    """Return ``(pfn, nr_pages)`` of the pages that overlap the byte range ``poisoned``."""
    first = page_align_down(poisoned.start)
    return pmem.pfn_of(first), PHYS_PFN(page_align_up(poisoned.end) - first)
