"""Mounting, committing, shutting down: what concerns a filesystem as a whole (fs/super.c, xfs_mount.c)."""

from __future__ import annotations

import time
from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

from daxemu.errors import Busy, CorruptMetadata, DaxemuError, NoSpace, Shutdown
from daxemu.events import Emit, FilesystemShutdown, MetadataRewritten, MetadataUpgraded
from daxemu.fs.data_ops import DataOps
from daxemu.fs.file_data import FileData
from daxemu.fs.huge_allocator import allocator_for
from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.fs.inodegc import InodeGc
from daxemu.fs.layouts import Layouts
from daxemu.fs.metadata_page import CopyState
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.namespace import Namespace
from daxemu.fs.notify_failure import FailedRanges, FilesystemHolder, failed_ranges
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.store import Store
from daxemu.fs.superblock import FORMER_VERSION, VERSION
from daxemu.fs.upgrade import is_former, upgrade
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, merged
from daxemu.uapi import (
    PAGE_SIZE,
)

_DEV_BLOCK = attrgetter("dev_block")


MUCH = 2000
"""Changes of inodes, names and links after which a commit is due: 25 ms."""


class Uncommitted(NamedTuple):
    """Inodes and directory entries that changed since the last commit; seconds since the oldest change."""

    changes: int
    oldest: float | None


