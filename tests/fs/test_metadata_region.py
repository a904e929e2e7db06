"""The metadata region: two superblocks, two copies of every page, and the loss of each."""

from __future__ import annotations

import msgspec
import pytest

from daxemu.errors import CorruptMetadata, MediaError, NoSpace
from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_page import PAYLOAD, MetadataFile
from daxemu.fs.metadata_region import MetadataRegion, OnRewrite
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.superblock import SUPER_BLOCKS, VERSION, Superblock, _checksum
from daxemu.pmem.inject import inject
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core

DB, WAL = MetadataFile.DB, MetadataFile.WAL
FIRST, SECOND = 0, 1


@pytest.fixture
def empty(core: Core) -> Core:
    """Make an empty device of 2048 blocks."""
    core.without_filesystem()
    core.pmem.dax.discard(0, core.pmem.dax.size)
    return core


def a_region(core: Core, *on_rewrite: OnRewrite) -> MetadataRegion:
    return MetadataRegion(core.pmem.dax, Rmap(), Allocator(core.pmem.dax), *on_rewrite)


def formatted(core: Core, *on_rewrite: OnRewrite, pages: int = 4) -> MetadataRegion:
    region = a_region(core, *on_rewrite)
    region.format()
    for file in MetadataFile:
        region.grow(file, pages * PAYLOAD)
        region.write(file, 0, bytes([65 + file]) * pages * PAYLOAD)
    return region


def loaded(core: Core) -> MetadataRegion:
    region = a_region(core)
    region.load()
    return region


def place_of(core: Core, which: int) -> int:
    """The device offset of the first or the second superblock."""
    return a_region(core).superblocks.blocks[which].start * PAGE_SIZE


def copies(region: MetadataRegion, file: MetadataFile, page: int) -> list[int]:
    return [region._device_offset(file, replica, page) for replica in range(2)]


def lines(region: MetadataRegion, *, is_clean: bool = False) -> list[str]:
    return [damage.line for damage in region.damaged_pages(is_clean=is_clean)]


def put(core: Core, offset: int, data: bytes) -> None:
    core.pmem.media.view(offset, len(data))[:] = data


def put_superblocks(core: Core, superblock: object) -> None:
    """Write both superblocks, with a right checksum."""
    record = msgspec.msgpack.encode(superblock)
    sealed = len(record).to_bytes(4, "little") + _checksum(record) + record
    for which in (FIRST, SECOND):
        put(core, place_of(core, which), sealed)


# -- files


def test_an_empty_device_is_not_formatted(empty: Core) -> None:
    assert not a_region(empty).superblocks.is_formatted()
    a_region(empty).format()
    assert a_region(empty).superblocks.is_formatted()


def test_what_is_written_comes_back(empty: Core) -> None:
    region = formatted(empty)
    region.write(DB, 4000, b"x" * 5000)
    for seen in (region, loaded(empty)):
        assert seen.size(DB) == seen.size(WAL) == 4 * PAYLOAD
        assert seen.read(DB, 3999, 5002) == b"A" + b"x" * 5000 + b"A"
        assert seen.read(WAL, 0, 4 * PAYLOAD) == b"B" * 4 * PAYLOAD
        assert seen.read(DB, 100, 0) == b""


def test_every_block_of_it_is_known_as_metadata(empty: Core) -> None:
    rmap = Rmap()
    allocator = Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    region.grow(DB, 5 * PAYLOAD)
    assert {owner.ino for owner in rmap.owners(0, 2048)} == {METADATA_INO}
    assert sum(owner.length for owner in rmap.owners(0, 2048)) == 2 * SUPER_BLOCKS + 2 * 5
    assert allocator.free_blocks == 2048 - 2 * SUPER_BLOCKS - 2 * 5


def test_growing_keeps_what_is_there_and_never_shrinks(empty: Core) -> None:
    region = formatted(empty)
    region.grow(DB, 100 * PAYLOAD)
    region.grow(DB, 10)
    assert loaded(empty).read(DB, 0, 5 * PAYLOAD) == b"A" * 4 * PAYLOAD + bytes(PAYLOAD)
    assert region.size(DB) == 100 * PAYLOAD


def test_growing_beyond_what_is_free_changes_nothing(empty: Core) -> None:
    rmap, allocator = Rmap(), Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    links, free = rmap.link_count, allocator.free_blocks
    for pages in (1009, 5000):
        with pytest.raises(NoSpace):
            region.grow(DB, pages * PAYLOAD)
        assert (rmap.link_count, allocator.free_blocks, region.size(DB)) == (links, free, 0)
    allocator.settle()
    region.grow(DB, 1008 * PAYLOAD)


def test_a_file_in_hundreds_of_pieces_is_found_again(empty: Core) -> None:
    rmap, allocator = Rmap(), Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    for block in range(20, 2000, 2):
        if not rmap.proxy_of(block) and not list(rmap.owners(block, block + 1)):
            allocator.take(Range(block, block + 1))
    region.grow(DB, 400 * PAYLOAD)
    assert rmap.link_count > 700
    assert loaded(empty).size(DB) == 400 * PAYLOAD


# -- poison


