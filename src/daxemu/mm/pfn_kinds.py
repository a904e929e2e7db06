"""Kinds of pfn, as a walker of the memmap tells pfns apart before reading a struct page.

A pfn of a present section that is not online is of one of five kinds. The list is from the 2019 discussion of
/proc/kpageflags and uninitialised struct pages. The discussion led to ``pfn_zone_device()``. Only
``ZONE_DEVICE`` pfns have a readable struct page.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, StrEnum
from typing import NamedTuple

from daxemu.ranges import Range
from daxemu.uapi import Pfn


class PfnKind(StrEnum):
    """The kind of a pfn. Only a ``ZONE_DEVICE`` pfn has a readable struct page."""

    HOLE = "hole"  # no section
    OFFLINE = "offline"  # memory that was added but is not online: its struct pages are garbage
    PARTIAL = "partial section"  # a pfn beside a device that begins or ends inside the section
    RESERVED = "altmap"  # reserved by the driver for the memmap itself; never initialised
    UNINITIALISED = "not initialised"  # not yet reached by memmap_init_zone_device()
    ZONE_DEVICE = "zone device"


class Use(IntEnum):
    """The user of a span: ordinary memory or a device."""

    UNUSED = 0
    OFFLINE = 1
    DEVICE = 2


class Span(NamedTuple):
    """Pfns ``[start, end)`` with struct pages.

    ``use``: a :class:`Use`. ``data``: the end of the altmap. ``initialised``: the end of the initialised
    pages.
    """

    use: int
    start: Pfn
    end: Pfn
    data: Pfn
    initialised: Pfn


def kinds(run: Range, rows: list[Span]) -> Iterator[tuple[Range, PfnKind]]:
    """Split ``run`` into ranges of one kind.

    Preconditions: all its sections are present; ``rows`` are sorted.
    """
    at = run.start
    for span in rows:
        inside = [
            (Range(at, span.start), PfnKind.PARTIAL),
            (Range(span.start, span.end), PfnKind.OFFLINE)
            if span.use == Use.OFFLINE
            else (Range(span.start, span.data), PfnKind.RESERVED),
        ]
        if span.use == Use.DEVICE:
            inside.append((Range(span.data, span.initialised), PfnKind.ZONE_DEVICE))
            inside.append((Range(span.initialised, span.end), PfnKind.UNINITIALISED))
        for pages, kind in inside:
            if part := pages.clip(at, run.end):
                yield part, kind
                at = part.end
    if at < run.end:
        yield Range(at, run.end), PfnKind.PARTIAL
