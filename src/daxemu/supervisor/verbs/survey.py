"""The verb ``survey``: map of the use and poison of the device, in cells of equal size."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import trio

from daxemu.errors import InvalidArgument
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import METADATA_INO, Owner
from daxemu.pmem.inject import check_range
from daxemu.pmem.pmem import Pmem
from daxemu.protocol import Survey
from daxemu.ranges import Range
from daxemu.survey_report import Cell, FileUse, SurveyReport
from daxemu.uapi import Block, Ino, page_align_up
from daxemu.units import DIV_ROUND_UP, PFN_PHYS, blocks_of, bytes_of_blocks, bytes_of_sectors, sectors_of

MAX_CELLS = 1 << 16
PIECE = 1024
"""Links, or ranges of poison, of one step: 10 ms."""
CELLS_PIECE = 8192
_USED, _METADATA, _SHARED, _BAD_BLOCKS, _LATENT = range(5)
"""Fields of a Cell."""


async def survey(pmem: Pmem, fs: Filesystem, wanted: Survey) -> SurveyReport:
    """Count used, shared and poisoned bytes in each cell of a device range, and find the largest files.

    The range is surveyed in parts, with a checkpoint after each; each part is correct at its moment. The cost
    grows with the number of links and of poisoned ranges, not with the bytes. Raises InvalidArgument.
    """
    size = pmem.dax.size
    length = size - wanted.offset if wanted.length is None else wanted.length
    check_range(wanted.offset, length, size, "the device")
    if not 0 < wanted.cells <= MAX_CELLS:
        raise InvalidArgument(f"{wanted.cells} cells: must be from 1 to {MAX_CELLS}")
    cell = page_align_up(DIV_ROUND_UP(length, wanted.cells))
    whole = Range(wanted.offset, wanted.offset + length)
    counts = _Counts(whole, cell)
    found: dict[Ino, FileUse] = {}
    for blocks in _parts(fs, blocks_of(whole)):
        owners = fs.rmap.owners(*blocks)
        for begin, end, count in _sharing(owners):
            used = bytes_of_blocks(Range(begin, end))
            counts.add(_USED, used)
            if count > 1:
                counts.add(_SHARED, used)
        for owner in owners:
            part = bytes_of_blocks(Range(owner.dev_block, owner.dev_block + owner.length))
            if owner.ino == METADATA_INO:
                counts.add(_METADATA, part)
            elif wanted.files > 0 and owner.ino >= ROOT_INO:
                _count(found, owner.ino, part, owner.file_block)
        await trio.lowlevel.checkpoint()
    for poison in pmem.dax.poisoned_in_pieces(whole, PIECE):
        for sectors in map(sectors_of, poison):
            for known in pmem.badblocks.known(sectors):
                counts.add(_BAD_BLOCKS, bytes_of_sectors(known))
            for latent in pmem.badblocks.unknown(sectors):
                counts.add(_LATENT, bytes_of_sectors(latent))
        await trio.lowlevel.checkpoint()
    most = heapq.nlargest(max(0, wanted.files), found.values(), key=lambda use: use.bytes)
    await trio.lowlevel.checkpoint()
    for use in most:
        use.path = fs.names.path_of(use.ino)
    cells: list[Cell] = []
    for low in range(0, counts.cells, CELLS_PIECE):
        await trio.lowlevel.checkpoint()
        cells += counts.cells_of(low, low + CELLS_PIECE)
    return SurveyReport(wanted.offset, cell, cells, most)


def _parts(fs: Filesystem, blocks: Range) -> Iterator[Range]:
    """Yield parts of ``blocks`` with about PIECE links each, without free space before a part."""
    at, length = blocks.start, PIECE
    while at < blocks.end and (run := fs.allocator.used_from(at)) is not None:
        part = Range(run.start, run.start + length).clip(*blocks)
        if not part:
            return
        links = fs.rmap.count(*part)
        if links > PIECE and length > 1:
            length //= 2
            continue
        yield part
        at = part.end
        if links < PIECE // 4:
            length *= 2


class _Counts:
    """Bytes of each kind in each cell of a range."""

    def __init__(self, whole: Range, cell: int) -> None:
        self._whole = whole
        self._cell = cell
        self.cells = DIV_ROUND_UP(whole.length, cell)
        self._bytes = np.zeros((len(Cell.__struct_fields__), self.cells), np.int64)

    def add(self, kind: int, area: Range) -> None:
        """Add the device bytes ``area`` to the counts of the cells that hold any of the bytes."""
        part = area.clip(*self._whole)
        if not part:
            return
        begin, stop = part.start - self._whole.start, part.end - self._whole.start
        first, last = begin // self._cell, (stop - 1) // self._cell
        row = self._bytes[kind]
        if first == last:
            row[first] += stop - begin
            return
        row[first] += (first + 1) * self._cell - begin
        row[first + 1 : last] += self._cell
        row[last] += stop - last * self._cell

    def cells_of(self, low: int, high: int) -> list[Cell]:
        """Return the cells ``[low, high)``."""
        return [Cell(*kinds) for kinds in self._bytes[:, low:high].T.tolist()]


def _sharing(owners: list[Owner]) -> Iterator[tuple[Block, Block, int]]:
    """Yield runs of blocks used by the same number of links, above 0, as (start, end, number)."""
    steps = [(owner.dev_block, 1) for owner in owners]
    steps += [(owner.dev_block + owner.length, -1) for owner in owners]
    steps.sort(key=lambda step: step[0])
    begin = at = count = shown = 0
    for block, step in steps:
        if block > at:
            if count != shown:
                if shown:
                    yield begin, at, shown
                begin, shown = at, count
            at = block
        count += step
    if shown:
        yield begin, at, shown


def _count(found: dict[Ino, FileUse], ino: Ino, part: Range, file_block: int) -> None:
    use = found.get(ino)
    if use is None:
        found[ino] = FileUse(ino, "", part.length, part.start, PFN_PHYS(file_block))
        return
    use.bytes += part.length
    if part.start < use.device_offset:
        use.device_offset, use.file_offset = part.start, PFN_PHYS(file_block)
