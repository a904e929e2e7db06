"""FICLONERANGE: allowed ranges, cost, and sharing of poison."""

from __future__ import annotations

import errno

import pytest

from daxemu.fs.inode import MAX_FILE_SIZE
from daxemu.uapi import PAGE_SIZE
from tests.fs.test_filesystem import refuses
from tests.support.core import Core, pages


def test_a_clone_reads_the_same_and_takes_no_space(core: Core) -> None:
    one = core.file(b"1", pages("ABC") + b"tail")
    free = core.fs.statfs().free
    two = core.clone(one, b"2")
    assert core.read(two) == pages("ABC") + b"tail"
    assert core.fs.statfs().free == free


@pytest.mark.parametrize(
    ("src", "dst", "length"),
    [
        (1, 0, PAGE_SIZE),
        (0, 1, PAGE_SIZE),
        (0, 0, 100),
        (PAGE_SIZE, 0, 4 * PAGE_SIZE),
        (-PAGE_SIZE, 0, PAGE_SIZE),
        (0, -PAGE_SIZE, PAGE_SIZE),
        (0, 0, -PAGE_SIZE),
        (8 * PAGE_SIZE, 0, 0),
    ],
)
def test_only_whole_blocks_inside_the_source_are_shared(core: Core, src: int, dst: int, length: int) -> None:
    one, two = core.file(b"1", pages("ABC") + b"tail"), core.file(b"2", pages("xyz"))
    assert refuses(errno.EINVAL, core.fs.remap_file_range, one, src, two, dst, length)
    assert core.read(two) == pages("xyz")


def test_a_partial_last_block_is_shared_only_at_the_targets_end(core: Core) -> None:
    one, two = core.file(b"1", pages("A") + b"tail"), core.file(b"2", pages("xyz"))
    assert refuses(errno.EINVAL, core.fs.remap_file_range, one, 0, two, 0, 0)
    assert core.fs.remap_file_range(one, PAGE_SIZE, two, 3 * PAGE_SIZE, 0) == 4
    assert core.read(two) == pages("xyz") + b"tail"


def test_ranges_of_one_file_must_not_overlap(core: Core) -> None:
    ino = core.file(data=pages("ABCD"))
    assert refuses(errno.EINVAL, core.fs.remap_file_range, ino, 0, ino, PAGE_SIZE, 2 * PAGE_SIZE)
    assert core.fs.remap_file_range(ino, 0, ino, 2 * PAGE_SIZE, 2 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert core.read(ino) == pages("ABAB")


def test_a_clone_does_not_reach_beyond_the_largest_size(core: Core) -> None:
    one, two = core.file(b"1", pages("AB")), core.file(b"2")
    assert refuses(errno.EFBIG, core.fs.remap_file_range, one, 0, two, MAX_FILE_SIZE - PAGE_SIZE, 0)
    assert core.fs.names.get(two).size == 0


def test_blocks_replaced_by_a_clone_are_freed(core: Core) -> None:
    one, two = core.file(b"1", pages("A")), core.file(b"2", pages("xyz"))
    free = core.fs.statfs().free
    core.fs.remap_file_range(one, 0, two, PAGE_SIZE, PAGE_SIZE)
    assert core.read(two) == pages("xAz")
    assert core.fs.statfs().free == free + 1


def test_a_clone_shares_the_poison(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    core.poison(one, 1)
    core.clone(one, b"2")
    assert [(d.path, d.offset) for d in core.fs.damaged()] == [("/1", PAGE_SIZE), ("/2", PAGE_SIZE)]
