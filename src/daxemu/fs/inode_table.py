"""The inode table: which inodes there are, what of them the store does not have yet, where their names are
(fs/inode.c, fs/xfs/xfs_icache.c).
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

    def __init__(self, rmap: Rmap) -> None:
        self._rmap = rmap
        self._inodes: dict[Ino, Inode] = {}
        self._next_ino = ROOT_INO + 1
        self.dirty_inodes: set[Ino] = set()
        self.dirty_times: set[Ino] = set()
        """Inodes of which at least the times changed."""
        self.dirty_since = 0
        """When the oldest of these changes was made, in ns since the epoch; 0 if there is none."""
        self.dirty_entries: set[tuple[Ino, bytes]] = set()
        """What the store does not have yet: inode numbers, and (directory, name) of entries made or
        removed.
        """
        self.on_change: Callable[[Ino], None] = lambda ino: None
        """Told which inode is touched."""
        self.name_bytes = 0
        """Bytes of names, symlinks and extended attributes: what the store must have room for besides inodes
        and links.
        """
        self.linkable: set[Ino] = set()
        """Files made without a name that may get one (``I_LINKABLE``)."""
        self._listings = Listings()
        self._names: dict[Ino, int] = {}
        """While a store is read: how many names a file with several has had so far."""

    def __len__(self) -> int:
        return len(self._inodes)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._inodes.values())

    def find(self, ino: Ino) -> Inode | None:
        """The inode with this number, if there is one."""
        return self._inodes.get(ino)

    def touch(self, inode: Inode, *, modified: bool) -> None:
        """An inode changed: set its ctime, and its mtime if its contents did. The next commit writes it."""
        inode.ctime = time.time_ns()
        if modified:
            inode.mtime = inode.ctime
        self.dirty_since = self.dirty_since or inode.ctime
        self.dirty_inodes.add(inode.ino)
        self.on_change(inode.ino)

    def update_time(self, inode: Inode, now: int) -> None:
        """``generic_update_time()``: its bytes changed at ``now`` (ns since the epoch), and nothing else. The
        next commit writes that, but fdatasync(2) does not wait for it.
        """
        inode.mtime = inode.ctime = now
        self.dirty_since = self.dirty_since or now
        self.dirty_times.add(inode.ino)

    def get(self, ino: Ino) -> Inode:
        """The inode with this number. Raises FsError ESTALE if there is none (any more)."""
        inode = self._inodes.get(ino)
        if inode is None:
            raise FsError(errno.ESTALE)
        return inode

    def regular(self, ino: Ino) -> tuple[Inode, ExtentMap]:
        """The regular file with this number and its extents. Raises FsError EISDIR or EINVAL for anything
        else.
        """
        inode = self.get(ino)
        if inode.extents is None:
            raise FsError(errno.EISDIR if inode.is_dir else errno.EINVAL)
        return inode, inode.extents

    def directory(self, ino: Ino) -> tuple[Inode, dict[bytes, Ino]]:
        """The directory with this number and its entries. Raises FsError ENOTDIR for anything else."""
        inode = self.get(ino)
        if inode.entries is None:
            raise FsError(errno.ENOTDIR)
        return inode, inode.entries

    def listing(self, ino: Ino) -> Listing:
        """Order of a directory's names. Raises FsError ENOTDIR for anything else."""
        return self._listings.of(ino, self.directory(ino)[1])

    def drop(self, inode: Inode) -> None:
        """Forget an inode. Preconditions: no links, no pins, no extents."""
        self._listings.drop(inode.ino)
        self.name_bytes -= self._own_bytes(inode)
        self.dirty_inodes.add(inode.ino)
        self.on_change(inode.ino)
        del self._inodes[inode.ino]

    def adopt(self, inode: Inode) -> None:
        """Put in an inode that a store has read."""
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
        """Put in entries of one directory that a store has read, as (parent, name, inode number).

        Raises FsError if there is no such directory or inode, ValueError for a name or a link that no
        directory can hold.
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
        """Count a name beyond the first. Raises ValueError for an inode that has one name at most."""
        if inode.is_dir or inode.ino == RESERVED_INO:
            raise ValueError(
                f"directory {parent}: a name leads to inode {inode.ino}, which has another place"
            )
        self._names[inode.ino] = self._names.get(inode.ino, 1) + 1

    def finish_loading(self) -> None:
        """Everything a store has is here. Raises CorruptMetadata or ValueError if that is no filesystem."""
        root = self._inodes.get(ROOT_INO)
        if root is None or not root.is_dir:
            raise CorruptMetadata("there is no root directory")
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
        """Raises ValueError if ``directory`` is in a ring, or has no name. ``reached``: known to be below the
        root.
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
        """The number the next inode gets; numbers are never used twice."""
        return self._next_ino

    def reserve_inos(self, below: Ino) -> None:
        """Give no number below ``below`` to a new inode: they were given out before."""
        self._next_ino = max(self._next_ino, below)

    def path_of(self, ino: Ino) -> str:
        """A path of the inode from the root, as daxemu.text.name_text has it. An unlinked file has only a
        number.
        """
        path = self.path_bytes(ino)
        return f"<inode {ino}, unlinked>" if path is None else name_text(path)

    def path_bytes(self, ino: Ino) -> bytes | None:
        """A path of the inode from the root, for the kernel; None if it is unlinked."""
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
        """Its remembered name was unlinked, but it has another: look through the tree for it."""
        for directory in self:
            for name, child in (directory.entries or {}).items():
                if child == inode.ino:
                    inode.parent, inode.name = directory.ino, name
                    return
