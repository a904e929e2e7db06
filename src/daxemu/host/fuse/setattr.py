"""Checks of the VFS before ->setattr, on the fields of a FUSE_SETATTR."""

from __future__ import annotations

from daxemu.fs import inode_flags
from daxemu.fs.inode import Inode
from daxemu.host.fuse.supplement import is_touch

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)


def may_setattr(inode: Inode, fields: pyfuse3.SetattrFields) -> None:
    """``may_setattr()`` for inode flags. touch(1) counts as a write, which append-only files allow.

    Raises FsError EPERM.
    """
    times = fields.update_atime or fields.update_mtime
    if fields.update_size or fields.update_mode or fields.update_uid or fields.update_gid:
        inode_flags.may_change(inode)
    elif times and is_touch():
        inode_flags.may_write(inode)
    elif times:
        inode_flags.may_change(inode)


def is_chown(fields: pyfuse3.SetattrFields) -> bool:
    """Return whether a request is a chown(2). A request without any field is chown(-1, -1)."""
    others = (fields.update_size, fields.update_atime, fields.update_mtime)
    return fields.update_uid or fields.update_gid or not any(others)
