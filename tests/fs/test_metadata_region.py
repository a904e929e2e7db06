"""The metadata region: two superblocks and two copies of every page, and what each can lose."""

from __future__ import annotations

import msgspec
import pytest

from daxemu.errors import CorruptMetadata, MediaError, NoSpace
from daxemu.fs import metadata_region
from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_region import SUPER_BLOCKS, VERSION, MetadataFile, MetadataRegion, Superblock
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.pmem.inject import inject
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core

DB, WAL = MetadataFile.DB, MetadataFile.WAL
FIRST, SECOND = 0, 1


@pytest.fixture
def empty(core: Core) -> Core:
    """A device of 2048 blocks with nothing on it."""
    core.without_filesystem()
    core.pmem.dax.discard(0, core.pmem.dax.size)
    return core


def a_region(core: Core) -> MetadataRegion:
    return MetadataRegion(core.pmem.dax, Rmap(), Allocator(core.pmem.dax))


def formatted(core: Core, pages: int = 4) -> MetadataRegion:
    region = a_region(core)
    region.format()
    for file in MetadataFile:
        region.grow(file, pages * PAGE_SIZE)
        region.write(file, 0, bytes([65 + file]) * pages * PAGE_SIZE)
    return region


def loaded(core: Core) -> MetadataRegion:
    region = a_region(core)
    region.load()
    return region


def place_of(core: Core, which: int) -> int:
    """The device offset of the first or the second superblock."""
    return a_region(core)._super_blocks[which].start * PAGE_SIZE


def copies(region: MetadataRegion, file: MetadataFile, page: int) -> list[int]:
    return [region._device_offset(file, replica, page) for replica in range(2)]


def put(core: Core, offset: int, data: bytes) -> None:
    core.pmem.media.view(offset, len(data))[:] = data


def put_superblocks(core: Core, superblock: object) -> None:
    """Both of them, with a right checksum."""
    record = msgspec.msgpack.encode(superblock)
    sealed = len(record).to_bytes(4, "little") + metadata_region._checksum(record) + record
    for which in (FIRST, SECOND):
        put(core, place_of(core, which), sealed)


# -- files


def test_an_empty_device_is_not_formatted(empty: Core) -> None:
    assert not a_region(empty).is_formatted()
    a_region(empty).format()
    assert a_region(empty).is_formatted()


def test_what_is_written_comes_back(empty: Core) -> None:
    region = formatted(empty)
    region.write(DB, 4000, b"x" * 5000)
    for seen in (region, loaded(empty)):
        assert seen.size(DB) == seen.size(WAL) == 4 * PAGE_SIZE
        assert seen.read(DB, 3999, 5002) == b"A" + b"x" * 5000 + b"A"
        assert seen.read(WAL, 0, 4 * PAGE_SIZE) == b"B" * 4 * PAGE_SIZE
        assert seen.read(DB, 100, 0) == b""


def test_every_block_of_it_is_known_as_metadata(empty: Core) -> None:
    rmap = Rmap()
    allocator = Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    region.grow(DB, 5 * PAGE_SIZE)
    assert {owner.ino for owner in rmap.owners(0, 2048)} == {METADATA_INO}
    assert sum(owner.length for owner in rmap.owners(0, 2048)) == 2 * SUPER_BLOCKS + 2 * 5
    assert allocator.free_blocks == 2048 - 2 * SUPER_BLOCKS - 2 * 5


def test_growing_keeps_what_is_there_and_never_shrinks(empty: Core) -> None:
    region = formatted(empty)
    region.grow(DB, 100 * PAGE_SIZE)
    region.grow(DB, 10)
    assert loaded(empty).read(DB, 0, 5 * PAGE_SIZE) == b"A" * 4 * PAGE_SIZE + bytes(PAGE_SIZE)
    assert region.size(DB) == 100 * PAGE_SIZE


def test_growing_beyond_what_is_free_changes_nothing(empty: Core) -> None:
    rmap, allocator = Rmap(), Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    links, free = rmap.link_count, allocator.free_blocks
    for pages in (1009, 5000):
        with pytest.raises(NoSpace):
            region.grow(DB, pages * PAGE_SIZE)
        assert (rmap.link_count, allocator.free_blocks, region.size(DB)) == (links, free, 0)
    allocator.settle()
    region.grow(DB, 1008 * PAGE_SIZE)


