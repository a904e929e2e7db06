"""Who is told of a failure: the choice of processes and threads (mm/memory-failure.c, collect_procs and kin).

Decisions over values that ``host`` read off /proc. Addresses are bytes, indexes and counts are pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from daxemu.mm.incident import FileId, Incident, MappingRange, PfnMapping
from daxemu.ranges import IntervalIndex, Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, PF_EXITING, PF_KTHREAD, PF_MCE_EARLY, PF_MCE_PROCESS, Ino, Pfn

_NOWHERE = Range(0, 0)
_FEW = 8  # runs of pages that are sooner looked through than indexed


@dataclass(frozen=True)
class Thread:
    """One thread as /proc shows it: its id and its ``task->flags``."""

    tid: int
    flags: int


@dataclass(frozen=True)
class PresentRun:
    """Consecutive pages of one mapping that a process has present: ``nr_pages`` from ``address`` on, in its
    own space.

    ``vma``: the addresses of that mapping; ``copies``: pages of the file that it shows its own copy of.
    """

    mapping: Ino
    index: int
    nr_pages: int
    address: int
    shift: int
    vma: Range = _NOWHERE
    copies: tuple[Range, ...] = ()
    writable: bool = False
    """Stores through it reach the file."""


@dataclass(frozen=True)
class Task:
    """One process, with what it has present of an incident's ranges. ``threads`` in the kernel's order,
    leader first.
    """

    pid: int
    comm: str
    threads: tuple[Thread, ...]
    present: tuple[PresentRun, ...]


@dataclass(frozen=True)
class ToKill:
    """``struct to_kill``: which thread is told, and with what. ``file``: what it has mapped there, if that is
    no file of the mount. ``merges``: the SIGBUS before this entry is for the same thread and still pending.
    """

    task: Task
    tid: int
    address: int
    shift: int
    pfn: Pfn
    file: FileId | None = None
    merges: bool = False


_Overlapping = Callable[[int, int], list[PresentRun]]


def shared_out(tasks: Sequence[Task], hurt: Sequence[Sequence[tuple[Ino, Range]]]) -> list[list[Task]]:
    """For each failure, whose page ranges of files are in ``hurt``: the tasks that have some of them present,
    with just those.
    """
    present: list[tuple[Task, dict[Ino, _Overlapping]]] = []
    for task in tasks:
        by_file: dict[Ino, list[PresentRun]] = {}
        for run in task.present:
            by_file.setdefault(run.mapping, []).append(run)
        present.append((task, {ino: _overlapping(runs) for ino, runs in by_file.items()}))
    shares: list[list[Task]] = []
    for ranges in hurt:
        shares.append([])
        for task, there in present:
            mine = [cut(run, pages) for ino, pages in ranges if ino in there for run in there[ino](*pages)]
            if mine:
                share = tuple(sorted(mine, key=attrgetter("address")))
                shares[-1].append(task if share == task.present else replace(task, present=share))
    return shares


def _overlapping(runs: list[PresentRun]) -> _Overlapping:
    """Those of ``runs`` that overlap a range of pages, however many they are."""
    if len(runs) <= _FEW:
        return lambda start, end: [r for r in runs if r.index < end and start < r.index + r.nr_pages]
    index = IntervalIndex[PresentRun](attrgetter("index"), attrgetter("nr_pages"))
    index.update(runs)
    return index.overlapping


def cut(run: PresentRun, pages: Range) -> PresentRun:
    """The part of a run that shows these pages of the file."""
    if pages.start <= run.index and run.index + run.nr_pages <= pages.end:
        return run
    part = Range(run.index, run.index + run.nr_pages).clip(*pages)
    address = run.address + ((part.start - run.index) << PAGE_SHIFT)
    return replace(run, index=part.start, nr_pages=part.length, address=address)


def find_early_kill_thread(threads: Iterable[Thread], early_kill: bool) -> Thread | None:
    """The thread that wants to be told early: one that chose so, or by the sysctl the first that chose
    nothing.
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
    """``task_early_kill()``: the thread of ``task`` to tell now; the consumer itself (``force_tid``) always
    is.
    """
    if force_tid is not None:
        for thread in task.threads:
            if thread.tid == force_tid:
                return thread
    return find_early_kill_thread(task.threads, early_kill)