@pytest.mark.parametrize("copy", [0, 1])
def test_a_page_that_cannot_be_read_is_read_from_the_other_copy(empty: Core, copy: int) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 2)[copy] + 700, 1)
    assert region.read(DB, 0, 4 * PAYLOAD) == b"A" * 4 * PAYLOAD
    assert lines(region) == ["metadata page 2 of db is poisoned: one copy is lost"]


def test_a_page_that_is_poison_twice_is_lost(empty: Core) -> None:
    region = formatted(empty)
    for at in copies(region, WAL, 1):
        inject(empty.pmem, at, 1)
    with pytest.raises(MediaError):
        region.read(WAL, 0, 4 * PAYLOAD)
    assert region.read(WAL, 0, PAYLOAD) == b"B" * PAYLOAD
    assert lines(region) == ["metadata page 1 of wal is poisoned: both copies are lost"]
    assert region.repair() == 0


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize(("offset", "length"), [(0, PAYLOAD), (100, 5), (0, 512), (4000, 200)])
def test_a_write_rewrites_the_bad_copies_of_its_page(
    empty: Core, copy: int, offset: int, length: int
) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 1)[copy], PAGE_SIZE)
    region.write(DB, PAYLOAD + offset, b"x" * length)
    assert lines(region) == []
    expected = bytearray(b"A" * 4 * PAYLOAD)
    expected[PAYLOAD + offset : PAYLOAD + offset + length] = b"x" * length
    assert region.read(DB, 0, 4 * PAYLOAD) == expected
    for replica in range(2):
        inject(empty.pmem, copies(region, DB, 1)[1 - replica], PAGE_SIZE)
        assert region.read(DB, PAYLOAD, PAYLOAD) == expected[PAYLOAD : 2 * PAYLOAD]
        empty.pmem.dax.clear_poison(copies(region, DB, 1)[1 - replica], PAGE_SIZE)


def test_a_partial_write_into_a_lost_page_is_refused_and_a_whole_write_replaces_it(empty: Core) -> None:
    region = formatted(empty)
    for at in copies(region, DB, 1):
        inject(empty.pmem, at, 1)
    with pytest.raises(MediaError):
        region.write(DB, PAYLOAD + 5, b"x")
    region.write(DB, PAYLOAD, b"x" * PAYLOAD)
    assert region.read(DB, PAYLOAD, PAYLOAD) == b"x" * PAYLOAD
    assert empty.pmem.badblocks.count == 0


def test_repair_writes_every_poisoned_page_from_its_other_copy(empty: Core) -> None:
    region = formatted(empty)
    inject(empty.pmem, copies(region, DB, 0)[0], 3 * PAGE_SIZE)
    inject(empty.pmem, copies(region, WAL, 3)[1], 1)
    inject(empty.pmem, place_of(empty, FIRST) + 5 * PAGE_SIZE, 1)
    inject(empty.pmem, place_of(empty, SECOND), 1)
    assert len(lines(region)) == 6
    assert region.repair() >= 6
    assert lines(region) == []
    assert empty.pmem.badblocks.count == 0
    assert loaded(empty).read(DB, 0, 4 * PAYLOAD) == b"A" * 4 * PAYLOAD


# -- checksums and generations


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("at", [0, 2000, PAYLOAD - 1, PAYLOAD, PAYLOAD + 5, PAYLOAD + 15, PAGE_SIZE - 1])
def test_any_corrupt_byte_of_one_copy_is_noticed_when_read_and_rewritten(
    empty: Core, copy: int, at: int
) -> None:
    rewritten: list[tuple[str, int, int, str]] = []
    region = formatted(empty, lambda *copy: rewritten.append(copy))
    flip(empty, copies(region, DB, 2)[copy] + at)
    assert lines(region, is_clean=True) == [f"metadata page 2 of db: copy {copy + 1} has a wrong checksum"]
    assert region.read(DB, 0, 4 * PAYLOAD) == b"A" * 4 * PAYLOAD
    assert rewritten == [("db", 2, copy + 1, "has a wrong checksum")]
    assert lines(region, is_clean=True) == []


@pytest.mark.parametrize("copy", [0, 1])
def test_a_copy_that_missed_a_write_is_older_and_rewritten(empty: Core, copy: int) -> None:
    region = formatted(empty)
    place = copies(region, WAL, 1)[copy]
    old = bytes(empty.pmem.media.view(place, PAGE_SIZE))
    region.write(WAL, PAYLOAD + 10, b"new")
    put(empty, place, old)
    assert lines(region, is_clean=True) == [
        f"metadata page 1 of wal: copy {copy + 1} is older than the other"
    ]
    assert lines(region) == []  # after a crash that is how a write ends that reached one copy
    assert region.read(WAL, PAYLOAD + 9, 5) == b"BnewB"
    assert lines(region, is_clean=True) == []


def test_a_page_in_the_place_of_another_is_corrupt(empty: Core) -> None:
    region = formatted(empty)
    for copy in (0, 1):
        put(
            empty,
            copies(region, DB, 1)[copy],
            bytes(empty.pmem.media.view(copies(region, DB, 2)[copy], PAGE_SIZE)),
        )
    with pytest.raises(MediaError, match="copy 1 has a wrong checksum, copy 2 has a wrong checksum"):
        region.read(DB, PAYLOAD, 1)


