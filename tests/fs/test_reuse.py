"""Allocator.hold(): no reuse of freed blocks while processes may have the blocks mapped for the old file."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daxemu.errors import NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.pmem.inject import inject, uninject
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core, core_at, pages


@pytest.fixture
def full(core: Core) -> Allocator:
    """An allocator without a free block, and without a filesystem."""
    core.without_filesystem()
    allocator = Allocator(core.pmem.dax)
    allocator.allocate(allocator.total)
    return allocator


def test_a_held_block_keeps_its_contents_and_gets_no_owner(core: Core, full: Allocator) -> None:
    core.pmem.dax.direct_access(5 * PAGE_SIZE, 1)[:] = b"x"
    full.free(Range(5, 6))
    hold = full.hold()
    full.settle()
    assert (full.held_blocks, full.free_blocks, full.usable_blocks) == (1, 1, 1)
    with pytest.raises(NoSpace, match="still mapped"):
        full.allocate(1)
    assert bytes(core.pmem.dax.direct_access(5 * PAGE_SIZE, 1)) == b"x"
    full.release(hold)
    assert full.allocate(1) == [Range(5, 6)]
    assert bytes(core.pmem.dax.direct_access(5 * PAGE_SIZE, 1)) == b"\0"


def test_only_freed_blocks_are_worth_a_wait(full: Allocator) -> None:
    assert not full.has_freed
    hold = full.hold()
    assert not full.has_freed
    full.free(Range(5, 6))
    assert full.has_freed
    full.settle()
    assert full.has_freed
    full.release(hold)
    assert not full.has_freed
    assert full.allocate(1) == [Range(5, 6)]


def test_holds_that_overlap_for_ever_do_not_keep_blocks_for_ever(full: Allocator) -> None:
    hold = full.hold()
    for block in range(20):
        full.free(Range(block, block + 1))
        full.settle()
        later = full.hold()
        full.release(hold)
        hold = later
        assert full.held_blocks == 0
    assert full.allocate(20) == [Range(0, 20)]


def test_a_commit_ends_while_blocks_are_held(core: Core) -> None:
    ino = core.file(data=pages("ABCD"))
    core.fs.commit()
    hold = core.fs.allocator.hold()
    core.fs.set_size(ino, 0)
    core.fs.fsync()
    assert core.fs.allocator.held_blocks == 4
    assert core.fs.uncommitted().changes == 0
    core.fs.allocator.release(hold)
    assert core.fs.allocator.held_blocks == 0


def test_a_mount_ends_while_blocks_are_held(core: Core) -> None:
    ino = core.file(data=pages("ABCD"))
    core.fs.allocator.hold()
    core.fs.set_size(ino, 0)
    core.reopen()
    assert core.fs.statfs().free == core.fs.allocator.free_blocks


def test_bad_blocks_are_counted_among_held_blocks(core: Core, full: Allocator) -> None:
    full.free(Range(5, 7))
    hold = full.hold()
    full.settle()
    inject(core.pmem, 5 * PAGE_SIZE, PAGE_SIZE)
    assert (full.usable_blocks, full.free_blocks) == (1, 2)
    uninject(core.pmem, 5 * PAGE_SIZE, PAGE_SIZE)
    assert full.usable_blocks == 2
    full.release(hold)
    assert full.allocate(2) == [Range(5, 7)]


Step = tuple[str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["allocate", "free", "settle", "hold", "release"]), st.integers(0, 40)),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(steps=steps)
def test_a_block_is_reused_after_its_commit_and_all_holds_from_before(steps: list[Step]) -> None:
    with core_at() as core:
        core.without_filesystem()
        allocator = Allocator(core.pmem.dax)
        allocator.allocate(allocator.total - 12)
        owned = RangeSet([(0, 12)])
        holds: list[int] = []
        freed: dict[int, list[int] | None] = {}
        """Holds to wait for, by freed block; None before the commit."""
        for what, number in steps:
            if what == "allocate":
                try:
                    found = allocator.allocate(number % 4 + 1)
                except NoSpace:
                    usable = [b for b, waits in freed.items() if waits is not None and not waits]
                    assert len(usable) + allocator_free(allocator, freed) < number % 4 + 1
                    continue
                for run in found:
                    for block in range(*run):
                        assert freed.pop(block, []) == []
                    owned.add(*run)
            elif what == "free" and owned:
                run = list(owned)[number % len(owned)].clip(0, allocator.total)
                owned.remove(run.start, run.start + 1)
                allocator.free(Range(run.start, run.start + 1))
                freed[run.start] = None
            elif what == "settle":
                allocator.settle()
                freed = {b: list(holds) if waits is None else waits for b, waits in freed.items()}
            elif what == "hold":
                holds.append(allocator.hold())
            elif what == "release" and holds:
                hold = holds.pop(number % len(holds))
                allocator.release(hold)
                for waits in freed.values():
                    if waits and hold in waits:
                        waits.remove(hold)


def allocator_free(allocator: Allocator, freed: dict[int, list[int] | None]) -> int:
    """Return the number of free blocks that were never freed in the test."""
    return allocator.free_blocks - len(freed)