def test_a_file_in_hundreds_of_pieces_is_found_again(empty: Core) -> None:
    rmap, allocator = Rmap(), Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    for block in range(20, 2000, 2):
        if not rmap.proxy_of(block) and not list(rmap.owners(block, block + 1)):
            allocator.take(Range(block, block + 1))
    region.grow(DB, 400 * PAGE_SIZE)
    assert rmap.link_count > 700
    assert loaded(empty).size(DB) == 400 * PAGE_SIZE


# -- poison


@pytest.mark.parametrize("copy", [0, 1])
def test_a_page_that_cannot_be_read_is_read_from_the_other_copy(empty: Core, copy: int) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 2)[copy] + 700, 1)
    assert region.read(DB, 0, 4 * PAGE_SIZE) == b"A" * 4 * PAGE_SIZE
    assert region.damaged_pages(is_clean=False) == ["metadata page 2 of db is poisoned: one copy is lost"]


def test_a_page_that_is_poison_twice_is_lost(empty: Core) -> None:
    region = formatted(empty)
    for at in copies(region, WAL, 1):
        inject(empty.pmem, at, 1)
    with pytest.raises(MediaError):
        region.read(WAL, 0, 4 * PAGE_SIZE)
    assert region.read(WAL, 0, PAGE_SIZE) == b"B" * PAGE_SIZE
    assert region.damaged_pages(is_clean=False) == [
        "metadata page 1 of wal is poisoned: both copies are lost"
    ]
    assert region.repair() == 0


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize(("offset", "length"), [(0, PAGE_SIZE), (100, 5), (0, 512), (4000, 200)])
def test_a_write_heals_the_page_it_is_in(empty: Core, copy: int, offset: int, length: int) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 1)[copy], PAGE_SIZE)
    region.write(DB, PAGE_SIZE + offset, b"x" * length)
    assert region.damaged_pages(is_clean=False) == []
    expected = bytearray(b"A" * 4 * PAGE_SIZE)
    expected[PAGE_SIZE + offset : PAGE_SIZE + offset + length] = b"x" * length
    assert region.read(DB, 0, 4 * PAGE_SIZE) == expected
    for replica in range(2):
        inject(empty.pmem, copies(region, DB, 1)[1 - replica], PAGE_SIZE)
        assert region.read(DB, PAGE_SIZE, PAGE_SIZE) == expected[PAGE_SIZE : 2 * PAGE_SIZE]
        empty.pmem.dax.clear_poison(copies(region, DB, 1)[1 - replica], PAGE_SIZE)


def test_a_partial_write_into_a_lost_page_is_refused_and_a_whole_one_makes_it_anew(empty: Core) -> None:
    region = formatted(empty)
    for at in copies(region, DB, 1):
        inject(empty.pmem, at, 1)
    with pytest.raises(MediaError):
        region.write(DB, PAGE_SIZE + 5, b"x")
    region.write(DB, PAGE_SIZE, b"x" * PAGE_SIZE)
    assert region.read(DB, PAGE_SIZE, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert empty.pmem.badblocks.count == 0


def test_repair_writes_every_poisoned_page_from_its_other_copy(empty: Core) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 0)[0], 3 * PAGE_SIZE)
    inject(empty.pmem, copies(region, WAL, 3)[1], 1)
    inject(empty.pmem, place_of(empty, FIRST) + 5 * PAGE_SIZE, 1)
    inject(empty.pmem, place_of(empty, SECOND), 1)
    assert len(region.damaged_pages(is_clean=False)) == 6
    assert region.repair() >= 6
    assert region.damaged_pages(is_clean=False) == []
    assert empty.pmem.badblocks.count == 0
    assert loaded(empty).read(DB, 0, 4 * PAGE_SIZE) == b"A" * 4 * PAGE_SIZE


# -- superblocks


@pytest.mark.parametrize("torn", [FIRST, SECOND])
@pytest.mark.parametrize("keep", [0, 3, 10, 25])
def test_a_torn_superblock_is_made_up_for_by_the_other(empty: Core, torn: int, keep: int) -> None:
    formatted(empty)
    put(empty, place_of(empty, torn) + keep, b"\xaa" * (PAGE_SIZE - keep))
    assert loaded(empty).size(WAL) == 4 * PAGE_SIZE


