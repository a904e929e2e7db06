"""Clones: blocks shared between two files while programs store to both through mappings.

Serves ``FICLONERANGE`` and copy_file_range(2). As in the kernel (``xfs_reflink_remap_prep()``), a clone takes
effect at one moment. Stores to the target before that moment are lost; later stores go to the target alone.
The clone has the stores to the source before that moment, and no later store (``Mappings.sharing``).
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from daxemu.errors import FsError
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.fs.reflink import check_remap
from daxemu.host.mappings import Mappings
from daxemu.ranges import Range
from daxemu.supervisor.failures import Failures
from daxemu.uapi import PAGE_SIZE, Ino


class Clones:
    """Shares blocks of files on the mount. Belongs to the trio thread."""

    def __init__(
        self, fs: Filesystem, mappings: Mappings, failures: Failures, writers: Mapping[Ino, int]
    ) -> None:
        """``writers``: number of handles open for writing, by inode."""
        self._fs = fs
        self._mappings = mappings
        self._failures = failures
        self._writers = writers

    async def clone(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share blocks, as ``FICLONERANGE`` does. Return the number of bytes shared.

        Offsets and length are bytes; ``length`` 0 is to the end of the source. Raises the errors of
        Filesystem.remap_file_range(), and FsError EAGAIN if a revoke of the pages takes too long.
        """
        fs = self._fs
        fs.check_alive()
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        check_remap(source, src_offset, target, dst_offset, length or source.size - src_offset)

        def share() -> int:
            return fs.remap_file_range(src, src_offset, dst, dst_offset, length)

        taken, replaced = _pages(src_offset, length), _pages(dst_offset, length)
        await self._mappings.write_back(dst)  # most of the write-back, before mf_mutex is taken
        # The kernel drops the answer to its question for the new size if a revoke comes in between, and a
        # page fault never asks again. Under the mutex no revoke comes in between.
        async with self._failures.mf_mutex:
            async with self._mappings.sharing(src, taken, dst, replaced):
                shared = share()
            if shared:
                await self._mappings.refresh_attributes(dst)
        return shared

    async def copy(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """Share blocks, as copy_file_range(2) does. Return the number of bytes shared.

        The kernel has written back both files before, and excludes other writes to the target. Raises the
        errors of Filesystem.copy_file_range(), and FsError EOPNOTSUPP if a revoke takes too long.
        """
        fs = self._fs

        def share() -> int:
            return fs.copy_file_range(src, src_offset, dst, dst_offset, length)

        if self.is_quick(src, src_offset, dst, dst_offset):
            return share()
        taken, replaced = _pages(src_offset, length), _pages(dst_offset, length)
        async with self._failures.mf_mutex:
            try:
                async with self._mappings.sharing(src, taken, dst, replaced):
                    return share()
            except FsError as error:
                if error.errno == errno.EAGAIN:
                    raise FsError(errno.EOPNOTSUPP) from error  # the kernel copies the bytes then
                raise

    def is_quick(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int) -> bool:
        """Return True if copy_file_range() shares nothing, or concerns no page that can be dirty or stale."""
        fs = self._fs
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        if (src_offset | dst_offset) % PAGE_SIZE or src_offset >= source.size:
            return True
        return dst_offset >= target.size and not self._writers[src]


def _pages(offset: int, length: int) -> Range:
    """Return the bytes of all pages that hold any byte of a range; ``length`` 0 is to the end."""
    end = offset + length if length else MAX_FILE_SIZE
    return Range(offset, min(end, MAX_FILE_SIZE)).outer(PAGE_SIZE)
