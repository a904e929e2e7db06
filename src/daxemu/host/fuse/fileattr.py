"""The ioctls of chattr(1), lsattr(1) and `xfs_io -c chattr`: inode flags, as FS_*_FL and as FS_XFLAG_* bits.

The kernel forwards the ioctls for regular files and directories (``fuse_fileattr_get()``,
``fuse_fileattr_set()``). The kernel also checks the owner, and has the inode locked meanwhile.
"""

from __future__ import annotations

import errno
import struct

from daxemu.errors import FsError
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode_flags import APPEND, IMMUTABLE, flags_of
from daxemu.host.proc.processes import capable
from daxemu.uapi import CAP_LINUX_IMMUTABLE, Ino

# The number of the first two says long, the argument is an int (include/uapi/linux/fs.h).
FLAGS = struct.Struct("=I")
FSXATTR = struct.Struct("=IIIII8x")
"""``struct fsxattr``: xflags, extsize, nextents, projid, cowextsize."""
_LONG = struct.calcsize("l")
FS_IOC_GETFLAGS = 2 << 30 | _LONG << 16 | ord("f") << 8 | 1
FS_IOC_SETFLAGS = 1 << 30 | _LONG << 16 | ord("f") << 8 | 2
FS_IOC_FSGETXATTR = 2 << 30 | FSXATTR.size << 16 | ord("X") << 8 | 31
FS_IOC_FSSETXATTR = 1 << 30 | FSXATTR.size << 16 | ord("X") << 8 | 32
GETTERS = (FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR)
SETTERS = (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR)

_XFLAGS = {IMMUTABLE: 0x08, APPEND: 0x10}
"""FS_XFLAG_IMMUTABLE, FS_XFLAG_APPEND by FS_*_FL."""


def get(fs: Filesystem, ino: Ino, command: int) -> bytes:
    """Answer one of GETTERS."""
    fs.check_alive()
    flags = flags_of(fs.names.get(ino))
    if command == FS_IOC_GETFLAGS:
        return FLAGS.pack(flags)
    return FSXATTR.pack(sum(xflag for flag, xflag in _XFLAGS.items() if flags & flag), 0, 0, 0, 0)


def set_(fs: Filesystem, ino: Ino, command: int, data: bytes, tid: int) -> None:
    """Do one of SETTERS for thread ``tid``.

    Raises FsError EPERM where a flag changes and the thread lacks CAP_LINUX_IMMUTABLE, EOPNOTSUPP for other
    flags, extent sizes and projects, NoSpace.
    """
    flags = _flags_in(command, data)
    if flags != flags_of(fs.names.get(ino)) and not capable(tid, CAP_LINUX_IMMUTABLE):
        raise FsError(errno.EPERM)
    fs.set_inode_flags(ino, flags)


def _flags_in(command: int, data: bytes) -> int:
    """Flags, FS_*_FL bits, in the argument of one of SETTERS."""
    layout = FLAGS if command == FS_IOC_SETFLAGS else FSXATTR
    if len(data) < layout.size:
        raise FsError(errno.EINVAL)
    if command == FS_IOC_SETFLAGS:
        return int(FLAGS.unpack_from(data)[0])
    xflags, extsize, _, projid, cowextsize = FSXATTR.unpack_from(data)
    if xflags & ~sum(_XFLAGS.values()) or extsize or projid or cowextsize:
        raise FsError(errno.EOPNOTSUPP)
    return sum(flag for flag, xflag in _XFLAGS.items() if xflags & xflag)
