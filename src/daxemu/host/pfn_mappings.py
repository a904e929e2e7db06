"""Whom to tell of memory that has no struct pages and is another driver's (collect_procs_pfn() in
mm/memory-failure.c).

By mapping, not by presence: a driver's remap_pfn_range() maps all pages at once, so that there a mapping *is*
present. Nothing can be unmapped here: those are not our files. Blocks: from a worker thread only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from daxemu.host.proc.present import collect_tasks, mapped_runs
from daxemu.mm.incident import PfnMapping
from daxemu.mm.to_kill import ToKill, collect_procs_pfn
from daxemu.ranges import Range


def collect(mappings: Iterable[PfnMapping], *, early_kill: bool) -> list[ToKill]:
    """Whom to tell of an incident's ``pfn_mappings``; never this process itself."""
    skip, told = frozenset({os.getpid()}), []
    for hurt in mappings:
        wanted = {hurt.file.ino: [Range(hurt.index, hurt.index + hurt.count)]}
        tasks = collect_tasks(hurt.file.dev, wanted, skip, mapped_runs)
        told += collect_procs_pfn(hurt, tasks, early_kill=early_kill)
    return told
