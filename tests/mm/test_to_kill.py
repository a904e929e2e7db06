"""Present pages of processes divided among failures, and victims that a repair spares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.to_kill import PresentRun, Task, Thread, collect_procs, shared_out, spare
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE

FILES = (5, 6)


def a_task(pid: int, runs: list[tuple[int, int, int]]) -> Task:
    """Return a task. ``runs`` are (file, first page, pages), each at addresses of its own."""
    present = tuple(
        PresentRun(ino, index, pages, (pid << 40) + (at << 30), 12)
        for at, (ino, index, pages) in enumerate(runs)
    )
    return Task(pid, f"p{pid}", (Thread(pid, 0),), present)


def pages_of(task: Task) -> list[tuple[int, int, int]]:
    """Return every present page of a task as (address, file, index)."""
    return [
        (run.address + page * PAGE_SIZE, run.mapping, run.index + page)
        for run in task.present
        for page in range(run.nr_pages)
    ]


def test_each_failure_gets_its_tasks_with_only_its_own_pages() -> None:
    one, two = a_task(1, [(5, 0, 10), (6, 0, 4)]), a_task(2, [(5, 8, 4)])
    shares = shared_out(
        [one, two], [[(5, Range(2, 4))], [(5, Range(9, 10)), (6, Range(3, 9))], [(7, Range(0, 9))]]
    )
    assert [[(task.pid, task.present) for task in tasks] for tasks in shares] == [
        [(1, (PresentRun(5, 2, 2, (1 << 40) + 2 * PAGE_SIZE, 12),))],
        [
            (
                1,
                (
                    PresentRun(5, 9, 1, (1 << 40) + 9 * PAGE_SIZE, 12),
                    PresentRun(6, 3, 1, (1 << 40) + (1 << 30) + 3 * PAGE_SIZE, 12),
                ),
            ),
            (2, (PresentRun(5, 9, 1, (2 << 40) + PAGE_SIZE, 12),)),
        ],
        [],
    ]


RUN = st.tuples(st.sampled_from(FILES), st.integers(0, 60), st.integers(1, 30))
RUNS = st.lists(RUN, min_size=1, max_size=6)
SPANS = st.lists(st.lists(RUN, max_size=4), max_size=4)


@given(st.lists(RUNS, max_size=4), SPANS)
def test_each_present_failed_page_is_in_exactly_one_share(
    have: list[list[tuple[int, int, int]]], failures: list[list[tuple[int, int, int]]]
) -> None:
    tasks = [a_task(pid, runs) for pid, runs in enumerate(have, 1)]
    taken = {ino: RangeSet() for ino in FILES}
    failed = [
        [(ino, part) for ino, start, length in spans for part in taken[ino].add(start, start + length)]
        for spans in failures
    ]
    for share, ranges in zip(shared_out(tasks, failed), failed, strict=True):
        pages = {(ino, page) for ino, part in ranges for page in range(*part)}
        expected = [page for task in tasks for page in pages_of(task) if page[1:] in pages]
        assert sorted(page for task in share for page in pages_of(task)) == sorted(expected)
        assert all(task.present for task in share)


def test_a_victim_is_spared_by_page_and_gets_the_next_failed_page() -> None:
    failed = [MappingRange(5, 0, 4, 100), MappingRange(6, 0, 4, 104)]
    incident = Incident(1, 100, 8, 0, mappings=failed)
    one, two = a_task(1, [(5, 0, 2), (5, 3, 1), (6, 1, 1)]), a_task(2, [(5, 0, 1)])
    to_kill = collect_procs(incident, [one, two], early_kill=True)
    assert [(v.tid, v.pfn, v.merges) for v in to_kill] == [
        (1, 100, False),
        (1, 103, True),
        (1, 105, False),
        (2, 100, False),
    ]

    def left(*pfns: tuple[int, int]) -> list[tuple[int, int, int, bool]]:
        return [(v.tid, v.address, v.pfn, v.merges) for v in spare(incident, to_kill, RangeSet(pfns))]

    base = 1 << 40
    assert left((100, 101)) == [
        (1, base + PAGE_SIZE, 101, False),
        (1, base + (1 << 30), 103, True),
        (1, base + (2 << 30), 105, False),
    ]
    assert left((100, 102), (105, 106)) == [(1, base + (1 << 30), 103, False)]
    assert left((100, 108)) == []
    assert spare(incident, to_kill, RangeSet([(200, 300)])) == to_kill
