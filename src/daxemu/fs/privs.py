"""Set-id bits, removed when a file changes its owner or contents (fs/attr.c, fs/inode.c).

Capabilities (security.capability) are removed, too, but by the kernel itself.
"""

from __future__ import annotations

import stat
from collections.abc import Callable

from daxemu.fs.inode import Inode
from daxemu.uapi import XATTR_NAME_CAPS


def setattr_should_drop_suidgid(inode: Inode, in_group_or_capable: Callable[[int], bool]) -> int:
    """Return the mode bits dropped by any chown, and by a write of a caller without CAP_FSETID.

    Set-gid without the group's x bit once meant mandatory locking. So the bit stays if
    ``in_group_or_capable`` returns True: the caller is in the file's group, or has the capability.
    """
    if inode.is_dir:
        return 0
    drop = inode.mode & stat.S_ISUID
    if inode.mode & stat.S_ISGID and (inode.mode & stat.S_IXGRP or not in_group_or_capable(inode.gid)):
        drop |= stat.S_ISGID
    return drop


def is_sxid(mode: int) -> bool:
    """Return True if a mode has set-id bits."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID))


def dentry_needs_remove_privs(inode: Inode) -> bool:
    """Return True if a write may have to remove set-id bits or capabilities."""
    return is_sxid(inode.mode) or XATTR_NAME_CAPS in inode.xattrs
