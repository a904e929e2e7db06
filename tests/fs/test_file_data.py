"""The bytes of files: copy on write, the effect of each kind of store on poison, and zeros beyond the end."""

from __future__ import annotations

import pytest

from daxemu.errors import MediaError, NoSpace
from daxemu.events import PoisonCleared, StoreLost
from daxemu.pmem.inject import inject
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core, pages


def media_of(core: Core, ino: int, page: int = 0) -> bytes:
    """Return the media bytes of a page of a file."""
    (place,) = core.fs.device_ranges(ino, page * PAGE_SIZE, PAGE_SIZE)
    return bytes(core.pmem.dax.direct_access(place.start, PAGE_SIZE))


def test_holes_read_as_zeros_and_have_no_blocks(core: Core) -> None:
    ino = core.file()
    free = core.fs.statfs().free
    core.fs.write(ino, 10 * PAGE_SIZE, b"x")
    assert core.read(ino) == bytes(10 * PAGE_SIZE) + b"x"
    assert core.fs.statfs().free == free - 1


def test_a_read_of_one_run_is_a_view_of_the_media(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    view = core.fs.read(ino, 100, 5000)
    assert isinstance(view, memoryview)
    assert bytes(view) == pages("AB")[100:5100]
    view.release()


def test_a_read_over_runs_and_holes_joins_them(core: Core) -> None:
    ino = core.file(data=pages("A"))
    core.fs.write(ino, 2 * PAGE_SIZE, pages("C"))
    assert bytes(core.fs.read(ino, 4000, 4400)) == b"A" * 96 + bytes(PAGE_SIZE) + b"C" * 208


def test_an_overwrite_stays_in_its_blocks(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    before = core.fs.device_ranges(ino, 0, 3 * PAGE_SIZE)
    core.fs.write(ino, 5000, b"zz")
    assert core.fs.device_ranges(ino, 0, 3 * PAGE_SIZE) == before
    assert core.read(ino)[4999:5003] == b"BzzB"


def test_a_partial_write_to_a_shared_block_copies_the_rest_of_it(core: Core) -> None:
    one = core.file(b"1", pages("ABC"))
    two = core.clone(one, b"2")
    core.fs.write(two, PAGE_SIZE + 10, b"xyz")
    assert core.read(two) == b"A" * PAGE_SIZE + b"B" * 10 + b"xyz" + b"B" * 4083 + b"C" * PAGE_SIZE
    assert core.read(one) == pages("ABC")


def test_only_the_written_blocks_stop_being_shared(core: Core) -> None:
    one = core.file(b"1", pages("ABC"))
    two = core.clone(one, b"2")
    free = core.fs.statfs().free
    core.fs.write(two, PAGE_SIZE + 10, b"xyz")
    assert core.fs.statfs().free == free - 1
    for page, shared in ((0, True), (1, False), (2, True)):
        places = [core.fs.device_ranges(ino, page * PAGE_SIZE, PAGE_SIZE) for ino in (one, two)]
        assert (places[0] == places[1]) is shared


def test_the_last_owner_writes_in_place(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.fs.unlink(1, b"1")
    core.fs.fsync()  # before the commit the blocks are still shared in the store
    before = core.fs.device_ranges(two, 0, 2 * PAGE_SIZE)
    core.fs.write(two, 0, pages("xy"))
    assert core.fs.device_ranges(two, 0, 2 * PAGE_SIZE) == before


def test_a_write_over_one_block_twice_in_one_file_keeps_both_pages_right(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    core.fs.remap_file_range(ino, 0, ino, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    core.fs.write(ino, 100, b"-" * (2 * PAGE_SIZE))
    assert core.read(ino) == b"A" * 100 + b"-" * 2 * PAGE_SIZE + b"A" * (PAGE_SIZE - 100) + pages("B")


def test_one_bad_sector_makes_exactly_its_page_unreadable(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    (place,) = core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE)
    inject(core.pmem, place.start + 1024, 1)
    assert bytes(core.fs.read(ino, 0, PAGE_SIZE)) == pages("A")
    assert bytes(core.fs.read(ino, 2 * PAGE_SIZE, PAGE_SIZE)) == pages("C")
    for offset, length in ((PAGE_SIZE, 1), (2 * PAGE_SIZE - 1, 1), (0, 3 * PAGE_SIZE), (PAGE_SIZE - 1, 2)):
        with pytest.raises(MediaError) as caught:
            core.fs.read(ino, offset, length)
        assert [tuple(r) for r in caught.value.ranges] == [(place.start + 1024, place.start + 1536)]


@pytest.mark.parametrize(("offset", "length"), [(5000, 10), (4095, 2), (8191, 2), (0, 4097), (4097, 8000)])
def test_a_partial_write_over_poison_fails_and_writes_nothing(core: Core, offset: int, length: int) -> None:
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 1)
    with pytest.raises(MediaError):
        core.fs.write(ino, offset, b"x" * length)
    assert media_of(core, ino, 0) == pages("A")
    assert media_of(core, ino, 2) == pages("C")
    assert core.pmem.badblocks.count == 8


def test_a_write_of_the_whole_page_clears_the_poison(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 1)
    (place,) = core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE)
    core.fs.write(ino, 100, b"x" * (2 * PAGE_SIZE - 100))
    assert core.read(ino) == b"A" * 100 + b"x" * (2 * PAGE_SIZE - 100) + pages("C")
    assert core.pmem.badblocks.count == 0
    assert core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE) == [place]
    (event,) = core.of_type(PoisonCleared)
    assert isinstance(event, PoisonCleared)
    assert (event.offset, event.length, event.by) == (place.start, PAGE_SIZE, "write")


def test_a_write_that_reaches_only_the_end_of_the_file_does_not_cover_its_last_block(core: Core) -> None:
    ino = core.file(data=b"A" * 100)
    core.poison(ino, 0)
    with pytest.raises(MediaError):
        core.fs.write(ino, 0, b"x" * 100)
    core.fs.write(ino, 0, b"x" * PAGE_SIZE)
    assert core.read(ino) == b"x" * PAGE_SIZE


def test_a_whole_page_over_shared_poison_goes_to_a_new_block(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.poison(one, 0)
    core.fs.write(two, 0, pages("x"))
    assert core.read(two) == pages("xB")
    with pytest.raises(MediaError):
        core.read(one)
    assert core.pmem.badblocks.count == 8
    assert core.of_type(PoisonCleared) == []


def test_a_partial_write_to_shared_poison_fails(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.poison(one, 0)
    free = core.fs.statfs().free
    with pytest.raises(MediaError):
        core.fs.write(two, 10, b"x")
    assert core.fs.statfs().free == free
    assert core.fs.device_ranges(two, 0, PAGE_SIZE) == core.fs.device_ranges(one, 0, PAGE_SIZE)


def test_a_store_from_the_cache_to_poison_is_lost_and_reported(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 1)
    assert core.fs.write(ino, 0, pages("xyz"), from_cache=True) == 3 * PAGE_SIZE
    assert media_of(core, ino, 0) == pages("x")
    assert media_of(core, ino, 2) == pages("z")
    with pytest.raises(MediaError):
        core.fs.read(ino, PAGE_SIZE, 1)
    (event,) = core.of_type(StoreLost)
    assert isinstance(event, StoreLost)
    assert (event.path, event.offset, event.length) == ("/f", PAGE_SIZE, PAGE_SIZE)
    assert core.of_type(PoisonCleared) == []


def test_a_lost_store_can_be_an_error_after_the_rest_was_written(core: Core) -> None:
    core.fs.lost_store_is_eio = True
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 0)
    with pytest.raises(MediaError, match="lost to poison"):
        core.fs.write(ino, 0, pages("xyz"), from_cache=True)
    assert media_of(core, ino, 2) == pages("z")
    core.fs.write(ino, PAGE_SIZE, pages("y"), from_cache=True)


def test_a_write_without_room_changes_nothing(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.fs.write(core.file(b"filler"), 0, bytes((core.fs.statfs().free - 1) * PAGE_SIZE))
    with pytest.raises(NoSpace):
        core.fs.write(two, 0, pages("xy"))
    assert core.read(two) == core.read(one) == pages("AB")
    assert core.fs.statfs().free == 1
    core.fs.write(two, 0, pages("x"))
    assert core.read(two) == pages("xB")
    core.fs.write(one, 0, pages("y"))  # the last owner of A


def test_a_file_cut_and_grown_again_reads_zeros(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    core.fs.set_size(ino, 100)
    core.fs.set_size(ino, 2 * PAGE_SIZE)
    assert core.read(ino) == b"A" * 100 + bytes(2 * PAGE_SIZE - 100)
    assert media_of(core, ino) == b"A" * 100 + bytes(PAGE_SIZE - 100)


def test_cutting_inside_a_shared_block_leaves_other_owners_unchanged(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.fs.set_size(two, 5000)
    core.fs.set_size(two, 2 * PAGE_SIZE)
    assert core.read(one) == pages("AB")
    assert core.read(two)[5000:] == bytes(2 * PAGE_SIZE - 5000)


def test_cutting_inside_poison_changes_nothing_and_at_its_edge_works(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    core.poison(ino, 1)
    with pytest.raises(MediaError):
        core.fs.set_size(ino, 5000)
    assert core.fs.names.get(ino).size == 3 * PAGE_SIZE
    assert len(core.fs.device_ranges(ino, 0, 3 * PAGE_SIZE)) == 1
    core.fs.set_size(ino, PAGE_SIZE)
    assert core.read(ino) == pages("A")


def test_freed_bad_blocks_are_not_allocated(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    (place,) = core.fs.device_ranges(ino, 0, PAGE_SIZE)
    core.poison(ino, 0)
    core.fs.unlink(1, b"f")
    assert core.fs.statfs().available == core.fs.statfs().free - 1
    again = core.file(b"g", bytes(core.fs.statfs().available * PAGE_SIZE))
    assert not any(r.clip(*place) for r in core.fs.device_ranges(again, 0, 1 << 30))
    assert core.fs.statfs().available == 0
