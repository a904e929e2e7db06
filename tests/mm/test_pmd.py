"""Who has a hurt page present where DAX would map by 2 MiB, and what is unmapped then."""

from __future__ import annotations

import pytest

from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.pmd import hurt_as_mapped, to_unmap
from daxemu.mm.to_kill import PresentRun, Task, Thread, collect_procs
from daxemu.ranges import Range
from daxemu.uapi import HPAGE_PMD_NR as NR
from daxemu.uapi import PAGE_SIZE, PF_MCE_EARLY, PF_MCE_PROCESS, PMD_SIZE

BASE = 0x7F00_0000_0000
INO = 7


def vma(pages: int, first: int = 0, base: int = BASE) -> Range:
    """A mapping of pages from ``first`` on, with the file's page 0 at ``base``."""
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
    """(first page, pages, shift) of what is present of the failure."""
    tasks = hurt_as_mapped(failure, [task(*present)])
    return [(run.index, run.nr_pages, run.shift) for each in tasks for run in each.present]


def test_a_touched_page_makes_all_of_its_2_mib_present_and_no_other() -> None:
    area = vma(2 * NR)
    assert seen(incident(3), touched(511, area=area)) == [(3, 1, 21)]
    assert seen(incident(3), touched(512, area=area)) == []
    assert seen(incident(3), touched(3, area=area)) == [(3, 1, 21)]


def test_without_2_mib_pages_only_the_page_itself_counts() -> None:
    area = vma(2 * NR)
    tasks = [task(touched(3, area=area))]
    assert hurt_as_mapped(incident(3, pmds=()), tasks) == tasks
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
def test_a_mapping_without_room_for_the_whole_2_mib_is_by_pages(area: Range) -> None:
    base = BASE + area.start % PMD_SIZE if area.length == PMD_SIZE * 2 else BASE
    assert seen(incident(3), touched(5, area=area, base=base)) == []
    assert seen(incident(3), touched(3, area=area, base=base)) == [(3, 1, 12)]


def test_room_counts_from_the_mapping_not_from_the_file() -> None:
    area = vma(2 * NR - 1, first=1)
    assert seen(incident(3), touched(5, area=area)) == []
    assert seen(incident(NR + 3), touched(NR + 5, area=area)) == [(NR + 3, 1, 21)]


def test_a_private_copy_splits_its_2_mib() -> None:
    area, copies = vma(2 * NR), (Range(9, 10),)
    assert seen(incident(3), touched(5, area=area, copies=copies)) == []
    assert seen(incident(3), touched(3, area=area, copies=copies)) == [(3, 1, 12)]
    assert seen(incident(NR + 3), touched(NR, area=area, copies=copies)) == [(NR + 3, 1, 21)]


def test_each_mapping_for_itself() -> None:
    large, small = vma(NR), vma(8, base=BASE + 16 * PMD_SIZE)
    failure = incident(3)
    runs = [touched(100, area=large), touched(3, area=small, base=BASE + 16 * PMD_SIZE)]
    (told,) = hurt_as_mapped(failure, [task(*runs)])
    assert [(run.address, run.shift) for run in told.present] == [
        (large.start + 3 * PAGE_SIZE, 21),
        (small.start + 3 * PAGE_SIZE, 12),
    ]


def test_a_long_failure_is_one_run_for_each_size_of_page() -> None:
    failure = incident(100, 2 * NR, pmds=(Range(0, NR), Range(2 * NR, 3 * NR)))
    area = vma(3 * NR)
    present = [touched(0, area=area), touched(NR, 2, area=area), touched(2 * NR + 511, area=area)]
    assert seen(failure, *present) == [(100, NR - 100, 21), (NR, 2, 12), (2 * NR, 100, 21)]


def test_all_of_the_2_mib_is_unmapped_once_somebody_is_told_of_them() -> None:
    failure = incident(NR + 3)
    tasks = hurt_as_mapped(failure, [task(touched(NR + 9, area=vma(2 * NR)))])
    to_kill = collect_procs(failure, tasks, early_kill=False)
    assert [(k.address, k.shift, k.pfn) for k in to_kill] == [
        (BASE + (NR + 3) * PAGE_SIZE, 21, 5000 + NR + 3)
    ]
    (whole,) = to_unmap(failure, to_kill).mappings
    assert (whole.index, whole.count, whole.pfn) == (NR, NR, 5000 + NR)
    assert to_unmap(failure, []) is failure


def test_told_by_pages_only_those_are_unmapped() -> None:
    failure = incident(3)
    tasks = hurt_as_mapped(failure, [task(touched(3, area=vma(8)))])
    to_kill = collect_procs(failure, tasks, early_kill=False)
    assert to_unmap(failure, to_kill) is failure


def test_another_file_that_shares_the_page_is_not_unmapped_by_2_mib() -> None:
    failure = incident(3)
    failure.mappings.append(MappingRange(INO + 1, 40, 1, 5003))
    tasks = hurt_as_mapped(failure, [task(touched(3, area=vma(NR)))])
    mappings = to_unmap(failure, collect_procs(failure, tasks, early_kill=False)).mappings
    assert [(m.mapping, m.index, m.count) for m in mappings] == [(INO, 0, NR), (INO + 1, 40, 1)]


def test_removal_is_not_looked_at() -> None:
    tasks = [task(touched(3, area=vma(NR)))]
    assert hurt_as_mapped(Incident(1, 0, 9, 0, whole_device=True), tasks) == tasks
