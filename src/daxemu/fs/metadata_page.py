"""Copy of a metadata page: the payload, and the trailer that identifies the page.

    0 .. 4071       payload
    4072 .. 4075    magic and the file (``MetadataFile``)
    4076 .. 4083    number of the page in the file
    4084 .. 4091    generation of the write of the page; larger is newer
    4092 .. 4095    CRC32C of all bytes before

All numbers are little-endian. Both copies of a page are equal to the last byte. A file's pages are sealed
when the file grows, so a page of zeros is a lost page.
"""

from __future__ import annotations

import struct
from enum import IntEnum, StrEnum

from crc32c import crc32c
from msgspec import Struct

from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import DIV_ROUND_UP

_TRAILER = struct.Struct("<IQQ")
_CRC = struct.Struct("<I")
_CRC_AT = PAGE_SIZE - _CRC.size
PAYLOAD = _CRC_AT - _TRAILER.size
"""Bytes of a page that belong to the file."""
_MAGIC = 0x4D786164 & ~0xFF  # "dax" above one byte for the file


class MetadataFile(IntEnum):
    """Files of the metadata region: database and write-ahead log."""

    DB = 0
    WAL = 1


class CopyState(StrEnum):
    """State of one copy of a page or superblock. The value completes "copy 1 ..." in messages."""

    GOOD = "is good"
    POISONED = "is poisoned"
    CORRUPT = "has a wrong checksum"
    STALE = "is older than the other"


class Copy(Struct, frozen=True):
    """Copy of a page: device offset in bytes, generation (0 if unknown), and state."""

    offset: int
    generation: int
    state: CopyState


class MetadataDamage(Struct, frozen=True):
    """Line about a bad page or superblock. ``is_repairable``: the other copy is good."""

    line: str
    is_repairable: bool


def seal(page: memoryview, file: int, number: int, generation: int) -> None:
    """Write the trailer of ``page``, whose payload is complete."""
    _TRAILER.pack_into(page, PAYLOAD, _MAGIC | file, number, generation)
    _CRC.pack_into(page, _CRC_AT, crc32c(page[:_CRC_AT]))


def is_intact(page: memoryview, file: int, number: int) -> bool:
    """Return True if the checksum is right and the trailer names page ``number`` of ``file``."""
    (crc,) = _CRC.unpack_from(page, _CRC_AT)
    if crc != crc32c(page[:_CRC_AT]):
        return False
    magic, found, _ = _TRAILER.unpack_from(page, PAYLOAD)
    return bool(magic == _MAGIC | file and found == number)


def is_published(page: memoryview) -> bool:
    """Return True if ``page`` is an intact page of any file of a filesystem with a superblock."""
    magic, number, generation = _TRAILER.unpack_from(page, PAYLOAD)
    return bool(magic & ~0xFF == _MAGIC and generation >> 32) and is_intact(page, magic & 0xFF, number)


def generation_of(page: memoryview) -> int:
    """Return the generation in the trailer. Precondition: the page is intact."""
    generation: int = _TRAILER.unpack_from(page, PAYLOAD)[2]
    return generation


def pages_of(offset: int, length: int) -> list[tuple[Block, int, int]]:
    """Return (page, start in the page, end in the page) of each page with a part of the range, in bytes."""
    end = offset + length
    return [
        (page, max(offset - page * PAYLOAD, 0), min(end - page * PAYLOAD, PAYLOAD))
        for page in range(offset // PAYLOAD, DIV_ROUND_UP(end, PAYLOAD))
    ]
