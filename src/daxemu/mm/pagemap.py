"""``struct dev_pagemap``: device memory with struct pages, its owner and its ops
(include/linux/memremap.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from daxemu.ranges import Range
from daxemu.uapi import Pfn

if TYPE_CHECKING:
    from daxemu.mm.memmap import Memmap  # numpy is slow to import, and who only mounts may not need it


class DevPagemapOps(Protocol):
    """``struct dev_pagemap_ops``, of which failure handling needs one."""

    def memory_failure(self, pgmap: DevPagemap, pfn: Pfn, nr_pages: int, flags: int) -> None:
        """``nr_pages`` pages from ``pfn`` on, all inside ``pgmap``, failed: one call for the range.

        Raises Unsupported (-EOPNOTSUPP) for the generic handler, any other DaxemuError when it could not be
        handled.
        """


@dataclass(eq=False)
class DevPagemap:
    """One ``dev_pagemap``. ``altmap_pages`` pages at the start of the first range hold the memmap itself."""

    name: str
    ranges: tuple[Range, ...]
    ops: DevPagemapOps | None
    altmap_pages: int = 0
    memmap: Memmap | None = None
    """The struct pages, where something keeps them."""

    @property
    def altmap(self) -> Range:
        """The pages that hold the memmap; false when it is elsewhere."""
        return Range(self.ranges[0].start, self.ranges[0].start + self.altmap_pages)

    def overlapping(self, start: Pfn, end: Pfn) -> list[Range]:
        """The parts of ``[start, end)`` that are this device's, altmap and data."""
        return [part for span in self.ranges if (part := span.clip(start, end))]

    def altmap_overlapping(self, start: Pfn, end: Pfn) -> list[Range]:
        """The part of ``[start, end)`` that is the altmap, if any is."""
        return [part] if (part := self.altmap.clip(start, end)) else []

    def pfn_valid(self, start: Pfn, end: Pfn) -> list[Range]:
        """The parts of ``[start, end)`` that are this device's *data* pages (``pgmap_pfn_valid``): no
        altmap.
        """
        found = []
        for index, span in enumerate(self.ranges):
            first = span.start + (self.altmap_pages if index == 0 else 0)
            if part := Range(first, span.end).clip(start, end):
                found.append(part)
        return found
