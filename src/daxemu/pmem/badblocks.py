"""Bad blocks: poison that the driver knows, in 512-byte sectors (block/badblocks.c).

The list is independent of memory_failure(): the allocator and the search for damaged files use the list. A
change of the list signals no process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from daxemu.notifier import NotifierChain
from daxemu.ranges import ByteRange, Range, RangeSet, SectorRange
from daxemu.uapi import Sector
from daxemu.units import bytes_of_sectors, sectors_at


class Badblocks:
    """Bad blocks of one device. Sectors count from the first data sector."""

    def __init__(self) -> None:
        self._sectors = RangeSet()
        self.on_change: NotifierChain[[]] = NotifierChain()
        """Called after any change; within :meth:`one_change`, once at its end."""
        self.on_set: NotifierChain[[list[SectorRange]]] = NotifierChain()
        """Called with new bad blocks."""
        self.on_clear: NotifierChain[[list[SectorRange]]] = NotifierChain()
        """Called with sectors that are no longer bad blocks."""
        self._is_one_change = False

    def __len__(self) -> int:
        return len(self._sectors)

    def __iter__(self) -> Iterator[SectorRange]:
        return iter(self._sectors)

    @property
    def count(self) -> int:
        """Number of bad sectors. (``bb->count`` is the number of entries.)"""
        return self._sectors.total

    def set(self, sector: Sector, sectors: int) -> list[SectorRange]:
        """Add bad sectors (``badblocks_set``). Return the new ones."""
        return self.populate([Range(sector, sector + sectors)])

    def populate(self, ranges: Iterable[SectorRange]) -> list[SectorRange]:
        """Add many ranges of bad sectors in one change (``nvdimm_badblocks_populate``). Return the new
        ones.
        """
        added = [new for part in ranges for new in self._sectors.add(*part)]
        if added:
            self.on_set.call_chain(added)
            self._changed()
        return added

    @contextmanager
    def one_change(self) -> Iterator[None]:
        """Context in which all changes count as one: ``on_change`` is called once, at the end."""
        self._is_one_change = True
        try:
            yield
        finally:
            self._is_one_change = False
            self.on_change.call_chain()

    def _changed(self) -> None:
        if not self._is_one_change:
            self.on_change.call_chain()

    def clear(self, sector: Sector, sectors: int) -> list[SectorRange]:
        """Remove bad sectors (``badblocks_clear``). Return the removed ones."""
        removed = self._sectors.remove(sector, sector + sectors)
        if removed:
            self.on_clear.call_chain(removed)
            self._changed()
        return removed

    def check(self, sector: Sector, sectors: int) -> SectorRange | None:
        """Return the first bad part of the range (``badblocks_check``); None without a bad part."""
        return next(self._sectors.overlapping(sector, sector + sectors), None)

    def overlapping_bytes(self, offset: int, length: int) -> Iterator[ByteRange]:
        """Yield the bad byte ranges (whole sectors) that overlap ``[offset, offset + length)``."""
        for sectors in self._sectors.overlapping(*sectors_at(offset, length)):
            yield bytes_of_sectors(sectors)

    def in_pieces(self, count: int) -> Iterator[list[SectorRange]]:
        """Yield all bad sectors, up to ``count`` ranges at a time. The list may change between two pieces."""
        return self._sectors.in_pieces(0, 1 << 63, count)

    def unknown(self, sectors: SectorRange) -> Iterator[SectorRange]:
        """Yield the parts of ``sectors`` outside the bad blocks."""
        return self._sectors.gaps(*sectors)

    def known(self, sectors: SectorRange) -> Iterator[SectorRange]:
        """Yield the parts of ``sectors`` inside the bad blocks."""
        return self._sectors.overlapping(*sectors)

    def sysfs_text(self) -> str:
        """Return the list in the format of /sys/block/pmem0/badblocks: lines "first-sector count"."""
        return "".join(f"{part.start} {part.length}\n" for part in self._sectors)
