"""Open handles of the mount's files, counted by inode."""

from __future__ import annotations

from collections import Counter

from daxemu.host.fuse.supplement import may_store_through_mapping, unpack
from daxemu.uapi import Ino


class OpenFiles:
    """Numbers of open handles. A mapping keeps its handle open. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._opened: Counter[Ino] = Counter()
        self.writers: Counter[Ino] = Counter()
        """Number of handles of each inode open for writing."""
        self.mappable: Counter[Ino] = Counter()
        """Number of handles of each inode that permit a shared writable mapping."""

    def __len__(self) -> int:
        return len(self._opened)

    def inodes(self) -> list[Ino]:
        """Return the inodes with open handles. From any thread."""
        return list(self._opened)

    def mapped(self, ino: Ino) -> None:
        """Count a direct mapping, which holds the file open for writing without a handle."""
        self._opened[ino] += 1
        self.writers[ino] += 1

    def unmapped(self, ino: Ino) -> None:
        """Forget a direct mapping."""
        self._closed(ino, writable=True, mappable=False)

    def opened(self, fh: int) -> None:
        """Count a new handle."""
        ino, writable = unpack(fh)[:2]
        self._opened[ino] += 1
        self.writers[ino] += writable
        self.mappable[ino] += may_store_through_mapping(fh)

    def released(self, fh: int) -> None:
        """Forget a handle."""
        ino, writable = unpack(fh)[:2]
        self._closed(ino, writable=writable, mappable=may_store_through_mapping(fh))

    def _closed(self, ino: Ino, *, writable: bool, mappable: bool) -> None:
        self._opened[ino] -= 1
        self.writers[ino] -= writable
        self.mappable[ino] -= mappable
        if not self._opened[ino]:
            del self._opened[ino], self.writers[ino], self.mappable[ino]
