"""Clones: blocks shared between two files while programs store to both through mappings.

Serves ``FICLONERANGE`` and copy_file_range(2). As in the kernel (``xfs_reflink_remap_prep()``), a clone takes
effect at one moment. Stores to the target before that moment are lost; later stores go to the target alone.
The clone has the stores to the source before that moment, and no later store (``Mappings.sharing``).

The blocks are shared in pieces. Until the last piece the I/O lock holds writes to both files, and reads of
the target. Reads of the source pass: the clone does not change its bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Mapping

from daxemu.errors import FsError
from daxemu.fs import pieces
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.fs.reflink import check_remap
from daxemu.host.fuse.handlers import result_of
from daxemu.host.fuse.io_lock import IoLock
from daxemu.host.mappings import Mappings
from daxemu.ranges import Range
from daxemu.supervisor.failures import Failures
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import DIV_ROUND_UP


class Clones:
    """Shares blocks of files on the mount. Belongs to the trio thread."""

    def __init__(
        self,
        fs: Filesystem,
        mappings: Mappings,
        failures: Failures,
        writers: Mapping[Ino, int],
        io_lock: IoLock,
    ) -> None:
        """``writers``: number of handles open for writing, by inode."""
        self._fs = fs
        self._mappings = mappings
        self._failures = failures
        self._writers = writers
        self._io_lock = io_lock

    async def clone(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share blocks, as ``FICLONERANGE`` does. Return the number of bytes shared.

        Offsets and length are bytes; ``length`` 0 is to the end of the source. Raises the errors of
        Filesystem.remap_file_range(), and FsError EAGAIN if a revoke of the pages takes too long.
        """
        fs = self._fs
        fs.check_alive()
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        check_remap(source, src_offset, target, dst_offset, length or source.size - src_offset)

        def share() -> Generator[None, None, int]:
            return fs.remap_in_pieces(src, src_offset, dst, dst_offset, length)

        taken, replaced = _pages(src_offset, length), _pages(dst_offset, length)
        await self._mappings.write_back(dst)  # most of the write-back, before mf_mutex is taken
        # The kernel drops the answer to its question for the new size if a revoke comes in between, and a
        # page fault never asks again. Under the mutex no revoke comes in between.
        async with self._failures.mf_mutex:
            if shared := await self._share(share, src, dst, taken, replaced):
                await self._mappings.refresh_attributes(dst)
        return shared

    async def copy(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share blocks, as copy_file_range(2) does. Return the number of bytes shared.

        The kernel has written back both files before, and excludes other writes to the target. Raises the
        errors of Filesystem.copy_file_range(), and FsError EOPNOTSUPP if a revoke takes too long.
        """
        fs = self._fs

        def share() -> Generator[None, None, int]:
            return fs.copy_in_pieces(src, src_offset, dst, dst_offset, length)

        if self.is_quick(src, src_offset, dst, dst_offset, length):
            return pieces.whole(share())
        taken, replaced = _pages(src_offset, length), _pages(dst_offset, length)
        async with self._failures.mf_mutex:
            try:
                return await self._share(share, src, dst, taken, replaced)
            except FsError as error:
                if error.errno == errno.EAGAIN:
                    raise FsError(errno.EOPNOTSUPP) from error  # the kernel copies the bytes then
                raise

    def is_quick(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> bool:
        """Return True if copy_file_range() shares nothing, or shares in one piece, and concerns no page that
        can be dirty or stale, nor a file that a verb in pieces is changing.
        """
        fs = self._fs
        (source, extents), target = fs.names.regular(src), fs.names.regular(dst)[0]
        if (src_offset | dst_offset) % PAGE_SIZE or src_offset >= source.size:
            return True
        if dst_offset < target.size or self._writers[src] or self._io_lock.is_held(src, dst):
            return False
        end = DIV_ROUND_UP(src_offset + length, PAGE_SIZE)
        return extents.count(src_offset // PAGE_SIZE, end) <= pieces.PIECE_LINKS

    async def _share(
        self,
        share: Callable[[], Generator[None, None, int]],
        source: Ino,
        target: Ino,
        taken: Range,
        replaced: Range,
    ) -> int:
        """Share blocks at one moment. Precondition: ``mf_mutex`` is held."""
        async with (
            self._mappings.sharing(source, taken, target, replaced),
            # The clone's moment: from now on no store reaches the media of either file before the last piece.
            self._io_lock.claim(source, target, readable={source} - {target}),
        ):
            return await result_of(share())


def _pages(offset: int, length: int) -> Range:
    """Return the bytes of all pages that hold any byte of a range; ``length`` 0 is to the end."""
    end = offset + length if length else MAX_FILE_SIZE
    return Range(offset, min(end, MAX_FILE_SIZE)).outer(PAGE_SIZE)
