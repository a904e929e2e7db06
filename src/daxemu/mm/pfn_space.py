"""Memory without struct pages: ranges of pfns that a driver maps to user space.

Counterpart in Linux: ``struct pfn_address_space`` (include/linux/memory-failure.h) and
``register_pfn_address_space()`` (mm/memory-failure.c), since 6.19. The ``failure`` callback is from the 2023
series ("mm: handle poisoning of pfn without struct pages"). In the kernel a call takes one pfn; here, a
range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from daxemu.errors import Busy, InvalidArgument
from daxemu.mm.incident import PfnMapping
from daxemu.ranges import IntervalIndex, PfnRange
from daxemu.uapi import Pfn


class PfnAddressSpaceOps(Protocol):
    """``struct pfn_address_space_ops``: the callbacks of a driver of memory without struct pages."""

    def failure(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> None:
        """Stop mapping ``nr_pages`` failed pages from ``pfn`` on, all inside ``space``.

        Raises a DaxemuError if the driver could not; the outcome is then Failed.
        """

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> Sequence[PfnMapping]:
        """Return the file ranges mapping the pages (``pfn_to_vma_pgoff``); empty if no file can map them."""


@dataclass(eq=False)
class PfnAddressSpace:
    """A registered range ``[start, end)`` of pfns, and its driver."""

    name: str
    pages: PfnRange
    ops: PfnAddressSpaceOps | None


class PfnAddressSpaces:
    """The registered spaces (``pfn_space_itree``). Invariant: no two overlap."""

    def __init__(self) -> None:
        self._spaces: IntervalIndex[PfnAddressSpace] = IntervalIndex(
            lambda space: space.pages.start, lambda space: space.pages.length
        )

    def __len__(self) -> int:
        return len(self._spaces)

    def register(self, space: PfnAddressSpace) -> None:
        """``register_pfn_address_space()``.

        Raises InvalidArgument (-EINVAL) without ops or for an empty range, Busy (-EBUSY) if a part of the
        range is registered.
        """
        if space.ops is None:
            raise InvalidArgument(f"{space.name}: a pfn address space needs its callbacks")
        if not space.pages or space.pages.start < 0:
            raise InvalidArgument(f"{space.name}: pfns {space.pages.start}-{space.pages.end} are not a range")
        for other in self._spaces.overlapping(*space.pages):
            raise Busy(
                f"{space.name}: pfns {space.pages.start:#x}-{space.pages.end:#x} belong to {other.name}"
            )
        self._spaces.add(space)

    def unregister(self, space: PfnAddressSpace) -> None:
        """``unregister_pfn_address_space()``. Without effect on an unregistered space, as in the kernel."""
        if any(other is space for other in self._spaces.overlapping(*space.pages)):
            self._spaces.discard(space)

    def overlapping(self, start: Pfn, end: Pfn) -> Iterator[tuple[PfnAddressSpace, PfnRange]]:
        """Yield the spaces that overlap ``[start, end)``, in order, each with the overlap."""
        found = sorted(self._spaces.overlapping(start, end), key=lambda space: space.pages)
        for space in found:
            yield space, space.pages.clip(start, end)
