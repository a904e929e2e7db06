"""Processes that had pages of latent poison present, remembered until the discovery of the poison.

On hardware the pages stay mapped until a load consumes the poison, and the processes are signalled then.
daxemu revokes the pages at the injection, so that the load is a page fault, and remembers the processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from daxemu.mm.incident import Incident
from daxemu.mm.to_kill import PresentRun, Task, cut, without
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT
from daxemu.units import PFN_PHYS, PHYS_PFN


class Latent:
    """Tasks with their present pages at the time of the revoke. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []

    def add(self, tasks: Iterable[Task]) -> None:
        """Remember ``tasks``. Pages of the same process that were remembered at other addresses stay."""
        for task in tasks:
            again = RangeSet(_addresses(run) for run in task.present)
            self._tasks = [_less(old, again) if old.pid == task.pid else old for old in self._tasks]
            self._tasks.append(task)
        self._tasks = [task for task in self._tasks if task.present]

    def of(self, incident: Incident) -> list[Task]:
        """Return the tasks with pages of ``incident``, each with only these pages. A PMD counts whole."""
        return [
            replace(task, present=inside) for task in self._tasks if (inside := _split(task, incident)[0])
        ]

    def take(self, incident: Incident) -> list[Task]:
        """Return the tasks of :meth:`of`, and forget the pages of ``incident``."""
        taken = self.of(incident)
        outside = (replace(task, present=_split(task, incident)[1]) for task in self._tasks)
        self._tasks = [task for task in outside if task.present]
        return taken


def _split(task: Task, incident: Incident) -> tuple[tuple[PresentRun, ...], tuple[PresentRun, ...]]:
    """Return the runs of a task inside an incident, and the runs outside."""
    inside: list[PresentRun] = []
    outside: list[PresentRun] = []
    for run in task.present:
        pages = Range(run.index, run.index + run.nr_pages)
        failed = RangeSet(
            part
            for m in incident.mappings
            if m.mapping == run.mapping and (part := pages.clip(m.index, m.index + m.count))
        )
        if run.shift != PAGE_SHIFT:
            (inside if failed else outside).append(run)
            continue
        inside += [cut(run, part) for part in failed]
        outside += without(run, failed)
    return tuple(inside), tuple(outside)


def _addresses(run: PresentRun) -> Range:
    return Range(run.address, run.address + PFN_PHYS(run.nr_pages))


def _less(task: Task, addresses: RangeSet) -> Task:
    kept = [
        cut(run, Range(index, index + PHYS_PFN(part.length)))
        for run in task.present
        for part in addresses.gaps(*_addresses(run))
        for index in [run.index + PHYS_PFN(part.start - run.address)]
    ]
    return replace(task, present=tuple(kept))
