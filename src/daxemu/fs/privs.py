"""What a file loses when it changes hands or contents: set-id bits (fs/attr.c, fs/inode.c).

Capabilities (security.capability) go too, but the kernel itself removes that attribute.
"""

from __future__ import annotations

import stat
from collections.abc import Callable

from daxemu.fs.inode import Inode
from daxemu.uapi import XATTR_NAME_CAPS


def setattr_should_drop_suidgid(inode: Inode, in_group_or_capable: Callable[[int], bool]) -> int:
    """The bits of the mode that a write by somebody without CAP_FSETID takes away, and a chown by anybody.

    Set-gid without the group's x bit once meant mandatory locking: it stays where ``in_group_or_capable``
    says that the caller is of the file's group, or has the capability.
    """
    if inode.is_dir:
        return 0
    drop = inode.mode & stat.S_ISUID
    if inode.mode & stat.S_ISGID and (inode.mode & stat.S_IXGRP or not in_group_or_capable(inode.gid)):
        drop |= stat.S_ISGID
    return drop


def is_sxid(mode: int) -> bool:
    """Whether a mode has set-id bits."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID))


def dentry_needs_remove_privs(inode: Inode) -> bool:
    """Whether a write may have to take something away."""
    return is_sxid(inode.mode) or XATTR_NAME_CAPS in inode.xattrs
