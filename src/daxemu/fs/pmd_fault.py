"""Pages of a file mapped by 2 MiB in one fault: the file's side of dax_iomap_pmd_fault() in fs/dax.c."""

from __future__ import annotations

from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import Owner, Rmap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet, merged
from daxemu.uapi import HPAGE_PMD_NR, PAGE_SIZE, PMD_SIZE
from daxemu.units import DIV_ROUND_UP, blocks_of, byte_span


def pmd_ranges(
    dax: DaxDevice, rmap: Rmap, names: Namespace, owner: Owner, failing: Range
) -> tuple[Range, ...]:
    """Return, as page ranges, the PMDs of a file that overlap ``owner`` and that one fault maps.

    Conditions for each PMD (2 MiB):
    - contiguous on the device and aligned on the device
    - inside the file size
    - shared by the same number of links everywhere
    - without a bad block; the device bytes ``failing`` do not count, because mappings are older than the
      failure
    """
    delta = owner.dev_block - owner.file_block
    if dax.align < PMD_SIZE or delta % HPAGE_PMD_NR:
        return ()
    inode, extents = names.regular(owner.ino)
    around = Range(owner.file_block, owner.file_block + owner.length).outer(HPAGE_PMD_NR)
    around = around.clip(0, DIV_ROUND_UP(inode.size, PAGE_SIZE))
    in_place = merged(
        (run.file_block, run.file_block + run.length)
        for run in extents.lookup(*around)
        if run.link is not None and run.dev_block - run.file_block == delta
    )
    found = RangeSet()
    for piece in in_place:
        for run, _ in rmap.sharing(piece.start + delta, piece.end + delta):
            found.add(*run.inner(HPAGE_PMD_NR))
    for whole in list(found):
        for bad_block in dax.badblocks.overlapping_bytes(*byte_span(whole)):
            for part in RangeSet([failing]).gaps(*bad_block):
                found.remove(*blocks_of(part).outer(HPAGE_PMD_NR))
    return tuple(Range(run.start - delta, run.end - delta) for run in found)
