"""Statistics of a filesystem: used and free blocks, and damaged files."""

from __future__ import annotations

from typing import NamedTuple

from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.uapi import PAGE_SIZE, Ino

NAMELESS = {METADATA_INO: "<metadata>", RESERVED_INO: "<redundancy>"}
"""Names, in place of a path, of inodes without a path."""


class Damage(NamedTuple):
    """Damaged bytes ``[offset, offset + length)`` of a file: they cannot be read."""

    ino: Ino
    path: str
    offset: int
    length: int


class StatFs(NamedTuple):
    """``struct statfs``, in blocks of 4096 bytes."""

    blocks: int
    free: int
    available: int
    files: int
    name_max: int


def damaged(dax: DaxDevice, rmap: Rmap, names: Namespace) -> list[Damage]:
    """What the badblocks cost, in order of path and offset; one device range may be of several files."""
    lost = []
    for bad in dax.badblocks.overlapping_bytes(0, dax.size):
        for owner in rmap.owners(bad.start // PAGE_SIZE, -(-bad.end // PAGE_SIZE)):
            if owner.ino in NAMELESS:
                lost.append(Damage(owner.ino, NAMELESS[owner.ino], bad.start, bad.length))
                continue
            base = owner.dev_block * PAGE_SIZE
            part = bad.clip(base, base + owner.length * PAGE_SIZE)
            at = owner.file_block * PAGE_SIZE + part.start - base
            lost.append(Damage(owner.ino, names.path_of(owner.ino), at, part.length))
    return sorted(lost, key=lambda damage: (damage.path, damage.offset))
