"""``struct dev_pagemap``: device memory with struct pages, and the ops of its driver (linux/memremap.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from daxemu.ranges import PfnRange, Range
from daxemu.uapi import Pfn

if TYPE_CHECKING:
    from daxemu.mm.memmap import Memmap  # imports numpy, which is slow to import and not always needed


class DevPagemapOps(Protocol):
    """``struct dev_pagemap_ops``: the operation for memory failures."""

    def memory_failure(self, pgmap: DevPagemap, pfn: Pfn, nr_pages: int, flags: int) -> None:
        """Handle the failure of ``nr_pages`` pages from ``pfn`` on, all inside ``pgmap``. One call per range.

        Raises Unsupported (-EOPNOTSUPP) to ask for the generic handler, any other DaxemuError if the driver
        could not handle the failure.
        """


@dataclass(eq=False)
class DevPagemap:
    """A ``dev_pagemap``. ``altmap_pages`` pages at the start of the first range hold the memmap itself."""

    name: str
    ranges: tuple[PfnRange, ...]
    ops: DevPagemapOps | None
    altmap_pages: int = 0
    memmap: Memmap | None = None
    """The struct pages; None on a machine without a memmap."""

    @property
    def altmap(self) -> PfnRange:
        """The pages that hold the memmap; an empty (false) range without an altmap."""
        return Range(self.ranges[0].start, self.ranges[0].start + self.altmap_pages)

    def overlapping(self, start: Pfn, end: Pfn) -> list[PfnRange]:
        """Return the parts of ``[start, end)`` inside the device, altmap and data."""
        return [part for span in self.ranges if (part := span.clip(start, end))]

    def altmap_overlapping(self, start: Pfn, end: Pfn) -> list[PfnRange]:
        """Return the part of ``[start, end)`` inside the altmap; an empty list if no page is."""
        return [part] if (part := self.altmap.clip(start, end)) else []

    def pfn_valid(self, start: Pfn, end: Pfn) -> list[PfnRange]:
        """Return the *data* pages of the device in ``[start, end)`` (``pgmap_pfn_valid()``): no altmap."""
        found = []
        for index, span in enumerate(self.ranges):
            first = span.start + (self.altmap_pages if index == 0 else 0)
            if part := Range(first, span.end).clip(start, end):
                found.append(part)
        return found
