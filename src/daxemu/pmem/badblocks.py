"""The poison the driver knows of, in 512-byte sectors: block/badblocks.c.

Not the same thing as memory_failure(): this list is for the allocator and for naming damaged files; nobody is
signalled because of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from daxemu.ranges import Range, RangeSet
from daxemu.uapi import SECTOR_SIZE, Sector
from daxemu.units import DIV_ROUND_UP, bytes_of_sectors


class Badblocks:
    """Known-bad sectors of one device, counted from its first data sector."""

    def __init__(self) -> None:
        self._bad = RangeSet()
        self.on_change: Callable[[], None] = lambda: None
        self.on_set: Callable[[list[Range]], None] = lambda sectors: None
        """Told of sectors that were not known to be bad."""
        self.on_clear: Callable[[list[Range]], None] = lambda sectors: None
        """Told of sectors that are bad no more."""

    def __len__(self) -> int:
        return len(self._bad)

    def __iter__(self) -> Iterator[Range]:
        return iter(self._bad)

    @property
    def count(self) -> int:
        """Bad sectors in all (``bb->count`` counts entries; this counts what they hold)."""
        return self._bad.total

    def set(self, sector: Sector, sectors: int) -> list[Range]:
        """Acknowledge bad sectors (``badblocks_set``); returns those not known before."""
        return self.populate([Range(sector, sector + sectors)])

    def populate(self, ranges: Iterable[Range]) -> list[Range]:
        """Acknowledge many (``nvdimm_badblocks_populate``), which is one change; returns those not known
        before.
        """
        added = [new for bad in ranges for new in self._bad.add(*bad)]
        if added:
            self.on_set(added)
            self.on_change()
        return added

    @contextmanager
    def one_change(self) -> Iterator[None]:
        """Within, all changes are one: ``on_change`` is called at the end."""
        on_change, self.on_change = self.on_change, lambda: None
        try:
            yield
        finally:
            self.on_change = on_change
            on_change()

    def clear(self, sector: Sector, sectors: int) -> list[Range]:
        """Forget bad sectors (``badblocks_clear``); returns those that were known."""
        removed = self._bad.remove(sector, sector + sectors)
        if removed:
            self.on_clear(removed)
            self.on_change()
        return removed

    def check(self, sector: Sector, sectors: int) -> Range | None:
        """The first bad part of the range (``badblocks_check``), None if it has none."""
        return next(self._bad.overlapping(sector, sector + sectors), None)

    def overlapping_bytes(self, offset: int, length: int) -> Iterator[Range]:
        """The known-bad byte ranges (whole sectors) that meet ``[offset, offset + length)``."""
        first, last = offset // SECTOR_SIZE, DIV_ROUND_UP(offset + length, SECTOR_SIZE)
        for bad in self._bad.overlapping(first, last):
            yield bytes_of_sectors(bad)

    def in_pieces(self, count: int) -> Iterator[list[Range]]:
        """All bad sectors, up to ``count`` ranges at a time; they may change between two pieces."""
        return self._bad.in_pieces(0, 1 << 63, count)

    def unknown(self, sectors: Range) -> Iterator[Range]:
        """The parts of ``sectors`` that are not known to be bad."""
        return self._bad.gaps(*sectors)

    def known(self, sectors: Range) -> Iterator[Range]:
        """The parts of ``sectors`` that are known to be bad."""
        return self._bad.overlapping(*sectors)

    def sysfs_text(self) -> str:
        """As /sys/block/pmem0/badblocks prints it: "first-sector count" a line."""
        return "".join(f"{bad.start} {bad.length}\n" for bad in self._bad)
