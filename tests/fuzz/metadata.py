"""Fuzz targets of the metadata decoders: rows of the tables, pages under a valid seal, the superblock."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from daxemu.errors import CorruptMetadata
from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_page import PAYLOAD, MetadataFile, seal
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.records import inode_of
from daxemu.fs.rmap import Rmap
from daxemu.fs.store import _row
from daxemu.fs.superblock import MAGIC, VERSION, Superblock, _checksum
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core
from tests.support.corruption import Seen, outside_domains
from tests.support.damage import COLUMNS, run_sql
from tests.support.metadata import Page, metadata_pages

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


TABLES = ("inode", "entry", "link", "counter")
TABLE_ROWS = (
    ("entry", (1, b"new", 2)),
    ("link", (2, 0, 700, 1, None)),
    ("link", (2, 4, 700, 2, 1)),
    ("counter", ("next_ino", 99)),
    ("counter", ("clean", 0)),
)
_prepared: dict[Path, tuple[bytes, list[Page]]] = {}


def _restored(path: Path) -> list[Page]:
    """Restore the device at ``path`` to its first state, with a few files; return the database's pages."""
    if path not in _prepared:
        core = Core(path, DeviceConfig(SIZE))
        core.clone(core.file(b"f", b"data" * 3000), b"clone")
        core.dir(b"d")
        core.close()
        pages = [page for page in metadata_pages(path) if page.file is MetadataFile.DB and page.number < 12]
        _prepared[path] = (path / "media").read_bytes(), pages
    (path / "media").write_bytes(_prepared[path][0])
    return _prepared[path][1]


def _is_storable(value: object) -> bool:
    """Return True if SQLite has a type for the value."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return value is None or isinstance(value, str | bytes | float)


def table_row(path: Path, data: bytes) -> None:
    """(table, row) as MessagePack, stored in a device's tables. The device mounts with values in range, or is
    refused.
    """
    try:
        table, row = msgspec.msgpack.decode(data, type=tuple[str, tuple[Any, ...]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if table not in TABLES or len(row) != len(COLUMNS[table]) or not all(map(_is_storable, row)):
        return
    _restored(path)
    run_sql(path, [(f"REPLACE INTO {table} VALUES({', '.join('?' * len(row))})", row)])
    seen = Seen(path, write=False)
    assert not outside_domains(seen.tree or {})


def sealed_page(path: Path, data: bytes) -> None:
    """Page number, offset, and bytes for both copies of the page, under a valid seal."""
    if len(data) < 4:
        return
    pages = _restored(path)
    page, at = pages[data[0] % len(pages)], int.from_bytes(data[1:3], "little") % PAYLOAD
    with (path / "media").open("r+b") as media:
        media.seek(page.offsets[0])
        block = bytearray(media.read(PAGE_SIZE))
        part = data[3:][: PAYLOAD - at]
        block[at : at + len(part)] = part
        seal(memoryview(block), page.file, page.number, 1 << 40)
        for offset in page.offsets:
            media.seek(offset)
            media.write(block)
    seen = Seen(path, write=False)
    assert not any("\n" in line for line in seen.wrong)
    assert not outside_domains(seen.tree or {})


def superblock(path: Path, record: bytes) -> None:
    """Both superblocks of a device hold ``record`` under a valid checksum: the load succeeds or raises
    CorruptMetadata.
    """
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
