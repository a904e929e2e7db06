"""Conversions between bytes, sectors (512 bytes), blocks and pages (4096 bytes each).

Functions in capitals have the names of the kernel's macros.
"""

from __future__ import annotations

from daxemu.ranges import BlockRange, ByteRange, Range, SectorRange
from daxemu.uapi import PAGE_SHIFT, SECTOR_SIZE, Pfn, Sector


def DIV_ROUND_UP(number: int, divisor: int) -> int:
    """Return ``number / divisor``, rounded up."""
    return -(-number // divisor)


def round_up(number: int, unit: int) -> int:
    """Return the first multiple of ``unit`` at or after ``number``."""
    return -(-number // unit) * unit


def round_down(number: int, unit: int) -> int:
    """Return the last multiple of ``unit`` at or before ``number``."""
    return number // unit * unit


def PFN_PHYS(pfn: Pfn) -> int:
    """Return the bytes of a number of pages."""
    return pfn << PAGE_SHIFT


def PHYS_PFN(address: int) -> Pfn:
    """Return the number of whole pages in a number of bytes."""
    return address >> PAGE_SHIFT


def blocks_of(area: ByteRange) -> BlockRange:
    """Return the blocks, or pages, that overlap a range of bytes."""
    return Range(area.start >> PAGE_SHIFT, -(-area.end >> PAGE_SHIFT))


def blocks_inside(area: ByteRange) -> BlockRange:
    """Return the blocks, or pages, that lie whole in a range of bytes; empty (false) if none does."""
    return Range(-(-area.start >> PAGE_SHIFT), area.end >> PAGE_SHIFT)


def sectors_of(area: ByteRange) -> SectorRange:
    """Return the sectors that overlap a range of bytes."""
    return Range(area.start // SECTOR_SIZE, -(-area.end // SECTOR_SIZE))


def sectors_at(offset: int, length: int) -> SectorRange:
    """Return the sectors that overlap the bytes ``[offset, offset + length)``."""
    return Range(offset // SECTOR_SIZE, -(-(offset + length) // SECTOR_SIZE))


def sector_at(offset: int) -> Sector:
    """Return the sector that holds the byte ``offset``."""
    return offset // SECTOR_SIZE


def pages_at(offset: int, length: int) -> BlockRange:
    """Return the blocks, or pages, that overlap the bytes ``[offset, offset + length)``."""
    return Range(offset >> PAGE_SHIFT, -(-(offset + length) >> PAGE_SHIFT))


def bytes_of_blocks(blocks: BlockRange) -> ByteRange:
    """Return the bytes of a range of blocks, or pages."""
    return Range(blocks.start << PAGE_SHIFT, blocks.end << PAGE_SHIFT)


def bytes_of_sectors(sectors: SectorRange) -> ByteRange:
    """Return the bytes of a range of sectors."""
    return Range(sectors.start * SECTOR_SIZE, sectors.end * SECTOR_SIZE)


def blocks_of_sectors(sectors: SectorRange) -> BlockRange:
    """Return the blocks that overlap a range of sectors."""
    return blocks_of(bytes_of_sectors(sectors))


def byte_span(blocks: BlockRange) -> tuple[int, int]:
    """Return offset and length in bytes of a range of blocks."""
    return blocks.start << PAGE_SHIFT, (blocks.end - blocks.start) << PAGE_SHIFT
