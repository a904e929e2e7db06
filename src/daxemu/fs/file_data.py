"""The bytes of files: read, write with copy on write, and the effect of poison (fs/dax.c, xfs_reflink.c).

Poison counts by page, as in the kernel: one poisoned sector makes the block unreadable, and only a write of
the whole block clears the poison.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from daxemu.errors import MediaError, NoSpace, PartialOverPoison
from daxemu.fs.allocator import Allocator
from daxemu.fs.data_ops import DataOps, Origin
from daxemu.fs.extents import ExtentMap, Mapping
from daxemu.fs.rmap import Link, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet, merged, paired
from daxemu.uapi import PAGE_SIZE, Block, page_align_down, page_align_up
from daxemu.units import DIV_ROUND_UP, blocks_inside, blocks_of

Buffer = bytes | bytearray | memoryview


class Stored(NamedTuple):
    """The result of a store: ``cleared`` device byte ranges, and file byte ranges ``lost`` to poison."""

    cleared: list[Range]
    lost: list[Range]


class _Segment(NamedTuple):
    """Blocks ``[start, end)`` of a file that a store handles alike.

    ``copy``: the segment needs new blocks.
    """

    start: Block
    end: Block
    link: Link | None
    copy: bool

    def dev_block(self, block: Block) -> Block:
        assert self.link is not None
        return self.link.dev_block + block - self.link.file_block


class FileData:
    """Moves bytes between files and the media.

    Offsets are bytes of the file. Sizes and times are the caller's task.
    """

    def __init__(
        self, dax: DaxDevice, rmap: Rmap, allocator: Allocator, ensure_links: Callable[[int], None]
    ) -> None:
        """``ensure_links`` raises NoSpace if the metadata region has no room for so many additional links."""
        self._dax = dax
        self._rmap = rmap
        self._allocator = allocator
        self._ensure_links = ensure_links
        self.watcher: DataOps | None = None

    # -- reading

    def read(self, extents: ExtentMap, offset: int, length: int) -> Buffer:
        """Return the bytes ``[offset, offset + length)``; holes read as zeros.

        If one run has all bytes, the result is a view of the media. Raises MediaError if any page of the
        range is poisoned: all or nothing, because a short answer would mean end of file.
        """
        end = offset + length
        first, last = offset // PAGE_SIZE, DIV_ROUND_UP(end, PAGE_SIZE)
        pieces: list[Buffer] = []
        for run in extents.lookup(first, last):
            base = run.file_block * PAGE_SIZE
            part = Range(base, base + run.length * PAGE_SIZE).clip(offset, end)
            hole = run.link is None
            pieces.append(
                bytes(part.length) if hole else self._view(run)[part.start - base : part.end - base]
            )
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _view(self, run: Mapping) -> memoryview:
        if self.watcher is not None:
            self.watcher.verify(Range(run.dev_block, run.dev_block + run.length))
        return self._dax.direct_access(run.dev_block * PAGE_SIZE, run.length * PAGE_SIZE)

    # -- writing

    def store(
        self, extents: ExtentMap, offset: int, data: Buffer, *, from_cache: bool, zeroing: bool = False
    ) -> Stored:
        """Write ``data`` at ``offset``. Shared blocks are copied first.

        A write of a whole page clears the poison of the page, unless ``from_cache``: the page cache writes
        back stores made through a mapping. On persistent memory such a store had reached the media before the
        failure. So the store is lost and does not clear poison.

        Raises MediaError if an edge of the range lies inside a poisoned page (PartialOverPoison if the page
        is not shared, unless ``zeroing``), NoSpace if there are not enough blocks. Then nothing has changed.
        """
        end = offset + len(data)
        first, last = offset // PAGE_SIZE, DIV_ROUND_UP(end, PAGE_SIZE)
        segments = list(self._segments(extents, first, last))
        if not from_cache:
            self._refuse_partial(segments, offset, end, zeroing=zeroing)
        # Blocks written whole need no reservation before. A watcher expects new blocks to be zero.
        whole = offset % PAGE_SIZE == 0 and end % PAGE_SIZE == 0
        fresh = self._allocate(extents, segments, first, reserve=not whole or self.watcher is not None)
        view = memoryview(data)
        cleared: list[Range] = []
        lost: list[Range] = []
        origin = Origin.MAPPED if from_cache else Origin.SYSCALL
        touched = self._store_begins(segments, fresh, origin) if self.watcher is not None else []
        try:
            placed = self._place(segments, offset, view, fresh)
        except NoSpace:  # the new allocation may commit to make room, so reserve the memory first
            fresh = self._allocate(extents, segments, first, reserve=True)
            placed = self._place(segments, offset, view, fresh)
        for segment in segments:
            if segment.copy:
                self._map(extents, segment, placed)
            else:
                start, stop = max(offset, segment.start * PAGE_SIZE), min(end, segment.end * PAGE_SIZE)
                chunk = view[start - offset : stop - offset]
                self._store_in_place(segment, start, chunk, cleared, lost, from_cache=from_cache)
        if self.watcher is not None:
            self.watcher.store_done(touched, origin)
        return Stored(cleared, lost)

    def copy_block(self, extents: ExtentMap, block: Block) -> Block:
        """Copy one shared block of a file to a new block, and map the new block; return it.

        As a store of the block's own bytes, at a third of the time. Raises MediaError if the block is
        poisoned, NoSpace. Then nothing has changed.
        """
        source = self.read(extents, block * PAGE_SIZE, PAGE_SIZE)
        here = [Range(block, block + 1)]
        if self.watcher is None:
            self._ensure_links(2 + self._allocator.max_runs(here))
            (fresh,) = self._allocator.allocate_for(extents, here, extents.goal(block), reserve=False)
            try:
                self._dax.copy_from_iter(fresh.start * PAGE_SIZE, memoryview(source))
            except NoSpace:  # the general way reserves the memory first
                self._allocator.free(fresh)
            else:
                for run in extents.remove(block, block + 1):
                    self._allocator.free(run)
                extents.insert(block, fresh.start, 1)
                return fresh.start
        self.store(extents, block * PAGE_SIZE, source, from_cache=False)
        return extents.lookup(block, block + 1)[0].dev_block

    def _store_begins(self, segments: list[_Segment], fresh: list[Range], origin: Origin) -> list[Range]:
        """Announce the blocks of a store to the watcher.

        If the watcher refuses, free the ``fresh`` blocks.
        """
        assert self.watcher is not None
        starts = [(s.dev_block(s.start), s.end - s.start) for s in segments if not s.copy]
        touched = [*(Range(start, start + length) for start, length in starts), *fresh]
        try:
            self.watcher.store_begins(touched, origin)
        except BaseException:
            for run in fresh:
                self._allocator.free(run)
            raise
        return touched

    def _segments(self, extents: ExtentMap, first: Block, last: Block) -> Iterator[_Segment]:
        for run in extents.lookup(first, last):
            end = run.file_block + run.length
            if run.link is None:
                yield _Segment(run.file_block, end, None, copy=True)
                continue
            if run.link.proxy is None:
                yield _Segment(run.file_block, end, run.link, copy=False)
                continue
            shared = self._rmap.shared_parts(run.link, run.dev_block, run.dev_block + run.length)
            delta = run.file_block - run.dev_block
            parts = [(r, True) for r in shared]
            parts += [(r, False) for r in shared.gaps(run.dev_block, run.dev_block + run.length)]
            for part, copy in sorted(parts):
                yield _Segment(part.start + delta, part.end + delta, run.link, copy)

    def _refuse_partial(self, segments: list[_Segment], offset: int, end: int, *, zeroing: bool) -> None:
        for edge in {offset, end}:
            if edge % PAGE_SIZE == 0:
                continue
            block = edge // PAGE_SIZE
            for segment in segments:
                if segment.link is None or not segment.start <= block < segment.end:
                    continue
                try:
                    if self.watcher is not None:
                        self.watcher.verify(Range(segment.dev_block(block), segment.dev_block(block) + 1))
                    self._dax.direct_access(segment.dev_block(block) * PAGE_SIZE, PAGE_SIZE)
                except MediaError as error:
                    # The kernel reads a block before it copies or partly zeroes the block: the read is EIO.
                    if segment.copy or zeroing:
                        raise
                    raise PartialOverPoison(str(error), error.ranges) from error

    def _allocate(
        self, extents: ExtentMap, segments: list[_Segment], first: Block, *, reserve: bool
    ) -> list[Range]:
        pieces = list(merged((s.start, s.end) for s in segments if s.copy))
        if not pieces:
            return []
        # Each segment cuts at most one link in two, and the new blocks may come in several runs.
        copies = sum(s.copy for s in segments)
        self._ensure_links(2 * copies + self._allocator.max_runs(pieces))
        return self._allocator.allocate_for(extents, pieces, extents.goal(first), reserve=reserve)

    def _place(
        self, segments: list[_Segment], offset: int, view: memoryview, fresh: list[Range]
    ) -> deque[tuple[Block, Range]]:
        """Fill new blocks with ``view``, and with the rest of shared edge blocks. Nothing is mapped yet.

        Return (file block, device blocks) in order. Raises NoSpace; then the ``fresh`` blocks are freed.
        """
        pieces = [Range(segment.start, segment.end) for segment in segments if segment.copy]
        placed = deque((hole.start, run) for hole, run in paired(pieces, fresh))
        edges = [edge for s in segments if s.copy for edge in self._edges(s, offset, offset + len(view))]
        try:
            for block, run in placed:
                self._put(run, block * PAGE_SIZE, offset, view, edges)
        except NoSpace:
            for run in fresh:
                self._allocator.free(run)
            raise
        return placed

    def _map(self, extents: ExtentMap, segment: _Segment, placed: deque[tuple[Block, Range]]) -> None:
        """Map the new blocks of a segment in place of the old blocks."""
        freed = extents.remove(segment.start, segment.end) if segment.link is not None else []
        while placed and placed[0][0] < segment.end:
            block, run = placed.popleft()
            extents.insert(block, run.start, run.length)
        for run in freed:
            self._allocator.free(run)

    def _edges(self, segment: _Segment, start: int, stop: int) -> list[tuple[int, bytes]]:
        """Return the bytes of the first and last block of a shared segment outside ``[start, stop)``.

        Each comes with its offset in the file.
        """
        if segment.link is None:
            return []
        edges = []
        base = segment.dev_block(segment.start) * PAGE_SIZE - segment.start * PAGE_SIZE
        for low, high in ((segment.start * PAGE_SIZE, start), (stop, segment.end * PAGE_SIZE)):
            # A store from the page cache ends at the end of the file. The rest of its last block is zero.
            if low < high and not self._dax.is_poisoned(base + low, high - low):
                edges.append((low, bytes(self._dax.direct_access(base + low, high - low))))
        return edges

    def _put(
        self, blocks: Range, at: int, start: int, chunk: memoryview, edges: list[tuple[int, bytes]]
    ) -> None:
        """Fill new ``blocks`` from ``chunk`` and ``edges``.

        ``at``: offset of the blocks in the file. ``start``: offset of ``chunk`` in the file.
        """
        window = Range(at, at + blocks.length * PAGE_SIZE)
        pieces: list[tuple[int, Buffer]] = [*edges, (start, chunk)]
        for position, piece in pieces:
            if part := Range(position, position + len(piece)).clip(*window):
                inside = slice(part.start - position, part.end - position)
                dev = blocks.start * PAGE_SIZE + part.start - at
                self._dax.copy_from_iter(dev, memoryview(piece)[inside])

    def _store_in_place(
        self,
        segment: _Segment,
        start: int,
        chunk: memoryview,
        cleared: list[Range],
        lost: list[Range],
        *,
        from_cache: bool,
    ) -> None:
        base = segment.dev_block(segment.start) * PAGE_SIZE - segment.start * PAGE_SIZE
        dev = Range(base + start, base + start + len(chunk))
        first, last = page_align_down(dev.start), page_align_up(dev.end)
        if not self._dax.is_poisoned(first, last - first):
            self._dax.direct_access(dev.start, dev.length)[:] = chunk
            return
        poisoned = self._dax.poisoned_pages(dev)
        for good in poisoned.gaps(*dev):
            self._dax.direct_access(good.start, good.length)[:] = chunk[
                good.start - dev.start : good.end - dev.start
            ]
        for part in poisoned.overlapping(*dev):
            if from_cache:
                lost.append(Range(part.start - base, part.end - base))
                if self.watcher is not None:
                    self.watcher.store_lost(blocks_of(part))
            else:
                cleared += self._dax.recovery_write(
                    part.start, chunk[part.start - dev.start : part.end - dev.start]
                )

    # -- removing

    def remove(self, extents: ExtentMap, start: Block, end: Block) -> None:
        """Make blocks ``[start, end)`` a hole.

        Blocks without another owner are freed, even poisoned blocks.
        """
        for run in extents.remove(start, end):
            self._allocator.free(run)

    def zero_tail(self, extents: ExtentMap, size: int) -> None:
        """Zero the rest of the block with byte ``size``, so that a longer file reads zeros there.

        Raises MediaError if the block is poisoned, NoSpace if the block is shared and no other is free.
        """
        if size % PAGE_SIZE:
            self._zero_in_block(extents, size, page_align_up(size))

    def clear_beyond(self, extents: ExtentMap, size: int, end: Block = 1 << 52) -> None:
        """Zero all mapped and readable bytes of a file from byte ``size`` to block ``end``, on the media,
        even in shared blocks. Poison stays.
        """
        for run in extents.runs(size // PAGE_SIZE, end):
            if run.link is None:
                continue
            base = run.dev_block * PAGE_SIZE
            start = base + max(0, size - run.file_block * PAGE_SIZE)
            stop = base + run.length * PAGE_SIZE
            for part in RangeSet(self._dax.poisoned(start, stop - start)).gaps(start, stop):
                if part.length >= PAGE_SIZE or any(bytes(self._dax.read(part.start, part.length))):
                    self._dax.zero(part.start, part.length)

    def punch(self, extents: ExtentMap, start: int, end: int) -> None:
        """Make the bytes ``[start, end)`` zero: whole blocks become a hole, the edges are overwritten.

        Raises MediaError if an edge lies in a poisoned block, NoSpace as zero_tail(). Then whole blocks are
        unchanged.
        """
        whole = self._zero_edges(extents, start, end)
        if whole:
            self._ensure_links(1)
            self.remove(extents, *whole)

    def zero(self, extents: ExtentMap, start: int, end: int) -> None:
        """Make the bytes ``[start, end)`` zero. Whole blocks are replaced, so poisoned blocks are freed.

        Raises as punch(). Then no whole block has changed.
        """
        edges = {start // PAGE_SIZE, (end - 1) // PAGE_SIZE}
        cut = blocks_inside(Range(start, end))
        holes = [
            b for b in edges if not cut.start <= b < cut.end and extents.lookup(b, b + 1)[0].link is None
        ]
        targets = [*([cut] if cut else []), *(Range(block, block + 1) for block in holes)]
        # Each edge may lie in a shared block. A copy of that block cuts a link in three.
        self._ensure_links(5 + len(holes) + self._allocator.max_runs(targets))
        fresh = self._allocator.allocate_for(extents, targets)
        try:
            whole = self._zero_edges(extents, start, end)
        except BaseException:
            for run in fresh:
                self._allocator.free(run)
            raise
        self.remove(extents, *whole)
        extents.fill(targets, fresh)

    def _zero_edges(self, extents: ExtentMap, start: int, end: int) -> Range:
        """Overwrite the parts of partly covered blocks with zeros. Return the blocks covered whole."""
        whole = blocks_inside(Range(start, end))
        if start // PAGE_SIZE == (end - 1) // PAGE_SIZE and not whole:
            self._zero_in_block(extents, start, end)
            return Range(0, 0)
        self._zero_in_block(extents, start, whole.start * PAGE_SIZE)
        self._zero_in_block(extents, whole.end * PAGE_SIZE, end)
        return whole if whole else Range(0, 0)

    def _zero_in_block(self, extents: ExtentMap, start: int, end: int) -> None:
        block = start // PAGE_SIZE
        if start < end and extents.lookup(block, block + 1)[0].link is not None:
            self.store(extents, start, bytes(end - start), from_cache=False, zeroing=True)

    def check_edges(self, extents: ExtentMap, start: int, end: int) -> None:
        """Raise MediaError if a block partly covered by the bytes ``[start, end)`` is poisoned."""
        for edge in (start, end):
            (run,) = extents.lookup(edge // PAGE_SIZE, edge // PAGE_SIZE + 1)
            if edge % PAGE_SIZE and run.link is not None:
                self._dax.check_readable(run.dev_block * PAGE_SIZE, PAGE_SIZE)

    def preallocate(self, extents: ExtentMap, first: Block, last: Block) -> list[Range]:
        """Map the holes of blocks ``[first, last)`` to new zeroed blocks. Return the holes.

        Raises NoSpace; then nothing has changed.
        """
        holes = extents.holes(first, last)
        if holes:
            self._ensure_links(len(holes) + self._allocator.max_runs(holes))
            extents.fill(holes, self._allocator.allocate_for(extents, holes))
        return holes
