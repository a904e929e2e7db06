"""Unlinked files of many links: their blocks are given back in pieces (xfs_inodegc of fs/xfs/xfs_icache.c).

A host sets ``on_queue`` and then calls Filesystem.inactivate() until nothing is left. Between two pieces the
inode has no name, cannot be opened, and owns the blocks that are left. A crash forgets the file as a whole:
the store has no unlinked file.
"""

from __future__ import annotations

from collections.abc import Callable

from daxemu.fs.extents import ExtentMap
from daxemu.fs.file_data import FileData
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.uapi import PAGE_SIZE, Ino

MANY = 512
"""Links above which a file does not go at once."""


class InodeGc:
    """Queue of unlinked inodes, each pinned once while it is in the queue."""

    def __init__(self) -> None:
        self._queue: dict[Ino, ExtentMap] = {}
        self.on_queue: Callable[[], None] | None = None
        """Called when an inode is queued. While None, every file goes at once."""

    @property
    def is_busy(self) -> bool:
        """Whether files are left."""
        return bool(self._queue)

    @property
    def blocks(self) -> int:
        """Blocks that the queued files have, those that other files share included."""
        return sum(extents.blocks for extents in self._queue.values())

    def queue(self, inode: Inode, extents: ExtentMap) -> bool:
        """Take over an inode that nobody has open. Return whether its blocks go later."""
        if inode.ino in self._queue:
            return True
        if self.on_queue is None or len(extents) <= MANY:
            return False
        inode.pins += 1
        self._queue[inode.ino] = extents
        self.on_queue()
        return True

    def run(self, data: FileData, links: int) -> Ino | None:
        """Remove at most ``links`` links. Return the inode that has none left, to be unpinned."""
        for ino, extents in self._queue.items():
            data.remove(extents, extents.last_piece(0, links), MAX_FILE_SIZE // PAGE_SIZE)
            if len(extents):
                return None
            del self._queue[ino]
            return ino
        return None
