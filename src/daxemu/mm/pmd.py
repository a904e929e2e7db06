"""Huge pages: file ranges for which DAX would use one page-table entry of 2 MiB, a PMD.

In daxemu every mapping is a page-cache mapping of 4 KiB pages. The place of a mapping decides which pages DAX
would map by PMDs. Counterparts in Linux: dax_fault_check_fallback() in fs/dax.c (fs/pmd_fault.py is the
file's side of the check), dev_pagemap_mapping_shift() and unmap_and_kill() in mm/memory-failure.c. Indexes
and counts are pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.to_kill import PresentRun, Task, ToKill
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, Ino


def present_as_mapped(incident: Incident, tasks: Sequence[Task]) -> list[Task]:
    """Return ``tasks`` with the failed pages present in each task, and the size of page mapping each.

    Precondition: the tasks come with all present pages of each PMD with a failed page. If one page of a PMD
    is present, all are. Tasks without a present failed page are left out.
    """
    if not any(failed.pmds for failed in incident.mappings):
        return list(tasks)
    mapped = (
        (task, [run for failed in incident.mappings for run in _failed_runs(failed, task)]) for task in tasks
    )
    return [
        replace(task, present=tuple(sorted(runs, key=lambda run: run.address)))
        for task, runs in mapped
        if runs
    ]


def mapping_shift(incident: Incident, ino: Ino, index: int, address: int, vma: Range) -> int:
    """Return log2 of the size in bytes by which DAX maps a page of a shared mapping
    (``dev_pagemap_mapping_shift()``). ``address``: of the page; ``vma``: addresses of the mapping.
    """
    base = address - index * PAGE_SIZE
    for failed in incident.mappings:
        if failed.mapping == ino and index in _pmds_of(failed, vma, base):
            return PMD_SHIFT
    return PAGE_SHIFT


def _failed_runs(failed: MappingRange, task: Task) -> Iterator[PresentRun]:
    pages = Range(failed.index, failed.index + failed.count)
    by_vma: dict[Range, list[PresentRun]] = defaultdict(list)
    for run in task.present:
        if run.mapping == failed.mapping:
            by_vma[run.vma].append(run)
    for vma, runs in by_vma.items():
        base = runs[0].address - runs[0].index * PAGE_SIZE
        pmds = _pmds_of(failed, vma, base)
        for copy in (copy for run in runs for copy in run.copies):
            pmds.remove(*copy.outer(HPAGE_PMD_NR))
        small, large = RangeSet(), RangeSet()
        for run in runs:
            touched = Range(run.index, run.index + run.nr_pages)
            for part in pmds.overlapping(*touched):
                large.add(*part.outer(HPAGE_PMD_NR))
            for part in pmds.gaps(*touched):
                small.add(*part)
        for found, shift in ((small, PAGE_SHIFT), (large, PMD_SHIFT)):
            for part in found.overlapping(*pages):
                address = base + part.start * PAGE_SIZE
                yield replace(runs[0], index=part.start, nr_pages=part.length, address=address, shift=shift)


def _pmds_of(failed: MappingRange, vma: Range, base: int) -> RangeSet:
    """Return the PMDs for which a mapping has room.

    ``base``: the address that page 0 of the file has or would have.
    """
    pmds = RangeSet()
    if base % PMD_SIZE:
        return pmds
    inside = Range((vma.start - base) // PAGE_SIZE, (vma.end - base) // PAGE_SIZE).inner(HPAGE_PMD_NR)
    for part in failed.pmds:
        pmds.add(*part.clip(*inside))
    return pmds


def to_unmap(incident: Incident, to_kill: Sequence[ToKill]) -> Incident:
    """Return ``incident`` with each failed range widened to the PMDs mapped by victims.

    A PMD is unmapped as a whole, in every process with a mapping of the file.
    """
    large: dict[Ino, RangeSet] = defaultdict(RangeSet)
    for run in (run for victim in to_kill for run in victim.task.present if run.shift == PMD_SHIFT):
        large[run.mapping].add(*Range(run.index, run.index + run.nr_pages).outer(HPAGE_PMD_NR))
    if not large:
        return incident
    return replace(
        incident, mappings=[_widened(failed, large[failed.mapping]) for failed in incident.mappings]
    )


def _widened(failed: MappingRange, large: RangeSet) -> MappingRange:
    pages = Range(failed.index, failed.index + failed.count)
    for part in large.overlapping(*pages):
        whole = part.outer(HPAGE_PMD_NR)
        pages = Range(min(pages.start, whole.start), max(pages.end, whole.end))
    return replace(failed, index=pages.start, count=pages.length, pfn=failed.pfn - failed.index + pages.start)
