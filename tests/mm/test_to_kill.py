"""shared_out(): the present pages of each process, divided among several failures."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daxemu.mm.to_kill import PresentRun, Task, Thread, shared_out
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
