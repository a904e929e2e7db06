"""Table of direct mappings: which addresses of which processes map which blocks of which files.

The supervisor makes every direct mapping, so the supervisor knows them without /proc. Counterpart in Linux:
the maple tree of an ``mm_struct`` (by address) and ``address_space.i_mmap`` (by file block).

Addresses are bytes, positions in files are blocks. A range of addresses consists of whole pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import trio
from sortedcontainers import SortedDict, SortedSet

from daxemu.errors import Unsupported
from daxemu.host.direct.agent import Agent
from daxemu.host.direct.locking import transferable
from daxemu.host.direct.userfaultfd import Userfaultfd
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.run import zone
from daxemu.ranges import IntervalIndex, Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Block, Ino
from daxemu.units import PFN_PHYS, PHYS_PFN, round_up

PROT_WRITE = 2


@dataclass(frozen=True, eq=False, slots=True)
class Area:
    """Mapping of consecutive blocks of a file (``struct vm_area_struct``).

    - ``space``: the address space.
    - ``ino``, ``block``: the file, and the file block at the first address.
    - ``prot``: PROT_READ, PROT_WRITE and PROT_EXEC of mmap(2).
    - ``is_shared``: MAP_SHARED. Stores through any other mapping are private copies.
    - ``may_write``: False for MAP_SHARED of a file that was opened without write access (VM_MAYWRITE).
    """

    space: Space
    addresses: Range
    ino: Ino
    block: Block
    prot: int
    is_shared: bool
    may_write: bool

    @property
    def blocks(self) -> Range:
        """The blocks of the file."""
        return Range(self.block, self.block + PHYS_PFN(self.addresses.length))

    def addresses_of(self, blocks: Range) -> Range:
        """Return the addresses of file blocks; empty (false) if no block is mapped here."""
        part = blocks.clip(*self.blocks)
        start = self.addresses.start + PFN_PHYS(part.start - self.block)
        return Range(start, start + PFN_PHYS(part.length)) if part else Range(start, start)

    def block_at(self, address: int) -> Block:
        """Return the file block at an address. Precondition: the address is inside."""
        return self.block + PHYS_PFN(address - self.addresses.start)

    def continues(self, other: Area) -> bool:
        """Return True if the areas are one area of consecutive addresses and blocks."""
        alike = (self.ino, self.prot, self.is_shared, self.may_write) == (
            other.ino,
            other.prot,
            other.is_shared,
            other.may_write,
        )
        first, last = (self, other) if self.addresses < other.addresses else (other, self)
        return alike and (first.addresses.end, first.blocks.end) == (last.addresses.start, last.block)

    def extended(self, end: int) -> Area:
        """Return the area with another last address."""
        addresses = Range(self.addresses.start, end)
        return Area(self.space, addresses, self.ino, self.block, self.prot, self.is_shared, self.may_write)

    def part(self, addresses: Range, *, prot: int | None = None) -> Area:
        """Return the area cut to ``addresses``, optionally with another protection."""
        return Area(
            self.space,
            addresses,
            self.ino,
            self.block_at(addresses.start),
            self.prot if prot is None else prot,
            self.is_shared,
            self.may_write,
        )


def nothing() -> None:
    """Do nothing."""


async def no_outside() -> None:
    """Refuse: the address space is in the zone alone."""
    raise Unsupported("no userfaultfd for mappings outside the zone")


@dataclass(eq=False, slots=True)
class Space:
    """Address space of one or more processes (``struct mm_struct``), with its agent and userfaultfd.

    Every address of an area is in one of three states:

    - *lazy*: anonymous memory without a page. A touch is an event of the userfaultfd.
    - *shown*: the address maps the media or the void file (beyond the end of the file), or has a page of
      zeros for a hole (``zeros``).
    - *copied*: a private copy of a hole, or of a block that the file may not have any more. The page tables
      alone know the copies of shown blocks.
    """

    agent: Agent
    uffd: Userfaultfd
    zone: Range
    """Addresses for the mappings of this mount."""
    scratch: Range
    """Addresses where a replacement of a mapping is prepared. The reserve is at the end (planner.RESERVE)."""
    outside: Userfaultfd = field(default_factory=Userfaultfd)
    """Userfaultfd of the areas outside the zone, with events of munmap(2)."""
    open_outside: Callable[[], Awaitable[None]] = no_outside
    """Opens ``outside``, if closed. Precondition: the caller holds ``lock``."""
    drain: Callable[[], None] = nothing
    """Takes the events of ``outside`` that have come."""
    read_events: Callable[[], None] = nothing
    """Takes the events of ``uffd`` and ``outside`` that have come."""
    expected: Counter[Range] = field(default_factory=Counter)
    """Addresses outside the zone that the agent unmaps at this moment: an event for each comes."""
    lock: trio.Semaphore = field(default_factory=transferable)
    """Held over each change of mappings, but for munmap(2) by the program outside the zone. Acquired after
    the lock of a file.
    """
    shown: RangeSet = field(default_factory=RangeSet)
    zeros: RangeSet = field(default_factory=RangeSet)
    copied: RangeSet = field(default_factory=RangeSet)
    pieces: SortedSet = field(default_factory=SortedSet)
    """First addresses of the shown pieces: as many VMAs, and up to as many lazy ones between."""
    unforked: RangeSet = field(default_factory=RangeSet)
    """Addresses that the child of a fork does not get (MADV_DONTFORK)."""
    refused: int = 0
    """Number of pieces by which the VMAs of the program make the room of the address space smaller."""
    has_reserve: bool = False
    locks: bool = False
    """True once the program has locked memory: a page fault may be of that call (populate)."""
    locks_future: bool = False
    """True if mmap(2) may lock new mappings (MCL_FUTURE), also those of the agent."""
    populates: bool = False
    """True if mmap(2) brings in the pages of new mappings (MCL_FUTURE without MCL_ONFAULT)."""
    is_gone: bool = False
    """True after the end of the address space."""
    areas: SortedDict = field(default_factory=SortedDict)
    """The areas, by first address. Only :class:`Table` changes the areas."""

    @property
    def tgid(self) -> int:
        """Process id of the program; 0 for the child of a fork that is not complete yet."""
        return self.agent.tgid

    @property
    def pid(self) -> int:
        """Process id under which /proc shows the address space: the agent, which outlives the leader of the
        program; the program until the agent of a fork's child has answered.
        """
        return self.agent.pid or self.tgid

    def at(self, address: int) -> Area | None:
        """Return the area with an address; None if the address is in none."""
        index = self.areas.bisect_right(address) - 1
        area: Area | None = self.areas.peekitem(index)[1] if index >= 0 else None
        return area if area is not None and address < area.addresses.end else None

    def overlapping(self, addresses: Range) -> list[Area]:
        """Return the areas that overlap ``addresses``, in order."""
        first = self.areas.bisect_right(addresses.start) - 1
        found = [self.areas.peekitem(first)[1]] if first >= 0 else []
        found += [self.areas[start] for start in self.areas.irange(*addresses, inclusive=(False, False))]
        return [area for area in found if area.addresses.clip(*addresses)]

    def parts(self, addresses: Range) -> list[Area]:
        """As :meth:`overlapping`, each area cut to ``addresses``."""
        return [area.part(area.addresses.clip(*addresses)) for area in self.overlapping(addresses)]

    def mapping(self, ino: Ino, blocks: Range) -> list[Range]:
        """Return the addresses that map any of ``blocks`` of a file."""
        areas = [area for area in self.areas.values() if area.ino == ino and area.blocks.clip(*blocks)]
        return [area.addresses_of(blocks) for area in areas]

    def covers(self, addresses: Range) -> bool:
        """Return True if every address is in an area."""
        return sum(part.addresses.length for part in self.parts(addresses)) == addresses.length

    def uffd_at(self, address: int) -> Userfaultfd:
        """Return the userfaultfd of the areas on this side of the zone's borders."""
        return self.uffd if zone.has(address) else self.outside

    def wake(self, addresses: Range) -> None:
        """Let the threads go on that wait for an answer to an event at ``addresses``."""
        self.uffd_at(addresses.start).wake(addresses.start, addresses.length)

    @property
    def is_free(self) -> bool:
        """Return True if no task has the lock."""
        return self.lock.value > 0

    def showing(self, addresses: Range, *, zeros: bool = False) -> None:
        """Note that ``addresses`` are shown from now on, as one piece or as a page of ``zeros``."""
        self.shown.add(*addresses)
        if zeros:
            self.zeros.add(*addresses)
        else:
            self.zeros.remove(*addresses)
            self.pieces.add(addresses.start)

    def showing_all(self, pieces: Sequence[Range]) -> None:
        """Note that new ``pieces`` are shown from now on. Precondition: none of them is shown, and they are
        in order.
        """
        whole = Range(0, 0)
        for piece in pieces:
            if whole and piece.start == whole.end:
                whole = Range(whole.start, piece.end)
                continue
            self.shown.add(*whole)
            whole = piece
        self.shown.add(*whole)
        self.pieces.update(piece.start for piece in pieces)

    def hiding(self, addresses: Range) -> None:
        """Note that ``addresses`` are no longer shown."""
        self.shown.remove(*addresses)
        self.zeros.remove(*addresses)
        first, last = map(self.pieces.bisect_left, addresses)
        del self.pieces[first:last]

    def free_place(self, length: int, alignment: int) -> int | None:
        """Return the start of ``length`` unused bytes of the zone, aligned; None without such a place.

        A page of distance stays between two mappings, so that an overrun is SIGSEGV.
        """
        last = next(self.areas.irange(*self.zone, inclusive=(True, False), reverse=True), None)
        at = self._aligned(None if last is None else self.areas[last].addresses.end, alignment)
        if at + length <= self.zone.end:
            return at
        before: int | None = None
        # The end of the zone is reached: the first gap that fits.
        for start in self.areas.irange(*self.zone, inclusive=(True, False)):
            at = self._aligned(before, alignment)
            if at + length + PAGE_SIZE <= start:
                return at
            before = self.areas[start].addresses.end
        return None

    def _aligned(self, end: int | None, alignment: int) -> int:
        at = self.zone.start if end is None else end + PAGE_SIZE
        return round_up(at, alignment)


