"""Allocator: never a bad block, all or nothing, reserved memory."""

from __future__ import annotations

import os

import pytest

from daxemu.errors import NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.reclaimer import Reclaimer
from daxemu.pmem.inject import inject, scrub
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import SHM, Core, core_at


def used_bytes(core: Core) -> int:
    return (core.path / "media").stat().st_blocks * 512


def blocks(runs: list[Range]) -> list[int]:
    return [block for run in runs for block in range(*run)]


@pytest.fixture
def allocator(core: Core) -> Allocator:
    """An allocator over the whole device: 2048 blocks, no filesystem."""
    core.without_filesystem()
    core.pmem.dax.discard(0, core.pmem.dax.size)
    return Allocator(core.pmem.dax)


def test_allocation_is_one_run_if_possible(allocator: Allocator) -> None:
    assert allocator.allocate(10) == [Range(0, 10)]
    assert allocator.allocate(5) == [Range(10, 15)]
    assert allocator.free_blocks == 2048 - 15


def test_allocation_begins_at_a_free_goal(allocator: Allocator) -> None:
    assert allocator.allocate(2, goal=700) == [Range(700, 702)]
    assert allocator.allocate(2, goal=700) == [Range(702, 704)]


@pytest.mark.parametrize("goal", [2047, 2048, 5000])
def test_a_goal_at_the_end_wraps_around(allocator: Allocator, goal: int) -> None:
    got = allocator.allocate(4, goal=goal)
    assert len(set(blocks(got))) == 4
    assert all(0 <= block < 2048 for block in blocks(got))


def test_allocation_joins_fragments(allocator: Allocator) -> None:
    allocator.allocate(2048)
    allocator.free(Range(3, 5))
    allocator.free(Range(9, 10))
    allocator.settle()
    assert sorted(allocator.allocate(3)) == [Range(3, 5), Range(9, 10)]
    assert allocator.free_blocks == 0


def test_new_blocks_are_zero_even_after_earlier_use(core: Core, allocator: Allocator) -> None:
    (run,) = allocator.allocate(2)
    core.pmem.dax.direct_access(run.start * PAGE_SIZE, 2 * PAGE_SIZE)[:] = b"x" * (2 * PAGE_SIZE)
    allocator.free(run)
    allocator.settle()
    (again,) = allocator.allocate(2, goal=run.start)
    assert again == run
    assert bytes(core.pmem.dax.direct_access(run.start * PAGE_SIZE, 2 * PAGE_SIZE)) == bytes(2 * PAGE_SIZE)


def test_allocated_blocks_have_memory_and_freed_blocks_have_none(core: Core, allocator: Allocator) -> None:
    (run,) = allocator.allocate(100, goal=1000)
    assert used_bytes(core) == 100 * PAGE_SIZE
    allocator.free(run)
    assert used_bytes(core) == 100 * PAGE_SIZE
    allocator.settle()
    assert used_bytes(core) == 0


def test_freed_blocks_keep_their_bytes_and_are_not_used_before_the_commit(
    core: Core, allocator: Allocator
) -> None:
    """After a crash before the commit, the old file must still have the bytes."""
    (run,) = allocator.allocate(1, goal=7)
    core.pmem.dax.direct_access(7 * PAGE_SIZE, 3)[:] = b"old"
    allocator.free(run)
    assert allocator.free_blocks == allocator.usable_blocks == 2048
    assert 7 not in blocks(allocator.allocate(2047))
    assert bytes(core.pmem.dax.direct_access(7 * PAGE_SIZE, 3)) == b"old"
    with pytest.raises(NoSpace):
        allocator.allocate(1)


def test_reclaim_is_called_when_only_pending_blocks_are_left(core: Core) -> None:
    core.without_filesystem()
    asked = []

    def commit() -> None:
        asked.append(full.free_ranges())
        full.settle()

    full = Allocator(core.pmem.dax, Reclaimer(commit))
    full.allocate(2048)
    full.free(Range(5, 9))
    assert full.allocate(3) == [Range(5, 8)]
    assert asked == [[Range(5, 9)]]
    with pytest.raises(NoSpace):
        full.allocate(2)
    assert asked == [[Range(5, 9)]]


def test_bad_blocks_are_skipped(core: Core, allocator: Allocator) -> None:
    inject(core.pmem, 3 * PAGE_SIZE + 512, 1)
    inject(core.pmem, 6 * PAGE_SIZE - 512, 1024)
    assert allocator.allocate(8) == [Range(0, 3), Range(4, 5), Range(7, 11)]
    assert allocator.free_blocks == 2048 - 8
    assert allocator.usable_blocks == 2048 - 8 - 3


def test_a_bad_goal_is_skipped(core: Core, allocator: Allocator) -> None:
    inject(core.pmem, 50 * PAGE_SIZE, PAGE_SIZE)
    assert allocator.allocate(2, goal=50) == [Range(51, 53)]


def test_allocation_over_latent_poison_clears_it(core: Core, allocator: Allocator) -> None:
    inject(core.pmem, 0, PAGE_SIZE, latent=True)
    assert allocator.allocate(1, goal=0) == [Range(0, 1)]
    assert bytes(core.pmem.dax.direct_access(0, PAGE_SIZE)) == bytes(PAGE_SIZE)
    assert scrub(core.pmem) == []


def test_cleared_blocks_are_allocated_again(core: Core, allocator: Allocator) -> None:
    inject(core.pmem, 0, PAGE_SIZE)
    assert allocator.usable_blocks == 2047
    core.pmem.dax.clear_poison(0, PAGE_SIZE)
    assert allocator.usable_blocks == 2048
    assert allocator.allocate(1, goal=0) == [Range(0, 1)]


def test_allocating_more_than_is_free_changes_nothing(allocator: Allocator) -> None:
    allocator.allocate(2000)
    before = allocator.free_ranges()
    with pytest.raises(NoSpace):
        allocator.allocate(49)
    assert allocator.free_ranges() == before
    assert len(blocks(allocator.allocate(48))) == 48


def test_allocating_with_only_bad_blocks_left_changes_nothing(core: Core, allocator: Allocator) -> None:
    inject(core.pmem, 5 * PAGE_SIZE, PAGE_SIZE)
    before = allocator.free_ranges()
    with pytest.raises(NoSpace):
        allocator.allocate(2048)
    assert allocator.free_ranges() == before
    assert allocator.usable_blocks == 2047
    assert 5 not in blocks(allocator.allocate(2047))


def test_a_failed_reservation_allocates_nothing() -> None:
    """tmpfs refuses more than its size limit at once, so the backing store is really full."""
    memory = os.statvfs(SHM)
    total = memory.f_blocks * memory.f_frsize // PAGE_SIZE
    if not total:
        pytest.skip("/dev/shm has no limit here")
    with core_at(size=6 << 40) as core:
        allocator = core.fs.allocator
        first = allocator.free_ranges()[0].start
        allocator.take(Range(first + 100, first + 200))
        before, used = allocator.free_ranges(), used_bytes(core)
        with pytest.raises(NoSpace, match="memory behind the device"):
            allocator.allocate(100 + total + 1, goal=first)
        assert allocator.free_ranges() == before
        assert used_bytes(core) == used
        assert allocator.allocate(100, goal=first) == [Range(first, first + 100)]
        core.sound = False  # blocks taken without a file


def test_taking_used_blocks_is_refused(allocator: Allocator) -> None:
    allocator.take(Range(5, 10))
    with pytest.raises(NoSpace):
        allocator.take(Range(9, 11))
    assert allocator.free_blocks == 2043
