"""Verbs of the filesystem. The host translates system calls into verbs.

Every verb is synchronous and therefore atomic under trio. After :meth:`Filesystem.shutdown`, each verb raises
Shutdown (EIO). A verb that makes changes commits the earlier ones first if these are MUCH, so the size of a
commit does not depend on the number of verbs between two looks at the clock.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress

from daxemu.errors import FsError, MediaError, NoSpace, Shutdown
from daxemu.events import PoisonCleared, StoreLost
from daxemu.fs import inode_flags, pieces, posix_acl
from daxemu.fs.extents import ExtentMap
from daxemu.fs.file_data import Buffer, Stored
from daxemu.fs.inode import ENTRY_COST, MAX_FILE_SIZE, SUPERUSER, Credentials, Inode
from daxemu.fs.mapped_files import MappedFiles
from daxemu.fs.pieces import PIECE_LINKS
from daxemu.fs.reflink import check_remap
from daxemu.fs.statfs import Damage, StatFs, damaged, damaged_in_pieces
from daxemu.fs.super import MUCH
from daxemu.ranges import Range
from daxemu.uapi import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    NAME_MAX,
    PAGE_SIZE,
    RENAME_WHITEOUT,
    Ino,
)
from daxemu.units import DIV_ROUND_UP, blocks_of

Name = tuple[Ino, bytes]
"""Directory and name in it."""

MAX_PENDING = (64 << 20) // PAGE_SIZE
"""Number of blocks of removed files from which the host gets the memory back at once, not at the next commit.
"""


class Filesystem(MappedFiles):
    """Mounted filesystem."""

    # -- names

    def _new_bytes(self, parent: Ino, name: bytes) -> int:
        """Return the bytes of the name of a new inode and of the inherited access control lists."""
        inherited = len(self.names.get(parent).xattrs.get(posix_acl.DEFAULT, b""))
        return len(name) + 3 * ENTRY_COST + 2 * (inherited + len(posix_acl.DEFAULT))

    def mknod(self, parent: Ino, name: bytes, mode: int, rdev: int, cred: Credentials) -> Inode:
        """See Namespace.mknod. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(inodes=1, name_bytes=self._new_bytes(parent, name))
        return self.names.mknod(parent, name, mode, rdev, cred)

    def tmpfile(self, parent: Ino, mode: int, cred: Credentials) -> Inode:
        """See Namespace.tmpfile. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(inodes=1, name_bytes=self._new_bytes(parent, b""))
        return self.names.tmpfile(parent, mode, cred)

    def mkdir(self, parent: Ino, name: bytes, mode: int, cred: Credentials) -> Inode:
        """See Namespace.mkdir. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(inodes=1, name_bytes=self._new_bytes(parent, name))
        return self.names.mkdir(parent, name, mode, cred)

    def symlink(self, parent: Ino, name: bytes, target: bytes, cred: Credentials) -> Inode:
        """See Namespace.symlink. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(inodes=1, name_bytes=len(name) + len(target) + ENTRY_COST)
        return self.names.symlink(parent, name, target, cred)

    def link(self, ino: Ino, parent: Ino, name: bytes) -> Inode:
        """See Namespace.link. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(name_bytes=len(name) + ENTRY_COST)
        return self.names.link(ino, parent, name)

    def setattr(
        self,
        ino: Ino,
        *,
        size: int | None = None,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> Inode:
        """Set the attributes that are not None (``->setattr``). See Namespace.setattr and set_size."""
        self.fsync_if_much()
        if size is not None:
            self.set_size(ino, size)
        return self.names.setattr(ino, mode=mode, uid=uid, gid=gid, atime=atime, mtime=mtime)

    def set_inode_flags(self, ino: Ino, flags: int) -> None:
        """Set the flags of an inode (``FS_IOC_SETFLAGS``). Raises FsError EOPNOTSUPP for flags other than
        immutable and append-only, NoSpace when the metadata region is full.
        """
        self.fsync_if_much()
        if flags & ~inode_flags.SUPPORTED:
            raise FsError(errno.EOPNOTSUPP)
        if flags:  # no room is needed to clear flags: immutable files of a full region can be removed
            self._ensure_room(name_bytes=len(inode_flags.KEY) + len(inode_flags.encode(flags)) + ENTRY_COST)
        self.names.set_flags(ino, flags)

    def removexattr(self, ino: Ino, name: bytes) -> None:
        """See Namespace.removexattr."""
        self.fsync_if_much()
        self.names.removexattr(ino, name)

    def setxattr(
        self, ino: Ino, name: bytes, value: bytes, flags: int, *, acl_kill_sgid: bool = False
    ) -> None:
        """See Namespace.setxattr. Raises NoSpace when the metadata region is full."""
        self.fsync_if_much()
        self._ensure_room(name_bytes=len(name) + len(value) + ENTRY_COST)
        self.names.setxattr(ino, name, value, flags, acl_kill_sgid=acl_kill_sgid)

    def unlink(self, parent: Ino, name: bytes) -> Inode:
        """Remove a name. The file ends with its last name, once no pin is left."""
        self.fsync_if_much()
        return self._unless_unused(self.names.unlink(parent, name))

    def rmdir(self, parent: Ino, name: bytes) -> Inode:
        """Remove an empty directory."""
        self.fsync_if_much()
        return self._unless_unused(self.names.rmdir(parent, name))

    def rename(self, old: Name, new: Name, flags: int, cred: Credentials = SUPERUSER) -> Inode | None:
        """Rename (``renameat2(2)``). A replaced file ends as by unlink. ``cred``: see Namespace.rename."""
        self.fsync_if_much()
        if flags & RENAME_WHITEOUT:
            self._ensure_room(inodes=1, name_bytes=len(new[1]) + self._new_bytes(*old))
        else:
            self._ensure_room(name_bytes=max(0, len(new[1]) - len(old[1])))
        replaced = self.names.rename(*old, *new, flags, cred)
        return self._unless_unused(replaced) if replaced is not None else None

    # -- lifetime

    def pin(self, inode: Inode, count: int = 1) -> None:
        """Keep an inode even without a name, because the kernel knows the inode."""
        inode.pins += count

    def unpin(self, ino: Ino, count: int = 1) -> None:
        """Undo :meth:`pin`. The last unpin of an unlinked inode removes the inode."""
        inode = self.names.get(ino)
        inode.pins -= count
        self._unless_unused(inode)

    def open(self, inode: Inode) -> None:
        """Keep the bytes of an inode even without a name. Raises FsError ESTALE if the bytes are gone
        already.
        """
        if inode.nlink == 0 and inode.opens == 0 and inode.ino not in self.names.linkable:
            raise FsError(errno.ESTALE)
        inode.opens += 1

    def release(self, ino: Ino) -> None:
        """Undo :meth:`open`. The last release of an unlinked file frees its blocks."""
        inode = self.names.get(ino)
        inode.opens -= 1
        self._unless_unused(inode)

    def _unless_unused(self, inode: Inode) -> Inode:
        # The blocks are freed at once. The inode stays until the kernel's FORGET, which may come at any time.
        if inode.nlink == 0 and inode.opens == 0:
            self.names.linkable.discard(inode.ino)
            if inode.extents is not None and not self.inodegc.queue(inode, inode.extents):
                self._data.remove(inode.extents, 0, MAX_FILE_SIZE // PAGE_SIZE)
            if inode.pins <= 0:
                self.names.drop(inode)
            if self.allocator.pending_blocks >= MAX_PENDING or self.changes >= MUCH:
                with suppress(Shutdown):
                    self.fsync()
        return inode

    def inactivate(self) -> bool:
        """Remove PIECE_LINKS links from an unlinked file with many links. Return True if such a file is
        left.
        """
        self.commit_if_much()
        if (done := self.inodegc.run(self._data, PIECE_LINKS)) is not None:
            self.unpin(done)
        return self.inodegc.is_busy

    def _reclaim(self) -> None:
        """Free the blocks that unlinked files still have, and the pending blocks."""
        while self.inactivate():
            pass
        self.commit()

    # -- bytes

    def read(self, ino: Ino, offset: int, length: int) -> Buffer:
        """Read up to ``length`` bytes from ``offset``; fewer only at the end of the file.

        Raises MediaError (EIO) if any page of the range is poison; then no byte is returned.
        """
        self.check_alive()
        inode, extents = self.names.regular(ino)
        length = min(length, inode.size - offset)
        if length <= 0:
            return b""
        found = self._data.read(extents, offset, length)
        self.layouts.grant(inode, extents, offset, length)
        return found

    def write(self, ino: Ino, offset: int, data: Buffer, *, from_cache: bool = False) -> int:
        """Write bytes (``write(2)``). With ``from_cache``, the page cache writes stores through a mapping
        back.

        Raises PartialOverPoison (EFAULT) for a write that covers a poisoned page in part, MediaError (EIO) if
        such a page is shared, NoSpace; then nothing was written. A poisoned page that is covered whole is
        cleared. A store from the page cache to poison is lost: silently as on DAX or, with
        ``lost_store_is_eio``, with MediaError after the rest was written.
        """
        self.fsync_if_much()
        inode, extents = self.names.regular(ino)
        if not data:
            return 0
        if offset + len(data) > MAX_FILE_SIZE:
            raise FsError(errno.EFBIG)
        self._zero_exposed_tail(inode, extents, offset)
        must_copy = bool(
            self.rmap.given_up
        )  # read before the allocator, which may commit and so empty given_up
        try:
            stored = self._data.store(extents, offset, data, from_cache=from_cache)
        except NoSpace:
            if not must_copy:
                raise
            self.commit()  # after the commit, the last owner of a block need not copy the block
            stored = self._data.store(extents, offset, data, from_cache=from_cache)
        grown = offset + len(data) > inode.size
        if grown:
            self._resize(inode, offset + len(data))
            self.names.touch(inode, modified=True)
        else:
            self.names.update_time(inode, time.time_ns())
            self.layouts.break_attributes(ino)
        if not grown or inode.size % PAGE_SIZE:  # else the next write needs new blocks
            self.layouts.grant(inode, extents, offset, len(data))
        self._publish(inode, stored)
        return len(data)

    def wrote(self, ino: Ino, time_ns: int) -> None:
        """Record stores through a layout to a file, the last at ``time_ns`` (ns since the epoch)."""
        self.commit_if_much()
        self.names.update_time(self.names.get(ino), time_ns)

    def grew(self, ino: Ino, size: int) -> None:
        """Record stores through a layout beyond the end of a file; the new size is ``size`` bytes."""
        self.commit_if_much()
        self.names.get(ino).size = size
        self.names.dirty_inodes.add(ino)

    def _publish(self, inode: Inode, stored: Stored) -> None:
        for part in stored.cleared:
            self.emit(PoisonCleared(offset=part.start, length=part.length, by="write"))
        if not stored.lost:
            return
        path = self.names.path_of(inode.ino)
        for part in stored.lost:
            self.emit(StoreLost(ino=inode.ino, path=path, offset=part.start, length=part.length))
        if self.lost_store_is_eio:
            raise MediaError(f"{path}: a mapped store was lost to poison")

    def set_size(self, ino: Ino, size: int) -> None:
        """Set the size in bytes (``truncate(2)``). Raises MediaError if the new end lies within a poisoned
        block; then nothing has changed.
        """
        for _ in self.set_size_in_pieces(ino, size):
            pass

    def set_size_in_pieces(self, ino: Ino, size: int) -> Iterator[None]:
        """Set the size as :meth:`set_size`, and yield after each PIECE_LINKS links that a shorter file loses.

        Between two pieces the file ends at the begin of the last piece: shorter than before, but longer than
        ``size`` (xfs_itruncate_extents()). Precondition: no write to the file until the end; the kernel holds
        the lock of the inode and FUSE_NOWRITE.
        """
        self.fsync_if_much()
        inode, extents = self.names.regular(ino)
        inode_flags.may_change(inode)
        if size > MAX_FILE_SIZE:
            raise FsError(errno.EFBIG)
        if size < inode.size:
            for end in pieces.shorten(self._data, extents, size):
                self._resize(inode, min(inode.size, end))
                self.names.touch(inode, modified=True)
                yield
                self.fsync_if_much()
        self._zero_exposed_tail(inode, extents, size)
        self._resize(inode, size)
        self.names.touch(inode, modified=True)

    def fallocate(self, ino: Ino, mode: int, offset: int, length: int) -> None:
        """Preallocate, punch a hole, or zero a range (``fallocate(2)``). Zeroing replaces poisoned blocks by
        others.

        Raises FsError EINVAL, EOPNOTSUPP or EFBIG, MediaError if an edge of the range lies in a poisoned
        block, NoSpace.
        """
        for _ in self.fallocate_in_pieces(ino, mode, offset, length):
            pass

    def fallocate_in_pieces(self, ino: Ino, mode: int, offset: int, length: int) -> Iterator[None]:
        """Run :meth:`fallocate`, and yield after each PIECE_BLOCKS blocks or PIECE_LINKS links.

        Between two pieces a prefix of the range is done, and the size is unchanged (as in
        xfs_free_file_space() and xfs_alloc_file_space(), which have a transaction for each extent).
        Precondition: no write to the file until the end; the kernel holds the lock of the inode.
        """
        self.fsync_if_much()
        inode, extents = self.names.regular(ino)
        end = offset + length
        if offset < 0 or length <= 0:
            raise FsError(errno.EINVAL)
        if end > MAX_FILE_SIZE:
            raise FsError(errno.EFBIG)
        what = mode & ~FALLOC_FL_KEEP_SIZE
        if what not in (0, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE) or mode == FALLOC_FL_PUNCH_HOLE:
            raise FsError(errno.EOPNOTSUPP)
        inode_flags.may_fallocate(inode, mode)
        if what == FALLOC_FL_PUNCH_HOLE:
            steps = pieces.punch(self._data, extents, offset, end)
        elif what == FALLOC_FL_ZERO_RANGE:
            steps = pieces.zero(self._data, self.allocator, extents, offset, end)
        else:
            first, last = offset // PAGE_SIZE, DIV_ROUND_UP(end, PAGE_SIZE)
            steps = pieces.preallocate(self._data, self.allocator, extents, first, last)
        for _ in steps:
            yield
            self.fsync_if_much()
        if not mode & FALLOC_FL_KEEP_SIZE:
            self._zero_exposed_tail(inode, extents, end)
            self._resize(inode, max(inode.size, end))
        self.names.touch(inode, modified=True)

    def seek(self, ino: Ino, offset: int, whence: int) -> int:
        """Find data or a hole (``lseek(2)`` with SEEK_DATA or SEEK_HOLE). Raises FsError ENXIO without any
        from ``offset`` on.
        """
        self.check_alive()
        inode, extents = self.names.regular(ino)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FsError(errno.EINVAL)
        if not 0 <= offset < inode.size:
            raise FsError(errno.ENXIO)
        for run in extents.runs(offset // PAGE_SIZE, DIV_ROUND_UP(inode.size, PAGE_SIZE)):
            if (run.link is not None) == (whence == os.SEEK_DATA):
                return max(offset, run.file_block * PAGE_SIZE)
        if whence == os.SEEK_DATA:
            raise FsError(errno.ENXIO)
        return inode.size

    def copy_file_range(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share blocks for ``copy_file_range(2)``. Return the number of bytes; 0 at the end of ``src``.

        Raises FsError EOPNOTSUPP for a range that cannot be shared; the kernel then copies the bytes.
        """
        return pieces.whole(self.copy_in_pieces(src, src_offset, dst, dst_offset, length))

    def copy_in_pieces(
        self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int
    ) -> Generator[None, None, int]:
        """Run :meth:`copy_file_range` in pieces, as :meth:`remap_in_pieces`."""
        self.check_alive()
        source = self.names.regular(src)[0]
        length = min(length, source.size - src_offset)
        if length <= 0:
            return 0
        whole = length if src_offset + length == source.size else length & ~(PAGE_SIZE - 1)
        try:
            if not whole:
                raise FsError(errno.EINVAL)
            return (yield from self.remap_in_pieces(src, src_offset, dst, dst_offset, whole))
        except FsError as error:
            if error.errno == errno.EINVAL:
                raise FsError(errno.EOPNOTSUPP) from error
            raise

    def remap_file_range(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share the blocks of ``src`` with ``dst`` (``FICLONERANGE``); ``length`` 0 is to the end. Return the
        number of shared bytes.

        Poison is shared too. Raises FsError EINVAL for ranges that are not whole blocks (except at the end of
        the source file), lie beyond the end of the source file, or overlap; NoSpace when the metadata region
        is full.
        """
        return pieces.whole(self.remap_in_pieces(src, src_offset, dst, dst_offset, length))

    def remap_in_pieces(
        self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int
    ) -> Generator[None, None, int]:
        """Run :meth:`remap_file_range`, and yield after each PIECE_LINKS links.

        Between two pieces a prefix of the range is shared, and a longer target ends there
        (xfs_reflink_remap_blocks() has a transaction for each extent). A crash leaves a prefix. NoSpace is
        raised before the first piece; later only if other verbs use up the room meanwhile. Both files count
        as open until the end.

        Precondition: until the end, no other verb changes bytes, size or extents of the two files, and no
        bytes of ``dst`` are read.
        """
        self.fsync_if_much()
        source, src_extents = self.names.regular(src)
        target, dst_extents = self.names.regular(dst)
        inode_flags.may_write(target)
        if length == 0:
            length = source.size - src_offset
        check_remap(source, src_offset, target, dst_offset, length)
        if length == 0:
            return 0
        blocks = DIV_ROUND_UP(length, PAGE_SIZE)
        first, at = src_offset // PAGE_SIZE, dst_offset // PAGE_SIZE
        for room in pieces.links_to_share(src_extents, first, dst_extents, at, blocks):
            self._ensure_room(links=room)
            if room > PIECE_LINKS:
                yield
        self._zero_exposed_tail(target, dst_extents, dst_offset)
        if self.is_exposed(src):
            self._expose(dst)  # the last block is shared with its bytes beyond the end
        with ExitStack() as opened:
            for inode in (source, target):
                self.open(inode)
                opened.callback(self.release, inode.ino)
            ensure = self.ensure_links
            for done in pieces.share(self._data, ensure, src_extents, first, dst_extents, at, blocks):
                self._resize(target, max(target.size, dst_offset + min(length, done * PAGE_SIZE)))
                self.names.touch(target, modified=True)
                if done < blocks:
                    self.fsync_if_much()
                    yield
                    self.check_alive()
        return length

    def extents_of(self, ino: Ino) -> ExtentMap:
        """Return the extent map of a regular file."""
        return self.names.regular(ino)[1]

    def adopt_cleared(self, cleared: list[Range]) -> None:
        """Reserve memory again for the parts of ``cleared`` that files own. The caller has cleared the poison
        of these device byte ranges and given their memory back to the host.
        """
        for part in cleared:
            for owner in self.rmap.owners(*blocks_of(part)):
                self.dax.reserve(owner.dev_block * PAGE_SIZE, owner.length * PAGE_SIZE)

    # -- questions

    def statfs(self) -> StatFs:
        """Return the used and free space. Blocks of an unlinked file with many links count as used until
        :meth:`inactivate` has freed the blocks.
        """
        return StatFs(
            self.allocator.total,
            self.allocator.free_blocks,
            self.allocator.usable_blocks,
            len(self.names),
            NAME_MAX,
        )

    def damaged(self) -> list[Damage]:
        """Return each file range with a bad block, in order of path and offset."""
        return damaged(self.dax, self.rmap, self.names)

    def damaged_in_pieces(self) -> Iterator[list[Damage]]:
        """Yield the result of :meth:`damaged` in pieces, see statfs.damaged_in_pieces()."""
        return damaged_in_pieces(self.dax, self.rmap, self.names)

    def device_ranges(self, ino: Ino, offset: int, length: int) -> list[Range]:
        """Return the device byte ranges of the bytes ``[offset, offset + length)`` of a file, without
        holes.
        """
        extents = self.extents_of(ino)
        found = []
        for run in extents.lookup(offset // PAGE_SIZE, DIV_ROUND_UP(offset + length, PAGE_SIZE)):
            if run.link is not None:
                base = (run.dev_block - run.file_block) * PAGE_SIZE
                inside = Range(run.file_block * PAGE_SIZE, (run.file_block + run.length) * PAGE_SIZE)
                part = inside.clip(offset, offset + length)
                found.append(Range(base + part.start, base + part.end))
        return found
