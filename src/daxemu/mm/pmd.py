"""Pages mapped by 2 MiB: one entry of the page table for all of them, a PMD.

A mapping is one of the page cache here, page by page; that DAX would map it by PMDs is decided from where it
is. Counterparts in Linux: dax_fault_check_fallback() in fs/dax.c (fs/pmd_fault.py is the file's side of it),
dev_pagemap_mapping_shift() and unmap_and_kill() in mm/memory-failure.c. Indexes and counts are pages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.to_kill import PresentRun, Task, ToKill
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import HPAGE_PMD_NR, PAGE_SHIFT, PAGE_SIZE, PMD_SHIFT, PMD_SIZE, Ino


def hurt_as_mapped(incident: Incident, tasks: Sequence[Task]) -> list[Task]:
    """``tasks`` with the hurt pages that each has present, and by which size of page.

    They come with what they touched of all the 2 MiB that hurt pages are in: with one page of a PMD all are
    present. Those that have no hurt page present are left out.
    """
    if not any(hurt.pmds for hurt in incident.mappings):
        return list(tasks)
    mapped = ((task, [run for hurt in incident.mappings for run in _hurt(hurt, task)]) for task in tasks)
    return [
        replace(task, present=tuple(sorted(runs, key=lambda run: run.address)))
        for task, runs in mapped
        if runs
    ]


def _hurt(hurt: MappingRange, task: Task) -> Iterator[PresentRun]:
    pages = Range(hurt.index, hurt.index + hurt.count)
    by_vma: dict[Range, list[PresentRun]] = defaultdict(list)
    for run in task.present:
        if run.mapping == hurt.mapping:
            by_vma[run.vma].append(run)
    for vma, runs in by_vma.items():
        base = runs[0].address - runs[0].index * PAGE_SIZE
        pmds = _pmds_of(hurt, vma, base)
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


def _pmds_of(hurt: MappingRange, vma: Range, base: int) -> RangeSet:
    """The PMDs for which there is room in a mapping; page 0 of the file is, or would be, at ``base``."""
    pmds = RangeSet()
    if base % PMD_SIZE:
        return pmds
    inside = Range((vma.start - base) // PAGE_SIZE, (vma.end - base) // PAGE_SIZE).inner(HPAGE_PMD_NR)
    for part in hurt.pmds:
        pmds.add(*part.clip(*inside))
    return pmds


def to_unmap(incident: Incident, to_kill: Sequence[ToKill]) -> Incident:
    """``incident`` with all of the 2 MiB that somebody is told of as mapped by a PMD: it is unmapped as a
    whole, by everybody who maps the file.
    """
    large: dict[Ino, RangeSet] = defaultdict(RangeSet)
    for run in (run for victim in to_kill for run in victim.task.present if run.shift == PMD_SHIFT):
        large[run.mapping].add(*Range(run.index, run.index + run.nr_pages).outer(HPAGE_PMD_NR))
    if not large:
        return incident
    return replace(incident, mappings=[_widened(hurt, large[hurt.mapping]) for hurt in incident.mappings])


def _widened(hurt: MappingRange, large: RangeSet) -> MappingRange:
    pages = Range(hurt.index, hurt.index + hurt.count)
    for part in large.overlapping(*pages):
        whole = part.outer(HPAGE_PMD_NR)
        pages = Range(min(pages.start, whole.start), max(pages.end, whole.end))
    return replace(hurt, index=pages.start, count=pages.length, pfn=hurt.pfn - hurt.index + pages.start)
