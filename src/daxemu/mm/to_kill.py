"""The victims of a failure: which processes and threads to signal (collect_procs() in mm/memory-failure.c).

Decisions over values read from /proc by ``host``. Addresses are bytes, indexes and counts are pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from daxemu.mm.incident import FileId, Incident, MappingRange, PfnMapping
from daxemu.ranges import IntervalIndex, Range, RangeSet
from daxemu.uapi import PF_EXITING, PF_KTHREAD, PF_MCE_EARLY, PF_MCE_PROCESS, Ino, Pfn
from daxemu.units import PFN_PHYS, PHYS_PFN

_NOWHERE = Range(0, 0)
_FEW = 8  # up to this number of runs, a linear search is faster than building an index


@dataclass(frozen=True)
class Thread:
    """A thread as /proc shows it: tid and ``task->flags``."""

    tid: int
    flags: int


@dataclass(frozen=True)
class PresentRun:
    """Consecutive present pages of one mapping of a process: ``nr_pages`` pages from ``address`` on.

    ``vma``: the addresses of the mapping. ``copies``: pages of the file that the mapping shows as private
    copies. ``shift``: log2 of the size of page, in bytes.
    """

    mapping: Ino
    index: int
    nr_pages: int
    address: int
    shift: int
    vma: Range = _NOWHERE
    copies: tuple[Range, ...] = ()
    writable: bool = False
    """True if stores through the mapping reach the file."""


@dataclass(frozen=True)
class Task:
    """A process with its present pages of an incident. ``threads`` in the kernel's order, leader first."""

    pid: int
    comm: str
    threads: tuple[Thread, ...]
    present: tuple[PresentRun, ...]


@dataclass(frozen=True)
class ToKill:
    """``struct to_kill``: the victim thread and the contents of the signal.

    ``file``: the mapped file, if outside the mount. ``merges``: a SIGBUS of an earlier entry is still pending
    for the same thread, so the kernel does not queue this SIGBUS.
    """

    task: Task
    tid: int
    address: int
    shift: int
    pfn: Pfn
    file: FileId | None = None
    merges: bool = False


_Overlapping = Callable[[int, int], list[PresentRun]]


def shared_out(tasks: Sequence[Task], failed: Sequence[Sequence[tuple[Ino, Range]]]) -> list[list[Task]]:
    """Return, for each failure, the tasks with its pages present. Each task has only these pages.

    ``failed``: for each failure, the page ranges of files.
    """
    present: list[tuple[Task, dict[Ino, _Overlapping]]] = []
    for task in tasks:
        by_file: dict[Ino, list[PresentRun]] = {}
        for run in task.present:
            by_file.setdefault(run.mapping, []).append(run)
        present.append((task, {ino: _overlapping(runs) for ino, runs in by_file.items()}))
    shares: list[list[Task]] = []
    for ranges in failed:
        shares.append([])
        for task, there in present:
            mine = [cut(run, pages) for ino, pages in ranges if ino in there for run in there[ino](*pages)]
            if mine:
                share = tuple(sorted(mine, key=attrgetter("address")))
                shares[-1].append(task if share == task.present else replace(task, present=share))
    return shares


def _overlapping(runs: list[PresentRun]) -> _Overlapping:
    """Return a function from a page range to the overlapping ``runs``. Many ``runs`` are indexed."""
    if len(runs) <= _FEW:
        return lambda start, end: [r for r in runs if r.index < end and start < r.index + r.nr_pages]
    index = IntervalIndex[PresentRun](attrgetter("index"), attrgetter("nr_pages"))
    index.update(runs)
    return index.overlapping


def cut(run: PresentRun, pages: Range) -> PresentRun:
    """Return the part of a run that shows ``pages`` of the file."""
    if pages.start <= run.index and run.index + run.nr_pages <= pages.end:
        return run
    part = Range(run.index, run.index + run.nr_pages).clip(*pages)
    address = run.address + PFN_PHYS(part.start - run.index)
    return replace(run, index=part.start, nr_pages=part.length, address=address)


def find_early_kill_thread(threads: Iterable[Thread], early_kill: bool) -> Thread | None:
    """Return the first thread to signal early, or None.

    - A thread with the early-kill policy of prctl(2) qualifies.
    - With the sysctl ``early_kill``, a thread without a policy qualifies, too.
    - Exiting threads and kernel threads never qualify.
    """
    for thread in threads:
        if thread.flags & (PF_EXITING | PF_KTHREAD):
            continue
        if thread.flags & PF_MCE_PROCESS:
            if thread.flags & PF_MCE_EARLY:
                return thread
        elif early_kill:
            return thread
    return None


def task_early_kill(task: Task, *, early_kill: bool, force_tid: int | None = None) -> Thread | None:
    """``task_early_kill()``: return the victim thread of ``task``, or None.

    The consumer (``force_tid``) is a victim whatever its policy.
    """
    if force_tid is not None:
        for thread in task.threads:
            if thread.tid == force_tid:
                return thread
    return find_early_kill_thread(task.threads, early_kill)


