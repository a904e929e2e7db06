"""Mappings of the kernel's page cache: the first implementation of the seam (host/mappings)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from daxemu.host.fuse.session import Session
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.present import PagesOf, collect_tasks, mapped_runs, maps_still, present_runs
from daxemu.mm.memory_failure import Incident, Task
from daxemu.mm.to_kill import shared_out
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SHIFT, Ino


class PageCacheMappings:
    """Mappings of files on a FUSE mount, which are mappings of the kernel's page cache.

    ``open_inodes`` gives the inodes with open handles, and is called in the worker thread: only open inodes
    can be mapped. ``pfn_map``: the memory has no struct pages, so all pages of a mapping are present
    (VM_PFNMAP).
    """

    def __init__(
        self, session: Session, open_inodes: Callable[[], Iterable[Ino]], *, pfn_map: bool = False
    ) -> None:
        self._session = session
        self._open_inodes = open_inodes
        self._pages_of: PagesOf = mapped_runs if pfn_map else present_runs
        self._likely: set[int] = set()
        """Process ids found by the last collection: likely victims of the next failure."""

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """See Mappings.collect. One walk of /proc serves all incidents; none if no file of them is open."""
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

    def file_page(self, ino: Ino, index: int) -> FilePage:
        """See Mappings.file_page."""
        return FilePage(*self._session.mount.dev, ino, index)

    def still_mapped(self, task: Task) -> bool:
        """See Mappings.still_mapped."""
        return maps_still(task, self._session.mount.dev)

    def revoke(self, incident: Incident) -> None:
        """See Mappings.revoke. One notification for each file range."""
        for hurt in incident.mappings:
            self._session.revoke(hurt.mapping, hurt.index << PAGE_SHIFT, hurt.count << PAGE_SHIFT)

    def revoke_all(self) -> None:
        """See Mappings.revoke_all. One notification for each open file."""
        for ino in set(self._open_inodes()):
            self._session.revoke(ino, 0, 0)
