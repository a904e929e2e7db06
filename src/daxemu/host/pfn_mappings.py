"""Victims of a failure of another driver's memory without struct pages (collect_procs_pfn() in
mm/memory-failure.c).

The search is by mapping, not by presence: a driver's remap_pfn_range() maps all pages at once, so every page
of such a mapping *is* present. Nothing is unmapped here: the files belong to another driver. Blocks: from a
worker thread only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from daxemu.host.proc.present import collect_tasks, mapped_runs
from daxemu.mm.incident import PfnMapping
from daxemu.mm.to_kill import ToKill, collect_procs_pfn
from daxemu.ranges import Range


def collect(mappings: Iterable[PfnMapping], *, early_kill: bool) -> list[ToKill]:
    """Return the victims of an incident's ``pfn_mappings``; never this process itself."""
    skip, victims = frozenset({os.getpid()}), []
    for failed in mappings:
        wanted = {failed.file.ino: [Range(failed.index, failed.index + failed.count)]}
        tasks = collect_tasks(failed.file.dev, wanted, skip, mapped_runs)
        victims += collect_procs_pfn(failed, tasks, early_kill=early_kill)
    return victims
