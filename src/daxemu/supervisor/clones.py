"""Sharing blocks between files while programs store to both through mappings: ``FICLONERANGE`` and
copy_file_range(2).

As in the kernel (``xfs_reflink_remap_prep()``), it is as if it happened at one moment. What was stored to
the target before is gone, what is stored later is in the target alone. The clone has what was stored to the
source before, and nothing of what was stored later.

The target's pages are taken away first, and nobody gets them back before the clone is there: a page of
before, written back later, would lie over the clone. The source's pages stay, or a failure would find nobody
who has them present; they are written back until a pass over them finds none dirty, so that no store is in
the clone without those before it. Where that does not come about they are taken away as well.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from daxemu.errors import FsError
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.fs.reflink import check_remap
from daxemu.host.fuse.invalidate_lock import InvalidateLock
from daxemu.ranges import Range
from daxemu.supervisor import incidents
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.page_cache import PageCache
from daxemu.uapi import PAGE_SIZE, Ino

PASSES = 4
"""Times that the source is written back before its pages are taken away."""


class Clones:
    """Shares blocks of files on the mount. Belongs to the trio thread."""

    def __init__(
        self, fs: Filesystem, page_cache: PageCache, failures: Failures, writers: Mapping[Ino, int]
    ) -> None:
        """``writers``: number of handles open for writing, by inode."""
        self._fs = fs
        self._page_cache = page_cache
        self._failures = failures
        self._writers = writers

    async def clone(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """``FICLONERANGE``; ``length`` 0 is to the end. Returns the bytes shared. Raises as
        Filesystem.remap_file_range(), and FsError EAGAIN if the files are in too much use.
        """
        fs = self._fs
        fs.check_alive()
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        check_remap(source, src_offset, target, dst_offset, length or source.size - src_offset)

        def share() -> int:
            return fs.remap_file_range(src, src_offset, dst, dst_offset, length)

        hurt = _pages(src_offset, length), _pages(dst_offset, length)
        await self._page_cache.write_back(dst)  # most of it while nobody waits for us
        # A revoke while the kernel asks for the new size would make it drop the answer, and a page fault
        # never asks again: so the size is brought to the kernel under the mutex.
        async with self._failures.mf_mutex:
            if shared := await self._share(share, source, target, *hurt):
                await self._page_cache.refresh_attributes(dst)
        return shared

    async def copy(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """``copy_file_range(2)``, for which the kernel has written both files back, and keeps others from
        writing to the target. Raises as Filesystem.copy_file_range().
        """
        fs = self._fs

        def share() -> int:
            return fs.copy_file_range(src, src_offset, dst, dst_offset, length)

        if self.is_quick(src, src_offset, dst, dst_offset):
            return share()
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        hurt = _pages(src_offset, length), _pages(dst_offset, length)
        async with self._failures.mf_mutex:
            try:
                return await self._share(share, source, target, *hurt)
            except FsError as error:
                if error.errno == errno.EAGAIN:
                    raise FsError(errno.EOPNOTSUPP) from error  # the kernel copies the bytes then
                raise

    def is_quick(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int) -> bool:
        """Whether a copy_file_range() shares nothing, or concerns no page that can be dirty or stale."""
        fs = self._fs
        source, target = fs.names.regular(src)[0], fs.names.regular(dst)[0]
        if (src_offset | dst_offset) % PAGE_SIZE or src_offset >= source.size:
            return True
        return dst_offset >= target.size and not self._writers[src]

    async def _share(
        self, share: Callable[[], int], source: Inode, target: Inode, taken: Range, replaced: Range
    ) -> int:
        """Precondition: the mutex is held."""
        last_change = source.ctime  # the file's i_version: every write-back changes it
        await self._page_cache.write_back(source.ino, has_mutex=True)
        with self._page_cache.invalidate_lock() as lock:
            await self._page_cache.revoke(lock, target.ino, replaced)
            if not await self._settle(lock, source, last_change):
                await self._failures.remember(incidents.of_file(self._fs, source.ino))
                await self._page_cache.revoke(lock, source.ino, taken)
            return share()

    async def _settle(self, lock: InvalidateLock, source: Inode, last_change: int) -> bool:
        """Write back the source until a pass finds no dirty page. Return whether that came about."""
        for _ in range(PASSES):
            if source.ctime == last_change and lock.is_complete:
                return True
            last_change = source.ctime
            await self._page_cache.write_back_locked(lock, source.ino)
        return source.ctime == last_change and lock.is_complete


def _pages(offset: int, length: int) -> Range:
    """The bytes of all pages that hold any of these; ``length`` 0 is to the end."""
    end = offset + length if length else MAX_FILE_SIZE
    return Range(offset, min(end, MAX_FILE_SIZE)).outer(PAGE_SIZE)
