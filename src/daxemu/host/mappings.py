"""Collecting and revoking: the one interface through which a failure reaches the mappings of real processes.

The first implementation is the FUSE page cache. Another one (direct mappings of the media under userfaultfd)
would stand behind the same Protocol.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

from daxemu.host.fuse.session import Session
from daxemu.host.proc.present import PagesOf, collect_tasks, mapped_runs, maps_still, present_runs
from daxemu.mm.memory_failure import Incident, Task
from daxemu.mm.to_kill import shared_out
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, Ino


class Mappings(Protocol):
    """What the kernel does with rmap and page tables. Both calls block: from a worker thread only."""

    @property
    def dev(self) -> tuple[int, int]:
        """The device (major, minor) that /proc shows the files to be on."""

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """``collect_procs()`` for each incident: the processes that have a page of it, or of PMDs around it,
        present, with where.

        A page that two incidents have is the first one's: it would be gone when the second looked. Removal
        comes alone, and so does what has PMDs.
        """

    def still_mapped(self, task: Task) -> bool:
        """Whether a process still has mapped, at the same addresses, what it had present once."""

    def revoke(self, incident: Incident) -> None:
        """``unmap_mapping_range()`` for every file range of the incident: the next touch of each faults."""


class PageCacheMappings:
    """Mappings of files on a FUSE mount, which are mappings of the kernel's page cache.

    ``open_inodes`` gives the inodes that anybody has open; only those can be mapped. Called in the worker
    thread. ``pfn_map``: the memory has no struct pages; who maps it then has all of it present (VM_PFNMAP).
    """

    def __init__(
        self, session: Session, open_inodes: Callable[[], Iterable[Ino]], *, pfn_map: bool = False
    ) -> None:
        self._session = session
        self._open_inodes = open_inodes
        self._pages_of: PagesOf = mapped_runs if pfn_map else present_runs
        self._likely: set[int] = set()
        """Processes that had something mapped at the last failure: likely to have it at the next."""

    @property
    def dev(self) -> tuple[int, int]:
        """See Mappings.dev."""
        return self._session.mount.dev

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """See Mappings.collect. One look at /proc for all; none when no file of them is open."""
        open_now = set(self._open_inodes())
        dev, skip = self._session.mount.dev, frozenset({os.getpid()})
        if any(incident.whole_device for incident in incidents):
            return [collect_tasks(dev, None, skip, self._pages_of) if open_now else [] for _ in incidents]
        wanted: dict[Ino, RangeSet] = defaultdict(RangeSet)
        hurt: list[list[tuple[Ino, Range]]] = [
            [
                (m.mapping, part)
                for m in incident.mappings
                if m.mapping in open_now
                for pages in m.around()
                for part in wanted[m.mapping].add(*pages)
            ]
            for incident in incidents
        ]
        if not wanted:
            return [[] for _ in incidents]
        pages_of = self._pages_of
        if pages_of is present_runs and any(m.pmds for incident in incidents for m in incident.mappings):
            pages_of = partial(present_runs, copies=True)
        ranges = {ino: list(pages) for ino, pages in wanted.items()}
        tasks = collect_tasks(dev, ranges, skip, pages_of, self._likely)
        self._likely = {task.pid for task in tasks}
        return shared_out(tasks, hurt)

    def still_mapped(self, task: Task) -> bool:
        """See Mappings.still_mapped."""
        return maps_still(task, self._session.mount.dev)

    def revoke(self, incident: Incident) -> None:
        """See Mappings.revoke. One notification a file range; one a file when the whole device goes."""
        if incident.whole_device:
            for ino in set(self._open_inodes()):
                self._session.revoke(ino, 0, 0)
            return
        for hurt in incident.mappings:
            self._session.revoke(hurt.mapping, hurt.index << PAGE_SHIFT, hurt.count << PAGE_SHIFT)