def test_a_log_that_grows_in_a_page_makes_good_what_became_of_it(empty: Core) -> None:
    """The page written last is written from memory, so a small commit checks no page twice."""
    region = formatted(empty)
    region.write(WAL, 0, b"first")
    for copy in (0, 1):
        flip(empty, copies(region, WAL, 0)[copy] + 2)
    region.write(WAL, 5, b"second")
    assert region.read(WAL, 0, PAYLOAD) == b"firstsecond" + b"B" * (PAYLOAD - 11)
    inject(empty.pmem, copies(region, WAL, 0)[0], 1)
    inject(empty.pmem, copies(region, WAL, 0)[1], 1)
    with pytest.raises(MediaError):
        region.write(WAL, 11, b"third")


def test_pages_of_a_file_in_pieces_are_written_where_they_are(empty: Core) -> None:
    rmap, allocator = Rmap(), Allocator(empty.pmem.dax)
    region = MetadataRegion(empty.pmem.dax, rmap, allocator)
    region.format()
    for block in range(16, 60, 3):
        allocator.take(Range(block, block + 1))
    region.grow(DB, 20 * PAYLOAD)
    data = bytes(range(256)) * 300
    region.write(DB, 100, data)
    for seen in (region, loaded(empty)):
        assert seen.read(DB, 0, 20 * PAYLOAD) == bytes(100) + data + bytes(20 * PAYLOAD - 100 - len(data))
    assert lines(region, is_clean=True) == []


@pytest.mark.parametrize("good", [0, 1])
def test_repair_takes_the_copy_that_is_right_for_each_page(empty: Core, good: int) -> None:
    region = formatted(empty)
    for page in range(4):
        flip(empty, copies(region, DB, page)[(good + page) % 2] + 7)
    inject(empty.pmem, copies(region, WAL, 0)[good], 1)
    assert region.repair() == 5
    assert lines(region, is_clean=True) == []
    assert loaded(empty).read(DB, 0, 4 * PAYLOAD) == b"A" * 4 * PAYLOAD


def test_a_read_only_region_rewrites_nothing(empty: Core) -> None:
    region = formatted(empty)
    flip(empty, copies(region, DB, 0)[0])
    region.is_read_only = True
    assert region.read(DB, 0, 5) == b"AAAAA"
    assert len(lines(region, is_clean=True)) == 1


def test_pages_of_a_later_mount_are_newer(empty: Core) -> None:
    region = formatted(empty)
    before = region._page_generation
    later = loaded(empty)
    later.begin()
    assert later._page_generation > before


# -- superblocks


@pytest.mark.parametrize("torn", [FIRST, SECOND])
@pytest.mark.parametrize("keep", [0, 3, 10, 25])
def test_a_torn_superblock_is_made_up_for_by_the_other(empty: Core, torn: int, keep: int) -> None:
    formatted(empty)
    put(empty, place_of(empty, torn) + keep, b"\xaa" * (PAGE_SIZE - keep))
    assert loaded(empty).size(WAL) == 4 * PAYLOAD


def test_any_corrupt_byte_of_a_superblock_is_noticed(empty: Core) -> None:
    formatted(empty)
    first, second = place_of(empty, FIRST), place_of(empty, SECOND)
    used = 20 + int.from_bytes(bytes(empty.pmem.media.view(first, 4)), "little")
    for at in range(used):
        flip(empty, first + at)
        assert loaded(empty).size(DB) == 4 * PAYLOAD
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
    region.grow(DB, 9 * PAYLOAD)
    put(empty, second, old)
    assert loaded(empty).size(DB) == 9 * PAYLOAD
    put(empty, first, old)
    assert loaded(empty).size(DB) == 4 * PAYLOAD


@pytest.mark.parametrize("bad", [FIRST, SECOND])
def test_a_poisoned_superblock_is_made_up_for_and_stays_for_fsck_to_find(empty: Core, bad: int) -> None:
    region = formatted(empty)
    inject(empty.pmem, place_of(empty, bad), 1)
    region.grow(DB, 9 * PAYLOAD)
    again = loaded(empty)
    assert again.size(DB) == 9 * PAYLOAD
    assert [line for line in lines(again) if "superblock" in line]
    assert again.repair() == 1
    inject(empty.pmem, place_of(empty, 1 - bad), 1)
    assert loaded(empty).size(DB) == 9 * PAYLOAD


def test_two_poisoned_superblocks_are_corrupt_metadata_but_not_an_empty_device(empty: Core) -> None:
    formatted(empty)
    for which in (FIRST, SECOND):
        inject(empty.pmem, place_of(empty, which), 1)
    assert a_region(empty).superblocks.is_formatted()
    with pytest.raises(CorruptMetadata):
        loaded(empty)


def test_poison_on_an_empty_device_is_not_overwritten_by_a_new_filesystem(empty: Core) -> None:
    inject(empty.pmem, place_of(empty, SECOND), 1)
    assert a_region(empty).superblocks.is_formatted()


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
