"""Checks for ranges of files to share blocks (``generic_remap_file_range_prep`` in fs/remap_range.c)."""

from __future__ import annotations

import errno

from daxemu.errors import FsError
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.uapi import PAGE_SIZE


def check_remap(source: Inode, src_offset: int, target: Inode, dst_offset: int, length: int) -> None:
    """Check a range for sharing. Raises FsError EINVAL or, beyond the largest size, EFBIG.

    - The range must be whole blocks inside ``source``. The last block may be cut off by the ends of both
      files.
    - The range must not overlap the destination in the same file.
    """
    end = src_offset + length
    whole = src_offset % PAGE_SIZE == dst_offset % PAGE_SIZE == 0 and (
        end % PAGE_SIZE == 0 or end == source.size
    )
    if src_offset < 0 or dst_offset < 0 or length < 0 or end > source.size or not whole:
        raise FsError(errno.EINVAL, "a range to share must be whole 4096-byte blocks inside the source file")
    if length % PAGE_SIZE and dst_offset + length < target.size:
        raise FsError(errno.EINVAL, "the source's partial last block can only be shared at the target's end")
    if source is target and max(src_offset, dst_offset) < min(src_offset, dst_offset) + length:
        raise FsError(errno.EINVAL, "the ranges overlap")
    if dst_offset + length > MAX_FILE_SIZE:
        raise FsError(errno.EFBIG)
