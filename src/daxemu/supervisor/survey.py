"""What is where on the device: the request ``survey``."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from daxemu.errors import InvalidArgument
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import METADATA_INO, Owner
from daxemu.pmem.inject import check_range
from daxemu.pmem.pmem import Pmem
from daxemu.protocol import Cell, FileUse, Survey, SurveyReport
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, Block, Ino, page_align_up

MAX_CELLS = 1 << 16


def survey(pmem: Pmem, fs: Filesystem, wanted: Survey) -> SurveyReport:
    """Costs what the range has of links and of poison, not its size. Raises InvalidArgument."""
    size = pmem.dax.size
    length = size - wanted.offset if wanted.length is None else wanted.length
    check_range(wanted.offset, length, size, "the device")
    if not 0 < wanted.cells <= MAX_CELLS:
        raise InvalidArgument(f"{wanted.cells} cells: must be from 1 to {MAX_CELLS}")
    cell = page_align_up(-(-length // wanted.cells))
    whole = Range(wanted.offset, wanted.offset + length)
    cells = [Cell() for _ in range(-(-length // cell))]
    blocks = Range(whole.start // PAGE_SIZE, -(-whole.end // PAGE_SIZE))

    def parts(start: int, end: int) -> Iterator[tuple[Cell, int]]:
        """Each cell that has some of the bytes ``[start, end)``, and how many."""
        part = Range(start, end).clip(*whole)
        while part:
            index = (part.start - whole.start) // cell
            here = part.clip(part.start, whole.start + (index + 1) * cell)
            yield cells[index], here.length
            part = Range(here.end, part.end)

    found: dict[Ino, FileUse] = {}
    owners = list(fs.rmap.owners(*blocks))
    for start, end, count in _sharing(owners):
        for each, some in parts(start << PAGE_SHIFT, end << PAGE_SHIFT):
            each.used += some
            each.shared += some if count > 1 else 0
    for owner in owners:
        start = owner.dev_block << PAGE_SHIFT
        if owner.ino == METADATA_INO:
            for each, some in parts(start, start + (owner.length << PAGE_SHIFT)):
                each.metadata += some
        elif wanted.files > 0 and owner.ino >= ROOT_INO:
            _count(found, owner.ino, Range(start, start + (owner.length << PAGE_SHIFT)), owner.file_block)
    known = RangeSet(pmem.badblocks)
    for sectors in pmem.media.poison.overlapping(whole.start // SECTOR_SIZE, -(-whole.end // SECTOR_SIZE)):
        for bad in known.overlapping(*sectors):
            for each, some in parts(bad.start * SECTOR_SIZE, bad.end * SECTOR_SIZE):
                each.bad += some
        for hidden in known.gaps(*sectors):
            for each, some in parts(hidden.start * SECTOR_SIZE, hidden.end * SECTOR_SIZE):
                each.latent += some
    most = heapq.nlargest(max(0, wanted.files), found.values(), key=lambda use: use.bytes)
    for use in most:
        use.path = fs.names.path_of(use.ino)
    return SurveyReport(wanted.offset, cell, cells, most)


def _sharing(owners: list[Owner]) -> Iterator[tuple[Block, Block, int]]:
    """Runs that the same number of links use, which is not 0, as (start, end, number)."""
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
        found[ino] = FileUse(ino, "", part.length, part.start, file_block << PAGE_SHIFT)
        return
    use.bytes += part.length
    if part.start < use.device_offset:
        use.device_offset, use.file_offset = part.start, file_block << PAGE_SHIFT
