"""Statistics of a filesystem: used and free blocks, and damaged files."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from daxemu.fs.inode import RESERVED_INO
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import blocks_of, bytes_of_sectors

NAMELESS = {METADATA_INO: "<metadata>", RESERVED_INO: "<redundancy>"}
"""Names, in place of a path, of inodes without a path."""


PIECE = 512
"""Bad blocks, or lines, of one piece of the list: 10 ms."""


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
    """Return the damage of all bad blocks, in order of path and offset. A bad block counts for each owner."""
    return [damage for part in damaged_in_pieces(dax, rmap, names) for damage in part]


def damaged_in_pieces(dax: DaxDevice, rmap: Rmap, names: Namespace) -> Iterator[list[Damage]]:
    """Yield the list of :func:`damaged` in pieces, after a number of empty pieces.

    Each step costs PIECE bad blocks, or the owners of one bad block. A change between two steps shows from
    the next step on.
    """
    found: list[list[Damage]] = []
    for sectors in dax.badblocks.in_pieces(PIECE):
        lost: list[Damage] = []
        for part in sectors:
            lost += _damage(dax, rmap, names, bytes_of_sectors(part))
            if len(lost) >= PIECE:
                found.append(sorted(lost, key=_order))
                lost = []
                yield []
        found.append(sorted(lost, key=_order))
        yield []
    ordered = heapq.merge(*found, key=_order)
    while some := list(islice(ordered, PIECE)):
        yield some


def _damage(dax: DaxDevice, rmap: Rmap, names: Namespace, bad_block: Range) -> Iterator[Damage]:
    for owner in rmap.owners(*blocks_of(bad_block)):
        if owner.ino in NAMELESS:
            yield Damage(owner.ino, NAMELESS[owner.ino], bad_block.start, bad_block.length)
            continue
        base = owner.dev_block * PAGE_SIZE
        part = bad_block.clip(base, base + owner.length * PAGE_SIZE)
        at = owner.file_block * PAGE_SIZE + part.start - base
        yield Damage(owner.ino, names.path_of(owner.ino), at, part.length)


def _order(damage: Damage) -> tuple[str, int]:
    return damage.path, damage.offset
