"""Changes of failed blocks for a repair strategy: rewrite in place, relocate, punch.

Blocks are device blocks. Each function keeps the filesystem's invariants, and handles every owner of a block.
"""

from __future__ import annotations

from itertools import pairwise

from daxemu.errors import InvalidArgument
from daxemu.events import PoisonCleared
from daxemu.fs.extents import ExtentMap
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.rmap import METADATA_INO, Owner
from daxemu.ranges import BlockRange, Range, paired
from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import byte_span


def rewrite(fs: Filesystem, offset: int, data: bytes | memoryview) -> None:
    """Write ``data`` to the device at byte ``offset``. Poison there is cleared, as by any write.

    Raises InvalidArgument unless both ends are whole sectors.
    """
    for good in fs.dax.recovery_write(offset, data):
        fs.emit(PoisonCleared(offset=good.start, length=good.length, by="repair"))


def relocate(fs: Filesystem, blocks: BlockRange, data: bytes | memoryview) -> None:
    """Move all owners of ``blocks`` to new blocks with ``data``. Sharing is kept.

    The old blocks are free, but not used while poisoned. Raises NoSpace; then nothing has changed.
    """
    owners = [owner for owner in fs.rmap.owners(*blocks) if owner.ino != METADATA_INO]
    edges = sorted({edge for o in owners for edge in (o.dev_block, o.dev_block + o.length)})
    # Between two edges, every owner of a block owns all blocks.
    pieces = [Range(*pair) for pair in pairwise(edges) if any(_has(owner, pair[0]) for owner in owners)]
    wanted = sum(piece.length for piece in pieces)
    fs.ensure_links((2 + min(wanted, fs.allocator.fragments)) * len(owners))
    for old, new in paired(pieces, fs.allocator.allocate(wanted)):
        skip = (old.start - blocks.start) * PAGE_SIZE
        target = fs.dax.direct_access(*byte_span(new))
        target[:] = memoryview(data)[skip : skip + len(target)]
        _move(fs, [owner for owner in owners if _has(owner, old.start)], old, new)


def _has(owner: Owner, block: Block) -> bool:
    return owner.dev_block <= block < owner.dev_block + owner.length


def _move(fs: Filesystem, owners: list[Owner], old: BlockRange, new: BlockRange) -> None:
    """Map ``new`` in place of ``old`` for all ``owners``. Precondition: each owner has all of ``old``."""
    first: tuple[ExtentMap, Block] | None = None
    for owner in owners:
        extents, at = fs.extents_of(owner.ino), owner.file_block + old.start - owner.dev_block
        for run in extents.remove(at, at + old.length):
            fs.allocator.free(run)
        if first is None:
            extents.insert(at, new.start, new.length)
            first = extents, at
        else:
            extents.clone_from(first[0], first[1], new.length, at)


def punch(fs: Filesystem, blocks: BlockRange) -> None:
    """Punch a hole over ``blocks`` in every owner. The blocks are free, but not used while poisoned."""
    if blocks.start < 0 or blocks.end > fs.allocator.total:
        raise InvalidArgument(f"blocks {blocks.start}-{blocks.end} are outside the device")
    fs.ensure_links(sum(1 for _ in fs.rmap.owners(*blocks)))
    for owner in list(fs.rmap.owners(*blocks)):
        if owner.ino != METADATA_INO:
            freed = fs.extents_of(owner.ino).remove(owner.file_block, owner.file_block + owner.length)
            for run in freed:
                fs.allocator.free(run)
