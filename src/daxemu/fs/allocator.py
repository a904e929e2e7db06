"""Free device blocks. A bad block is never allocated (fs/xfs/libxfs/xfs_alloc.c, with pmem's badblocks)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from daxemu.errors import NoSpace
from daxemu.fs.data_ops import DataOps
from daxemu.fs.extents import ExtentMap
from daxemu.fs.reclaimer import Reclaimer
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import BlockRange, Range, RangeSet, SectorRange
from daxemu.uapi import PAGE_SIZE, Block
from daxemu.units import DIV_ROUND_UP, PFN_PHYS, blocks_of_sectors, byte_span, bytes_of_blocks

DRAIN_RUNS = 256
"""Runs of settled blocks that become free in one step: 5 ms."""
DRAIN_BLOCKS = (32 << 20) // PAGE_SIZE
"""Settled blocks that become free in one step: the host takes 32 MiB of memory back in 5 ms."""


def _common(blocks: RangeSet, run: BlockRange) -> int:
    """Return the number of integers of ``run`` in the set."""
    return sum(part.length for part in blocks.overlapping(*run)) if blocks else 0


class Allocator:
    """The free blocks of one device. All lengths are blocks.

    A block over bad sectors stays in the free set, but is skipped until the sectors are cleared. A freed
    block is *pending* until the commit of the metadata without the block: if the block were used earlier, a
    crash would show new contents in the old file. After the commit the block is *held* while processes may
    still have the block mapped for the old file (:meth:`hold`). Then the block is *settled*: the host gets
    the memory back, and then the block becomes free. ``reclaimer`` commits when only pending blocks are left,
    and may have a task that drains settled blocks piece by piece.
    """

    def __init__(self, dax: DaxDevice, reclaimer: Reclaimer | None = None) -> None:
        self._dax = dax
        self._reclaimer = reclaimer or Reclaimer()
        self.total = dax.size // PAGE_SIZE
        self.align = dax.align
        self._free = RangeSet([(0, self.total)])
        self._pending = RangeSet()
        self._held: deque[tuple[int, RangeSet]] = deque()
        """Committed blocks, each set with the number of the last hold before its commit, oldest first."""
        self._holds: dict[int, None] = {}
        """Numbers of the holds without a release, in order."""
        self._last_hold = 0
        self._settled = RangeSet()
        self._bad_blocks = RangeSet()
        """Blocks over bad sectors, free or not."""
        self._good: RangeSet | None = None
        """Free blocks without a bad sector; None while no block is bad."""
        self._later_bad_blocks = 0
        """Number of bad blocks among the pending, held and settled blocks."""
        self._cursor = 0
        dax.badblocks.on_set.register(self._set_bad_blocks)
        dax.badblocks.on_clear.register(self._clear_bad_blocks)
        self._set_bad_blocks(list(dax.badblocks))
        self.watcher: DataOps | None = None

    def close(self) -> None:
        """Follow the bad blocks of the device no longer."""
        self._dax.badblocks.on_set.unregister(self._set_bad_blocks)
        self._dax.badblocks.on_clear.unregister(self._clear_bad_blocks)

    def _later(self) -> Iterator[RangeSet]:
        """Yield the sets of blocks without an owner that cannot be allocated yet."""
        yield self._pending
        for _, blocks in self._held:
            yield blocks
        yield self._settled

    @property
    def _blocks_later(self) -> int:
        return sum(blocks.total for blocks in self._later())

    @property
    def free_blocks(self) -> int:
        """Number of blocks without an owner, including bad, pending, held and settled blocks."""
        return self._free.total + self._blocks_later

    @property
    def pending_blocks(self) -> int:
        """Number of freed blocks, usable after the next commit."""
        return self._pending.total

    @property
    def held_blocks(self) -> int:
        """Number of freed and committed blocks that wait for :meth:`release`. NoSpace may end with it."""
        return sum(blocks.total for _, blocks in self._held)

    @property
    def usable_blocks(self) -> int:
        """Number of free blocks that can be allocated: ``f_bavail`` of statfs(2)."""
        return self._usable.total + self._blocks_later - self._later_bad_blocks

    @property
    def _usable(self) -> RangeSet:
        """Free blocks without a bad sector."""
        return self._free if self._good is None else self._good

    def _set_bad_blocks(self, sectors: list[SectorRange]) -> None:
        """Note sectors added to badblocks."""
        for part in sectors:
            for block in self._bad_blocks.add(*blocks_of_sectors(part)):
                if self._good is None:
                    self._good = self._free.copy()
                self._good.remove(*block)
                self._later_bad_blocks += self._common_later(block)

    def _common_later(self, run: BlockRange) -> int:
        return sum(_common(blocks, run) for blocks in self._later())

    def _clear_bad_blocks(self, sectors: list[SectorRange]) -> None:
        """Note sectors removed from badblocks.

        A block becomes usable with the last of its bad sectors cleared.
        """
        for part in sectors:
            blocks = blocks_of_sectors(part)
            size = blocks.length * PAGE_SIZE
            left = self._dax.badblocks.overlapping_bytes(blocks.start * PAGE_SIZE, size)
            still = RangeSet(sectors.outer(PAGE_SIZE) for sectors in left)
            for good in still.gaps(*bytes_of_blocks(blocks)):
                run = Range(good.start // PAGE_SIZE, good.end // PAGE_SIZE)
                for block in self._bad_blocks.remove(*run):
                    self._later_bad_blocks -= self._common_later(block)
                    if self._good is not None:
                        for free in list(self._free.overlapping(*block)):
                            self._good.add(*free)
        if not self._bad_blocks:
            self._good = None

    @property
    def fragments(self) -> int:
        """Upper bound of the number of runs an allocation can be split into."""
        runs = len(self._free) + sum(len(blocks) for blocks in self._later())
        return runs + len(self._dax.badblocks)

    def free_ranges(self) -> list[BlockRange]:
        """Return all blocks without an owner, in order, including pending, held and settled blocks."""
        return list(RangeSet([*self._free, *(run for blocks in self._later() for run in blocks)]))

    def used_from(self, at: Block) -> BlockRange | None:
        """Return the first run of used blocks at or after ``at``, cut to begin there; None if all are
        free.
        """
        free = self._free.first_from(at)
        if free is not None and free.start <= at:
            at, free = free.end, self._free.first_from(free.end)
        end = free.start if free is not None else self.total
        return Range(at, end) if at < end else None

    def used_in(self, blocks: BlockRange) -> int:
        """Return the number of used blocks in ``blocks``."""
        return blocks.length - sum(part.length for part in self._free.overlapping(*blocks))

    def allocate(self, length: int, goal: Block | None = None) -> list[BlockRange]:
        """Allocate ``length`` blocks in few runs, the first at ``goal`` if free.

        New blocks are reserved and zero. Raises NoSpace; then nothing has changed.
        """
        return self._or_reclaim(length, lambda taken: self._take_next(taken, length, goal), True)

    def allocate_for(
        self,
        extents: ExtentMap,
        pieces: Sequence[BlockRange],
        goal: Block | None = None,
        *,
        reserve: bool = True,
    ) -> list[BlockRange]:
        """As :meth:`allocate`, for the blocks ``pieces`` of a file, in the order of the pieces.

        Without ``reserve`` the blocks have no memory yet: for a caller that fills every block by
        copy_from_iter().
        """
        length = sum(piece.length for piece in pieces)
        return self._or_reclaim(length, lambda taken: self._take_next(taken, length, goal), reserve)

    def max_runs(self, pieces: Sequence[BlockRange]) -> int:
        """Return the largest number of runs that :meth:`allocate_for` can return."""
        return min(sum(piece.length for piece in pieces), self.fragments)

    def check_free(self, length: int) -> None:
        """Raise NoSpace unless ``length`` blocks have no owner."""
        if length > self.free_blocks + self._reclaimer.backlog:
            raise NoSpace("the device is full: remove files, or make a larger one")

    def _or_reclaim(
        self, length: int, take: Callable[[list[BlockRange]], None], reserve: bool
    ) -> list[BlockRange]:
        """Return the runs that ``take`` appends, all or nothing.

        After NoSpace reclaim, then call ``take`` again.
        """
        self.check_free(length)
        while True:
            try:
                return self._all_of(take, reserve)
            except NoSpace:
                if self._settled:
                    self.drain(DRAIN_RUNS, max(length, DRAIN_BLOCKS))
                elif not ((self._pending or self._reclaimer.backlog) and self._reclaimer.reclaim()):
                    raise

    def _all_of(self, take: Callable[[list[BlockRange]], None], reserve: bool) -> list[BlockRange]:
        taken: list[BlockRange] = []
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

    def _take_next(self, taken: list[BlockRange], length: int, goal: Block | None) -> None:
        missing = length
        at = self._cursor if goal is None else goal
        for low, high in ((at, self.total), (0, at)):
            while missing and (run := self._next_usable(low, high)):
                run = run.clip(run.start, run.start + missing)
                self._take(taken, run)
                missing -= run.length
                low = run.end
        if missing:
            raise NoSpace(
                "the device is full: all free blocks are bad; see daxemu badblocks, daxemu clear"
                if not self._held
                else "the device is full: freed blocks are still mapped"
            )

    def _take(self, taken: list[BlockRange], run: BlockRange) -> None:
        self._remove_free(run)
        taken.append(run)

    def _prepare(self, run: BlockRange, reserve: bool) -> None:
        if reserve:
            self._dax.reserve(*byte_span(run))
        # A new block is written with zeros, and a write clears latent poison.
        for good in self._dax.clear_poison(*byte_span(run)) if self._dax.has_poison else ():
            if reserve:  # pages put aside had no memory in the media before
                self._dax.reserve(good.start, good.length)
        if self.watcher is not None:
            self.watcher.allocated(run)

    def _next_usable(self, low: Block, high: Block) -> BlockRange | None:
        """The first run of free blocks in ``[low, high)`` that are not bad."""
        run = self._usable.first_from(low)
        return (run.clip(low, high) or None) if run is not None else None

    def _next_good(self, free: RangeSet, low: int, high: int, unit: int = PAGE_SIZE) -> BlockRange | None:
        """Return the first run of ``free`` in ``[low, high)`` without bad sectors.

        ``unit``: bytes of one position.
        """
        while (run := free.first_from(low)) and (run := run.clip(low, high)):
            sectors = next(self._dax.badblocks.overlapping_bytes(run.start * unit, run.length * unit), None)
            if sectors is None:
                return run
            first_bad_block = sectors.start // unit
            if run.start < first_bad_block:
                return Range(run.start, first_bad_block)
            low = DIV_ROUND_UP(sectors.end, unit)
        return None

    def _remove_free(self, run: BlockRange) -> None:
        self._free.remove(*run)
        if self._good is not None:
            self._good.remove(*run)

    def _add_free(self, run: BlockRange) -> None:
        self._free.add(*run)
        if self._good is not None:
            for part in list(self._bad_blocks.gaps(*run)):
                self._good.add(*part)

    def free(self, run: BlockRange) -> None:
        """Free blocks after the next commit. Precondition: no link has any of the blocks."""
        self._pending.add(*run)
        self._later_bad_blocks += _common(self._bad_blocks, run)

    @property
    def has_freed(self) -> bool:
        """True if freed blocks wait for a commit, for a hold, or for the host: an allocation may succeed
        later.
        """
        return bool(self._pending or self._held or self._settled)

    def hold(self) -> int:
        """Begin a hold: blocks freed before a commit during the hold are not reused until :meth:`release`.

        For the holder of direct mappings, from a change of an extent map until no process has the old blocks
        mapped. A commit does not wait. Blocks of a commit wait only for holds that began before the commit.
        Return the number of the hold.
        """
        self._last_hold += 1
        self._holds[self._last_hold] = None
        return self._last_hold

    def release(self, hold: int) -> None:
        """End a hold. Raises KeyError for a hold that has ended."""
        del self._holds[hold]
        self._settle_unheld()

    def settle(self) -> None:
        """Settle the pending blocks, except during a hold, and start giving their memory back to the host.

        Called after a commit.
        """
        if self._pending:
            self._held.append((self._last_hold, self._pending))
            self._pending = RangeSet()
        self._settle_unheld()

    def _settle_unheld(self) -> None:
        oldest = next(iter(self._holds), self._last_hold + 1)
        while self._held and self._held[0][0] < oldest:
            _, blocks = self._held.popleft()
            if not self._settled:
                self._settled = blocks
            else:  # few blocks are left, because the host drains faster than the filesystem commits
                for run in blocks:
                    self._settled.add(*run)
        if not self._reclaimer.has_task:
            while self.drain():
                pass
        elif self._settled:
            self._reclaimer.wake()

    def drain(self, runs: int = DRAIN_RUNS, blocks: int = DRAIN_BLOCKS) -> bool:
        """Free settled blocks: at most ``runs`` runs, and ``blocks`` blocks with memory. Return True if any
        are left.

        Blocks that are left keep memory and contents, and have no owner.
        """
        while self._settled and runs > 0 and blocks > 0:
            start, length = byte_span(next(iter(self._settled)))
            run = self._settled.pop(self._dax.discard_limit(start, length, PFN_PHYS(blocks)) // PAGE_SIZE)
            self._later_bad_blocks -= _common(self._bad_blocks, run)
            self._give_back(run)
            runs, blocks = runs - 1, blocks - run.length
        return bool(self._settled)

    def _give_back(self, run: BlockRange) -> None:
        if self.watcher is not None:
            self.watcher.freed(run)
        self._add_free(run)
        self._dax.discard(*byte_span(run))

    def discard_free(self) -> None:
        """Zero all free blocks: after a crash a free block may hold data."""
        for run in self._free:
            self._dax.discard(*byte_span(run))

    def take(self, run: BlockRange) -> None:
        """Mark blocks as used, for a record of the store. Raises NoSpace if any block is used already."""
        if not self._free.covers(*run):
            raise NoSpace(f"blocks {run.start}-{run.end} are in use twice")
        self._remove_free(run)
