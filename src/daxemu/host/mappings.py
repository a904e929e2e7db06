"""Collecting and revoking: the one interface through which a failure reaches the mappings of real processes.

The first implementation is the FUSE page cache. Another one (direct mappings of the media under userfaultfd)
would stand behind the same Protocol.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Protocol

from daxemu.host.session import Session
from daxemu.host.tasks import collect_tasks, mapped_runs, maps_still, present_runs
from daxemu.mm.memory_failure import Incident, Task
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SHIFT, Ino


class Mappings(Protocol):
    """What the kernel does with rmap and page tables. Both calls block: from a worker thread only."""

    def collect(self, incident: Incident) -> list[Task]:
        """``collect_procs()``: the processes that have a page of the incident present, with where."""

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
        self._pages_of = mapped_runs if pfn_map else present_runs

    def collect(self, incident: Incident) -> list[Task]:
        """See Mappings.collect. Nothing is read of /proc when no file of the incident is open."""
        open_now = set(self._open_inodes())
        dev, skip = self._session.mount.dev, frozenset({os.getpid()})
        if incident.whole_device:
            return collect_tasks(dev, None, skip, self._pages_of) if open_now else []
        wanted: dict[Ino, list[Range]] = defaultdict(list)
        for hurt in incident.mappings:
            if hurt.mapping in open_now:
                wanted[hurt.mapping].append(Range(hurt.index, hurt.index + hurt.count))
        return collect_tasks(dev, wanted, skip, self._pages_of) if wanted else []

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
