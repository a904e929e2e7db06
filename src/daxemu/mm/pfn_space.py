"""Memory without struct pages: ranges of pfns that a driver maps to user space all the same.

Counterpart in Linux: ``struct pfn_address_space`` (include/linux/memory-failure.h) and
``register_pfn_address_space()`` (mm/memory-failure.c), 6.19 and later; the failure callback is of the series
that led there ("mm: handle poisoning of pfn without struct pages", 2023). Unlike there, every call takes a
range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from daxemu.errors import Busy, InvalidArgument
from daxemu.mm.incident import PfnMapping
from daxemu.ranges import IntervalIndex, Range
from daxemu.uapi import Pfn


class PfnAddressSpaceOps(Protocol):
    """``struct pfn_address_space_ops``: what the driver of such memory answers."""

    def failure(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> None:
        """``nr_pages`` pages from ``pfn`` on, all inside ``space``, went bad: do not give them out any more.

        Raises a DaxemuError when that could not be done; the failure is then "Failed".
        """

    def pfn_to_pgoff(self, space: PfnAddressSpace, pfn: Pfn, nr_pages: int) -> Sequence[PfnMapping]:
        """Which pages of which files show these pages (``pfn_to_vma_pgoff``); none for pages nobody can
        map.
        """


@dataclass(eq=False)
class PfnAddressSpace:
    """One registered range ``[start, end)`` of pfns, and its driver."""

    name: str
    pages: Range
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

        Raises InvalidArgument (-EINVAL) without ops or for an empty range, Busy (-EBUSY) if a part of it is
        registered.
        """
        if space.ops is None:
            raise InvalidArgument(f"{space.name}: a pfn address space needs its callbacks")
        if not space.pages or space.pages.start < 0:
            raise InvalidArgument(f"{space.name}: pfns {space.pages.start}-{space.pages.end} are no range")
        for other in self._spaces.overlapping(*space.pages):
            raise Busy(
                f"{space.name}: pfns {space.pages.start:#x}-{space.pages.end:#x} belong to {other.name}"
            )
        self._spaces.add(space)

    def unregister(self, space: PfnAddressSpace) -> None:
        """``unregister_pfn_address_space()``; nothing happens if it is not registered, as in the kernel."""
        if any(other is space for other in self._spaces.overlapping(*space.pages)):
            self._spaces.discard(space)

    def overlapping(self, start: Pfn, end: Pfn) -> Iterator[tuple[PfnAddressSpace, Range]]:
        """The spaces that have any of the pfns, in order, each with its part of them."""
        found = sorted(self._spaces.overlapping(start, end), key=lambda space: space.pages)
        for space in found:
            yield space, space.pages.clip(start, end)
