"""memory_failure() for device memory: whose page it was, who is told, how it ended (mm/memory-failure.c).

All of it is decisions over values; nothing here reads /proc, unmaps or signals. Addresses and offsets are
bytes, indexes and counts are pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from daxemu.errors import Busy, DaxemuError, NoDevice, Unsupported
from daxemu.events import Emit, MemoryFailureHandled, Outcome
from daxemu.mm.pagemap import DevPagemap
from daxemu.uapi import (
    MF_ACTION_REQUIRED,
    MF_MEM_PRE_REMOVE,
    PAGE_SIZE,
    PF_EXITING,
    PF_KTHREAD,
    PF_MCE_EARLY,
    PF_MCE_PROCESS,
    U64_MAX,
    Ino,
    Pfn,
)


@dataclass(frozen=True)
class MappingRange:
    """Pages ``[index, index + count)`` of the file ``mapping`` (its inode number), backed by pages from
    ``pfn`` on.
    """

    mapping: Ino
    index: int
    count: int
    pfn: Pfn


@dataclass(eq=False)
class Incident:
    """One failure between its discovery and its outcome: what ``host`` has to collect, unmap and signal."""

    serial: int
    pfn: Pfn
    nr_pages: int
    flags: int
    mappings: list[MappingRange] = field(default_factory=list)
    whole_device: bool = False
    error: DaxemuError | None = None

    @property
    def pre_remove(self) -> bool:
        return bool(self.flags & MF_MEM_PRE_REMOVE)


@dataclass(frozen=True)
class Thread:
    """One thread as /proc shows it: its id and its ``task->flags``."""

    tid: int
    flags: int


@dataclass(frozen=True)
class PresentRun:
    """Consecutive pages of one mapping that a process has present: ``nr_pages`` from ``address`` on, in its
    own space.
    """

    mapping: Ino
    index: int
    nr_pages: int
    address: int
    shift: int


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
    """``struct to_kill``: which thread is told, and with what."""

    task: Task
    tid: int
    address: int
    shift: int
    pfn: Pfn


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

    Only present pages count. On removal everybody is told through the group leader, policy or not, and once:
    the whole device is one range, and a second SIGBUS would only be merged with the first.
    """
    to_kill = []
    for task in tasks:
        if not task.present:
            continue
        if incident.pre_remove:
            thread = next((t for t in task.threads if not t.flags & PF_EXITING), None)
            runs: Sequence[PresentRun] = task.present[:1]
        else:
            thread = task_early_kill(task, early_kill=early_kill, force_tid=force_tid)
            runs = task.present
        if thread is None:
            continue
        to_kill += [ToKill(task, thread.tid, run.address, run.shift, _pfn_of(incident, run)) for run in runs]
    return to_kill


def _pfn_of(incident: Incident, run: PresentRun) -> Pfn:
    for hurt in incident.mappings:
        if hurt.mapping == run.mapping and hurt.index <= run.index < hurt.index + hurt.count:
            return hurt.pfn + (run.index - hurt.index)
    return incident.pfn


