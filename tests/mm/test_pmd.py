"""Failures where DAX would map by 2 MiB: tasks with a failed page present, and the pages to unmap."""

from __future__ import annotations

from dataclasses import replace

import pytest

from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.pmd import present_as_mapped, to_unmap
from daxemu.mm.to_kill import PresentRun, Task, Thread, collect_procs
from daxemu.ranges import Range
from daxemu.uapi import HPAGE_PMD_NR as NR
from daxemu.uapi import PAGE_SIZE, PF_MCE_EARLY, PF_MCE_PROCESS, PMD_SIZE

BASE = 0x7F00_0000_0000
INO = 7


def vma(pages: int, first: int = 0, base: int = BASE) -> Range:
    """Return the addresses of a mapping of pages from ``first`` on, with the file's page 0 at ``base``."""
    return Range(base + first * PAGE_SIZE, base + (first + pages) * PAGE_SIZE)


def touched(
    index: int, nr_pages: int = 1, *, area: Range, base: int = BASE, copies: tuple[Range, ...] = ()
) -> PresentRun:
    return PresentRun(INO, index, nr_pages, base + index * PAGE_SIZE, 12, area, copies)


def task(*present: PresentRun) -> Task:
    return Task(10, "p10", (Thread(10, PF_MCE_PROCESS | PF_MCE_EARLY),), present)


def incident(index: int, count: int = 1, pmds: tuple[Range, ...] = (Range(0, 2 * NR),)) -> Incident:
    return Incident(1, 5000 + index, count, 0, [MappingRange(INO, index, count, 5000 + index, pmds)])


def seen(failure: Incident, *present: PresentRun) -> list[tuple[int, int, int]]:
    """Return (first page, pages, shift) for each present run of the failure."""
    tasks = present_as_mapped(failure, [task(*present)])
    return [(run.index, run.nr_pages, run.shift) for each in tasks for run in each.present]


def test_one_present_page_makes_its_whole_pmd_present_and_no_other() -> None:
    area = vma(2 * NR)
    assert seen(incident(3), touched(511, area=area)) == [(3, 1, 21)]
    assert seen(incident(3), touched(512, area=area)) == []
    assert seen(incident(3), touched(3, area=area)) == [(3, 1, 21)]


def test_without_pmds_only_the_failed_page_itself_counts() -> None:
    area = vma(2 * NR)
    tasks = [task(touched(3, area=area))]
    assert present_as_mapped(incident(3, pmds=()), tasks) == tasks
    mixed = incident(3, pmds=(Range(NR, 2 * NR),))
    assert seen(mixed, touched(4, area=area)) == []
    assert seen(mixed, touched(2, 3, area=area)) == [(3, 1, 12)]


@pytest.mark.parametrize(
    "area",
    [
        pytest.param(vma(NR - 1), id="ends-early"),
        pytest.param(vma(NR - 1, first=1), id="begins-late"),
        pytest.param(vma(2 * NR, base=BASE + PAGE_SIZE), id="not-aligned"),
    ],
)
def test_a_mapping_without_room_for_a_pmd_maps_by_pages(area: Range) -> None:
    base = BASE + area.start % PMD_SIZE if area.length == PMD_SIZE * 2 else BASE
    assert seen(incident(3), touched(5, area=area, base=base)) == []
    assert seen(incident(3), touched(3, area=area, base=base)) == [(3, 1, 12)]


def test_pmds_are_clipped_to_the_mapping_not_to_the_file() -> None:
    area = vma(2 * NR - 1, first=1)
    assert seen(incident(3), touched(5, area=area)) == []
    assert seen(incident(NR + 3), touched(NR + 5, area=area)) == [(NR + 3, 1, 21)]


def test_a_private_copy_splits_its_pmd() -> None:
    area, copies = vma(2 * NR), (Range(9, 10),)
    assert seen(incident(3), touched(5, area=area, copies=copies)) == []
    assert seen(incident(3), touched(3, area=area, copies=copies)) == [(3, 1, 12)]
    assert seen(incident(NR + 3), touched(NR, area=area, copies=copies)) == [(NR + 3, 1, 21)]


def test_each_mapping_of_a_process_has_its_own_size_of_page() -> None:
    large, small = vma(NR), vma(8, base=BASE + 16 * PMD_SIZE)
    failure = incident(3)
    runs = [touched(100, area=large), touched(3, area=small, base=BASE + 16 * PMD_SIZE)]
    (to_kill,) = present_as_mapped(failure, [task(*runs)])
    assert [(run.address, run.shift) for run in to_kill.present] == [
        (large.start + 3 * PAGE_SIZE, 21),
        (small.start + 3 * PAGE_SIZE, 12),
    ]


def test_a_long_failure_is_one_run_for_each_stretch_of_one_page_size() -> None:
    failure = incident(100, 2 * NR, pmds=(Range(0, NR), Range(2 * NR, 3 * NR)))
    area = vma(3 * NR)
    present = [touched(0, area=area), touched(NR, 2, area=area), touched(2 * NR + 511, area=area)]
    assert seen(failure, *present) == [(100, NR - 100, 21), (NR, 2, 12), (2 * NR, 100, 21)]


def test_a_pmd_of_a_victim_is_unmapped_whole() -> None:
    failure = incident(NR + 3)
    tasks = present_as_mapped(failure, [task(touched(NR + 9, area=vma(2 * NR)))])
    to_kill = collect_procs(failure, tasks, early_kill=False)
    assert [(k.address, k.shift, k.pfn) for k in to_kill] == [
        (BASE + (NR + 3) * PAGE_SIZE, 21, 5000 + NR + 3)
    ]
    (whole,) = to_unmap(failure, to_kill).mappings
    assert (whole.index, whole.count, whole.pfn) == (NR, NR, 5000 + NR)
    assert to_unmap(failure, []) is failure


def test_a_victim_that_maps_by_pages_does_not_widen_the_range_to_unmap() -> None:
    failure = incident(3)
    tasks = present_as_mapped(failure, [task(touched(3, area=vma(8)))])
    to_kill = collect_procs(failure, tasks, early_kill=False)
    assert to_unmap(failure, to_kill) is failure


def test_the_pmd_of_another_file_sharing_the_page_is_not_unmapped() -> None:
    failure = incident(3)
    failure = replace(failure, mappings=[*failure.mappings, MappingRange(INO + 1, 40, 1, 5003)])
    tasks = present_as_mapped(failure, [task(touched(3, area=vma(NR)))])
    mappings = to_unmap(failure, collect_procs(failure, tasks, early_kill=False)).mappings
    assert [(m.mapping, m.index, m.count) for m in mappings] == [(INO, 0, NR), (INO + 1, 40, 1)]


def test_removal_returns_the_tasks_unchanged() -> None:
    tasks = [task(touched(3, area=vma(NR)))]
    assert present_as_mapped(Incident(1, 0, 9, 0, whole_device=True), tasks) == tasks
