"""Inode table: all inodes, the changes that are not committed yet, and paths of inodes (fs/inode.c,
fs/xfs/xfs_icache.c).
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable, Iterable, Iterator

from daxemu.errors import CorruptMetadata, FsError
from daxemu.fs.extents import ExtentMap
from daxemu.fs.inode import ENTRY_COST, RESERVED_INO, ROOT_INO, Inode
from daxemu.fs.listing import Listing, Listings
from daxemu.fs.records import check_entry
from daxemu.fs.rmap import Rmap
from daxemu.text import name_text
from daxemu.uapi import Ino


class InodeTable:
    """All inodes of a filesystem."""

    def __init__(self, rmap: Rmap, on_change: Callable[[Ino], None] = lambda ino: None) -> None:
        """``on_change`` is called with the number of each inode that changes."""
        self._rmap = rmap
        self._on_change = on_change
        self._inodes: dict[Ino, Inode] = {}
        self._next_ino = ROOT_INO + 1
        self.dirty_inodes: set[Ino] = set()
        self.dirty_times: set[Ino] = set()
        """Inodes whose times changed, and possibly more."""
        self.dirty_since = 0
        """Time of the oldest uncommitted change, in ns since the epoch; 0 without changes."""
        self.dirty_entries: set[tuple[Ino, bytes]] = set()
        """Uncommitted entries, made or removed, as (directory, name)."""
        self.name_bytes = 0
        """Bytes of names, symlinks and extended attributes. The store needs room for these besides inodes and
        links.
        """
        self.linkable: set[Ino] = set()
        """Files made without a name that may get a name (``I_LINKABLE``)."""
        self._listings = Listings()
        self._names: dict[Ino, int] = {}
        """During the load of a store: the number of names so far of a file with several names."""

    def __len__(self) -> int:
        return len(self._inodes)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._inodes.values())

    def find(self, ino: Ino) -> Inode | None:
        """Return the inode with the number ``ino``; None without such an inode."""
        return self._inodes.get(ino)

    def is_stored(self, inode: Inode) -> bool:
        """Return True if commits write an inode: the inode has a name, or may get one (``I_LINKABLE``)."""
        return inode.nlink > 0 or inode.ino in self.linkable

    def touch(self, inode: Inode, *, modified: bool) -> None:
        """Record a change of an inode: set ctime and, with ``modified``, mtime. The next commit writes the
        inode.
        """
        inode.ctime = time.time_ns()
        if modified:
            inode.mtime = inode.ctime
        self.dirty_since = self.dirty_since or inode.ctime
        self.dirty_inodes.add(inode.ino)
        self._on_change(inode.ino)

    def update_time(self, inode: Inode, now: int) -> None:
        """Record a change of only the bytes of an inode at ``now``, in ns since the epoch
        (``generic_update_time()``). The next commit writes the times; fdatasync(2) does not wait for the
        times.
        """
        inode.mtime = inode.ctime = now
        self.dirty_since = self.dirty_since or now
        self.dirty_times.add(inode.ino)

    def get(self, ino: Ino) -> Inode:
        """Return the inode with the number ``ino``. Raises FsError ESTALE without such an inode."""
        inode = self._inodes.get(ino)
        if inode is None:
            raise FsError(errno.ESTALE)
        return inode

    def regular(self, ino: Ino) -> tuple[Inode, ExtentMap]:
        """Return a regular file and its extents. Raises FsError EISDIR for a directory, EINVAL for any other
        type, ESTALE without such an inode.
        """
        inode = self.get(ino)
        if inode.extents is None:
            raise FsError(errno.EISDIR if inode.is_dir else errno.EINVAL)
        return inode, inode.extents

    def directory(self, ino: Ino) -> tuple[Inode, dict[bytes, Ino]]:
        """Return a directory and its entries. Raises FsError ENOTDIR for any other type, ESTALE without such
        an inode.
        """
        inode = self.get(ino)
        if inode.entries is None:
            raise FsError(errno.ENOTDIR)
        return inode, inode.entries

    def listing(self, ino: Ino) -> Listing:
        """Return the order of the names of a directory. Raises FsError ENOTDIR for any other type."""
        return self._listings.of(ino, self.directory(ino)[1])

    def drop(self, inode: Inode) -> None:
        """Forget an inode. Preconditions: no links, no pins, no extents."""
        self._listings.drop(inode.ino)
        self.name_bytes -= self._own_bytes(inode)
        self.dirty_inodes.add(inode.ino)
        self._on_change(inode.ino)
        del self._inodes[inode.ino]

    def adopt(self, inode: Inode) -> None:
        """Add an inode that a store has read."""
        if stat.S_ISREG(inode.mode):
            inode.extents = ExtentMap(inode.ino, self._rmap)
        elif stat.S_ISDIR(inode.mode):
            inode.entries = {}
        self._inodes[inode.ino] = inode
        if inode.ino != RESERVED_INO:
            self.reserve_inos(inode.ino + 1)
        if inode.target or inode.xattrs:
            self.name_bytes += self._own_bytes(inode)

    def adopt_entries(self, parent: Ino, rows: Iterable[tuple[Ino, bytes, Ino]]) -> None:
        """Add entries of one directory that a store has read, as (parent, name, inode number).

        Raises FsError for a missing directory or inode, ValueError for a name or a link that no directory can
        hold.
        """
        directory, entries = self.directory(parent)
        subdirectories = 0
        for _, name, ino in rows:
            check_entry(parent, name)
            child = self.get(ino)
            entries[name] = child.ino
            if child.entries is not None:
                subdirectories += 1
            if child.parent or ino in (ROOT_INO, RESERVED_INO):
                self._another_name(child, parent)
            child.parent, child.name = parent, name
        if directory.nlink != 2 + subdirectories:
            raise ValueError(f"inode {parent}: link count {directory.nlink}, has {2 + subdirectories}")
        self.name_bytes += sum(map(len, entries)) + ENTRY_COST * len(entries)

    def _another_name(self, inode: Inode, parent: Ino) -> None:
        """Count a name beyond the first. Raises ValueError for an inode with at most one possible name."""
        if inode.is_dir or inode.ino == RESERVED_INO:
            raise ValueError(
                f"directory {parent}: a name leads to inode {inode.ino}, which has another place"
            )
        self._names[inode.ino] = self._names.get(inode.ino, 1) + 1

    def finish_loading(self) -> None:
        """Check the tree after the load of a store. Raises CorruptMetadata or ValueError for an invalid
        tree.
        """
        root = self._inodes.get(ROOT_INO)
        if root is None or not root.is_dir:
            raise CorruptMetadata("the root directory is missing")
        root.parent = ROOT_INO
        reached = {ROOT_INO}
        for inode in self._inodes.values():
            if inode.entries is not None:
                self._reach(inode, reached)
                if not inode.entries and inode.nlink != 2:
                    raise ValueError(f"inode {inode.ino}: link count {inode.nlink}, has 2")
            elif inode.nlink != 1 or not inode.parent or inode.ino in self._names:
                self._check_links(inode)
        self._names.clear()

    def _check_links(self, inode: Inode) -> None:
        found = self._names.get(inode.ino, 1) if inode.parent or inode.ino == RESERVED_INO else 0
        if inode.nlink != found:
            raise ValueError(f"inode {inode.ino}: link count {inode.nlink}, has {found}")

    def _reach(self, directory: Inode, reached: set[Ino]) -> None:
        """Check that ``directory`` is below the root. ``reached``: directories that are known to be below the
        root. Raises ValueError for a directory in a ring or without a name.
        """
        way: set[Ino] = set()
        ino = directory.ino
        while ino not in reached:
            inode = self._inodes.get(ino)
            if inode is None or ino in way:
                raise ValueError(f"directory {directory.ino}: cannot be reached from the root")
            way.add(ino)
            ino = inode.parent
        reached |= way

    @staticmethod
    def _own_bytes(inode: Inode) -> int:
        values = sum(len(name) + len(value) + ENTRY_COST for name, value in inode.xattrs.items())
        return len(inode.target or b"") + values

    @property
    def next_ino(self) -> Ino:
        """Number of the next inode; numbers are never used twice."""
        return self._next_ino

    def reserve_inos(self, below: Ino) -> None:
        """Reserve all numbers below ``below``, which earlier inodes may have used."""
        self._next_ino = max(self._next_ino, below)

    def path_of(self, ino: Ino) -> str:
        """Return a path of the inode from the root, encoded by daxemu.text.name_text; for an unlinked file,
        text with its number.
        """
        path = self.path_bytes(ino)
        return f"<inode {ino}, unlinked>" if path is None else name_text(path)

    def path_bytes(self, ino: Ino) -> bytes | None:
        """Return a path of the inode from the root, for the kernel; None for an unlinked inode."""
        names: list[bytes] = []
        if ino == RESERVED_INO:
            return None
        while ino != ROOT_INO:
            inode = self._inodes.get(ino)
            if inode is None or inode.nlink == 0:
                return None
            parent = self._inodes.get(inode.parent)
            if parent is None or parent.entries is None or parent.entries.get(inode.name) != ino:
                self._find_name(inode)
            names.append(inode.name)
            ino = inode.parent
        return b"/" + b"/".join(reversed(names))

    def _find_name(self, inode: Inode) -> None:
        """Search the tree for another name of an inode whose remembered name was unlinked."""
        for directory in self:
            for name, child in (directory.entries or {}).items():
                if child == inode.ino:
                    inode.parent, inode.name = directory.ino, name
                    return
