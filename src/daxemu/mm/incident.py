"""A memory failure as a value: failed pages, drivers' answers, file ranges to unmap and signal.

Counterpart in Linux: the local variables of memory_failure() and mf_dax_kill_procs() in mm/memory-failure.c.
Indexes and counts are pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from daxemu.errors import DaxemuError
from daxemu.events import PageType
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import MF_MEM_PRE_REMOVE, Ino, Pfn


class FileId(NamedTuple):
    """File of any filesystem of the host (``struct address_space``): device (major, minor) and inode."""

    dev: tuple[int, int]
    ino: int


@dataclass(frozen=True)
class PfnMapping:
    """Pages ``[index, index + count)`` of ``file``, which map pfns from ``pfn`` on without struct pages."""

    file: FileId
    index: int
    count: int
    pfn: Pfn


@dataclass(frozen=True)
class Part:
    """Pages ``[pfn, pfn + nr_pages)`` of a failure that one driver handled, and the driver's error if any."""

    page_type: PageType
    pfn: Pfn
    nr_pages: int
    error: DaxemuError | None = None


@dataclass(frozen=True)
class MappingRange:
    """Pages ``[index, index + count)`` of the file ``mapping`` (an inode number), backed from ``pfn`` on.

    ``pmds``: page ranges of the file. Each consists of whole PMDs (2 MiB): each PMD holds a page of the
    range, and one page fault maps all of the PMD.
    """

    mapping: Ino
    index: int
    count: int
    pfn: Pfn
    pmds: tuple[Range, ...] = ()

    def around(self) -> list[Range]:
        """Return the page ranges to look up in page tables.

        A PMD with a failed page counts whole: if any page of the PMD is present, all pages are.
        """
        own = Range(self.index, self.index + self.count)
        return list(RangeSet([own, *self.pmds])) if self.pmds else [own]


@dataclass(frozen=True, eq=False)
class Incident:
    """A failure between discovery and outcome: the work for ``host``. A value.

    ``mappings`` and ``pfn_mappings`` are the file ranges to collect, unmap and signal. ``parts`` holds the
    pages handled by a driver. Pages of no driver are in no part.
    """

    serial: int
    pfn: Pfn
    nr_pages: int
    flags: int
    mappings: Sequence[MappingRange] = ()
    pfn_mappings: Sequence[PfnMapping] = ()
    whole_device: bool = False
    parts: Sequence[Part] = ()
    after_kill: Sequence[Callable[[], None]] = ()
    """Actions of the holder to run once every victim is signalled; see ``MemoryFailures.after_kill``."""

    @property
    def pre_remove(self) -> bool:
        return bool(self.flags & MF_MEM_PRE_REMOVE)

    @property
    def has_pfn_map(self) -> bool:
        """True if any page of the incident has no struct page."""
        return any(part.page_type is PageType.PFN_MAP for part in self.parts)

    @property
    def error(self) -> DaxemuError | None:
        """The error of the first part that has one; None if every part was handled."""
        return next((part.error for part in self.parts if part.error is not None), None)


@dataclass(eq=False)
class IncidentDraft:
    """An incident while the drivers are called. Fields as in Incident."""

    serial: int
    pfn: Pfn
    nr_pages: int
    flags: int
    mappings: list[MappingRange] = field(default_factory=list)
    pfn_mappings: list[PfnMapping] = field(default_factory=list)
    whole_device: bool = False
    parts: list[Part] = field(default_factory=list)
    after_kill: list[Callable[[], None]] = field(default_factory=list)

    def complete(self) -> Incident:
        """Return the incident."""
        return Incident(
            self.serial,
            self.pfn,
            self.nr_pages,
            self.flags,
            self.mappings,
            self.pfn_mappings,
            self.whole_device,
            self.parts,
            self.after_kill,
        )
