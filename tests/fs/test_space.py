"""Verbs about blocks of files: fallocate, lseek, copy_file_range, statfs, damaged, device_ranges."""

from __future__ import annotations

import errno
import os

import pytest

from daxemu.errors import FsError, MediaError, NoSpace
from daxemu.fs.inode import MAX_FILE_SIZE, ROOT_INO
from daxemu.fs.statfs import Damage
from daxemu.pmem.inject import inject
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, PAGE_SIZE
from tests.fs.test_filesystem import refuses
from tests.support.core import Core, pages

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE


def test_preallocated_blocks_belong_to_the_file_and_read_as_zeros(core: Core) -> None:
    ino, free = core.file(), core.fs.statfs().free
    core.fs.fallocate(ino, 0, 100, 3 * PAGE_SIZE)
    assert core.read(ino) == bytes(100 + 3 * PAGE_SIZE)
    assert core.fs.statfs().free == free - 4


def test_preallocation_fills_only_the_holes(core: Core) -> None:
    ino = core.file(data=pages("A"))
    core.fs.write(ino, 2 * PAGE_SIZE, pages("C"))
    free = core.fs.statfs().free
    core.fs.fallocate(ino, 0, 0, 4 * PAGE_SIZE)
    assert core.read(ino) == pages("A") + bytes(PAGE_SIZE) + pages("C") + bytes(PAGE_SIZE)
    assert core.fs.statfs().free == free - 2


def test_keep_size_allocates_beyond_the_end_and_truncate_frees(core: Core) -> None:
    ino, free = core.file(data=b"x"), core.fs.statfs().free
    core.fs.fallocate(ino, FALLOC_FL_KEEP_SIZE, 0, 10 * PAGE_SIZE)
    assert (core.fs.names.get(ino).size, core.fs.statfs().free) == (1, free - 9)
    core.reopen()
    assert core.fs.statfs().free == free - 9
    core.fs.set_size(ino, 0)
    assert core.fs.statfs().free == free + 1


def test_preallocating_more_than_is_free_changes_nothing(core: Core) -> None:
    ino, free = core.file(), core.fs.statfs().free
    with pytest.raises(NoSpace):
        core.fs.fallocate(ino, 0, 0, (free + 1) * PAGE_SIZE)
    assert (core.fs.names.get(ino).size, core.fs.statfs().free) == (0, free)


def test_punching_frees_whole_blocks_and_zeroes_the_edges(core: Core) -> None:
    ino, free = core.file(data=pages("ABCD")), core.fs.statfs().free
    core.fs.fallocate(ino, PUNCH, 100, 3 * PAGE_SIZE)
    assert core.read(ino) == b"A" * 100 + bytes(3 * PAGE_SIZE) + b"D" * (PAGE_SIZE - 100)
    assert core.fs.statfs().free == free + 2


@pytest.mark.parametrize(("offset", "length"), [(10, 20), (PAGE_SIZE - 5, 10), (PAGE_SIZE, 7), (4000, 96)])
def test_punching_less_than_a_block_zeroes_exactly_the_range(core: Core, offset: int, length: int) -> None:
    ino = core.file(data=pages("AB"))
    core.fs.fallocate(ino, PUNCH, offset, length)
    expected = bytearray(pages("AB"))
    expected[offset : offset + length] = bytes(length)
    assert core.read(ino) == expected


def test_punching_or_zeroing_a_whole_poisoned_block_replaces_it(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    for mode, page in ((PUNCH, 0), (ZERO, 1)):
        core.poison(ino, page)
        core.fs.fallocate(ino, mode, page * PAGE_SIZE, PAGE_SIZE)
    assert core.read(ino) == bytes(2 * PAGE_SIZE) + pages("C")
    assert core.pmem.badblocks.count == 16


@pytest.mark.parametrize("mode", [PUNCH, ZERO])
def test_punching_with_an_edge_in_poison_is_refused(core: Core, mode: int) -> None:
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 0)
    with pytest.raises(MediaError):
        core.fs.fallocate(ino, mode, 100, 2 * PAGE_SIZE - 100)
    assert bytes(core.fs.read(ino, PAGE_SIZE, 2 * PAGE_SIZE)) == pages("BC")


def test_punching_a_shared_block_leaves_other_owners_unchanged(core: Core) -> None:
    one = core.file(b"1", pages("ABC"))
    two = core.clone(one, b"2")
    core.fs.fallocate(two, PUNCH, 100, 2 * PAGE_SIZE)
    assert core.read(one) == pages("ABC")
    assert core.read(two) == b"A" * 100 + bytes(2 * PAGE_SIZE) + pages("C")[100:]


@pytest.mark.parametrize(
    ("mode", "offset", "length", "number"),
    [
        (0, -1, 10, errno.EINVAL),
        (0, 0, 0, errno.EINVAL),
        (0, 0, -1, errno.EINVAL),
        (0, MAX_FILE_SIZE, 1, errno.EFBIG),
        (FALLOC_FL_PUNCH_HOLE, 0, 1, errno.EOPNOTSUPP),
        (PUNCH | ZERO, 0, 1, errno.EOPNOTSUPP),
        (0x08, 0, 1, errno.EOPNOTSUPP),
    ],
)
def test_fallocate_refuses_invalid_arguments(
    core: Core, mode: int, offset: int, length: int, number: int
) -> None:
    assert refuses(number, core.fs.fallocate, core.file(), mode, offset, length)


