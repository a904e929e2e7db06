"""One memory failure as a value: which pages, who handled them, whom to collect, unmap and signal.

Counterpart in Linux: the local variables of memory_failure() and mf_dax_kill_procs() in mm/memory-failure.c.
Indexes and counts are pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from daxemu.errors import DaxemuError
from daxemu.events import PageType
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import MF_MEM_PRE_REMOVE, Ino, Pfn


class FileId(NamedTuple):
    """A file anywhere on the host (``struct address_space``): its device (major, minor) and inode."""

    dev: tuple[int, int]
    ino: int


@dataclass(frozen=True)
class PfnMapping:
    """Pages ``[index, index + count)`` of ``file`` show pages from ``pfn`` on that have no struct pages."""

    file: FileId
    index: int
    count: int
    pfn: Pfn


@dataclass
class Part:
    """The pages of a failure that one kind of owner handled, and what went wrong there."""

    page_type: PageType
    pfn: Pfn
    nr_pages: int
    error: DaxemuError | None = None


@dataclass(frozen=True)
class MappingRange:
    """Pages ``[index, index + count)`` of the file ``mapping`` (its inode number), backed by pages from
    ``pfn`` on.

    ``pmds``: the whole 2 MiB of the file that hold any of them and that a fault maps at once, as page ranges.
    """

    mapping: Ino
    index: int
    count: int
    pfn: Pfn
    pmds: tuple[Range, ...] = ()

    def around(self) -> list[Range]:
        """The pages that say, when present, that one of the range is: those of its PMDs, too."""
        own = Range(self.index, self.index + self.count)
        return list(RangeSet([own, *self.pmds])) if self.pmds else [own]


@dataclass(eq=False)
class Incident:
    """One failure between its discovery and its outcome: what ``host`` has to collect, unmap and signal.

    ``parts`` says who handled which of its pages; none of them are pages that nobody has.
    """

    serial: int
    pfn: Pfn
    nr_pages: int
    flags: int
    mappings: list[MappingRange] = field(default_factory=list)
    pfn_mappings: list[PfnMapping] = field(default_factory=list)
    whole_device: bool = False
    parts: list[Part] = field(default_factory=list)
    spared: RangeSet | None = None
    """The pfns that a repair strategy made as good as before; None as long as none was asked."""
    after_kill: list[Callable[[], None]] = field(default_factory=list)
    """What the holder does once every victim is signalled; see ``MemoryFailures.after_kill``."""

    @property
    def pre_remove(self) -> bool:
        return bool(self.flags & MF_MEM_PRE_REMOVE)

    @property
    def has_pfn_map(self) -> bool:
        """Whether any of its pages have no struct pages."""
        return any(part.page_type is PageType.PFN_MAP for part in self.parts)

    @property
    def error(self) -> DaxemuError | None:
        """What went wrong first; None if every part was handled."""
        return next((part.error for part in self.parts if part.error is not None), None)
