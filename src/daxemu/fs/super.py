"""Superblock object: mount, commit and shutdown of a whole filesystem (fs/super.c, xfs_mount.c)."""

from __future__ import annotations

import time
from contextlib import suppress
from operator import attrgetter
from typing import NamedTuple

from daxemu.errors import Busy, CorruptMetadata, DaxemuError, NoSpace, Shutdown
from daxemu.events import Emit, FilesystemShutdown, MetadataRewritten, MetadataUpgraded
from daxemu.fs.data_ops import DataOps
from daxemu.fs.fault import FaultHandler
from daxemu.fs.file_data import FileData
from daxemu.fs.huge_allocator import allocator_for
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.fs.inodegc import InodeGc
from daxemu.fs.layouts import Layouts
from daxemu.fs.metadata_page import CopyState
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.namespace import Namespace
from daxemu.fs.notify_failure import FailedRanges, FilesystemHolder, failed_ranges
from daxemu.fs.reclaimer import Reclaimer
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.store import Store
from daxemu.fs.superblock import FORMER_VERSION, VERSION
from daxemu.fs.upgrade import is_former, upgrade
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.notifier import NotifierChain
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import InBlocks, Range, RangeSet, merged
from daxemu.uapi import (
    PAGE_SIZE,
)

_DEV_BLOCK = attrgetter("dev_block")


MUCH = 2000
"""Number of changed inodes, names and links that starts a commit. A commit of this size takes 25 ms."""


class Uncommitted(NamedTuple):
    """Number of inodes and directory entries changed since the last commit; seconds since the oldest
    change.
    """

    changes: int
    oldest: float | None


