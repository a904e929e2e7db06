"""The reserved file: a file without a name for copies of blocks, used only by a repair strategy.

The file has an inode number of its own. So reverse map, store, free space and fsck handle the reserved file
like any other file.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from daxemu.errors import MediaError
from daxemu.fs.extents import ExtentMap
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import RESERVED_INO, Inode
from daxemu.fs.pieces import PIECE_LINKS
from daxemu.ranges import BlockRange, Range
from daxemu.uapi import PAGE_SIZE


class ReservedFile:
    """The reserved file of a filesystem, created at the first write. Positions are blocks of the file."""

    def __init__(self, fs: Filesystem) -> None:
        self._fs = fs

    @property
    def blocks(self) -> int:
        """Number of device blocks of the file."""
        extents = self._extents()
        return extents.blocks if extents is not None else 0

    @property
    def exists(self) -> bool:
        """True if the file exists."""
        return self._fs.names.find(RESERVED_INO) is not None

    def create(self) -> None:
        """Create the file, empty, unless the file exists."""
        if not self.exists:
            self._make()

    def _extents(self) -> ExtentMap | None:
        inode = self._fs.names.find(RESERVED_INO)
        return inode.extents if inode is not None else None

    def mapped(self, blocks: BlockRange) -> list[BlockRange]:
        """Return the parts of ``blocks`` that are not holes."""
        extents = self._extents()
        if extents is None:
            return []
        runs = extents.lookup(*blocks)
        return [Range(r.file_block, r.file_block + r.length) for r in runs if r.link is not None]

    def map(self, blocks: BlockRange) -> None:
        """Allocate device blocks for the holes in ``blocks``. Raises NoSpace; then nothing has changed."""
        extents = self._extents()
        if extents is None:
            extents = self._make()
        holes = [
            Range(r.file_block, r.file_block + r.length) for r in extents.lookup(*blocks) if r.link is None
        ]
        wanted = sum(hole.length for hole in holes)
        if wanted:
            allocator = self._fs.allocator
            self._fs.ensure_links(len(holes) + min(wanted, allocator.fragments))
            extents.fill(holes, allocator.allocate(wanted))

    def _make(self) -> ExtentMap:
        fs = self._fs
        # Of the largest size, because a mount after a crash zeroes all blocks beyond the end of a file.
        inode = Inode(RESERVED_INO, stat.S_IFREG | 0o600, 0, 0, size=fs.allocator.total * PAGE_SIZE)
        fs.names.adopt(inode)
        fs.names.touch(inode, modified=True)
        assert inode.extents is not None
        return inode.extents

    def unmap(self, blocks: BlockRange) -> None:
        """Make ``blocks`` a hole, and free the device blocks."""
        if (extents := self._extents()) is not None:
            for run in extents.remove(*blocks):
                self._fs.allocator.free(run)

    def read(self, blocks: BlockRange) -> bytes:
        """Return the contents of ``blocks``, zeros in holes. Raises MediaError on poison."""
        extents, pieces = self._extents(), []
        if extents is None:
            return bytes(blocks.length * PAGE_SIZE)
        for run in extents.lookup(*blocks):
            size = run.length * PAGE_SIZE
            hole = run.link is None
            pieces.append(
                bytes(size) if hole else bytes(self._fs.dax.direct_access(run.dev_block * PAGE_SIZE, size))
            )
        return b"".join(pieces)

    def write(self, blocks: BlockRange, data: bytes | memoryview) -> None:
        """Write ``data`` to ``blocks``. Poison there is cleared. Precondition: no holes."""
        extents = self._extents()
        assert extents is not None
        for run in extents.lookup(*blocks):
            at = (run.file_block - blocks.start) * PAGE_SIZE
            chunk = memoryview(data)[at : at + run.length * PAGE_SIZE]
            try:
                self._fs.dax.direct_access(run.dev_block * PAGE_SIZE, len(chunk))[:] = chunk
            except MediaError:
                self._fs.dax.recovery_write(run.dev_block * PAGE_SIZE, chunk)

    def positions(self, blocks: BlockRange) -> list[BlockRange]:
        """Return the positions in the file of the device ``blocks`` that belong to the file."""
        return [
            Range(owner.file_block, owner.file_block + owner.length)
            for owner in self._fs.rmap.owners(*blocks)
            if owner.ino == RESERVED_INO
        ]

    def discard_in_pieces(self) -> Iterator[None]:
        """Remove the file and free all blocks, PIECE_LINKS links in each step.

        After each step the file is shorter.
        """
        inode = self._fs.names.find(RESERVED_INO)
        if inode is not None:
            extents = self._extents()
            assert extents is not None
            while (at := extents.last_piece(0, PIECE_LINKS)) > 0:
                self.unmap(Range(at, self._fs.allocator.total))
                yield
                self._fs.commit_if_much()
            self.unmap(Range(0, self._fs.allocator.total))
            inode.nlink = 0
            self._fs.names.drop(inode)
