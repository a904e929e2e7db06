"""Who maps memory that has no struct pages (collect_procs_pfn() in mm/memory-failure.c).

By mapping, not by presence: a driver's remap_pfn_range() maps all pages at once, so that there a mapping *is*
present. Blocks: from a worker thread only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from daxemu.host.tasks import read_comm, read_threads, read_vmas
from daxemu.mm.incident import PfnMapping
from daxemu.mm.to_kill import PresentRun, Task, ToKill, collect_procs_pfn
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SHIFT


def collect_mappers(hurt: PfnMapping, skip: frozenset[int] = frozenset()) -> list[Task]:
    """Every process with a mapping of pages of ``hurt``, and which pages each mapping shows.

    Those that vanish, or that we may not look into, are left out.
    """
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [task for pid in pids if pid not in skip and (task := _look_at(pid, hurt)) is not None]


def _look_at(pid: int, hurt: PfnMapping) -> Task | None:
    pages, runs = Range(hurt.index, hurt.index + hurt.count), []
    try:
        for vma in read_vmas(pid, hurt.file.dev):
            part = pages.clip(vma.pgoff, vma.pgoff + ((vma.end - vma.start) >> PAGE_SHIFT))
            if vma.ino == hurt.file.ino and part:
                address = vma.start + ((part.start - vma.pgoff) << PAGE_SHIFT)
                runs.append(PresentRun(vma.ino, part.start, part.length, address, PAGE_SHIFT))
        return Task(pid, read_comm(pid), tuple(read_threads(pid)), tuple(runs)) if runs else None
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def collect(mappings: Iterable[PfnMapping], *, early_kill: bool) -> list[ToKill]:
    """Whom to tell of an incident's ``pfn_mappings``; never this process itself."""
    skip = frozenset({os.getpid()})
    return [
        told
        for hurt in mappings
        for told in collect_procs_pfn(hurt, collect_mappers(hurt, skip), early_kill=early_kill)
    ]
