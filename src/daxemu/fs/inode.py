"""An inode, and the credentials of a caller (``struct inode``, ``struct cred``)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from daxemu.fs.extents import ExtentMap
from daxemu.uapi import PAGE_SECTORS, PAGE_SIZE, Ino

ROOT_INO: Ino = 1
RESERVED_INO: Ino = 1 << 62
"""The file of a repair strategy (fs/reserved.py). The file has no name."""
LINK_MAX = (1 << 31) - 1
MAX_FILE_SIZE = (1 << 63) - PAGE_SIZE
_SECOND = 10**9
TIME_MAX = (1 << 63) // _SECOND * _SECOND
"""Largest time in the store, in nanoseconds before or after 1970, as whole seconds: years 1677 to 2262."""
ENTRY_COST = 28
"""Bytes of a directory entry or an extended attribute in the store, besides name and value."""


def timestamp_truncate(time: int) -> int:
    """Return the nearest storable time, in nanoseconds (fs/inode.c, s_time_min and s_time_max)."""
    return max(-TIME_MAX, min(time, TIME_MAX))


class Inode(msgspec.Struct, eq=False, gc=False):
    """An inode. The first fields are in the order of the store's columns. Times are nanoseconds since 1970.

    ``size``: bytes. ``entries`` belongs to a directory, ``extents`` to a regular file, ``target`` to a
    symlink; in other inodes each is None. ``parent`` and ``name`` are one name of the inode: the only name of
    a directory, for other inodes a hint verified by ``path_of``. ``pins`` and ``opens`` keep an unlinked
    inode: lookups of the kernel, and open handles, which keep the data as well. The host counts both.
    """

    ino: Ino
    mode: int
    uid: int
    gid: int
    nlink: int = 1
    rdev: int = 0
    size: int = 0
    atime: int = 0
    mtime: int = 0
    ctime: int = 0
    target: bytes | None = None
    xattrs: dict[bytes, bytes] = {}
    parent: Ino = 0
    name: bytes = b""
    entries: dict[bytes, Ino] | None = None
    extents: ExtentMap | None = None
    pins: int = 0
    opens: int = 0

    @property
    def is_dir(self) -> bool:
        return self.entries is not None

    @property
    def sectors(self) -> int:
        """``st_blocks``: 512-byte sectors used on the device."""
        return self.extents.blocks * PAGE_SECTORS if self.extents is not None else 0


@dataclass(frozen=True)
class Credentials:
    """The caller of an operation (the parts of ``struct cred`` that matter here)."""

    uid: int
    gid: int
    umask: int = 0


SUPERUSER = Credentials(0, 0)