def test_any_corrupt_byte_of_a_superblock_is_noticed(empty: Core) -> None:
    formatted(empty)
    first, second = place_of(empty, FIRST), place_of(empty, SECOND)
    used = 20 + int.from_bytes(bytes(empty.pmem.media.view(first, 4)), "little")
    for at in range(used):
        flip(empty, first + at)
        assert loaded(empty).size(DB) == 4 * PAGE_SIZE
        flip(empty, second + at)
        with pytest.raises(CorruptMetadata):
            loaded(empty)
        flip(empty, first + at)
        flip(empty, second + at)


def flip(core: Core, at: int) -> None:
    core.pmem.media.view(at, 1)[0] ^= 0x10


def test_the_newer_superblock_counts(empty: Core) -> None:
    region = formatted(empty)
    first, second = place_of(empty, FIRST), place_of(empty, SECOND)
    old = bytes(empty.pmem.media.view(second, PAGE_SIZE))
    region.grow(DB, 9 * PAGE_SIZE)
    put(empty, second, old)
    assert loaded(empty).size(DB) == 9 * PAGE_SIZE
    put(empty, first, old)
    assert loaded(empty).size(DB) == 4 * PAGE_SIZE


@pytest.mark.parametrize("bad", [FIRST, SECOND])
def test_a_poisoned_superblock_is_made_up_for_and_stays_for_fsck_to_find(empty: Core, bad: int) -> None:
    region = formatted(empty)
    inject(empty.pmem, place_of(empty, bad), 1)
    region.grow(DB, 9 * PAGE_SIZE)
    again = loaded(empty)
    assert again.size(DB) == 9 * PAGE_SIZE
    assert [line for line in again.damaged_pages(is_clean=False) if "superblock" in line]
    assert again.repair() == 1
    inject(empty.pmem, place_of(empty, 1 - bad), 1)
    assert loaded(empty).size(DB) == 9 * PAGE_SIZE


def test_two_poisoned_superblocks_are_corrupt_metadata_but_not_an_empty_device(empty: Core) -> None:
    formatted(empty)
    for which in (FIRST, SECOND):
        inject(empty.pmem, place_of(empty, which), 1)
    assert a_region(empty).is_formatted()
    with pytest.raises(CorruptMetadata):
        loaded(empty)


def test_poison_on_an_empty_device_is_not_overwritten_by_a_new_filesystem(empty: Core) -> None:
    inject(empty.pmem, place_of(empty, SECOND), 1)
    assert a_region(empty).is_formatted()


DB0, DB1, WAL0, WAL1 = (n << 40 for n in (1, 2, 3, 4))
GOOD = [(DB0, 100, 2), (DB1, 200, 2), (WAL0, 300, 1), (WAL1, 400, 1)]


@pytest.mark.parametrize(
    "superblock",
    [
        Superblock("daxemu-fs", VERSION + 1, 9, 2048, GOOD),
        Superblock("another", VERSION, 9, 2048, GOOD),
        Superblock("daxemu-fs", VERSION, 9, 4096, GOOD),
        Superblock("daxemu-fs", VERSION, 9, 2048, GOOD[1:]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, 2047, 2), *GOOD[1:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, -1, 2), *GOOD[1:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, 100, 0), *GOOD[1:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, 100, 2), (DB1, 101, 2), *GOOD[2:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, 5, 2), *GOOD[1:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [(DB0, 100, 2), (DB1 + 1, 200, 2), *GOOD[2:]]),
        Superblock("daxemu-fs", VERSION, 9, 2048, [*GOOD, (DB0, 500, 2), (DB1, 600, 2)]),
        "text",
        [1, 2, 3],
    ],
    ids=repr,
)
def test_a_superblock_that_makes_no_sense_is_refused(empty: Core, superblock: object) -> None:
    put_superblocks(empty, Superblock("daxemu-fs", VERSION, 9, 2048, GOOD))
    loaded(empty)
    put_superblocks(empty, superblock)
    with pytest.raises(CorruptMetadata):
        loaded(empty)
