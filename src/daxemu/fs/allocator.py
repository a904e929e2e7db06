"""Free device blocks. A bad block is never allocated (fs/xfs/libxfs/xfs_alloc.c, with pmem's badblocks)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daxemu.errors import NoSpace
from daxemu.fs.data_ops import DataOps
from daxemu.fs.extents import ExtentMap
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Block


class Allocator:
    """The free blocks of one device, all lengths in blocks.

    A block over known bad sectors stays in the free set but is passed over until they are cleared. A block
    that is freed is *pending* until the metadata that no longer names it is on the device: were it used
    before, a crash would show its new contents in its old file. ``reclaim`` is called when only pending
    blocks are left; it commits.
    """

    def __init__(self, dax: DaxDevice) -> None:
        self._dax = dax
        self.total = dax.size // PAGE_SIZE
        self._free = RangeSet([(0, self.total)])
        self._pending = RangeSet()
        self._cursor = 0
        self.reclaim: Callable[[], None] | None = None
        self.watcher: DataOps | None = None

    @property
    def free_blocks(self) -> int:
        """Blocks without an owner, bad and pending ones included."""
        return self._free.total + self._pending.total

    @property
    def pending_blocks(self) -> int:
        """Number of freed blocks, usable after the next commit."""
        return self._pending.total

    @property
    def usable_blocks(self) -> int:
        """Free blocks that could be handed out: what statfs says is available."""
        return self.free_blocks - sum(bad.length for bad in self._bad_free())

    def _bad_free(self) -> RangeSet:
        """The free blocks that hold a bad sector."""
        bad = RangeSet()
        for start, end in self._dax.badblocks.overlapping_bytes(0, self._dax.size):
            blocks = Range(start // PAGE_SIZE, -(-end // PAGE_SIZE))
            for part in (*self._free.overlapping(*blocks), *self._pending.overlapping(*blocks)):
                bad.add(*part)
        return bad

    @property
    def fragments(self) -> int:
        """How many runs free space is in: what an allocation can be split into at the most."""
        return len(self._free) + len(self._pending) + len(self._dax.badblocks)

    def free_ranges(self) -> list[Range]:
        """What has no owner, in order, pending blocks included."""
        return list(RangeSet([*self._free, *self._pending]))

    def used_from(self, at: Block) -> Range | None:
        """Return the first run of used blocks at or after ``at``, cut to begin there; None if there is
        none.
        """
        free = self._free.first_from(at)
        if free is not None and free.start <= at:
            at, free = free.end, self._free.first_from(free.end)
        end = free.start if free is not None else self.total
        return Range(at, end) if at < end else None

    def used_in(self, blocks: Range) -> int:
        """Return the number of used blocks in ``blocks``."""
        return blocks.length - sum(part.length for part in self._free.overlapping(*blocks))

    def allocate(self, length: int, goal: Block | None = None) -> list[Range]:
        """Allocate ``length`` blocks in few runs, the first at ``goal`` if free.

        New blocks are reserved and zero. Raises NoSpace; then nothing has changed.
        """
        return self._or_reclaim(length, lambda taken: self._take_next(taken, length, goal), True)

    def allocate_for(
        self, extents: ExtentMap, pieces: Sequence[Range], goal: Block | None = None, *, reserve: bool = True
    ) -> list[Range]:
        """As :meth:`allocate`, for the blocks ``pieces`` of a file, in the order of the pieces.

        Without ``reserve`` the blocks have no memory yet: for a caller that fills every block by
        copy_from_iter().
        """
        length = sum(piece.length for piece in pieces)
        return self._or_reclaim(length, lambda taken: self._take_next(taken, length, goal), reserve)

    def max_runs(self, pieces: Sequence[Range]) -> int:
        """Return the largest number of runs that :meth:`allocate_for` can return."""
        return min(sum(piece.length for piece in pieces), self.fragments)

    def _or_reclaim(self, length: int, take: Callable[[list[Range]], None], reserve: bool) -> list[Range]:
        """What ``take`` adds to its argument, all or nothing; called again once pending blocks are free."""
        if length > self.free_blocks:
            raise NoSpace("the device is full: remove files, or make a larger one")
        try:
            return self._all_of(take, reserve)
        except NoSpace:
            if not self._pending or self.reclaim is None:
                raise
            self.reclaim()
            return self._all_of(take, reserve)

    def _all_of(self, take: Callable[[list[Range]], None], reserve: bool) -> list[Range]:
        taken: list[Range] = []
        try:
            take(taken)
            for run in taken:
                self._prepare(run, reserve)
        except BaseException:
            for run in taken:
                self._give_back(run)
            raise
        self._cursor = taken[-1].end if taken else self._cursor
        return taken

    def _take_next(self, taken: list[Range], length: int, goal: Block | None) -> None:
        missing = length
        at = self._cursor if goal is None else goal
        for low, high in ((at, self.total), (0, at)):
            while missing and (run := self._next_good(self._free, low, high)):
                run = run.clip(run.start, run.start + missing)
                self._take(taken, run)
                missing -= run.length
                low = run.end
        if missing:
            raise NoSpace("the device is full: all free blocks are bad; see daxemu badblocks, daxemu clear")

    def _take(self, taken: list[Range], run: Range) -> None:
        self._remove_free(run)
        taken.append(run)

    def _prepare(self, run: Range, reserve: bool) -> None:
        if reserve:
            self._dax.reserve(run.start * PAGE_SIZE, run.length * PAGE_SIZE)
        # A new block is written with zeros, and a write clears latent poison.
        self._dax.clear_poison(run.start * PAGE_SIZE, run.length * PAGE_SIZE)
        if self.watcher is not None:
            self.watcher.allocated(run)

    def _next_good(self, free: RangeSet, low: int, high: int, unit: int = PAGE_SIZE) -> Range | None:
        """Return the first run of ``free`` in ``[low, high)`` without bad sectors.

        ``unit``: bytes of one position.
        """
        while (run := free.first_from(low)) and (run := run.clip(low, high)):
            bad = next(self._dax.badblocks.overlapping_bytes(run.start * unit, run.length * unit), None)
            if bad is None:
                return run
            first_bad = bad.start // unit
            if run.start < first_bad:
                return Range(run.start, first_bad)
            low = -(-bad.end // unit)
        return None

    def _remove_free(self, run: Range) -> None:
        self._free.remove(*run)

    def _add_free(self, run: Range) -> None:
        self._free.add(*run)

    def free(self, run: Range) -> None:
        """Free blocks after the next commit. Precondition: no link has any of the blocks."""
        self._pending.add(*run)

    def settle(self) -> None:
        """A commit is done: what was freed before it may be used again, and its memory goes back to the
        host.
        """
        pending, self._pending = self._pending, RangeSet()
        for run in pending:
            self._give_back(run)

    def _give_back(self, run: Range) -> None:
        if self.watcher is not None:
            self.watcher.freed(run)
        self._add_free(run)
        self._dax.discard(run.start * PAGE_SIZE, run.length * PAGE_SIZE)

    def discard_free(self) -> None:
        """Zero all free blocks: after a crash a free block may hold data."""
        for run in self._free:
            self._dax.discard(run.start * PAGE_SIZE, run.length * PAGE_SIZE)

    def take(self, run: Range) -> None:
        """Mark blocks as used, for a record of the store. Raises NoSpace if any block is used already."""
        if not self._free.covers(*run):
            raise NoSpace(f"blocks {run.start}-{run.end} are in use twice")
        self._remove_free(run)
