"""Making media bad and good again, and looking for what is bad: what ``ndctl inject-error`` and an ARS do.

Offsets and lengths are device bytes. Everything is rounded out to 512-byte sectors, and the result says to
what.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from daxemu.errors import InvalidArgument
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, SECTOR_SIZE, page_align_down, page_align_up

CORRUPT_PIECE = 1 << 20
"""Bytes that are corrupted in one step: 4 ms. A multiple of the 4 bytes that ``random`` makes at once: the
bytes of a seed do not depend on the pieces.
"""


def check_range(offset: int, length: int, size: int, what: str) -> None:
    """Raises InvalidArgument unless ``[offset, offset + length)`` is a range inside ``what``'s ``size``
    bytes.
    """
    if offset < 0:
        raise InvalidArgument(f"offset {offset} is negative: give an offset from 0 to {size - 1} of {what}")
    if length <= 0:
        raise InvalidArgument(f"length {length} is not positive: give at least one byte of {what}")
    if offset + length > size:
        raise InvalidArgument(f"{offset:#x}+{length:#x} is past the end of {what}, which has {size:#x} bytes")


def inject(pmem: Pmem, offset: int, length: int, *, latent: bool = False) -> Range:
    """As :func:`inject_all`, one range."""
    (bad,) = inject_all(pmem, [Range(offset, offset + length)], latent=latent)
    return bad


def inject_all(pmem: Pmem, ranges: Sequence[Range], *, latent: bool = False) -> list[Range]:
    """Poison byte ranges. Unless ``latent`` the driver learns of it at once: they are in badblocks.

    Returns what is bad now of each. Raises InvalidArgument for one outside the device, NoSpace if it cannot
    be recorded; then nothing has changed. Nobody is signalled by this: :func:`failed_pages` says what to give
    to memory_failure().
    """
    for start, end in ranges:
        check_range(start, end - start, pmem.dax.size, "the device")
    bad = pmem.dax.add_poison(*ranges)
    if not latent:
        pmem.badblocks.populate(Range(r.start // SECTOR_SIZE, r.end // SECTOR_SIZE) for r in bad)
    return bad


def uninject(pmem: Pmem, offset: int, length: int) -> list[Range]:
    """Make the range healthy again; returns the byte ranges that were poison. Their bytes are zeros from now
    on.

    What was there is lost: hardware clears by writing, and nobody has anything to write. Whole pages are
    given back to the host, so whoever uses them reserves them anew. Raises InvalidArgument for a range
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


def scrub(pmem: Pmem) -> list[Range]:
    """An address range scrub: latent poison becomes known. Returns the byte ranges newly in badblocks."""
    return [new for part in scrub_in_pieces(pmem, 1024) for new in part]


def scrub_in_pieces(pmem: Pmem, count: int) -> Iterator[list[Range]]:
    """As :func:`scrub`, up to ``count`` ranges of poison at a time, in order of their offsets."""
    if pmem.badblocks.count == pmem.media.poison.total:
        return  # known poison is poison: so all of it is known
    for bad in pmem.dax.poisoned_in_pieces(Range(0, pmem.dax.size), count):
        new = pmem.badblocks.populate(Range(r.start // SECTOR_SIZE, r.end // SECTOR_SIZE) for r in bad)
        yield [Range(r.start * SECTOR_SIZE, r.end * SECTOR_SIZE) for r in new]


def corrupt(pmem: Pmem, offset: int, length: int, seed: int) -> None:
    """Change every byte of the range that is no poison, to what ``seed`` says. Nothing is made bad by it.

    Raises InvalidArgument for a range outside the device.
    """
    for _ in corrupt_in_pieces(pmem, offset, length, seed):
        pass


def corrupt_in_pieces(pmem: Pmem, offset: int, length: int, seed: int) -> Iterator[Range]:
    """As :func:`corrupt`, and yield each piece of at most CORRUPT_PIECE bytes once it is changed."""
    check_range(offset, length, pmem.dax.size, "the device")
    noise = random.Random(seed)
    for at in range(offset, offset + length, CORRUPT_PIECE):
        piece = Range(at, min(at + CORRUPT_PIECE, offset + length))
        flips = np.maximum(np.frombuffer(noise.randbytes(piece.length), np.uint8), 1)
        for part in RangeSet(pmem.dax.poisoned(*_span(piece))).gaps(*piece):
            pmem.dax.reserve(part.start, part.length)
            _flip(pmem.dax.direct_access(part.start, part.length), flips[part.start - at : part.end - at])
        yield piece


def _span(part: Range) -> tuple[int, int]:
    return part.start, part.length


def _flip(media: memoryview, flips: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """Exclusive or, in place; no view of the media is left."""
    np.bitwise_xor(np.frombuffer(media, np.uint8), flips, out=np.frombuffer(media, np.uint8))


def failed_pages(pmem: Pmem, bad: Range) -> tuple[int, int]:
    """``(pfn, nr_pages)`` of the pages that hold any byte of ``bad``."""
    first = page_align_down(bad.start)
    return pmem.pfn_of(first), (page_align_up(bad.end) - first) >> PAGE_SHIFT
