"""Free blocks of a device with 2 MiB alignment: files are placed so that page faults can map 2 MiB.

A fault maps 2 MiB at once only if the 2 MiB of the file are contiguous on the device, at the same offset from
a 2 MiB boundary as in the file. Counterpart in Linux: the extent size hint and stripe alignment set for XFS
(xfs_bmap_btalloc()).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.fs.reclaimer import Reclaimer
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import HPAGE_PMD_NR, PMD_SIZE, Block


class HugeAllocator(Allocator):
    """An allocator that places each 2 MiB of a file in 2 MiB of the device.

    The first write to 2 MiB of a file takes a part of 2 MiB of the device that are free as a whole. Later
    blocks of the same 2 MiB of the file go to the matching place in the rest. The rest is not reserved: other
    files get the blocks once no 2 MiB are free as a whole. Then, and if another part of the 2 MiB of the file
    is elsewhere already, blocks are allocated as in the base class.
    """

    def __init__(self, dax: DaxDevice, reclaimer: Reclaimer | None = None) -> None:
        super().__init__(dax, reclaimer)
        self._whole = RangeSet([(0, self.total // HPAGE_PMD_NR)])
        """Runs that are free as a whole, in units of 2 MiB."""

    def allocate_for(
        self, extents: ExtentMap, pieces: Sequence[Range], goal: Block | None = None, *, reserve: bool = True
    ) -> list[Range]:
        """See Allocator.allocate_for. ``goal`` is ignored: the other blocks of the file decide the place."""

        def take(taken: list[Range]) -> None:
            for piece in pieces:
                self._place(taken, extents, piece)

        return self._or_reclaim(sum(piece.length for piece in pieces), take, reserve)

    def max_runs(self, pieces: Sequence[Range]) -> int:
        """See Allocator.max_runs.

        A piece is placed in up to three parts, and a part taken from the middle of a free run makes two runs
        of the rest.
        """
        return min(sum(piece.length for piece in pieces), 4 * (self.fragments + 5 * len(pieces)))

    def _place(self, taken: list[Range], extents: ExtentMap, piece: Range) -> None:
        goal = extents.goal(piece.start)
        for part in _by_units(piece):
            place = _beside(extents, part)
            if place is None:
                self._take_whole(taken, part, goal)
            else:
                run = self._next_usable(place, min(place + part.length, self.total))
                if run is not None and run.start == place:
                    self._take(taken, run)
                    part = Range(part.start + run.length, part.end)
                if part:  # the 2 MiB of the file are not contiguous already
                    self._take_next(taken, part.length, place)
            goal = taken[-1].end

    def _take_whole(self, taken: list[Range], part: Range, goal: Block | None) -> None:
        at = part.start
        while at < part.end and (whole := self._next_whole(at, goal)) is not None:
            start = whole.start + at % HPAGE_PMD_NR
            run = Range(start, whole.end).clip(start, start + part.end - at)
            self._take(taken, run)
            at, goal = at + run.length, run.end
        if at < part.end:
            self._take_next(taken, part.end - at, goal)

    def _next_whole(self, at: Block, goal: Block | None) -> Range | None:
        """Return blocks free by whole 2 MiB: at ``goal`` if ``at`` can continue there, or the first run."""
        lows = [0]
        if goal is not None and (goal - at) % HPAGE_PMD_NR == 0:
            lows.insert(0, goal // HPAGE_PMD_NR)
        for low in lows:
            run = self._next_good(self._whole, low, self.total // HPAGE_PMD_NR, PMD_SIZE)
            if run is not None and (run.start == low or low == 0):
                return Range(run.start * HPAGE_PMD_NR, run.end * HPAGE_PMD_NR)
        return None

    def _remove_free(self, run: Range) -> None:
        super()._remove_free(run)
        units = run.outer(HPAGE_PMD_NR)
        self._whole.remove(units.start // HPAGE_PMD_NR, units.end // HPAGE_PMD_NR)

    def _add_free(self, run: Range) -> None:
        super()._add_free(run)
        within = run.inner(HPAGE_PMD_NR)
        self._whole.add(within.start // HPAGE_PMD_NR, within.end // HPAGE_PMD_NR)
        for block in {run.start, run.end - 1}:
            unit = Range(block, block + 1).outer(HPAGE_PMD_NR)
            if self._free.covers(*unit):
                self._whole.add(unit.start // HPAGE_PMD_NR, unit.end // HPAGE_PMD_NR)


def _by_units(piece: Range) -> list[Range]:
    """Cut ``piece`` at the end of the first and the start of the last 2 MiB of the piece."""
    cuts = {piece.start, piece.end}
    cuts |= {at for at in piece.inner(HPAGE_PMD_NR) if piece.start < at < piece.end}
    return [Range(*ends) for ends in pairwise(sorted(cuts))]


def _beside(extents: ExtentMap, part: Range) -> Block | None:
    """Return the device block that makes ``part`` contiguous with its 2 MiB; None if the rest is a hole."""
    unit = part.outer(HPAGE_PMD_NR)
    if unit == part:
        return None
    before, after = extents.lookup(unit.start, part.start), extents.lookup(part.end, unit.end)
    for run in (*reversed(before), *after):
        if run.link is not None:
            return max(0, run.dev_block + part.start - run.file_block)
    return None


def allocator_for(dax: DaxDevice, reclaimer: Reclaimer | None = None) -> Allocator:
    """Return the allocator for the alignment of the device."""
    return HugeAllocator(dax, reclaimer) if dax.align == PMD_SIZE else Allocator(dax, reclaimer)
