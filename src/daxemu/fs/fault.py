"""Page faults of direct mappings: what a mapping shows at a block of a file (fs/dax.c, xfs_iomap.c).

A mapping of a file on persistent memory maps the device's own blocks. The filesystem decides each fault, and
names the blocks to map. Positions and lengths are blocks of the file.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from daxemu.errors import MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap, Mapping
from daxemu.fs.file_data import FileData
from daxemu.fs.inode import Inode
from daxemu.fs.rmap import Link, Rmap
from daxemu.ranges import Range
from daxemu.uapi import HPAGE_PMD_NR, PAGE_SIZE, PMD_SIZE, Block, Ino
from daxemu.units import DIV_ROUND_UP


class FaultKind(enum.Enum):
    """Content of a mapping at a run of blocks."""

    HOLE = "hole"
    """Zeros, until a store."""
    MAPPED = "mapped"
    """Device blocks. Poisoned blocks are among them: their pages are missing in the media."""
    BEYOND_EOF = "beyond EOF"
    """No page: an access is SIGBUS with BUS_ADRERR."""


class FileRun(NamedTuple):
    """A run of a file that a mapping shows alike (``struct iomap``).

    ``dev_block``: first device block; 0 unless MAPPED. ``is_shared``: True if a store needs a new block, so
    the mapping must be write-protected. ``is_watched``: True if the filesystem must know the first store to
    each block, for a repair strategy.
    """

    kind: FaultKind
    file_block: Block
    length: int
    dev_block: Block = 0
    is_shared: bool = False
    is_watched: bool = False

    @property
    def file_end(self) -> Block:
        return self.file_block + self.length


class MappingOps(Protocol):
    """The holder of direct mappings: the subscriber of Filesystem.follow()."""

    def changed(self, ino: Ino, blocks: Range) -> None:
        """Note that mappings of the file blocks may show other device blocks, or other rights, than before.

        Called in the middle of a change, so the callee must not call the filesystem. Called for each change
        of the extent map or the size, and where unshared blocks become shared. Not called where shared blocks
        become unshared: a mapping that stays write-protected is right.
        """

    def stored_to(self) -> Iterator[tuple[Ino, Range]]:
        """Yield the file blocks that programs can store to through shared mappings now."""


class FaultHandler:
    """Decides faults on the files of one filesystem."""

    def __init__(self, data: FileData, rmap: Rmap, allocator: Allocator) -> None:
        self._data = data
        self._rmap = rmap
        self._allocator = allocator

    # -- reading

    def runs(self, inode: Inode, extents: ExtentMap, blocks: Range) -> Iterator[FileRun]:
        """Yield ``blocks`` of a file as runs, in order, without gaps.

        Neighbours on the device that are shared alike are one run. Precondition: the file does not change
        during the iteration.
        """
        end = DIV_ROUND_UP(inode.size, PAGE_SIZE)
        last: FileRun | None = None
        for run in self._parts(extents, blocks.clip(0, end)):
            if last is not None and _continues(last, run):
                last = last._replace(length=last.length + run.length)
                continue
            if last is not None:
                yield last
            last = run
        if last is not None:
            yield last
        if blocks.end > max(end, blocks.start):
            start = max(end, blocks.start)
            yield FileRun(FaultKind.BEYOND_EOF, start, blocks.end - start)

    def _parts(self, extents: ExtentMap, blocks: Range) -> Iterator[FileRun]:
        for run in extents.runs(*blocks):
            if run.link is None:
                yield FileRun(FaultKind.HOLE, run.file_block, run.length)
            else:
                yield from self._mapped(run, run.link)

    def _mapped(self, run: Mapping, link: Link) -> Iterator[FileRun]:
        start, end = run.dev_block, run.dev_block + run.length
        delta = run.file_block - start
        # Most files have no shared block.
        shared = self._rmap.shared_parts(link, start, end) if link.proxy is not None else None
        if not shared:
            yield FileRun(FaultKind.MAPPED, run.file_block, run.length, start)
            return
        parts = [(part, True) for part in shared] + [(part, False) for part in shared.gaps(start, end)]
        for part, is_shared in sorted(parts):
            yield FileRun(FaultKind.MAPPED, part.start + delta, part.length, part.start, is_shared)

    # -- faults

    def load(self, inode: Inode, extents: ExtentMap, block: Block, limit: int) -> FileRun:
        """Return the run around ``block`` within the aligned ``limit`` blocks of the file that hold it."""
        window = Range(block // limit * limit, block // limit * limit + limit)
        end = DIV_ROUND_UP(inode.size, PAGE_SIZE)
        if block >= end:
            start = max(end, window.start)
            return FileRun(FaultKind.BEYOND_EOF, start, window.end - start)
        around = extents.around(block, window.clip(0, end))
        if around.link is None:
            return FileRun(FaultKind.HOLE, around.file_block, around.length)
        return next(run for run in self._mapped(around, around.link) if block < run.file_end)

    def store(self, inode: Inode, extents: ExtentMap, block: Block, limit: int) -> FileRun:
        """As :meth:`load`, after the allocation of a hole. A shared block is copied; the run then is the copy
        alone (dax_iomap_copy_around(), xfs_reflink_end_cow()).

        Raises NoSpace; MediaError if a shared block is poison. Then nothing has changed. A poisoned block
        that is shared only until the next commit is not copied.
        """
        shared = self._shared(inode, extents, block)
        if shared is not None:
            try:
                return FileRun(FaultKind.MAPPED, block, 1, self._data.copy_block(extents, block))
            except MediaError:
                if self._rmap.count(shared, shared + 1) > 1:
                    raise
        found = self.load(inode, extents, block, limit)
        if found.kind is FaultKind.HOLE:
            self._allocate(inode, extents, block, limit)
            return self.load(inode, extents, block, limit)
        return found

    def _shared(self, inode: Inode, extents: ExtentMap, block: Block) -> Block | None:
        """Return the device block of a file block that a store must copy; None if the store needs none."""
        if block >= DIV_ROUND_UP(inode.size, PAGE_SIZE):
            return None
        here = extents.around(block, Range(block, block + 1))
        if here.link is None or not self._rmap.is_shared(here.link, here.dev_block):
            return None
        return here.dev_block

    def _allocate(self, inode: Inode, extents: ExtentMap, block: Block, limit: int) -> None:
        """Allocate a block, or the 2 MiB around the block where dax_iomap_pmd_fault() would map them."""
        unit = Range(block, block + 1).outer(HPAGE_PMD_NR)
        if (
            self._allocator.align == PMD_SIZE
            and limit >= HPAGE_PMD_NR
            and unit.end <= DIV_ROUND_UP(inode.size, PAGE_SIZE)
            and extents.holes(*unit) == [unit]
        ):
            try:
                self._data.preallocate(extents, *unit)
            except NoSpace:  # VM_FAULT_FALLBACK: the fault is tried again with one page
                pass
            else:
                return
        self._data.preallocate(extents, block, block + 1)


def _continues(before: FileRun, run: FileRun) -> bool:
    return (
        before.kind is run.kind
        and before.is_shared == run.is_shared
        and (run.kind is not FaultKind.MAPPED or before.dev_block + before.length == run.dev_block)
    )
