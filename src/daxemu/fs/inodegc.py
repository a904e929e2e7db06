"""Unlinked files with many links: the blocks are freed in pieces (xfs_inodegc of fs/xfs/xfs_icache.c).

While the reclaimer has a task, the task calls Filesystem.inactivate() until no file is left. Between two
pieces the inode has no name, cannot be opened, and owns the remaining blocks. A crash frees the file as a
whole: the store has no unlinked files, and the next mount removes orphans.
"""

from __future__ import annotations

from daxemu.fs.extents import ExtentMap
from daxemu.fs.file_data import FileData
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.fs.reclaimer import Reclaimer
from daxemu.uapi import PAGE_SIZE, Ino

MANY = 512
"""A file with more links is freed in pieces."""


class InodeGc:
    """Queue of unlinked inodes, each pinned once while it is in the queue."""

    def __init__(self, reclaimer: Reclaimer) -> None:
        self._queue: dict[Ino, ExtentMap] = {}
        self._reclaimer = reclaimer

    @property
    def is_busy(self) -> bool:
        """True while a file is queued."""
        return bool(self._queue)

    @property
    def blocks(self) -> int:
        """Number of blocks of the queued files, including shared blocks."""
        return sum(extents.blocks for extents in self._queue.values())

    def queue(self, inode: Inode, extents: ExtentMap) -> bool:
        """Queue an inode without open handles. Return True if the blocks are freed later."""
        if inode.ino in self._queue:
            return True
        if not self._reclaimer.has_task or len(extents) <= MANY:
            return False
        inode.pins += 1
        self._queue[inode.ino] = extents
        self._reclaimer.wake()
        return True

    def run(self, data: FileData, links: int) -> Ino | None:
        """Remove at most ``links`` links.

        Return an inode without links, which the caller must unpin; None otherwise.
        """
        for ino, extents in self._queue.items():
            data.remove(extents, extents.last_piece(0, links), MAX_FILE_SIZE // PAGE_SIZE)
            if len(extents):
                return None
            del self._queue[ino]
            return ino
        return None