class SuperBlock:
    """Filesystem without its verbs. The filesystem holds the dax device from construction to
    :meth:`close`.
    """

    def __init__(
        self,
        dax: DaxDevice,
        mm: MemoryFailures,
        emit: Emit,
        *,
        owner: tuple[int, int] = (0, 0),
        read_only: bool = False,
    ) -> None:
        """Load the filesystem on ``dax``. On a device without a filesystem, make one; its root belongs to
        ``owner``. With ``read_only``, nothing on the device changes.

        Raises CorruptMetadata for an unreadable filesystem (with ``read_only``, also for a missing one), Busy
        if the device is held.
        """
        if not dax.dax_is_idle():
            raise Busy(f"{dax.name}: already held by a filesystem")
        self.dax = dax
        self.emit = emit
        self.lost_store_is_eio = False
        """Result of fsync after a mapped store was lost to poison. False: success (DAX). True: EIO once (the
        page cache).
        """
        self.shutdown_reason: str | None = None
        self.is_read_only = read_only
        self.mapped_stores: RangeSet[InBlocks] = RangeSet()
        """Device blocks that programs can store to through direct mappings, or could when the watcher last
        saw their contents. Empty without a watcher.
        """
        self._never_commit = True  # until the records are loaded
        self.on_shutdown: NotifierChain[[]] = NotifierChain()
        """Called at a shutdown: the page cache must not serve the files any longer."""
        if not read_only and is_former(dax):
            upgrade(dax)
            emit(MetadataUpgraded(device=dax.name, before=FORMER_VERSION, now=VERSION))
        self.layouts = Layouts(dax)
        self.rmap = Rmap(self.layouts.break_layout)
        self.reclaimer = Reclaimer(self._reclaim, lambda: self.inodegc.blocks)
        self.inodegc = InodeGc(self.reclaimer)
        self.allocator = allocator_for(dax, self.reclaimer)
        self._data = FileData(dax, self.rmap, self.allocator, self.ensure_links)
        self._faults = FaultHandler(self._data, self.rmap, self.allocator)
        self.region = MetadataRegion(dax, self.rmap, self.allocator, self._on_rewrite)
        self.store = Store(self.region, dax.name)
        try:
            if read_only or self.region.superblocks.is_formatted():
                self.store.open(read_only=read_only)
                self.names = Namespace(self.rmap, self.layouts.break_layout)
                self.store.load(self.names, self.rmap, self.allocator.total)
                self._claim_blocks()
            else:
                self.region.superblocks.check_blank()
                self.names = Namespace.new(self.rmap, *owner, self.layouts.break_layout)
                self.store.format(self.names, self.rmap)
            self._never_commit = read_only
            self.had_crashed = not self.store.is_clean
            if self.had_crashed and not read_only:
                self._after_crash()
            self.commit()
        except BaseException:
            self.allocator.close()
            self.store.close()
            raise
        self._holder = FilesystemHolder(
            dax, self.rmap, self.names, mm, emit, self.shutdown, self.layouts.break_all
        )
        dax.hold(self._holder)

    def _on_rewrite(self, file: str, page: int, copy: int, state: CopyState) -> None:
        self.emit(MetadataRewritten(device=self.dax.name, file=file, page=page, copy=copy, reason=state))

    def _after_crash(self) -> None:
        """Remove orphans. Zero all data that was written but not committed: free blocks, and bytes beyond the
        end of a file.
        """
        for inode in self._end_orphans():
            self.names.drop(inode)
        self.region.settle()
        self.allocator.discard_free()
        for inode in self.names:
            if inode.extents is not None:
                self._data.clear_beyond(inode.extents, inode.size)

    def close(self) -> None:
        """Commit, unless shut down, and release the device. Raises NoSpace if the memory of the host is
        full.
        """
        try:
            if not self._never_commit and self.shutdown_reason is None:
                self._end_orphans()
            self.commit(clean=True)
        finally:
            self.store.close()
            self.allocator.close()
            self.dax.release(self._holder)

    def _end_orphans(self) -> list[Inode]:
        """Free the blocks of files without a name, for good (xlog_recover_process_iunlinks()). Return these
        inodes. The freed blocks read as zeros at their next use.
        """
        orphans = [inode for inode in self.names if inode.nlink == 0]
        for inode in orphans:
            if inode.extents is not None:
                self._data.remove(inode.extents, 0, MAX_FILE_SIZE // PAGE_SIZE)
            self.names.linkable.discard(inode.ino)
            self.names.dirty_inodes.add(inode.ino)
        return orphans

    def abandon(self) -> None:
        """Lose power: no later call writes, not even :meth:`close`. Uncommitted changes are lost."""
        self._never_commit = True
        self.layouts.suspend()
        if self.shutdown_reason is None:
            self.shutdown_reason = "the power failed"

    def _claim_blocks(self) -> None:
        """Remove the blocks of files from free space, each block once, because links share blocks. Raises
        CorruptMetadata for a block of several files without a proxy.
        """
        links = sorted((link for link in self.rmap if link.ino != METADATA_INO), key=_DEV_BLOCK)
        claims: list[tuple[int, int]] = []
        end, proxy = 0, None
        for link in links:
            claims.append((link.dev_block, link.dev_end))
            if link.dev_block < end and (proxy is None or link.proxy is not proxy):
                raise CorruptMetadata(
                    f"{self.dax.name}: inode {link.ino} has block {link.dev_block} of another without a proxy"
                )
            if link.dev_end > end:
                end, proxy = link.dev_end, link.proxy
        for run in merged(claims):
            try:
                self.allocator.take(run)
            except NoSpace as error:
                raise CorruptMetadata(f"{self.dax.name}: a file has blocks of the metadata") from error

    def _reclaim(self) -> None:
        """Free the pending blocks."""
        self.commit()

    def commit(self, *, clean: bool = False) -> None:
        """Write all changes to the device, or nothing. Afterwards the freed blocks can be used again.
        ``clean``: no change will follow the commit.

        Does nothing after a shutdown or a power failure. Raises CorruptMetadata if the region is unusable.
        """
        if self.shutdown_reason is not None or self._never_commit:
            return
        self.store.commit(self.names, self.rmap, clean=clean)
        self.allocator.settle()
        if self.allocator.watcher is not None:
            self.allocator.watcher.committed()

    def fsync(self, *, datasync: bool = False) -> None:
        """Make all earlier changes of files and directories durable (``fsync(2)``). With ``datasync``,
        changes of only times are not written; bytes are on the media already.

        Raises Shutdown. A failure to write the metadata shuts the filesystem down.
        """
        self.check_alive()
        if datasync and not (self.names.dirty_inodes or self.names.dirty_entries or self.rmap.dirty):
            return
        try:
            self.commit()
        except DaxemuError as error:
            self.shutdown(f"Log I/O error: {error}  Shutting down filesystem.")
            self.check_alive()

    def fsync_if_much(self) -> None:
        """Commit if the changes are MUCH, before these are more than one step can write: at the begin of a
        verb, and between two pieces of a verb. Raises Shutdown.
        """
        self.check_alive()
        if self.changes >= MUCH:
            self.fsync()

    def commit_if_much(self) -> None:
        """Commit as :meth:`fsync_if_much`, for a verb that also works after a shutdown."""
        if self.changes >= MUCH:
            with suppress(Shutdown):
                self.fsync()

    def shutdown(self, reason: str, *, save: bool = True) -> None:
        """Shut the filesystem down (``xfs_force_shutdown()``): no later call reads or writes. With ``save``,
        all earlier changes are committed first; without, uncommitted changes are lost.
        """
        if self.shutdown_reason is not None:
            return
        try:
            if save:
                self.commit()
        except DaxemuError as error:
            reason += f" (and it could not be saved: {error})"
        self.shutdown_reason = reason
        self.layouts.suspend()
        self.emit(FilesystemShutdown(device=self.dax.name, reason=self.shutdown_reason))
        self.on_shutdown.call_chain()

    @property
    def changes(self) -> int:
        """Number of changed inodes, names and links since the last commit: the cost of a commit. An inode
        counts twice if its times changed apart from its other fields.
        """
        names = self.names
        return len(names.dirty_inodes) + len(names.dirty_times) + len(names.dirty_entries) + self.rmap.marks

    def uncommitted(self) -> Uncommitted:
        """Return the number and the age of the uncommitted changes."""
        names = self.names
        inodes = names.dirty_inodes | names.dirty_times | (self.rmap.dirty.keys() - {METADATA_INO})
        changes = len(inodes) + len(names.dirty_entries)
        age = max(0, time.time_ns() - names.dirty_since) / 1e9 if changes and names.dirty_since else None
        return Uncommitted(changes, age)

    def watch(self, watcher: DataOps | None) -> None:
        """Call ``watcher`` for each operation on the bytes of files from now on; None ends the calls."""
        self._data.watcher = self.allocator.watcher = watcher
        self.mapped_stores = RangeSet()
        self.layouts.watch(watcher is not None)

    def failed_ranges(self, failed: Range) -> FailedRanges:
        """Return the file ranges that use any of the device bytes ``failed``."""
        return failed_ranges(self.dax, self.rmap, self.names, failed)

    def check_alive(self) -> None:
        """Check that no shutdown happened. Raises Shutdown."""
        if self.shutdown_reason is not None:
            raise Shutdown(
                f"the filesystem was shut down: {self.shutdown_reason} Unmount it, then daxemu fsck --repair"
            )

    def _ensure_room(self, *, inodes: int = 0, links: int = 0, name_bytes: int = 0) -> None:
        """Make room for a change in the next commit. Raises NoSpace without room."""
        self.store.ensure_room(
            len(self.names) + inodes, self.rmap.link_count + links, self.names.name_bytes + name_bytes
        )

    def ensure_links(self, links: int) -> None:
        """Make room for ``links`` more links in the next commit. Raises NoSpace without room."""
        self._ensure_room(links=links)
