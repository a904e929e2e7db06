"""Free blocks of a device that is mapped by 2 MiB pages: files are placed so that it can be.

A fault maps 2 MiB at once only where they lie in one piece on the device, and as far into an aligned 2 MiB
there as in the file. Counterpart in Linux: the extent size hint and stripe alignment that XFS is given for
this (xfs_bmap_btalloc()).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import HPAGE_PMD_NR, PMD_SIZE, Block


class HugeAllocator(Allocator):
    """An allocator that gives each 2 MiB of a file, once any of it is written, 2 MiB of the device that are
    free as a whole: the rest of them is where the rest of it goes.

    They are not kept for it: others get them when no 2 MiB is free as a whole any more. Then, and where a
    part of such 2 MiB lies elsewhere already, blocks are given as they come by.
    """

    def __init__(self, dax: DaxDevice) -> None:
        super().__init__(dax)
        self._whole = RangeSet([(0, self.total // HPAGE_PMD_NR)])
        """What is free as a whole, in units of 2 MiB."""

    def allocate_for(
        self, extents: ExtentMap, pieces: Sequence[Range], goal: Block | None = None, *, reserve: bool = True
    ) -> list[Range]:
        """See Allocator.allocate_for. ``goal`` is not looked at: the file's other blocks say where."""

        def take(taken: list[Range]) -> None:
            for piece in pieces:
                self._place(taken, extents, piece)

        return self._or_reclaim(sum(piece.length for piece in pieces), take, reserve)

    def max_runs(self, pieces: Sequence[Range]) -> int:
        """See Allocator.max_runs. A piece is placed in up to three parts, and a part that is taken out of the
        middle of a free run makes two of that.
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
                if part:  # these 2 MiB are in pieces already
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
        """Blocks free by whole 2 MiB: from ``goal`` on if the file goes on there at ``at``, or the first."""
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
    """``piece`` cut where its first and its last 2 MiB end and begin."""
    cuts = {piece.start, piece.end}
    cuts |= {at for at in piece.inner(HPAGE_PMD_NR) if piece.start < at < piece.end}
    return [Range(*ends) for ends in pairwise(sorted(cuts))]


def _beside(extents: ExtentMap, part: Range) -> Block | None:
    """Where on the device ``part`` of a file would be in one piece with the rest of its 2 MiB; None if that
    is a hole.
    """
    unit = part.outer(HPAGE_PMD_NR)
    if unit == part:
        return None
    before, after = extents.lookup(unit.start, part.start), extents.lookup(part.end, unit.end)
    for run in (*reversed(before), *after):
        if run.link is not None:
            return max(0, run.dev_block + part.start - run.file_block)
    return None


def allocator_for(dax: DaxDevice) -> Allocator:
    """The allocator of a device's alignment."""
    return HugeAllocator(dax) if dax.align == PMD_SIZE else Allocator(dax)
