"""What a pfn is to a walker, known without a look at its struct page.

The list is from the 2019 discussion of /proc/kpageflags and uninitialised struct pages, which led to
``pfn_zone_device()``: the five things that a pfn of a present section that is not online can be. Only one of
them may be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import NamedTuple

from daxemu.ranges import Range
from daxemu.uapi import Pfn


class Kind(StrEnum):
    """What a pfn is to a walker. Only a ``ZONE_DEVICE`` one has a struct page that may be looked at."""

    HOLE = "hole"  # no section
    OFFLINE = "offline"  # memory that was added but is not online yet: garbage
    PARTIAL = "partial section"  # the device ends, or begins, inside the section
    RESERVED = "altmap"  # reserved by the driver, for the memmap itself: never initialised
    UNINITIALISED = "not initialised"  # memmap_init_zone_device() is still on its way
    ZONE_DEVICE = "zone device"


class Use(IntEnum):
    """Whose a span is."""

    UNUSED = 0
    OFFLINE = 1
    DEVICE = 2


class Span(NamedTuple):
    """Pfns with struct pages: whose, where the altmap ends, how far they are initialised."""

    use: int
    start: Pfn
    end: Pfn
    data: Pfn
    initialised: Pfn


def kinds(run: Range, rows: list[Span]) -> Iterator[tuple[Range, Kind]]:
    """The pfns of ``run``, whose sections are present, by what ``rows`` say of them."""
    at = run.start
    for span in rows:
        inside = [
            (Range(at, span.start), Kind.PARTIAL),
            (Range(span.start, span.end), Kind.OFFLINE)
            if span.use == Use.OFFLINE
            else (Range(span.start, span.data), Kind.RESERVED),
        ]
        if span.use == Use.DEVICE:
            inside.append((Range(span.data, span.initialised), Kind.ZONE_DEVICE))
            inside.append((Range(span.initialised, span.end), Kind.UNINITIALISED))
        for pages, kind in inside:
            if part := pages.clip(at, run.end):
                yield part, kind
                at = part.end
    if at < run.end:
        yield Range(at, run.end), Kind.PARTIAL
