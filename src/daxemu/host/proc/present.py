"""Processes with pages of a file mapped or present, from /proc (the kernel's walk over i_mmap and page
tables).

Addresses are bytes, file positions pages. Processes that vanish during the walk, and processes that the
caller may not look into, are left out: the caller cannot signal either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from operator import attrgetter
from typing import NamedTuple

from daxemu.host import victims
from daxemu.host.proc import collect_in_c, in_time, maps, stat
from daxemu.host.proc.mapcount import all_found
from daxemu.host.proc.maps import Vma
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.processes import as_comm, comm_of, read_comm, read_threads
from daxemu.host.proc.procfs import GONE, pids
from daxemu.mm.memory_failure import PresentRun, Task, Thread
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SHIFT, Ino
from daxemu.units import PFN_PHYS

log = logging.getLogger(__name__)

_WHY = "a thread of the process holds mmap_lock in a page fault that another filesystem does not answer"
_LOOKS = 8  # at a process that keeps mapping and faulting

Wanted = Mapping[Ino, Sequence[Range]] | None
"""Page ranges by inode; None: any page of the device, and one run of each process is enough."""
PagesOf = Callable[[int, list[Vma], Wanted], Iterator[PresentRun]]


def collect_tasks(
    dev: tuple[int, int],
    wanted: Wanted,
    skip: frozenset[int] = frozenset(),
    pages_of: PagesOf | None = None,
    likely: Set[int] = frozenset(),
) -> list[Task]:
    """Return every process with a wanted page of a file on ``dev``, with the addresses.

    ``pages_of`` chooses presence (:func:`present_runs`, the default) or mapping (:func:`mapped_runs`). Of a
    process whose page tables cannot be read in time (``in_time``), each mapped page counts as present.
    Processes in ``likely`` come first: the kernel's count of mappings may prove that no other has the page.
    """
    pages_of = pages_of or present_runs
    everyone = [pid for pid in pids() if pid not in skip]
    found, are_all = _look_at_each([pid for pid in everyone if pid in likely], dev, wanted, pages_of)
    rest = [pid for pid in everyone if pid not in likely]
    # The proof costs as much as the search of the processes already found.
    if wanted is not None and pages_of is present_runs and are_all and len(found) < len(rest):
        everybody = all_found(found, wanted)
        rest = rest if everybody is None else everybody.living_in(rest)
    found += _look_at_each(rest, dev, wanted, pages_of)[0]
    return sorted(found, key=attrgetter("pid"))


def _look_at_each(
    pids: list[int], dev: tuple[int, int], wanted: Wanted, pages_of: PagesOf
) -> tuple[list[Task], bool]:
    """Return the processes with wanted pages, and whether the page tables of all processes could be read."""
    known = in_time.stuck()
    free, stuck = [pid for pid in pids if pid not in known], [pid for pid in pids if pid in known]
    tasks: list[Task] = []
    if not victims.MISSING:
        is_plain = wanted is not None and pages_of is present_runs
        looked, more = collect_in_c.collect(free, dev, wanted if wanted is not None and is_plain else {})
        stuck += more
        free = [found for found in looked if isinstance(found, int)]
        tasks += filter(None, (_as_task(found) for found in looked if not isinstance(found, int)))
    found, more = in_time.each_by(free, lambda pid: _look_at(pid, dev, wanted, pages_of))
    stuck += more
    mapping, unknown = in_time.each_by(stuck, lambda pid: _look_at(pid, dev, wanted, mapped_runs))
    for task in filter(None, mapping):
        log.warning("each mapped page of process %d (%s) counts as present: %s", task.pid, task.comm, _WHY)
    for pid in unknown:
        log.warning("no pages of process %d (%s) are known: %s", pid, comm_of(pid), _WHY)
    tasks += filter(None, (*found, *mapping))
    return tasks, not stuck


def _as_task(found: collect_in_c.Found) -> Task | None:
    """Return a process that C found; None if the process is gone."""
    try:
        # A single thread is the leader, whose flags C has read from stat.
        alone = found.nr_threads == 1
        threads = [Thread(found.pid, found.flags)] if alone else read_threads(found.pid)
        return Task(found.pid, as_comm(found.comm), tuple(threads), tuple(map(_present, found.runs)))
    except GONE:
        return None


def _present(run: collect_in_c.Run) -> PresentRun:
    area = Range(run.vma_start, run.vma_end)
    writable = bool(run.writable)
    return PresentRun(run.ino, run.first, run.nr_pages, run.address, PAGE_SHIFT, area, writable=writable)


def _look_at(pid: int, dev: tuple[int, int], wanted: Wanted, pages_of: PagesOf) -> Task | None:
    try:
        present = _settled(pid, dev, lambda vmas: pages_of(pid, vmas, wanted))
        if not present:
            return None
        return Task(pid, read_comm(pid), tuple(read_threads(pid)), present)
    except GONE:
        return None


def _settled(
    pid: int, dev: tuple[int, int], look: Callable[[list[Vma]], Iterable[PresentRun]]
) -> tuple[PresentRun, ...]:
    """Return the runs that ``look`` finds in the page tables at the addresses of the mappings.

    Mappings and page tables cannot be read in one step: a page present at an address may belong to a mapping
    made for a moment, or have moved away. For a process that keeps changing, return the runs found in each of
    several looks.
    """
    vmas, faults = list(maps.read(pid, dev)), _faults(pid)
    found: tuple[PresentRun, ...] = ()
    looks = []
    for _ in range(_LOOKS if vmas else 0):
        before, at_first = vmas, faults
        found = tuple(look(vmas))
        vmas, faults = list(maps.read(pid, dev)), _faults(pid)
        if vmas == before:
            if not found or faults == at_first:
                return found
            looks.append(found)
    return tuple(
        run
        for run in found
        if _is_shown(run, vmas) and all(any(_overlap(run, other) for other in each) for each in looks)
    )


def _faults(pid: int) -> tuple[bytes, bytes]:
    """Return the numbers of page faults of a process: without a fault, no page becomes present."""
    return stat.read(pid).faults


def _overlap(run: PresentRun, other: PresentRun) -> bool:
    same = Range(run.index, run.index + run.nr_pages).clip(other.index, other.index + other.nr_pages)
    return run.mapping == other.mapping and bool(same)


class Mapped(NamedTuple):
    """Mapping of a file of a mount: offset and length in bytes of the file."""

    pid: int
    comm: str
    ino: Ino
    offset: int
    length: int


def mapped_files(dev: tuple[int, int]) -> Iterator[Mapped]:
    """Yield every mapping of a file on ``dev``, of all processes that the caller may look into."""
    for pid in pids():
        try:
            vmas = list(maps.read(pid, dev))
            comm = read_comm(pid) if vmas else ""
        except GONE:
            continue
        for vma in vmas:
            yield Mapped(pid, comm, vma.ino, PFN_PHYS(vma.pgoff), vma.end - vma.start)


def mapped_runs(pid: int, vmas: list[Vma], wanted: Wanted) -> Iterator[PresentRun]:
    """Yield the wanted pages that are mapped, touched or not."""
    for vma, part in _wanted_parts(vmas, wanted):
        address = vma.address_of(part.start)
        yield PresentRun(
            vma.ino, part.start, part.length, address, PAGE_SHIFT, vma.area, writable=vma.writable
        )
        if wanted is None:
            return


def present_runs(pid: int, vmas: list[Vma], wanted: Wanted, *, copies: bool = False) -> Iterator[PresentRun]:
    """Yield the wanted pages in the page tables. A private copy of a page (CoW) does not count; with
    ``copies``, each run lists the wanted pages with private copies in the same mapping.
    """
    with Pagemap(pid) as pagemap:
        for vma, part in _wanted_parts(vmas, wanted):
            low, high = vma.addresses_of(part)
            own = pagemap.present_in(low, high, copies=True) if copies and vma.private else ()
            copied = tuple(vma.pages_at(run) for run in own)
            for run in pagemap.present_in(low, high):
                first, end = vma.pages_at(run)
                yield PresentRun(
                    vma.ino, first, end - first, run.start, PAGE_SHIFT, vma.area, copied, vma.writable
                )
                if wanted is None:
                    return


def _wanted_parts(vmas: list[Vma], wanted: Wanted) -> Iterator[tuple[Vma, Range]]:
    """Yield the wanted pages of each mapping, with the mapping."""
    for vma in vmas:
        for pages in [vma.pages] if wanted is None else wanted.get(vma.ino, ()):
            if part := pages.clip(*vma.pages):
                yield vma, part


def maps_still(task: Task, dev: tuple[int, int]) -> bool:
    """Return whether a process still maps the same pages of the same files at the addresses of
    ``task.present``.
    """
    try:
        vmas = list(maps.read(task.pid, dev))
    except GONE:
        return False
    return all(_is_shown(run, vmas) for run in task.present)


def _is_shown(run: PresentRun, vmas: Iterable[Vma]) -> bool:
    """Return whether the mappings show the first page of ``run`` at its address."""
    return any(
        vma.ino == run.mapping
        and vma.start <= run.address < vma.end
        and vma.page_at(run.address) == run.index
        for vma in vmas
    )
