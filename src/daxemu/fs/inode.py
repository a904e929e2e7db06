"""One inode, and who may ask for what (``struct inode``, ``struct cred``)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from daxemu.fs.extents import ExtentMap
from daxemu.uapi import PAGE_SIZE, SECTOR_SIZE, Ino

ROOT_INO: Ino = 1
RESERVED_INO: Ino = 1 << 62
"""The file of a repair strategy (fs/reserved.py). It has no name."""
LINK_MAX = (1 << 31) - 1
MAX_FILE_SIZE = (1 << 63) - PAGE_SIZE
_SECOND = 10**9
TIME_MAX = (1 << 63) // _SECOND * _SECOND
"""Nanoseconds, in whole seconds, that the store has room for, before 1970 and after: from 1677 to 2262."""
ENTRY_COST = 28
"""Bytes a directory entry or an extended attribute takes in the store besides its name and value."""


def timestamp_truncate(time: int) -> int:
    """The nearest time that can be kept (fs/inode.c, s_time_min and s_time_max)."""
    return max(-TIME_MAX, min(time, TIME_MAX))


class Inode(msgspec.Struct, eq=False, gc=False):
    """One inode, its fields in the order of the store's columns first. Times are nanoseconds since the epoch,
    ``size`` is bytes.

    ``entries`` is a directory's, ``extents`` a regular file's, ``target`` a symlink's; the others are None.
    ``parent`` and ``name`` are one of its links: a directory's only one, for others a hint that ``path_of``
    verifies. ``pins`` and ``opens`` count what keeps it alive besides its links: the kernel's lookups, and
    open handles, which keep its bytes as well. Both are the host's to count.
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
        """``st_blocks``: what its bytes take up on the device."""
        return self.extents.blocks * (PAGE_SIZE // SECTOR_SIZE) if self.extents is not None else 0


@dataclass(frozen=True)
class Credentials:
    """Who asks (``struct cred``, what of it matters here)."""

    uid: int
    gid: int
    umask: int = 0


SUPERUSER = Credentials(0, 0)