class SuperBlock:
    """A filesystem without its verbs: it holds the dax device from construction to :meth:`close`."""

    def __init__(
        self,
        dax: DaxDevice,
        mm: MemoryFailures,
        emit: Emit,
        *,
        owner: tuple[int, int] = (0, 0),
        read_only: bool = False,
    ) -> None:
        """Load the filesystem on ``dax``, or make one (whose root belongs to ``owner``) on a device without
        any. With ``read_only``, which is for looking only, the device is not changed in any way.

        Raises CorruptMetadata if there is one that cannot be read (or none, with ``read_only``), Busy if the
        device is held.
        """
        if not dax.dax_is_idle():
            raise Busy(f"{dax.name}: already held by a filesystem")
        self.dax = dax
        self.emit = emit
        self.lost_store_is_eio = False
        """What fsync says of a mapped store lost to poison: False, nothing (DAX); True, EIO once (the page
        cache).
        """
        self.shutdown_reason: str | None = None
        self.is_read_only = read_only
        self._never_commit = read_only
        self.on_shutdown: Callable[[], None] = lambda: None
        """Told of a shutdown: the page cache must not go on answering for us."""
        if not read_only and is_former(dax):
            upgrade(dax)
            emit(MetadataUpgraded(device=dax.name, before=FORMER_VERSION, now=VERSION))
        self.rmap = Rmap()
        self.allocator = allocator_for(dax)
        self._data = FileData(dax, self.rmap, self.allocator, self.ensure_links)
        self.layouts = Layouts(dax)
        self.inodegc = InodeGc()
        self.region = MetadataRegion(dax, self.rmap, self.allocator)
        self.region.on_bad_copy = self._on_bad_copy
        self.store = Store(self.region, dax.name)
        try:
            if read_only or self.region.is_formatted():
                self.store.open(read_only=read_only)
                self.names = Namespace(self.rmap)
                self.store.load(self.names, self.rmap, self.allocator.total)
                self._claim_blocks()
            else:
                self.names = Namespace.new(self.rmap, *owner)
                self.store.format(self.names, self.rmap)
            self.allocator.reclaim = self.commit
            self.had_crashed = not self.store.is_clean
            if self.had_crashed and not read_only:
                self._after_crash()
            self.commit()
        except BaseException:
            self.store.close()
            raise
        self.rmap.on_change = self.names.on_change = self.layouts.break_layout
        self._holder = FilesystemHolder(dax, self.rmap, self.names, mm, emit, self.shutdown)
        dax.hold(self._holder)

    def _on_bad_copy(self, file: str, page: int, copy: int, state: CopyState) -> None:
        self.emit(MetadataRewritten(device=self.dax.name, file=file, page=page, copy=copy, reason=state))

    def _after_crash(self) -> None:
        """Take away what was written and never committed: whatever is free, or beyond the end of a file, is
        zero.
        """
        self.region.settle()
        self.allocator.discard_free()
        for inode in self.names:
            if inode.extents is not None:
                self._data.clear_beyond(inode.extents, inode.size)

    def close(self) -> None:
        """Save, unless shut down, and let go of the device. Raises NoSpace if the host's memory is full."""
        try:
            if not self._never_commit and self.shutdown_reason is None:
                self._drop_orphans()
            self.commit(clean=True)
        finally:
            self.store.close()
            self.dax.release(self._holder)

    def _drop_orphans(self) -> None:
        """Files without a name that are still open go: what is free reads as zeros when it is used again."""
        for inode in self.names:
            if inode.nlink == 0 and inode.extents is not None:
                self._data.remove(inode.extents, 0, MAX_FILE_SIZE // PAGE_SIZE)

    def abandon(self) -> None:
        """A power failure: nothing more is written, not even by :meth:`close`. What was not committed is
        lost.
        """
        self._never_commit = True
        self.layouts.suspend()
        if self.shutdown_reason is None:
            self.shutdown_reason = "the power failed"

    def _claim_blocks(self) -> None:
        """Take out of free space what files have; links share blocks, so each block once. Raises
        CorruptMetadata for blocks of several files that no proxy stands for.
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

    def commit(self, *, clean: bool = False) -> None:
        """Put what changed on the device, all of it or nothing; what was freed can be used again then.
        ``clean``: and nothing follows.

        Does nothing after a shutdown or a power failure. Raises CorruptMetadata if the region cannot be used.
        """
        if self.shutdown_reason is not None or self._never_commit:
            return
        self.store.commit(self.names, self.rmap, clean=clean)
        self.allocator.settle()
        if self.allocator.watcher is not None:
            self.allocator.watcher.committed()

    def fsync(self, *, datasync: bool = False) -> None:
        """``fsync(2)``, of a file or a directory: nothing that was done before it can be lost any more;
        ``datasync``: but times, where nothing else has changed (bytes are on the media already).

        Raises Shutdown, also when the metadata cannot be written and the filesystem is shut down for that.
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
        """Commit what a verb that is done in pieces has changed, before that is more than one step can
        write. Raises Shutdown.
        """
        self.check_alive()
        if self.changes >= MUCH:
            self.fsync()

    def shutdown(self, reason: str, *, save: bool = True) -> None:
        """``xfs_force_shutdown()``: nothing is read or written any more; what was done until now is kept,
        without ``save`` only up to the last commit.
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
        self.on_shutdown()

    @property
    def changes(self) -> int:
        """Changes of inodes, names and links since the last commit: what a commit costs."""
        return len(self.names.dirty_inodes) + len(self.names.dirty_entries) + self.rmap.marks

    def uncommitted(self) -> Uncommitted:
        """Changes that the next mount would not have if this one ended now."""
        names = self.names
        inodes = names.dirty_inodes | names.dirty_times | (self.rmap.dirty.keys() - {METADATA_INO})
        changes = len(inodes) + len(names.dirty_entries)
        age = max(0, time.time_ns() - names.dirty_since) / 1e9 if changes and names.dirty_since else None
        return Uncommitted(changes, age)

    def watch(self, watcher: DataOps | None) -> None:
        """Have ``watcher`` told of everything that happens to the bytes of files from now on."""
        self._data.watcher = self.allocator.watcher = watcher
        self.layouts.watch(watcher is not None)

    def failed_ranges(self, failed: Range) -> FailedRanges:
        """Return the file ranges that use any of the device bytes ``failed``."""
        return failed_ranges(self.dax, self.rmap, self.names, failed)

    def check_alive(self) -> None:
        """Raises Shutdown after a shutdown."""
        if self.shutdown_reason is not None:
            raise Shutdown(
                f"the filesystem was shut down: {self.shutdown_reason} Unmount it, then daxemu fsck --repair"
            )

    def _ensure_room(self, *, inodes: int = 0, links: int = 0, name_bytes: int = 0) -> None:
        """Refuse with NoSpace what the next commit would have no room for."""
        self.store.ensure_room(
            len(self.names) + inodes, self.rmap.link_count + links, self.names.name_bytes + name_bytes
        )

    def ensure_links(self, links: int) -> None:
        """Refuse with NoSpace what needs so many links more than the next commit has room for."""
        self._ensure_room(links=links)
