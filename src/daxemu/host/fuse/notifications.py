"""Notifications to the kernel, through /dev/fuse: pages and attributes in its caches are out of date."""

from __future__ import annotations

import errno
import os
import struct

from daxemu.uapi import Ino

FUSE_NOTIFY_INVAL_INODE = 2
_OUT_HEADER = struct.Struct("=IiQ")
_INVAL_INODE = struct.Struct("=Qqq")


def invalidate_pages(fd: int, ino: Ino, offset: int, length: int) -> None:
    """Remove the pages of a range from all page tables and the page cache (``unmap_mapping_range()``).

    Bytes; ``length`` 0: to the end of the file. Neighbouring pages stay. The kernel writes dirty pages back
    to this process during the call: from a worker thread only.
    """
    _inval_inode(fd, ino, offset, length)


def invalidate_attributes(fd: int, ino: Ino) -> None:
    """Have the kernel ask for size and times anew at the next use. Does not block."""
    _inval_inode(fd, ino, -1, 0)


def _inval_inode(fd: int, ino: Ino, offset: int, length: int) -> None:
    body = _INVAL_INODE.pack(ino, offset, length)
    header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), FUSE_NOTIFY_INVAL_INODE, 0)
    try:
        os.write(fd, header + body)
    except OSError as error:
        # The inode is not in the kernel's cache, or the connection is gone: nothing to invalidate.
        if error.errno not in (errno.ENOENT, errno.ENOTCONN, errno.ENODEV):
            raise
