"""Fuzz targets of the metadata decoders: rows of table inode, and the superblock's record."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec

from daxemu.errors import CorruptMetadata
from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_region import MetadataFile, MetadataRegion
from daxemu.fs.records import inode_of
from daxemu.fs.rmap import Rmap
from daxemu.fs.store import _row
from daxemu.fs.superblock import MAGIC, VERSION, Superblock, _checksum
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE

SIZE = 8 << 20
_REPLICA = 1 << 40
_RUNS = [(number * _REPLICA, 100 * number, 64) for number in range(1, 5)]

ROWS = (
    (1, 0o40755, 0, 0, 2, 0, 0, 1, 2, 3, None, None),
    (2, 0o100644, 7, 7, 1, 0, 4096, -1, 2, 3, None, msgspec.msgpack.encode({b"user.a": b"b"})),
    (3, 0o120777, 7, 7, 1, 0, 6, 1, 2, 3, b"target", None),
)
SUPERBLOCKS = (
    Superblock(MAGIC, VERSION, 1, SIZE // PAGE_SIZE, _RUNS),
    Superblock(MAGIC, VERSION, 7, SIZE // PAGE_SIZE, []),
    Superblock(MAGIC, VERSION - 1, 7, SIZE // PAGE_SIZE, _RUNS),
)


def inode_row(data: bytes) -> None:
    """A row of table inode as an array of MessagePack: an inode with the same row, or ValueError."""
    try:
        row = msgspec.msgpack.decode(data, type=tuple)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if not row:
        return  # no table is without columns
    try:
        inode = inode_of(row)
    except ValueError:
        return
    assert _row(inode)[:-1] == row[:-1]
    assert inode_of(_row(inode)).xattrs == inode.xattrs


def superblock(path: Path, record: bytes) -> None:
    """Both superblocks of a device hold ``record`` under a valid checksum: it loads or is CorruptMetadata."""
    if not (path / "device.toml").exists():
        DeviceDir.create(path, DeviceConfig(SIZE))
    sealed = len(record).to_bytes(4, "little") + _checksum(record) + record
    with (path / "media").open("r+b") as media:
        for offset in (0, SIZE // 2):
            media.seek(offset)
            media.write(sealed)
    with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
        region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
        try:
            region.load()
        except CorruptMetadata:
            return
        for file in MetadataFile:
            assert 0 <= region.pages(file) < SIZE // PAGE_SIZE
