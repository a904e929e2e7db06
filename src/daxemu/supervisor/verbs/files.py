"""The verbs ``map``, ``who_maps``, ``reflink``, ``damaged`` and ``badblocks``.

A reply is made in pieces, with a checkpoint after each. Files may change between two pieces, so a long reply
describes several moments. Each piece is correct at its moment, and no part of a file or of the device is in
two pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from daxemu import protocol as p
from daxemu.fs.extents import Mapping
from daxemu.fs.filesystem import Filesystem
from daxemu.host.mappings import Mappings
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.supervisor.clones import Clones
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import DIV_ROUND_UP, PFN_PHYS, byte_span

PIECE = 2048
"""Extents or bad blocks of one step: 10 ms."""


async def file_map(pmem: Pmem, fs: Filesystem, ino: Ino) -> p.FileMap:
    """Return the extents of a file, holes included.

    Raises InvalidArgument if ``ino`` is not a regular file, FsError ESTALE if the file is deleted meanwhile.
    """
    found: list[p.Extent] = []
    at = 0
    while True:
        inode, extents = fs.names.regular(ino)
        end = DIV_ROUND_UP(inode.size, PAGE_SIZE)
        if at >= end:
            return p.FileMap(ino, fs.names.path_of(ino), inode.size, found)
        stop = extents.piece(at, end, PIECE)
        for run in extents.runs(at, stop):
            found += _extents(pmem, fs, run)
        at = stop
        if at < end:
            await trio.lowlevel.checkpoint()


def _extents(pmem: Pmem, fs: Filesystem, run: Mapping) -> Iterator[p.Extent]:
    offset, length = PFN_PHYS(run.file_block), PFN_PHYS(run.length)
    if run.link is None:
        yield p.Extent(offset, length, None, None, 0, False)
        return
    base = offset - PFN_PHYS(run.dev_block)
    blocks = Range(run.dev_block, run.dev_block + run.length)
    parts = [(blocks, 1)] if run.link.proxy is None else fs.rmap.sharing(*blocks)
    for part, shared_by in parts:
        device, size = byte_span(part)
        poisoned = pmem.dax.is_poisoned(device, size)
        yield p.Extent(base + device, size, device, pmem.pfn_of(device), shared_by, poisoned)


async def damaged(fs: Filesystem) -> p.DamagedList:
    """Return the damaged file ranges, by path."""
    found: list[p.DamagedRange] = []
    for part in fs.damaged_in_pieces():
        found += [p.DamagedRange(d.ino, d.path, d.offset, d.length) for d in part]
        await trio.lowlevel.checkpoint()
    return p.DamagedList(found)


async def badblocks(pmem: Pmem) -> p.BadblockList:
    """Return the bad blocks, as ranges of 512-byte sectors."""
    found: list[tuple[int, int]] = []
    sectors = 0
    for part in pmem.badblocks.in_pieces(PIECE):
        found += [(r.start, r.length) for r in part]
        sectors += sum(r.length for r in part)
        await trio.lowlevel.checkpoint()
    return p.BadblockList(found, sectors)


async def who_maps(mappings: Mappings) -> p.MappedFileList:
    """Return the mappings of files of the mount."""
    found = await trio.to_thread.run_sync(mappings.mapped_files)
    return p.MappedFileList([p.MappedFile(*each) for each in found])


async def reflink(clones: Clones, request: p.Reflink) -> p.Shared:
    """Share blocks between files, as FICLONERANGE does. Raises the errors of Clones.clone()."""
    return p.Shared(
        await clones.clone(request.src, request.src_offset, request.dst, request.dst_offset, request.length)
    )
