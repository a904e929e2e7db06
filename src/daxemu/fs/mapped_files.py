"""Verbs for direct mappings of files: a page fault, the runs of a mapping, and the end of a mapped file."""

from __future__ import annotations

import time
from collections.abc import Iterator

from daxemu.errors import NoSpace
from daxemu.fs.extents import ExtentMap
from daxemu.fs.fault import FaultKind, FileRun, MappingOps
from daxemu.fs.inode import Inode
from daxemu.fs.super import SuperBlock
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block, Ino
from daxemu.units import DIV_ROUND_UP

SHOWN_AT_ONCE = 256
"""Blocks that a watcher processes in one call, which has a time limit."""


class MappedFiles(SuperBlock):
    """Filesystem with the verbs of direct mappings."""

    _mapping_ops: MappingOps | None = None

    def follow(self, ops: MappingOps | None) -> None:
        """Report changes of extent maps and sizes to ``ops`` from now on; None ends the reports."""
        if self._mapping_ops is not None:
            self.rmap.on_remap.unregister(self._mapping_ops.changed)
        self._mapping_ops = ops
        if ops is not None:
            self.rmap.on_remap.register(ops.changed)

    def fault(self, ino: Ino, block: Block, *, is_store: bool, limit: int) -> FileRun:
        """Decide a page fault at a block of a file (xfs_filemap_fault()). Return the run to map.

        The run holds ``block``, and lies within the aligned ``limit`` blocks of the file around ``block``:
        1 for a single page, 512 for a fault of 2 MiB. A store allocates a hole and copies a shared block
        first, one block at a time; a hole of 2 MiB is allocated whole where DAX would map 2 MiB. A store sets
        mtime and ctime; the caller has the kernel forget its cached attributes.

        A poisoned block is MAPPED, unless a store must copy the block. Raises FsError with EIO (MediaError)
        for such a copy: dax_iomap_copy_around() turns -EHWPOISON into -EIO, so the kernel sends BUS_ADRERR.
        Raises NoSpace (BUS_ADRERR), Shutdown, FsError ESTALE. Then nothing has changed.
        """
        self.fsync_if_much()
        inode, extents = self.names.regular(ino)
        if not is_store:
            found = self._faults.load(inode, extents, block, limit)
        elif (found := self._store_fault(inode, extents, block, limit)).kind is not FaultKind.BEYOND_EOF:
            self.names.update_time(inode, time.time_ns())
            self.layouts.break_attributes(ino)
        if found.kind is FaultKind.MAPPED:
            self._expose(ino)
            at = found.dev_block + block - found.file_block
            if is_store and not self.dax.is_poisoned(at * PAGE_SIZE, PAGE_SIZE):
                self._mapped_store(Range(at, at + 1))
        return self._watched(found)

    def _store_fault(self, inode: Inode, extents: ExtentMap, block: Block, limit: int) -> FileRun:
        must_copy = bool(self.rmap.given_up)  # see Filesystem.write()
        try:
            return self._faults.store(inode, extents, block, limit)
        except NoSpace:
            if not must_copy:
                raise
            self.commit()
            return self._faults.store(inode, extents, block, limit)

    def is_regular(self, ino: Ino) -> bool:
        """Return whether an inode is a regular file, which can be mapped; False without such an inode."""
        inode = self.names.find(ino)
        return inode is not None and inode.extents is not None

    def runs(self, ino: Ino, blocks: Range) -> Iterator[FileRun]:
        """Yield what a mapping of the file shows at ``blocks``: runs in order, without gaps, each as long as
        possible. The cost is in proportion to the extents of the range.

        Precondition: the file does not change during the iteration. Raises Shutdown, FsError.
        """
        self.check_alive()
        inode, extents = self.names.regular(ino)
        self._expose(ino)
        return map(self._watched, self._faults.runs(inode, extents, blocks))

    def stored(self, ino: Ino) -> None:
        """Set mtime and ctime: programs may have stored to blocks that they had mapped. Raises FsError."""
        inode, _ = self.names.regular(ino)
        self.names.update_time(inode, time.time_ns())
        self.layouts.break_attributes(ino)

    # -- stores that a repair strategy does not see

    def _watched(self, run: FileRun) -> FileRun:
        return run if self._data.watcher is None else run._replace(is_watched=True)

    def _mapped_store(self, blocks: Range) -> None:
        """Note that programs can store to device blocks from now on. Raises NoSpace."""
        if self._data.watcher is not None and not self.mapped_stores.covers(*blocks):
            self._data.watcher.mapped(blocks)
            self.mapped_stores.add(*blocks)

    def note_stored_to(self) -> None:
        """Note the blocks that programs can store to now: a watcher begins. Raises NoSpace."""
        for ino, blocks in self._mapping_ops.stored_to() if self._mapping_ops is not None else ():
            for run in self.runs(ino, blocks):
                if run.kind is FaultKind.MAPPED:
                    self._mapped_store(Range(run.dev_block, run.dev_block + run.length))

    def mapped_stores_end(self, blocks: Range) -> None:
        """Show the contents of device blocks to the watcher, and forget the blocks in ``mapped_stores``.

        Precondition: no program can store to the blocks through a mapping.
        """
        for part in list(self.mapped_stores.overlapping(*blocks)):
            for low in range(part.start, part.end, SHOWN_AT_ONCE):
                piece = Range(low, min(low + SHOWN_AT_ONCE, part.end))
                if self._data.watcher is not None and self._data.watcher.unmapped(piece):
                    self.mapped_stores.remove(*piece)

    # -- the end of a mapped file

    def _expose(self, ino: Ino) -> None:
        """Note that stores may reach the last block of a file beyond the end of the file.

        From now on the bytes there are zeroed when the file grows, as xfs_zero_range() does, and no layout
        goes beyond the end.
        """
        if ino not in self.layouts.exposed:
            self.layouts.break_layout(ino)
            self.layouts.exposed.add(ino)

    def is_exposed(self, ino: Ino) -> bool:
        """Return True if bytes of the last block beyond the end of the file may be other than zero."""
        return ino in self.layouts.exposed

    def _zero_exposed_tail(self, inode: Inode, extents: ExtentMap, end: int) -> None:
        """Zero the bytes from the end of an exposed file to byte ``end``, inside the last block.

        Raises MediaError for a poisoned block, NoSpace if the block is shared and no other is free.
        """
        size = inode.size
        if size % PAGE_SIZE == 0 or size >= end or not self.is_exposed(inode.ino):
            return
        end = min(end, size - size % PAGE_SIZE + PAGE_SIZE)
        if extents.holes(size // PAGE_SIZE, size // PAGE_SIZE + 1):
            return
        if any(bytes(self._data.read(extents, size, end - size))):
            self._data.store(extents, size, bytes(end - size), from_cache=False, zeroing=True)

    def _resize(self, inode: Inode, size: int) -> None:
        """Set the size of a file in bytes, and report the blocks that an end was moved over.

        Precondition: the bytes between the old and the new end read as zeros.
        """
        ends = sorted((DIV_ROUND_UP(inode.size, PAGE_SIZE), DIV_ROUND_UP(size, PAGE_SIZE)))
        inode.size = size
        if self._mapping_ops is not None and ends[0] < ends[1]:
            self._mapping_ops.changed(inode.ino, Range(*ends))

    def _zero_exposed_tails(self) -> None:
        """Zero the bytes beyond the ends of all exposed files, in their last blocks."""
        for ino in self.layouts.exposed:
            if (inode := self.names.find(ino)) is not None and inode.extents is not None:
                self._data.clear_beyond(inode.extents, inode.size, DIV_ROUND_UP(inode.size, PAGE_SIZE))

    def close(self) -> None:
        """See SuperBlock."""
        if not self._never_commit and self.shutdown_reason is None:
            self._zero_exposed_tails()
        super().close()
