"""Inode flags of chattr(1), immutable and append-only, with the checks of the VFS for both.

The kernel's FUSE forwards the ioctls (``fuse_fileattr_get()`` in fs/fuse/ioctl.c), but never sets S_IMMUTABLE
and S_APPEND in the kernel's inode. So the filesystem makes the checks itself. As on Linux, an open file keeps
the rights of its open(2): a descriptor from before ``chattr +i`` can still write(2).

Every check raises FsError EPERM.
"""

from __future__ import annotations

import errno
import os

from daxemu.errors import FsError
from daxemu.fs.inode import Inode
from daxemu.uapi import FALLOC_FL_KEEP_SIZE

IMMUTABLE = 0x10
"""FS_IMMUTABLE_FL: the inode does not change. Names of a directory do not change either."""
APPEND = 0x20
"""FS_APPEND_FL: a file only grows. A directory only gets new names."""
SUPPORTED = IMMUTABLE | APPEND

KEY = b"daxemu.inode_flags"
"""Key of the flags in ``Inode.xattrs``. Programs cannot get, set or list an attribute of this name."""
_BYTES = 4


def flags_of(inode: Inode) -> int:
    """Flags of an inode, FS_*_FL bits."""
    return int.from_bytes(inode.xattrs.get(KEY, b""), "little") & SUPPORTED


def encode(flags: int) -> bytes:
    """Value of KEY for flags; empty for no flags, which have no KEY."""
    return flags.to_bytes(_BYTES, "little") if flags else b""


def _refuse(inode: Inode, flags: int) -> None:
    if flags_of(inode) & flags:
        raise FsError(errno.EPERM)


def may_write(inode: Inode) -> None:
    """Check ``inode_permission(MAY_WRITE)``: a new name in a directory, bytes of a file."""
    _refuse(inode, IMMUTABLE)


def may_open(inode: Inode, flags: int) -> None:
    """Check ``may_open()``; ``flags`` as for open(2)."""
    if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
        return
    may_write(inode)
    if flags & os.O_TRUNC or not flags & os.O_APPEND:
        _refuse(inode, APPEND)


def may_change(inode: Inode) -> None:
    """Check for a new size, mode, owner, explicit time, hard link, or extended attribute.

    The check of ``may_setattr()``, ``vfs_truncate()``, ``vfs_link()`` and ``may_write_xattr()``.
    """
    _refuse(inode, IMMUTABLE | APPEND)


def may_delete(directory: Inode, victim: Inode) -> None:
    """Check ``may_delete()``: remove the name of ``victim`` from a directory, or replace the name."""
    _refuse(directory, IMMUTABLE | APPEND)
    _refuse(victim, IMMUTABLE | APPEND)


def may_fallocate(inode: Inode, mode: int) -> None:
    """Check ``vfs_fallocate()``: an append-only file takes nothing but preallocation."""
    may_write(inode)
    if mode & ~FALLOC_FL_KEEP_SIZE:
        _refuse(inode, APPEND)
