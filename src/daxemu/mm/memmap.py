"""The memmap: struct pages of device memory, and the kind of each pfn, known without reading a struct page.

Counterpart in Linux: mm/sparse.c (``mem_section``), ``memmap_init_zone_device()`` (mm/mm_init.c),
PG_hwpoison, and ``pfn_zone_device()``, the check proposed in 2019 when /proc/kpageflags was found to read
uninitialised struct pages. :class:`PfnKind` has the kinds of pfn listed in the discussion of that patch.

The arrays (``memmap_arrays``):

- ``spans``: a few rows. Each row is a range of pfns with struct pages, the end of the altmap, and the end of
  the initialised pages.
- ``sections``: one byte for each section (128 MiB): the kernel's section flags and two flags of daxemu.
  ``ALL_HWPOISON``: every page of the section is poisoned. ``SOME_HWPOISON``: ``pages`` has the flag of each
  page.
- ``pages``: one byte of flags for each page. The array is sparse, and read only where ``SOME_HWPOISON`` is
  set.

Poisoning 6 TiB writes 48 KiB of section flags. Poisoning one page writes one byte of ``pages``. The cost of a
call grows with the number of sections, never with the number of pfns. Only the two sections at the ends of a
range are changed page by page.

Invariant, for walkers in other processes: between any two stores, each page reads either as before the change
under way or as after the change.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from daxemu.errors import Busy, NoDevice, NoSpace
from daxemu.mm.memmap_arrays import MAX_SPANS, PAGES_PER_SECTION, MemmapArrays, pages_of
from daxemu.mm.pfn_kinds import PfnKind, Span, Use, kinds
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range
from daxemu.uapi import Pfn
from daxemu.units import DIV_ROUND_UP

PG_HWPOISON = 1
_POISON = 1 << 6 | 1 << 7


class Section:
    """``mem_section->section_mem_map`` flags (linux/mmzone.h), and two flags of daxemu (``*_HWPOISON``).

    The flags are plain integers, because numpy converts enumerations to int64.
    """

    MARKED_PRESENT = 1 << 0
    HAS_MEM_MAP = 1 << 1
    TAINT_ZONE_DEVICE = 1 << 4
    ALL_HWPOISON = 1 << 6
    SOME_HWPOISON = 1 << 7


class Walked(NamedTuple):
    """Consecutive pfns of one kind. ``hwpoison`` is False for pfns whose struct page may not be read."""

    pages: Range
    kind: PfnKind
    hwpoison: bool


def _ends(sections: slice) -> tuple[int, int]:
    """Return the first and the last section.

    Spans are disjoint, so only these two sections can hold pages of two spans.
    """
    return sections.start, sections.stop - 1


class Memmap:
    """The struct pages of pfns ``[base, end)``."""

    def __init__(self, arrays: MemmapArrays) -> None:
        self._arrays = arrays
        self._spans, self._sections = arrays.spans, arrays.sections
        self.base, self.end = arrays.base, arrays.end

    @classmethod
    def create(cls, directory: PrivatePath, pages: Range) -> Memmap:
        """Create an empty memmap for the pfns ``pages``; replace an existing memmap. Raises NoSpace."""
        return cls(MemmapArrays.create(directory, pages))

    @classmethod
    def open(cls, directory: PrivatePath) -> Memmap:
        """Open the memmap of a running machine read-only. Raises FileNotFoundError if no memmap exists."""
        return cls(MemmapArrays.open(directory))

    def close(self) -> None:
        """Close the files."""
        self._arrays.close()

    def discard(self) -> None:
        """Remove the files. A process that has the files open keeps reading the old content."""
        self._arrays.discard()

    # -- spans of struct pages

    def _rows(self) -> list[Span]:
        rows = np.asarray(self._spans)[:MAX_SPANS]
        used = rows[rows[:, 0] != Use.UNUSED].tolist()
        return sorted(map(Span._make, used), key=attrgetter("start"))

    def _add(self, use: int, pages: Range, altmap_pages: int, flags: int) -> None:
        for other in self._rows():
            if pages.clip(other.start, other.end):
                raise Busy(f"pfns {pages.start:#x}-{pages.end:#x} have struct pages already")
        if not self.base <= pages.start < pages.end <= self.end:
            raise NoDevice(f"pfns {pages.start:#x}-{pages.end:#x} are outside this memmap")
        free = np.flatnonzero(self._spans[:MAX_SPANS, 0] == Use.UNUSED)
        if not len(free):
            raise NoSpace(f"no room for more than {MAX_SPANS} ranges of struct pages")
        data = pages.start + altmap_pages
        # ``use`` is stored last: a row with ``use`` UNUSED is ignored by walkers.
        self._spans[free[0], 1:] = (pages.start, pages.end, data, data)
        self._spans[free[0], 0] = use
        self._sections[self._sections_of(pages)] |= flags

    def _sections_of(self, pages: Range) -> slice:
        first = (pages.start - self.base) // PAGES_PER_SECTION
        return slice(first, DIV_ROUND_UP(pages.end - self.base, PAGES_PER_SECTION))

    def add_offline(self, pages: Range) -> None:
        """``add_memory()``: add ordinary memory whose sections are present but not online.

        Raises Busy, NoDevice and NoSpace as :meth:`add_pages`.
        """
        self._add(Use.OFFLINE, pages, 0, Section.MARKED_PRESENT | Section.HAS_MEM_MAP)

    def add_pages(self, pages: Range, altmap_pages: int = 0) -> None:
        """``arch_add_memory()`` of device memory: add struct pages, none of them initialised.

        The first ``altmap_pages`` pages are reserved by the driver, and are never initialised. Raises Busy if
        a page has a struct page already, NoDevice outside the memmap, NoSpace for more than ``MAX_SPANS``
        spans.
        """
        flags = Section.MARKED_PRESENT | Section.HAS_MEM_MAP | Section.TAINT_ZONE_DEVICE
        self._add(Use.DEVICE, pages, altmap_pages, flags)

    def remove_pages(self, pages: Range) -> None:
        """``arch_remove_memory()``: remove the spans that lie inside ``pages`` whole, with the struct pages.

        Section flags are cleared before the span: a walker looks up no pfn of a section that is not present.
        A section that another span shares keeps its flags.
        """
        rows = [Span(*map(int, row)) for row in self._spans[:MAX_SPANS]]
        gone = {i for i, span in enumerate(rows) if span.use and pages.clip(*span[1:3]) == span[1:3]}
        others = [span for i, span in enumerate(rows) if span.use and i not in gone]
        shared = {at for span in others for at in _ends(self._sections_of(Range(*span[1:3])))}
        for index in gone:
            sections = self._sections_of(Range(*rows[index][1:3]))
            first, last = _ends(sections)
            self._sections[sections.start + (first in shared) : sections.stop - (last in shared)] = 0
            self._spans[index, 0] = Use.UNUSED

    def memmap_init_zone_device(self, pages: Range) -> None:
        """Initialise the struct pages of a span up to the end of ``pages``, none of them poisoned."""
        for index, row in enumerate(self._spans[:MAX_SPANS]):
            span = Span(*map(int, row))
            if span.use == Use.DEVICE and (part := pages.clip(span.data, span.end)):
                self._forget(Range(max(part.start, span.initialised), part.end))
                self._spans[index, 4] = max(span.initialised, part.end)

    def _forget(self, pages: Range) -> None:
        """Zero struct pages that hold garbage.

        Precondition: the pages are not initialised, so no walker reads them.
        """
        if pages:
            self._clear(pages)

    # -- the kind of a pfn

    def pfn_present(self, pfn: Pfn) -> bool:
        """Return True if the section of ``pfn`` is present."""
        if not self.base <= pfn < self.end:
            return False
        return bool(self._sections[(pfn - self.base) // PAGES_PER_SECTION] & Section.MARKED_PRESENT)

    def kind(self, pfn: Pfn) -> PfnKind:
        """Return the kind of ``pfn``. Reads no struct page."""
        if not self.pfn_present(pfn):
            return PfnKind.HOLE
        return next(kinds(Range(pfn, pfn + 1), self._rows()))[1]

    def pfn_zone_device(self, pfn: Pfn) -> bool:
        """Return True if ``pfn`` has an initialised struct page of a device."""
        return self.kind(pfn) is PfnKind.ZONE_DEVICE

    def page_hwpoison(self, pfn: Pfn) -> bool:
        """``PageHWPoison()``. Raises NoDevice for a pfn whose struct page may not be read."""
        if not self.pfn_zone_device(pfn):
            raise NoDevice(f"pfn {pfn:#x} has no struct page ({self.kind(pfn)})")
        section = int(self._sections[(pfn - self.base) // PAGES_PER_SECTION])
        if section & Section.ALL_HWPOISON:
            return True
        at = pfn - self.base
        return bool(section & Section.SOME_HWPOISON and self._arrays.read(Range(at, at + 1))[0] & PG_HWPOISON)

    # -- PG_hwpoison

    def _valid(self, ranges: Iterable[Range]) -> Iterator[Range]:
        spans = [span for span in self._rows() if span.use == Use.DEVICE]
        for pages in ranges:
            for span in spans:
                if part := pages.clip(span.data, span.initialised):
                    yield part

    def _split(self, pages: Range) -> tuple[slice, list[tuple[int, Range]]]:
        """Return the sections inside ``pages``, and the rest as (section, elements of ``pages``)."""
        low, high = pages.start - self.base, pages.end - self.base
        first, last = DIV_ROUND_UP(low, PAGES_PER_SECTION), high // PAGES_PER_SECTION
        if first > last:  # inside one section
            return slice(0, 0), [(last, Range(low, high))]
        ends = [
            (first - 1, Range(low, first * PAGES_PER_SECTION)),
            (last, Range(last * PAGES_PER_SECTION, high)),
        ]
        return slice(first, last), [(section, part) for section, part in ends if part]

    def set_hwpoison(self, *ranges: Range) -> None:
        """``SetPageHWPoison()`` for the valid pages of the ranges. Never fails.

        On a full host filesystem a section may stay unchanged: a store to a page that the host filesystem
        cannot allocate would raise SIGBUS.
        """
        some: dict[int, list[Range]] = defaultdict(list)
        for valid in self._valid(ranges):
            whole, ends = self._split(valid)
            if whole.start < whole.stop:
                self._sections[whole] |= Section.ALL_HWPOISON
            for section, part in ends:
                some[section].append(part)
        for section, parts in some.items():
            span = Range(min(part.start for part in parts), max(part.end for part in parts))
            if self._sections[section] & Section.ALL_HWPOISON or not self._arrays.reserve(span):
                continue
            if not self._sections[section] & Section.SOME_HWPOISON:
                self._arrays.clear(pages_of(section))  # without SOME_HWPOISON the elements may hold garbage
            for part in parts:
                self._arrays.pages[part.start : part.end] |= PG_HWPOISON
            self._sections[section] |= Section.SOME_HWPOISON

    def clear_hwpoison(self, *ranges: Range) -> None:
        """``ClearPageHWPoison()`` for the valid pages of the ranges."""
        for valid in self._valid(ranges):
            self._clear(valid)

    def _clear(self, pages: Range) -> None:
        whole, ends = self._split(pages)
        for section in np.flatnonzero(self._sections[whole] & Section.SOME_HWPOISON) + whole.start:
            self._arrays.clear(pages_of(int(section)))
        self._sections[whole] &= 0xFF & ~_POISON
        for section, part in ends:
            every = pages_of(section)
            if self._sections[section] & Section.ALL_HWPOISON:
                if not self._arrays.reserve(every):
                    continue
                self._arrays.pages[every.start : every.end] = PG_HWPOISON
                self._sections[section] |= Section.SOME_HWPOISON
                self._sections[section] &= 0xFF & ~Section.ALL_HWPOISON
            if self._sections[section] & Section.SOME_HWPOISON:
                self._arrays.clear(part)
                if not self._arrays.read(every).any():
                    self._sections[section] &= 0xFF & ~Section.SOME_HWPOISON

    # -- walking

    def _pieces(self) -> Iterator[tuple[Range, PfnKind, int]]:
        """Yield every pfn from 0 to ``end``, in runs of one kind and equal section flags."""
        if self.base:
            yield Range(0, self.base), PfnKind.HOLE, 0
        rows, sections = self._rows(), np.array(self._sections)
        edges = [0, *(np.flatnonzero(np.diff(sections)) + 1).tolist(), len(sections)]
        for first, last in itertools.pairwise(edges):
            run = Range(self.base + first * PAGES_PER_SECTION, self.base + last * PAGES_PER_SECTION)
            flags = int(sections[first])
            if not flags & Section.MARKED_PRESENT:
                yield run, PfnKind.HOLE, flags
                continue
            for part, kind in kinds(run, rows):
                yield part, kind, flags

    def walk(self) -> Iterator[Walked]:
        """Yield every pfn from 0 to ``end`` as ranges, in order. Neighbours differ in kind or hwpoison."""
        for alike, group in itertools.groupby(self._runs(), key=lambda run: (run.kind, run.hwpoison)):
            first, *more = [run.pages for run in group]
            yield Walked(Range(first.start, (more or [first])[-1].end), *alike)

    def _runs(self) -> Iterator[Walked]:
        for run, kind, flags in self._pieces():
            all_of_it = kind is PfnKind.ZONE_DEVICE and bool(flags & Section.ALL_HWPOISON)
            if all_of_it or kind is not PfnKind.ZONE_DEVICE or not flags & Section.SOME_HWPOISON:
                yield Walked(run, kind, all_of_it)
                continue
            for part, hwpoison in self._hwpoison_flags(run):
                edges = [0, *(np.flatnonzero(np.diff(hwpoison)) + 1).tolist(), part.length]
                for first, last in itertools.pairwise(edges):
                    yield Walked(Range(part.start + first, part.start + last), kind, bool(hwpoison[first]))

    def _hwpoison_flags(self, run: Range) -> Iterator[tuple[Range, np.ndarray[Any, np.dtype[np.uint8]]]]:
        """Yield the PG_hwpoison flags of a run, at most one section (32768 pages) at a time."""
        for start in range(run.start, run.end, PAGES_PER_SECTION):
            part = Range(start, min(run.end, start + PAGES_PER_SECTION))
            pages = self._arrays.read(Range(part.start - self.base, part.end - self.base))
            yield part, pages & np.uint8(PG_HWPOISON)

    def count(self) -> dict[tuple[PfnKind, bool], int]:
        """Return the number of pages for each (kind, hwpoison)."""
        counts: Counter[tuple[PfnKind, bool]] = Counter()
        for run, kind, flags in self._pieces():
            hwpoison = 0
            if kind is PfnKind.ZONE_DEVICE:
                if flags & Section.ALL_HWPOISON:
                    hwpoison = run.length
                elif flags & Section.SOME_HWPOISON:
                    hwpoison = sum(int(np.count_nonzero(pages)) for _, pages in self._hwpoison_flags(run))
            counts[kind, True] += hwpoison
            counts[kind, False] += run.length - hwpoison
        return {key: count for key, count in counts.items() if count}
