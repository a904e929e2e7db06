"""Verbs on long ranges of a file in pieces. Each verb is a generator, and yields between two pieces.

At each yield the filesystem is consistent, and the verb is done for a prefix of the range (when a file is
shortened: for a suffix). XFS also has one transaction for each extent: xfs_itruncate_extents(),
xfs_free_file_space(), xfs_alloc_file_space(). Positions are bytes where a verb takes bytes, else blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from daxemu.errors import NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.fs.file_data import FileData
from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import DIV_ROUND_UP

PIECE_BLOCKS = (16 << 20) // PAGE_SIZE
"""Number of blocks allocated in one step: 16 MiB of memory to zero, 5 ms."""
PIECE_LINKS = 512
"""Number of links made or removed in one step: 10 ms."""


Result = TypeVar("Result")


def whole(steps: Generator[object, None, Result]) -> Result:
    """Run all ``steps`` at once. Return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result


def _next(extents: ExtentMap, start: Block, end: Block) -> Block:
    return min(start + PIECE_BLOCKS, extents.piece(start, end, PIECE_LINKS))


def shorten(data: FileData, extents: ExtentMap, size: int) -> Iterator[int]:
    """Remove all bytes of a file beyond byte ``size``, from the end on. Yields the size that the file may
    have meanwhile.

    Raises MediaError, with nothing changed, if the block with byte ``size`` is poisoned.
    """
    end = DIV_ROUND_UP(size, PAGE_SIZE)
    data.check_edges(extents, size, size)
    while (at := extents.last_piece(end, PIECE_LINKS)) > end:
        data.remove(extents, at, MAX_FILE_SIZE // PAGE_SIZE)
        yield at * PAGE_SIZE
    data.zero_tail(extents, size)
    data.remove(extents, end, MAX_FILE_SIZE // PAGE_SIZE)


def punch(data: FileData, extents: ExtentMap, start: int, end: int) -> Iterator[None]:
    """See FileData.punch. Raises MediaError, with nothing changed, if an edge lies in a poisoned block."""
    data.check_edges(extents, start, end)
    last = DIV_ROUND_UP(end, PAGE_SIZE)
    while (stop := extents.piece(start // PAGE_SIZE, last, PIECE_LINKS) * PAGE_SIZE) < end:
        data.punch(extents, start, stop)
        start = stop
        yield
    data.punch(extents, start, end)


def zero(data: FileData, allocator: Allocator, extents: ExtentMap, start: int, end: int) -> Iterator[None]:
    """See FileData.zero. Raises as :func:`punch`; NoSpace, with nothing changed if the device is full now."""
    data.check_edges(extents, start, end)
    last = DIV_ROUND_UP(end, PAGE_SIZE)
    allocator.check_free(last - start // PAGE_SIZE)
    while (stop := _next(extents, start // PAGE_SIZE, last) * PAGE_SIZE) < end:
        data.zero(extents, start, stop)
        start = stop
        yield
    data.zero(extents, start, end)


def preallocate(
    data: FileData, allocator: Allocator, extents: ExtentMap, first: Block, last: Block
) -> Iterator[None]:
    """See FileData.preallocate. Raises NoSpace; then all filled holes are holes again."""
    wanted, at = 0, first
    while at < last:
        stop = extents.piece(at, last, PIECE_LINKS)
        wanted += sum(hole.length for hole in extents.holes(at, stop))
        at = stop
        if at < last:
            yield
    allocator.check_free(wanted)
    filled: list[Range] = []
    at = first
    try:
        while at < last:
            stop = _next(extents, at, last)
            filled += data.preallocate(extents, at, stop)
            at = stop
            if at < last:
                yield
    except NoSpace:
        for number, hole in enumerate(reversed(filled), 1):
            data.remove(extents, *hole)
            if number % PIECE_LINKS == 0:
                yield
        raise


def links_to_share(
    source: ExtentMap, first: Block, target: ExtentMap, at: Block, blocks: int
) -> Iterator[int]:
    """Yield numbers of links in steps of PIECE_LINKS, up to the largest number that :func:`share` can add."""
    replaced = target.count(at, at + blocks)
    # A piece that ends inside a link of the source leaves one link more in the target.
    most = 2 + source.count(first, first + blocks) + DIV_ROUND_UP(replaced, PIECE_LINKS)
    yield from range(PIECE_LINKS, most, PIECE_LINKS)
    yield most


def share(
    data: FileData,
    ensure_links: Callable[[int], None],
    source: ExtentMap,
    first: Block,
    target: ExtentMap,
    at: Block,
    blocks: int,
) -> Iterator[int]:
    """Share ``blocks`` blocks of ``source`` from block ``first`` on with ``target``, at block ``at``. Yields
    the number of blocks shared so far, the last time all of them.

    ``ensure_links`` raises NoSpace if the metadata region has no room for so many additional links: before a
    piece, where another verb used the room of :func:`links_to_share`. Precondition: the ranges do not overlap
    if both maps are one.
    """
    done = 0
    while done < blocks:
        stop = source.piece(first + done, first + blocks, PIECE_LINKS) - first
        stop = min(stop, target.piece(at + done, at + blocks, PIECE_LINKS) - at)
        ensure_links(2 + source.count(first + done, first + stop))
        data.remove(target, at + done, at + stop)
        target.clone_from(source, first + done, stop - done, at + done)
        done = stop
        yield done