def test_lseek_finds_data_and_holes(core: Core) -> None:
    ino = core.file()
    core.fs.write(ino, 2 * PAGE_SIZE, pages("C"))
    core.fs.set_size(ino, 5 * PAGE_SIZE + 10)
    for offset, data, hole in ((0, 2, 0), (100, 2, None), (2 * PAGE_SIZE + 7, None, 3)):
        found = (core.fs.seek(ino, offset, os.SEEK_DATA), core.fs.seek(ino, offset, os.SEEK_HOLE))
        assert found == (
            offset if data is None else data * PAGE_SIZE,
            offset if hole is None else hole * PAGE_SIZE,
        )
    assert refuses(errno.ENXIO, core.fs.seek, ino, 3 * PAGE_SIZE, os.SEEK_DATA)
    assert refuses(errno.ENXIO, core.fs.seek, ino, 5 * PAGE_SIZE + 10, os.SEEK_HOLE)
    assert refuses(errno.EINVAL, core.fs.seek, ino, 0, os.SEEK_SET)


def test_a_file_without_holes_has_one_at_its_end(core: Core) -> None:
    ino = core.file(data=b"x" * 5000)
    assert core.fs.seek(ino, 0, os.SEEK_HOLE) == 5000


def test_copy_file_range_is_a_reflink_of_the_whole_blocks(core: Core) -> None:
    one, two = core.file(b"1", pages("AB") + b"tail"), core.file(b"2")
    assert core.fs.copy_file_range(one, 0, two, 0, PAGE_SIZE + 100) == PAGE_SIZE
    assert core.fs.copy_file_range(one, PAGE_SIZE, two, PAGE_SIZE, 1 << 40) == PAGE_SIZE + 4
    assert core.fs.copy_file_range(one, 1 << 30, two, 0, 10) == 0
    assert core.read(two) == core.read(one)
    for page in range(3):
        places = [core.fs.device_ranges(ino, page * PAGE_SIZE, PAGE_SIZE) for ino in (one, two)]
        assert places[0] == places[1] != []


@pytest.mark.parametrize(("src", "dst", "length"), [(0, 0, 100), (1, 0, PAGE_SIZE), (0, 1, PAGE_SIZE)])
def test_copy_file_range_refuses_ranges_that_cannot_be_shared(
    core: Core, src: int, dst: int, length: int
) -> None:
    one, two = core.file(b"1", pages("ABC")), core.file(b"2", pages("xyz"))
    with pytest.raises(FsError) as caught:
        core.fs.copy_file_range(one, src, two, dst, length)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert core.read(two) == pages("xyz")


def test_statfs_tells_free_from_available(core: Core) -> None:
    before = core.fs.statfs()
    assert before.blocks == 2048
    assert before.free == before.available > 1000
    inject(core.pmem, 2000 * PAGE_SIZE, 2 * PAGE_SIZE)
    after = core.fs.statfs()
    assert (after.free, after.available) == (before.free, before.free - 2)


def test_damaged_names_every_file_range_in_order(core: Core) -> None:
    one = core.file(b"b", pages("ABC"))
    two = core.file(b"a", pages("xyzw"))
    core.fs.remap_file_range(one, 0, two, 3 * PAGE_SIZE, PAGE_SIZE)
    core.poison(two, 0)
    (place,) = core.fs.device_ranges(one, 0, PAGE_SIZE)
    inject(core.pmem, place.start + 512, 600)
    inject(core.pmem, 3 * PAGE_SIZE, 512)
    core.sound = False  # the block holds metadata
    inject(core.pmem, 2000 * PAGE_SIZE, PAGE_SIZE)
    assert core.fs.damaged() == [
        Damage(two, "/a", 0, PAGE_SIZE),
        Damage(two, "/a", 3 * PAGE_SIZE + 512, 1024),
        Damage(one, "/b", 512, 1024),
        Damage(0, "<metadata>", 3 * PAGE_SIZE, 512),
    ]


def test_latent_poison_is_not_yet_damage(core: Core) -> None:
    ino = core.file(data=pages("A"))
    core.poison(ino, 0, latent=True)
    assert core.fs.damaged() == []


def test_device_ranges_leave_holes_out_and_cut_to_bytes(core: Core) -> None:
    ino = core.file(data=pages("A"))
    core.fs.write(ino, 2 * PAGE_SIZE, pages("C"))
    places = core.fs.device_ranges(ino, 100, 2 * PAGE_SIZE)
    assert [place.length for place in places] == [PAGE_SIZE - 100, 100]
    assert [place.start % PAGE_SIZE for place in places] == [100, 0]
    assert core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE) == []


def test_the_last_owner_writes_in_place_with_only_bad_blocks_free(core: Core) -> None:
    """The write commits to make room, or an earlier commit ended the sharing."""
    one = core.file(b"one", b"1" * 2 * PAGE_SIZE)
    core.clone(one, b"two")
    other = core.file(b"other", b"o" * PAGE_SIZE)
    core.fs.commit()
    while core.fs.statfs().available:
        core.fs.write(other, core.fs.names.get(other).size, bytes(PAGE_SIZE))
    end = core.fs.names.get(other).size - 3 * PAGE_SIZE
    for last in core.fs.device_ranges(other, end, 3 * PAGE_SIZE):
        inject(core.pmem, last.start, last.length)
    core.fs.set_size(other, end)
    core.fs.unlink(ROOT_INO, b"two")
    assert core.fs.write(one, 0, b"x" * 2 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert core.read(one) == b"x" * 2 * PAGE_SIZE