def collect_procs(
    incident: Incident, tasks: Sequence[Task], *, early_kill: bool, force_tid: int | None = None
) -> list[ToKill]:
    """``collect_procs_fsdax()``: choose the victims of ``incident``, each with the address in its own space.

    Entries are in the kernel's order. All entries of one thread for one file range merge with the first:
    kill_procs() queues all at once, and the kernel does not queue a standard signal twice.

    Only present pages count. On removal every process with a present page is signalled once, through the
    first living thread, whatever the policy: the whole device is one range, and a second SIGBUS would merge
    with the first. Every process with a mapping of failed memory without struct pages is signalled, too: see
    :func:`collect_procs_pfn`.
    """
    to_kill = []
    for task in tasks:
        if not task.present:
            continue
        if incident.pre_remove:
            thread = _first_alive(task)
            runs: Sequence[PresentRun] = task.present[:1]
        else:
            thread = task_early_kill(task, early_kill=early_kill, force_tid=force_tid)
            if thread is None and incident.has_pfn_map:
                thread = _first_alive(task)
            runs = task.present
        if thread is None:
            continue
        to_kill += _of_task(incident, task, thread.tid, runs)
    return to_kill


def _of_task(incident: Incident, task: Task, tid: int, runs: Sequence[PresentRun]) -> list[ToKill]:
    by_range: dict[MappingRange | None, list[PresentRun]] = {}
    for run in sorted(runs, key=_in_rmap_order):
        by_range.setdefault(_range_of(incident, run), []).append(run)
    return [
        ToKill(task, tid, run.address, run.shift, _pfn_of(incident, failed, run), merges=position > 0)
        for failed, alike in by_range.items()
        for position, run in enumerate(alike)
    ]


def _in_rmap_order(run: PresentRun) -> tuple[Ino, int, int, int]:
    """Return the sort key for the order in which mf_dax_kill_procs() signals.

    The kernel goes page by page, and through ``i_mmap`` by the first page of a mapping. Mappings with the
    same first page are in the order of mmap(2). /proc does not show this order: mmap(2) chooses addresses
    downwards, so the higher address counts as the earlier mapping.
    """
    first = run.index - PHYS_PFN(run.address - run.vma.start)
    return run.mapping, run.index, first, -run.address


def spare(incident: Incident, to_kill: Sequence[ToKill], pfns: RangeSet) -> list[ToKill]:
    """Return the victims that are left once the data of ``pfns`` was recovered.

    A victim with further failed pages present gets the address of the first of these instead. Precondition:
    ``to_kill`` is what :func:`collect_procs` returned for ``incident``, and the incident is no removal.
    """
    recovered: dict[Ino, RangeSet] = {}
    for failed in incident.mappings:
        for part in pfns.overlapping(failed.pfn, failed.pfn + failed.count):
            start = failed.index + part.start - failed.pfn
            recovered.setdefault(failed.mapping, RangeSet()).add(start, start + part.length)
    if not recovered:
        return list(to_kill)
    left: list[ToKill] = []
    for victim in {id(victim.task): victim for victim in to_kill}.values():
        runs = [
            part
            for run in victim.task.present
            for part in (without(run, recovered[run.mapping]) if run.mapping in recovered else [run])
        ]
        task = replace(victim.task, present=tuple(runs))
        left += _of_task(incident, task, victim.tid, runs)
    return left


def without(run: PresentRun, pages: RangeSet) -> list[PresentRun]:
    """Return the parts of a run that show pages outside ``pages``."""
    return [cut(run, part) for part in pages.gaps(run.index, run.index + run.nr_pages)]


def _first_alive(task: Task) -> Thread | None:
    return next((thread for thread in task.threads if not thread.flags & PF_EXITING), None)


def _range_of(incident: Incident, run: PresentRun) -> MappingRange | None:
    for failed in incident.mappings:
        if failed.mapping == run.mapping and failed.index <= run.index < failed.index + failed.count:
            return failed
    return None


def _pfn_of(incident: Incident, failed: MappingRange | None, run: PresentRun) -> Pfn:
    return incident.pfn if failed is None else failed.pfn + (run.index - failed.index)


def collect_procs_pfn(failed: PfnMapping, tasks: Sequence[Task], *, early_kill: bool) -> list[ToKill]:
    """``collect_procs_pfn()``: signal every process with ``failed`` mapped.

    The address is the first failed page of each mapping. Policy only chooses the thread. The kernel cannot
    replace a page without a struct page, so a victim must be signalled (``MF_MUST_KILL``). The kernel of 6.19
    does not signal late-kill processes, and kills each at the next access. In daxemu the access cannot always
    be made to fail, and the process would never learn of the failure.
    """
    to_kill = []
    for task in tasks:
        thread = task_early_kill(task, early_kill=early_kill) or _first_alive(task)
        if thread is not None:
            to_kill += [
                ToKill(
                    task,
                    thread.tid,
                    run.address,
                    run.shift,
                    failed.pfn + run.index - failed.index,
                    failed.file,
                    merges=position > 0,
                )
                for position, run in enumerate(sorted(task.present, key=_in_rmap_order))
            ]
    return to_kill