class MemoryFailures:
    """The machine's memory-failure state: its pagemaps, its sysctl, its counters.

    One object stands for what are global variables in the kernel, so that one process can hold several
    machines.
    """

    def __init__(self, emit: Emit) -> None:
        self.sysctl_early_kill = False
        self.counters: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._emit = emit
        self._pagemaps: list[DevPagemap] = []
        self._serial = itertools.count(1)
        self._current: Incident | None = None

    # -- dev_pagemap

    def memremap_pages(self, pgmap: DevPagemap) -> None:
        """Register a pagemap. Raises Busy (-EBUSY) if its ranges overlap one that is there."""
        for other in self._pagemaps:
            for mine, theirs in itertools.product(pgmap.ranges, other.ranges):
                if mine.clip(*theirs):
                    raise Busy(f"{pgmap.name}: pfns {mine.start:#x}-{mine.end:#x} belong to {other.name}")
        self._pagemaps.append(pgmap)

    def memunmap_pages(self, pgmap: DevPagemap) -> None:
        """Forget a pagemap."""
        self._pagemaps.remove(pgmap)

    def get_dev_pagemap(self, pfn: Pfn, nr_pages: int) -> Iterator[tuple[DevPagemap, Pfn, int]]:
        """The pagemaps that hold data pages of the range, each with its part of it."""
        for pgmap in self._pagemaps:
            for part in pgmap.pfn_valid(pfn, pfn + nr_pages):
                yield pgmap, part.start, part.length

    # -- the failure

    def memory_failure(self, pfn: Pfn, nr_pages: int, flags: int) -> Incident:
        """``memory_failure()`` for a range, up to the point where processes must be looked at.

        The owner of each part is called once. The incident returned says what ``host`` has to do, and
        ``error`` what the owner answered; it must be given to :meth:`action_result`. Raises NoDevice (-ENXIO)
        if no pagemap has any of it.
        """
        parts = list(self.get_dev_pagemap(pfn, nr_pages))
        if not parts:
            raise NoDevice(f"pfn {pfn:#x}+{nr_pages}: memory outside kernel control")
        incident = Incident(next(self._serial), pfn, nr_pages, flags)
        outer, self._current = self._current, incident
        try:
            for pgmap, start, count in parts:
                self._memory_failure_dev_pagemap(incident, pgmap, start, count)
        finally:
            self._current = outer
        return incident

    def _memory_failure_dev_pagemap(
        self, incident: Incident, pgmap: DevPagemap, pfn: Pfn, nr_pages: int
    ) -> None:
        try:
            if pgmap.ops is None:
                raise Unsupported(f"{pgmap.name}: no ->memory_failure")
            pgmap.ops.memory_failure(pgmap, pfn, nr_pages, incident.flags)
        except Unsupported:
            # mf_generic_kill_procs(): the page's own mapping. Nobody below knows of a file here, so there is
            # no mapping to look through and nobody to tell: the failure is handled by that.
            return
        except DaxemuError as error:
            incident.error = error

    def removal(self, pfn: Pfn, nr_pages: int) -> Incident:
        """The incident of a whole device that goes away; :meth:`mf_dax_kill_procs` then adds to it as
        always.
        """
        return Incident(next(self._serial), pfn, nr_pages, MF_MEM_PRE_REMOVE)

    def during(self, incident: Incident) -> _Current:
        """A context in which the holder's ``mf_dax_kill_procs`` calls belong to ``incident``."""
        return _Current(self, incident)

    def mf_dax_kill_procs(self, mapping: Ino, index: int, count: int, pfn: Pfn, flags: int) -> None:
        """The filesystem names a file range that is hurt; called from within its ``->notify_failure``.

        ``index`` and ``count`` are pages of the file, ``count`` up to U64_MAX (then every mapping of the
        device). Precondition: a failure is being handled.
        """
        if self._current is None:
            raise RuntimeError("mf_dax_kill_procs() outside of a memory failure")
        if count >= U64_MAX // PAGE_SIZE:
            self._current.whole_device = True
        else:
            self._current.mappings.append(MappingRange(mapping, index, count, pfn))

    def action_result(self, incident: Incident, told: int) -> Outcome:
        """``action_result()``: count it, log it. ``told`` processes were sent a signal."""
        outcome = Outcome.FAILED if incident.error is not None else Outcome.RECOVERED
        self.counters[outcome] += 1
        self._emit(
            MemoryFailureHandled(
                pfn=incident.pfn,
                nr_pages=incident.nr_pages,
                page_type="dax page",
                outcome=outcome,
                told=told,
                files=len({hurt.mapping for hurt in incident.mappings}),
                error=str(incident.error) if incident.error else None,
            )
        )
        return outcome

    def action_required(self, incident: Incident) -> bool:
        """Whether a thread consumed the poison, rather than somebody found it."""
        return bool(incident.flags & MF_ACTION_REQUIRED)


class _Current:
    """Sets the incident that ``mf_dax_kill_procs`` adds to."""

    def __init__(self, failures: MemoryFailures, incident: Incident) -> None:
        self._failures = failures
        self._incident = incident
        self._outer: Incident | None = None

    def __enter__(self) -> Incident:
        self._outer, self._failures._current = self._failures._current, self._incident
        return self._incident

    def __exit__(self, *exc: object) -> None:
        self._failures._current = self._outer