def collect_procs(
    incident: Incident, tasks: Sequence[Task], *, early_kill: bool, force_tid: int | None = None
) -> list[ToKill]:
    """``collect_procs_fsdax()``: who is told of ``incident``, each at the address in its own space.

    Entries are in the kernel's order. All entries of one thread for one file range merge with the first:
    kill_procs() queues them at once, and a standard signal that is pending is not queued again.

    Only present pages count. On removal everybody is told through the group leader, policy or not, and once:
    the whole device is one range, and a second SIGBUS would only be merged with the first. Of memory without
    struct pages everybody is told, too: see :func:`collect_procs_pfn`.
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
        to_kill += _of_task(incident, task, thread, runs)
    return to_kill


def _of_task(incident: Incident, task: Task, thread: Thread, runs: Sequence[PresentRun]) -> list[ToKill]:
    by_range: dict[MappingRange | None, list[PresentRun]] = {}
    for run in sorted(runs, key=_in_rmap_order):
        by_range.setdefault(_range_of(incident, run), []).append(run)
    return [
        ToKill(task, thread.tid, run.address, run.shift, _pfn_of(incident, hurt, run), merges=position > 0)
        for hurt, alike in by_range.items()
        for position, run in enumerate(alike)
    ]


def _in_rmap_order(run: PresentRun) -> tuple[Ino, int, int, int]:
    """Sort key: mf_dax_kill_procs() goes page by page, and through ``i_mmap`` by the first page of a mapping.

    Mappings from the same page on are in the order of their mmap(2). /proc does not show that order: mmap(2)
    chooses addresses downwards, so the higher address counts as the earlier mapping.
    """
    first = run.index - ((run.address - run.vma.start) >> PAGE_SHIFT)
    return run.mapping, run.index, first, -run.address


def spare(incident: Incident, tasks: Sequence[Task], pfns: RangeSet) -> list[Task]:
    """``tasks`` without what they have present of ``pfns``, which are as good as before."""
    good: dict[Ino, RangeSet] = {}
    for hurt in incident.mappings:
        for part in pfns.overlapping(hurt.pfn, hurt.pfn + hurt.count):
            start = hurt.index + part.start - hurt.pfn
            good.setdefault(hurt.mapping, RangeSet()).add(start, start + part.length)
    if not good:
        return list(tasks)
    return [
        replace(
            task,
            present=tuple(
                left
                for run in task.present
                for left in (without(run, good[run.mapping]) if run.mapping in good else [run])
            ),
        )
        for task in tasks
    ]


def without(run: PresentRun, pages: RangeSet) -> list[PresentRun]:
    """The parts of a run that show other pages of the file."""
    return [cut(run, part) for part in pages.gaps(run.index, run.index + run.nr_pages)]


def _first_alive(task: Task) -> Thread | None:
    return next((thread for thread in task.threads if not thread.flags & PF_EXITING), None)


def _range_of(incident: Incident, run: PresentRun) -> MappingRange | None:
    for hurt in incident.mappings:
        if hurt.mapping == run.mapping and hurt.index <= run.index < hurt.index + hurt.count:
            return hurt
    return None


def _pfn_of(incident: Incident, hurt: MappingRange | None, run: PresentRun) -> Pfn:
    return incident.pfn if hurt is None else hurt.pfn + (run.index - hurt.index)


def collect_procs_pfn(hurt: PfnMapping, tasks: Sequence[Task], *, early_kill: bool) -> list[ToKill]:
    """``collect_procs_pfn()``: everybody who maps ``hurt``, at its first page in each mapping of theirs.

    Policy only chooses the thread here: nothing can be put in such a page's place, so whoever maps it cannot
    do without knowing (``MF_MUST_KILL``). The kernel of 6.19 leaves late processes untold and lets the next
    access kill them; where that access cannot be made to fail, they would never learn of it.
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
                    hurt.pfn + run.index - hurt.index,
                    hurt.file,
                    merges=position > 0,
                )
                for position, run in enumerate(sorted(task.present, key=_in_rmap_order))
            ]
    return to_kill
