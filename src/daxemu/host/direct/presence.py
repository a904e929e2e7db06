"""Presence: which processes have pages of files in their page tables, from the table and PAGEMAP_SCAN.

Counterpart in Linux: collect_procs_fsdax() in mm/memory-failure.c, which walks ``i_mmap``. The table replaces
the walk of /proc: the cost is in proportion to the mappings of the failed pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from daxemu.host.direct.table import Area, Space, Table
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.present import Mapped
from daxemu.host.proc.processes import comm_of, read_process
from daxemu.host.proc.procfs import GONE
from daxemu.mm.incident import Incident
from daxemu.mm.to_kill import PresentRun, Task, shared_out
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, Block, Ino
from daxemu.units import PFN_PHYS, PHYS_PFN


class AreaToScan(NamedTuple):
    """Addresses of an area to look at, and the file blocks there. A value for a worker thread.

    ``is_shown``: False for a lazy area, where no page of the file can be present.
    """

    tgid: int
    pid: int  # Space.pid
    ino: Ino
    block: Block
    addresses: Range
    area: Range
    is_shared: bool
    writable: bool

    def run(self, present: Range, copies: tuple[Range, ...]) -> PresentRun:
        """Return the present addresses as a run of the file."""
        index = self.block + PHYS_PFN(present.start - self.addresses.start)
        count = PHYS_PFN(present.length)
        return PresentRun(self.ino, index, count, present.start, PAGE_SHIFT, self.area, copies, self.writable)


class Presence:
    """Looks at page tables. The methods of the first part belong to the trio thread, the others to workers.

    ``pfn_map``: the memory has no struct pages, so each mapped page counts as present (VM_PFNMAP).
    """

    def __init__(self, table: Table, *, pfn_map: bool = False) -> None:
        self._table = table
        self._pfn_map = pfn_map
        self._remembered: list[tuple[int, PresentRun]] = []
        """Process and run of pages that were present when their media page was taken away."""

    # -- trio thread

    def seen(self, wanted: dict[Ino, RangeSet] | None) -> list[AreaToScan]:
        """Return the addresses that show wanted blocks; None: all blocks of all files."""
        files: Iterable[tuple[Ino, Iterable[Range]]] = (
            ((ino, [Range(0, 1 << 52)]) for ino in self._table.files()) if wanted is None else wanted.items()
        )
        return [
            _seen(area, addresses)
            for ino, ranges in files
            for blocks in ranges
            for area, addresses in self._table.mappers(ino, blocks)
        ]

    def remember(self, ino: Ino, blocks: Range) -> None:
        """Note which processes have file blocks present, before the media page is taken from all of them."""
        for seen in self.seen({ino: RangeSet([blocks])}):
            self._remembered += [(seen.tgid, run) for run in self._runs(seen, copies=False)]

    def take_remembered(self, wanted: dict[Ino, RangeSet] | None) -> list[tuple[int, PresentRun]]:
        """Return, and forget, what remember() has noted about wanted blocks."""

        def is_wanted(run: PresentRun) -> bool:
            if wanted is None:
                return True
            ranges = wanted.get(run.mapping)
            return ranges is not None and ranges.overlaps(run.index, run.index + run.nr_pages)

        taken = [(tgid, run) for tgid, run in self._remembered if is_wanted(run)]
        self._remembered = [(tgid, run) for tgid, run in self._remembered if not is_wanted(run)]
        return taken

    def still_maps(self, task: Task) -> bool:
        """Return whether a process maps the same blocks at the addresses of ``task.present``."""
        space = self._table.space_of(task.pid)
        if space is None:
            return False
        areas = [(run, space.at(run.address)) for run in task.present]
        return all(
            area is not None and area.ino == run.mapping and area.block_at(run.address) == run.index
            for run, area in areas
        )

    def mapped_files(self) -> list[Mapped]:
        """Return every mapping."""
        return [
            Mapped(space.tgid, comm_of(space.tgid), area.ino, PFN_PHYS(area.block), area.addresses.length)
            for space in self._table.spaces()
            for area in space.areas.values()
        ]

    # -- worker threads

    def tasks(
        self,
        seen: Sequence[AreaToScan],
        remembered: Sequence[tuple[int, PresentRun]],
        *,
        one: bool,
        copies: bool,
    ) -> list[Task]:
        """Return the processes with pages present at the addresses, sorted by process id.

        ``one``: a single run of each process is enough. ``copies``: each run lists the private copies of its
        mapping.
        """
        by_process: dict[int, list[AreaToScan]] = defaultdict(list)
        for each in seen:
            by_process[each.tgid].append(each)
        before: dict[int, list[PresentRun]] = defaultdict(list)
        for tgid, run in remembered:
            before[tgid].append(run)
        found = []
        for tgid in sorted({*by_process, *before}):
            runs = list(before[tgid])
            for each in by_process[tgid]:
                if one and runs:
                    break
                runs += self._runs(each, copies=copies)
            task = _task(tgid, runs)
            if task is not None:
                found.append(task)
        return found

    def _runs(self, seen: AreaToScan, *, copies: bool) -> Iterator[PresentRun]:
        """Yield the present pages. An address space that has ended has none."""
        if self._pfn_map:
            yield seen.run(seen.addresses, ())
            return
        try:
            with Pagemap(seen.pid) as pagemap:
                copied: tuple[Range, ...] = ()
                if copies and not seen.is_shared:
                    own = pagemap.present_in(*seen.addresses, copies=True)
                    copied = tuple(_blocks(seen, part) for part in own)
                for part in pagemap.present_in(*seen.addresses):
                    yield seen.run(part, copied)
        except GONE:
            return


def _seen(area: Area, addresses: Range) -> AreaToScan:
    space: Space = area.space
    writable = area.is_shared and bool(area.prot & 2)
    block = area.block_at(addresses.start)
    return AreaToScan(
        space.tgid, space.pid, area.ino, block, addresses, area.addresses, area.is_shared, writable
    )


def _blocks(seen: AreaToScan, part: Range) -> Range:
    base = seen.block - PHYS_PFN(seen.addresses.start)
    return Range(base + PHYS_PFN(part.start), base + PHYS_PFN(part.end))


def _task(tgid: int, runs: Sequence[PresentRun]) -> Task | None:
    if not runs:
        return None
    ordered = sorted(set(runs), key=lambda run: (run.address, run.nr_pages))
    try:
        comm, threads = read_process(tgid)
        return Task(tgid, comm, tuple(threads), tuple(ordered))
    except GONE:
        return None


def wanted_of(incidents: Sequence[Incident]) -> tuple[dict[Ino, RangeSet], list[list[tuple[Ino, Range]]]]:
    """Return the wanted blocks of each file, and for each incident the blocks that no earlier one has."""
    wanted: dict[Ino, RangeSet] = defaultdict(RangeSet)
    pages = [
        [
            (m.mapping, part)
            for m in incident.mappings
            for pages in m.around()
            for part in wanted[m.mapping].add(*pages)
        ]
        for incident in incidents
    ]
    return dict(wanted), pages


def collected(
    presence: Presence,
    incidents: Sequence[Incident],
    pages: Sequence[Sequence[tuple[Ino, Range]]],
    seen: Sequence[AreaToScan],
    remembered: Sequence[tuple[int, PresentRun]],
) -> list[list[Task]]:
    """``collect_procs()`` for each incident, see host.mappings. In a worker thread."""
    if any(incident.whole_device for incident in incidents):
        return [presence.tasks(seen, remembered, one=True, copies=False) for _ in incidents]
    pmds = any(m.pmds for incident in incidents for m in incident.mappings)
    return shared_out(presence.tasks(seen, remembered, one=False, copies=pmds), pages)
