"""Superblock: the place of the metadata files on the device. Stored twice (fs/metadata_region.py).

0 .. 3      length of the record in bytes, little-endian
4 .. 19     BLAKE2b of the record
20 ..       the record: a :class:`Superblock` as MessagePack
"""

from __future__ import annotations

import hashlib

import msgspec

from daxemu.errors import CorruptMetadata, MediaError, NoSpace
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block

MAGIC = "daxemu-fs"
VERSION, FORMER_VERSION = 3, 2
"""Present format, and the former format that a mount upgrades (fs/upgrade.py)."""
SUPER_BLOCKS = 16
_HEADER = 20
_SIZE = SUPER_BLOCKS * PAGE_SIZE


class Superblock(msgspec.Struct, array_like=True):
    """Record of a superblock. ``runs``: (file block, device block, blocks) of each extent of METADATA_INO,
    except the superblocks.
    """

    magic: str
    version: int
    generation: int
    total_blocks: int
    runs: list[tuple[int, int, int]]


def super_blocks(total: Block) -> tuple[Range, Range]:
    """Return the blocks of both superblocks, on a device of ``total`` blocks."""
    return Range(0, SUPER_BLOCKS), Range(total // 2, total // 2 + SUPER_BLOCKS)


def sealed(superblock: Superblock) -> bytes:
    """Encode a superblock with length and checksum, in whole pages. Raises NoSpace for too many runs."""
    record = msgspec.msgpack.encode(superblock)
    if len(record) > _SIZE - _HEADER:
        raise NoSpace("the metadata is in too many pieces for the superblock")
    whole = len(record).to_bytes(4, "little") + _checksum(record) + record
    return whole + bytes(-len(whole) % PAGE_SIZE)


def unsealed(dax: DaxDevice, blocks: Range) -> Superblock:
    """Read the superblock at ``blocks``. Raises MediaError for poison, CorruptMetadata for a corrupt
    record.
    """
    start = blocks.start * PAGE_SIZE
    length = int.from_bytes(dax.direct_access(start, PAGE_SIZE)[:4], "little")
    if not 0 < length <= _SIZE - _HEADER:
        raise CorruptMetadata("a superblock has an invalid length")
    whole = dax.direct_access(start, _HEADER + length)
    if _checksum(whole[_HEADER:]) != bytes(whole[4:_HEADER]):
        raise CorruptMetadata("a superblock does not match its checksum")
    try:
        return msgspec.msgpack.decode(whole[_HEADER:], type=Superblock)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptMetadata("a superblock's record cannot be decoded") from error


def names_filesystem(page: memoryview) -> bool:
    """Whether ``page`` begins as a superblock, of any version, intact or not."""
    return MAGIC.encode() in bytes(page[_HEADER : 2 * _HEADER + len(MAGIC)])


def newest(dax: DaxDevice, *, version: int = VERSION) -> Superblock:
    """Return the valid superblock: the readable superblock with the higher generation. Raises CorruptMetadata
    if neither is readable, and for a format other than ``version``.
    """
    total = dax.size // PAGE_SIZE
    found: list[Superblock] = []
    why: list[str] = []
    for name, blocks in zip(("first", "second"), super_blocks(total), strict=True):
        try:
            found.append(unsealed(dax, blocks))
        except MediaError:
            why.append(f"the {name} is poisoned")
        except CorruptMetadata:
            why.append(f"the {name} has a wrong checksum")
    if not found:
        raise CorruptMetadata(f"{dax.name}: neither superblock can be read ({', '.join(why)})")
    superblock = max(found, key=lambda superblock: superblock.generation)
    if superblock.magic != MAGIC or superblock.version != version:
        hint = "copy its files off with the daxemu that made it, then mkfs --force"
        if superblock.version == FORMER_VERSION:
            hint = "a mount, or fsck --repair, upgrades it"
        raise CorruptMetadata(
            f"{dax.name}: the filesystem has format {superblock.version}, this daxemu reads {version}: {hint}"
        )
    if superblock.total_blocks != total:
        raise CorruptMetadata(f"{dax.name}: the filesystem was made on a device of another size")
    if not 0 < superblock.generation < 1 << 31:
        raise CorruptMetadata(f"{dax.name}: the superblock's generation is {superblock.generation}")
    return superblock


def _checksum(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
