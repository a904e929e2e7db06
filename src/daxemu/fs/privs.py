"""What a file loses when it changes hands or contents: set-id bits (fs/attr.c, fs/inode.c).

Capabilities (security.capability) go too, but the kernel itself removes that attribute.
"""

from __future__ import annotations

import stat

from daxemu.fs.inode import Inode
from daxemu.uapi import XATTR_NAME_CAPS


def setattr_should_drop_suidgid(inode: Inode) -> int:
    """The bits of the mode that a write by somebody without CAP_FSETID takes away, and a chown by anybody.

    Set-gid without the group's x bit is no such bit: it once meant mandatory locking.
    """
    if inode.is_dir:
        return 0
    drop = inode.mode & stat.S_ISUID
    return drop | inode.mode & stat.S_ISGID if inode.mode & stat.S_IXGRP else drop


def dentry_needs_remove_privs(inode: Inode) -> bool:
    """Whether a write may have to take something away."""
    return bool(inode.mode & (stat.S_ISUID | stat.S_ISGID)) or XATTR_NAME_CAPS in inode.xattrs
