"""Private copies of pages, in the page tables of an address space."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from daxemu.host.direct.errors import AddressSpaceGone
from daxemu.host.direct.table import Space
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.procfs import GONE
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PFN_PHYS, PHYS_PFN


def private_copies(space: Space, private: Iterable[Range]) -> RangeSet:
    """Return the private copies at addresses of private mappings."""
    kept = RangeSet()
    for part in private:
        with looking_into(space), Pagemap(space.pid) as pagemap:
            for copied in pagemap.present_in(*part, copies=True):
                for own in list(space.zeros.gaps(*copied)):
                    for page in _unmarked(pagemap, own):
                        kept.add(*page)
        for copied in space.copied.overlapping(*part):
            kept.add(*copied)
    return kept


def _unmarked(pagemap: Pagemap, part: Range) -> Iterator[Range]:
    """Yield the pages of ``part`` that are there: not only marked by the write-protection."""
    for index, entry in enumerate(pagemap.entries(part.start, PHYS_PFN(part.length))):
        if not entry.is_marker:
            at = part.start + PFN_PHYS(index)
            yield Range(at, at + PAGE_SIZE)


@contextmanager
def looking_into(space: Space) -> Iterator[None]:
    """Context for reading /proc of an address space. Raises AddressSpaceGone instead of the errors there."""
    try:
        yield
    except GONE as error:
        raise AddressSpaceGone(f"process {space.tgid} has ended") from error