def _stored_through(space: Space, addresses: Range) -> Iterator[Area]:
    """Yield the parts of areas that stores reach the file through."""
    for part in space.parts(addresses):
        # Outside the zone mprotect(2) is not seen.
        if (
            part.is_shared
            and part.may_write
            and (part.prot & PROT_WRITE or not zone.has(part.addresses.start))
        ):
            yield part


class Mapper(NamedTuple):
    """Addresses of an area that map some blocks of a file."""

    area: Area
    addresses: Range


def _first_block(area: Area) -> int:
    return area.block


def _length(area: Area) -> int:
    return PHYS_PFN(area.addresses.length)


class Table:
    """The areas of all address spaces, by address and by file block. Belongs to the trio thread.

    Invariants:
    - areas of one address space are disjoint;
    - the index of each file has exactly the areas of the file in all address spaces.
    """

    def __init__(
        self,
        on_first: Callable[[Ino], None] = lambda ino: None,
        on_last: Callable[[Ino], None] = lambda ino: None,
        on_stored: Callable[[Ino], None] = lambda ino: None,
    ) -> None:
        """``on_first`` is called with a file that is mapped from now on, ``on_last`` with a file that is no
        longer mapped, ``on_stored`` with a file that a program may have stored to: see :meth:`stored`.
        """
        self._on_stored = on_stored
        self._on_first, self._on_last = on_first, on_last
        self._files: dict[Ino, IntervalIndex[Area]] = {}
        self._spaces: dict[Space, None] = {}
        self._emptied: set[Ino] = set()
        """Files that lost an area since the last call of _tidy()."""

    # -- address spaces

    def space_of(self, tgid: int) -> Space | None:
        """Return the address space of a process; None if the process has no direct mapping."""
        return next((space for space in self._spaces if space.tgid == tgid), None)

    def spaces(self) -> list[Space]:
        """Return every address space."""
        return list(self._spaces)

    def add_space(self, space: Space) -> None:
        """Add an address space without areas."""
        self._spaces[space] = None

    def fork(self, parent: Space, child: Space) -> None:
        """Give ``child`` the areas of ``parent``, as fork(2) does."""
        for area in list(parent.areas.values()):
            for part in parent.unforked.gaps(*area.addresses):
                self.add(
                    Area(
                        child,
                        part,
                        area.ino,
                        area.block_at(part.start),
                        area.prot,
                        area.is_shared,
                        area.may_write,
                    )
                )
        child.shown, child.copied = parent.shown.copy(), parent.copied.copy()
        child.zeros, child.pieces = parent.zeros.copy(), SortedSet(parent.pieces)
        for part in parent.unforked:
            child.hiding(part)
            child.copied.remove(*part)
        child.refused, child.has_reserve = parent.refused, parent.has_reserve
        self.add_space(child)

    def drop_space(self, space: Space) -> None:
        """Remove an address space that has ended."""
        self.stored(space, Range(0, 1 << 64))
        space.is_gone = True
        self._cut(space, Range(0, 1 << 64))
        self._tidy()
        self._spaces.pop(space, None)

    # -- areas

    def add(self, area: Area) -> None:
        """Add an area, merged with areas that it continues (vma_merge()). Precondition: none of its addresses
        is in an area of the address space.
        """
        space = area.space
        for other in (space.at(area.addresses.start - 1), space.at(area.addresses.end)):
            if other is not None and area.continues(other):
                self._discard(other)
                first, last = sorted((area, other), key=lambda each: each.addresses)
                area = first.extended(last.addresses.end)
        space.areas[area.addresses.start] = area
        index = self._files.get(area.ino)
        if index is None:
            index = self._files[area.ino] = IntervalIndex(_first_block, _length)
            self._on_first(area.ino)
        index.add(area)

    def _discard(self, area: Area) -> None:
        del area.space.areas[area.addresses.start]
        self._files[area.ino].discard(area)
        self._emptied.add(area.ino)

    def remove(self, space: Space, addresses: Range) -> None:
        """Remove ``addresses`` from all areas, as munmap(2) does."""
        self._cut(space, addresses)
        space.hiding(addresses)
        space.copied.remove(*addresses)
        space.unforked.remove(*addresses)
        self._tidy()

    def stored(self, space: Space, addresses: Range, *, is_unmapped: bool = False) -> None:
        """Report the files that the program may have stored to at ``addresses``: the page tables do not tell
        a load from a store, so a file counts with a page present that can be stored to. ``is_unmapped``: the
        program has unmapped the addresses, so no page is present any more.
        """
        found: set[Ino] = set()
        with suppress(OSError), Pagemap(space.pid) as pagemap:  # without a process no page is present
            for part in _stored_through(space, addresses):
                if part.ino not in found and (is_unmapped or pagemap.has_present(*part.addresses)):
                    found.add(part.ino)
        for ino in found:
            self._on_stored(ino)

    def protect(self, space: Space, addresses: Range, prot: int) -> None:
        """Set the protection of all areas in ``addresses``, as mprotect(2) does."""
        for part in self._cut(space, addresses):
            self.add(part.part(part.addresses, prot=prot))

    def move(self, space: Space, addresses: Range, to: int) -> None:
        """Move the areas of ``addresses`` to ``to`` on, as mremap(2) does. Precondition: nothing is there."""
        delta = to - addresses.start
        sets = (space.shown, space.zeros, space.copied, space.unforked)
        found = [list(known.overlapping(*addresses)) for known in sets]
        pieces = list(space.pieces.irange(*addresses, inclusive=(True, False)))
        parts = self._cut(space, addresses)
        space.hiding(addresses)
        space.copied.remove(*addresses)
        space.unforked.remove(*addresses)
        for part in parts:
            moved = Range(part.addresses.start + delta, part.addresses.end + delta)
            self.add(Area(space, moved, part.ino, part.block, part.prot, part.is_shared, part.may_write))
        for known, ranges in zip(sets, found, strict=True):
            for start, end in ranges:
                known.add(start + delta, end + delta)
        space.pieces.update(start + delta for start in pieces)

    def _cut(self, space: Space, addresses: Range) -> list[Area]:
        """Remove ``addresses`` from all areas. Return the removed parts."""
        removed = []
        for area in space.overlapping(addresses):
            self._discard(area)
            part = area.addresses.clip(*addresses)
            removed.append(area.part(part))
            for rest in (Range(area.addresses.start, part.start), Range(part.end, area.addresses.end)):
                if rest:
                    self.add(area.part(rest))
        return removed

    def _tidy(self) -> None:
        """Forget the files without an area."""
        while self._emptied:
            ino = self._emptied.pop()
            if ino in self._files and not len(self._files[ino]):
                del self._files[ino]
                self._on_last(ino)

    # -- by file

    def files(self) -> list[Ino]:
        """Return the mapped files."""
        return [ino for ino, index in self._files.items() if len(index)]

    def is_mapped(self, ino: Ino) -> bool:
        """Return True if any process maps the file."""
        return ino in self._files

    def areas_of(self, ino: Ino) -> list[Area]:
        """Return all areas of a file."""
        return list(self._files.get(ino, ()))

    def mappers(self, ino: Ino, blocks: Range) -> list[Mapper]:
        """Return the addresses in all address spaces that map any of ``blocks``.

        The cost is in proportion to the areas found.
        """
        index = self._files.get(ino)
        if index is None:
            return []
        return [Mapper(area, area.addresses_of(blocks)) for area in index.overlapping(*blocks)]
