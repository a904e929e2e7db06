"""HugeAllocator: each 2 MiB of a file in 2 MiB of the device at the same offset, while any are free."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daxemu.errors import NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.extents import ExtentMap
from daxemu.fs.fsck import fsck
from daxemu.fs.huge_allocator import HugeAllocator, allocator_for
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.inject import inject
from daxemu.ranges import Range
from daxemu.uapi import FALLOC_FL_PUNCH_HOLE, HPAGE_PMD_NR, PAGE_SIZE, PMD_SIZE
from tests.support.core import Core, core_at

UNITS = 16
KEEP_SIZE = 1


class File:
    """A file of nothing but blocks, for the allocator."""

    def __init__(self, allocator: HugeAllocator, ino: int = 2, rmap: Rmap | None = None) -> None:
        self.allocator = allocator
        self.extents = ExtentMap(ino, rmap or Rmap())

    def write(self, start: int, end: int) -> None:
        """Allocate blocks for the holes of ``[start, end)``."""
        holes = [
            Range(run.file_block, run.file_block + run.length)
            for run in self.extents.lookup(start, end)
            if run.link is None
        ]
        runs = self.allocator.allocate_for(self.extents, holes)
        assert sum(run.length for run in runs) == sum(hole.length for hole in holes)
        assert len(runs) <= max(1, self.allocator.max_runs(holes))
        left = list(runs)
        for hole in holes:
            at = hole.start
            while at < hole.end:
                run = left.pop(0)
                taken = run.clip(run.start, run.start + hole.end - at)
                if taken.end < run.end:
                    left.insert(0, Range(taken.end, run.end))
                self.extents.insert(at, taken.start, taken.length)
                at += taken.length

    def punch(self, start: int, end: int) -> None:
        for run in self.extents.remove(start, end):
            self.allocator.free(run)

    def in_place(self, unit: int) -> bool:
        """Return True if the 2 MiB of the file are in one 2 MiB of the device, at the same offset."""
        runs = self.extents.lookup(unit * HPAGE_PMD_NR, (unit + 1) * HPAGE_PMD_NR)
        places = {run.dev_block - run.file_block for run in runs if run.link is not None}
        return len(places) == 1 and places.pop() % HPAGE_PMD_NR == 0


def wholly_free(allocator: Allocator) -> list[int]:
    return [
        unit
        for unit in range(allocator.total // HPAGE_PMD_NR)
        if allocator._free.covers(unit * HPAGE_PMD_NR, (unit + 1) * HPAGE_PMD_NR)
    ]


def known_whole(allocator: HugeAllocator) -> list[int]:
    return [unit for run in allocator._whole for unit in range(*run)]


@pytest.fixture
def core() -> object:
    with core_at(size=UNITS * PMD_SIZE, align=PMD_SIZE) as made:
        made.without_filesystem()
        made.pmem.dax.discard(0, made.pmem.dax.size)
        yield made


@pytest.fixture
def allocator(core: Core) -> HugeAllocator:
    """An allocator over the whole device: 16 times 2 MiB."""
    return HugeAllocator(core.pmem.dax)


def test_the_alignment_of_the_device_chooses_the_allocator(core: Core) -> None:
    assert isinstance(allocator_for(core.pmem.dax), HugeAllocator)
    with core_at() as other:
        assert type(other.fs.allocator) is Allocator


@pytest.mark.parametrize("step", [1, 7, 32, 256, 512, 1300])
def test_a_growing_file_is_in_place_everywhere(allocator: HugeAllocator, step: int) -> None:
    allocator.take(Range(0, 16))
    file = File(allocator)
    for start in range(0, 1300, step):
        file.write(start, min(1300, start + step))
    assert [file.in_place(unit) for unit in range(3)] == [True] * 3
    assert len(file.extents) == 1


def test_two_files_growing_in_turns_are_both_in_place(allocator: HugeAllocator) -> None:
    rmap = Rmap()
    files = [File(allocator, ino, rmap) for ino in (2, 3)]
    for start in range(0, 1024, 32):
        for file in files:
            file.write(start, start + 32)
    assert all(file.in_place(unit) for file in files for unit in range(2))


def test_blocks_written_in_any_order_join_their_2_mib(allocator: HugeAllocator) -> None:
    file = File(allocator)
    for block in (700, 513, 1023, 512, 800):
        file.write(block, block + 1)
    file.write(512, 1024)
    assert file.in_place(1)


def test_a_write_across_partly_filled_2_mib_is_in_place(allocator: HugeAllocator) -> None:
    file = File(allocator)
    file.write(1500, 1501)
    file.write(3, 4)
    file.write(0, 2048)
    assert [file.in_place(unit) for unit in range(4)] == [True] * 4


def test_2_mib_with_a_bad_block_are_skipped(core: Core, allocator: HugeAllocator) -> None:
    inject(core.pmem, 5 * PAGE_SIZE, PAGE_SIZE)
    inject(core.pmem, PMD_SIZE, 1)
    file = File(allocator)
    file.write(0, 600)
    assert file.in_place(0)
    assert file.in_place(1)
    assert file.extents.lookup(0, 1)[0].dev_block == 2 * HPAGE_PMD_NR


def test_without_whole_2_mib_blocks_are_allocated_one_by_one(allocator: HugeAllocator) -> None:
    for unit in range(UNITS):
        allocator.take(Range(unit * HPAGE_PMD_NR + 100, unit * HPAGE_PMD_NR + 101))
    assert known_whole(allocator) == []
    file = File(allocator)
    file.write(0, 1024)
    assert file.extents.blocks == 1024
    assert not file.in_place(0)


def test_whole_2_mib_are_free_again_with_the_last_block(allocator: HugeAllocator) -> None:
    file = File(allocator)
    file.write(0, 1024)
    file.punch(0, 700)
    file.punch(701, 1024)
    assert len(known_whole(allocator)) == UNITS - 2
    allocator.settle()
    assert len(known_whole(allocator)) == UNITS - 1
    file.punch(700, 701)
    allocator.settle()
    assert known_whole(allocator) == list(range(UNITS))


def test_allocation_is_all_or_nothing(allocator: HugeAllocator) -> None:
    file = File(allocator)
    file.write(0, (UNITS - 2) * HPAGE_PMD_NR)
    before = allocator.free_ranges(), known_whole(allocator)
    with pytest.raises(NoSpace):
        file.write((UNITS - 2) * HPAGE_PMD_NR, (UNITS + 1) * HPAGE_PMD_NR)
    assert (allocator.free_ranges(), known_whole(allocator)) == before
    file.write((UNITS - 2) * HPAGE_PMD_NR, UNITS * HPAGE_PMD_NR)
    assert allocator.free_blocks == 0


def test_allocating_with_only_bad_blocks_left_changes_nothing(core: Core, allocator: HugeAllocator) -> None:
    inject(core.pmem, 5 * PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(NoSpace):
        File(allocator).write(0, UNITS * HPAGE_PMD_NR)
    assert known_whole(allocator) == wholly_free(allocator) == list(range(UNITS))


def test_the_partial_2_mib_at_the_end_of_a_device_are_used() -> None:
    with core_at(size=8 * PMD_SIZE + 3 * PAGE_SIZE, align=PMD_SIZE) as core:
        core.without_filesystem()
        allocator = HugeAllocator(core.pmem.dax)
        File(allocator).write(0, allocator.total)
        assert allocator.free_blocks == 0


def test_metadata_leaves_files_in_place() -> None:
    """Metadata grows while the files grow, and has 2 MiB of its own."""
    with core_at(size=64 * PMD_SIZE, align=PMD_SIZE) as core:
        ino = core.file()
        for start in range(0, 4 * PMD_SIZE, PMD_SIZE // 4):
            core.fs.write(ino, start, os.urandom(PMD_SIZE // 4))
            for i in range(20):
                core.file(b"%d-%d" % (start, i))
            core.fs.commit()
        core.reopen()
        (run,) = core.fs.extents_of(ino).lookup(0, 4 * HPAGE_PMD_NR)
        assert run.dev_block % HPAGE_PMD_NR == 0
        assert any(link.ino == METADATA_INO and link.length > 100 for link in core.fs.rmap)


blocks = st.integers(0, 6 * HPAGE_PMD_NR)
steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "write", "punch", "settle", "bad"]),
        st.integers(0, 2),
        blocks,
        blocks,
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_set_of_whole_2_mib_is_right_and_first_blocks_are_in_place(
    steps: list[tuple[str, int, int, int]],
) -> None:
    with core_at(size=UNITS * PMD_SIZE, align=PMD_SIZE) as core:
        core.without_filesystem()
        core.pmem.dax.discard(0, core.pmem.dax.size)
        allocator = HugeAllocator(core.pmem.dax)
        rmap = Rmap()
        files = [File(allocator, ino, rmap) for ino in (2, 3, 4)]
        for verb, which, one, other in steps:
            file, start, end = files[which], min(one, other), max(one, other)
            if verb == "write":
                empty = [
                    unit
                    for unit in range(-(-start // HPAGE_PMD_NR), end // HPAGE_PMD_NR)
                    if not any(
                        r.link for r in file.extents.lookup(unit * HPAGE_PMD_NR, (unit + 1) * HPAGE_PMD_NR)
                    )
                ]
                bad = {
                    r.start // PMD_SIZE for r in core.pmem.badblocks.overlapping_bytes(0, core.pmem.dax.size)
                }
                enough = len(set(wholly_free(allocator)) - bad) >= -(-(end - start) // HPAGE_PMD_NR) + 1
                try:
                    file.write(start, end)
                except NoSpace:
                    continue
                assert not enough or all(file.in_place(unit) for unit in empty)
            elif verb == "punch":
                file.punch(start, end)
            elif verb == "settle":
                allocator.settle()
            else:
                inject(core.pmem, start * PAGE_SIZE, 1)
            assert known_whole(allocator) == wholly_free(allocator)
            links = sorted((link.dev_block, link.dev_end) for link in rmap)
            assert all(a[1] <= b[0] for a, b in pairwise(links))
            used = sum(link.length for link in rmap)
            assert used + allocator.free_blocks == allocator.total


def test_a_filesystem_with_files_of_all_kinds_is_sound() -> None:
    with core_at(size=32 * PMD_SIZE, align=PMD_SIZE) as core:
        ino = core.file(data=os.urandom(3 * PMD_SIZE + 5000))
        core.clone(ino, b"clone")
        core.fs.write(ino, PMD_SIZE + 100, os.urandom(3 * PAGE_SIZE))
        core.fs.fallocate(ino, FALLOC_FL_PUNCH_HOLE | KEEP_SIZE, 1000, 3 * PMD_SIZE)
        core.fs.set_size(ino, 2 * PMD_SIZE + 7)
        other = core.file(b"other")
        core.fs.fallocate(other, 0, 0, 2 * PMD_SIZE)
        (run,) = core.fs.extents_of(other).lookup(0, 2 * HPAGE_PMD_NR)
        assert run.dev_block % HPAGE_PMD_NR == 0
        core.reopen()
        assert fsck(core.fs) == []
        assert isinstance(core.fs.allocator, HugeAllocator)
        assert known_whole(core.fs.allocator) == wholly_free(core.fs.allocator)
