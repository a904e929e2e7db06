"""From a device range to the damaged files. Metadata means shutdown. Removal is one call."""

from __future__ import annotations

import pytest

from daxemu.errors import CorruptMetadata, Shutdown
from daxemu.events import FileDamaged, FilesystemShutdown, encode
from daxemu.fs.rmap import METADATA_INO
from daxemu.mm.memory_failure import Incident, MappingRange
from daxemu.uapi import MF_MEM_PRE_REMOVE, PAGE_SIZE, U64_MAX, Pfn
from tests.support.core import Core, pages


def pfn_of(core: Core, ino: int, page: int) -> Pfn:
    (place,) = core.fs.device_ranges(ino, page * PAGE_SIZE, PAGE_SIZE)
    return core.pmem.pfn_of(place.start)


def notify(core: Core, offset: int, length: int, flags: int = 0) -> Incident:
    return core.mm.removal(
        core.pmem.dax.base_pfn, 0, lambda: core.pmem.dax.notify_failure(offset, length, flags)
    )


def test_one_page_of_one_file(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    (incident,) = core.fail(ino, 1)
    assert incident.mappings == [MappingRange(ino, 1, 1, pfn_of(core, ino, 1))]
    assert incident.error is None
    assert core.of_type(FileDamaged) == [FileDamaged(ino=ino, path="/f", offset=PAGE_SIZE, length=PAGE_SIZE)]


def test_every_owner_is_named_at_its_own_offset(core: Core) -> None:
    one = core.file(b"1", pages("ABC"))
    two = core.clone(one, b"2")
    three = core.file(b"3", pages("xxxxx"))
    core.fs.remap_file_range(one, PAGE_SIZE, three, 4 * PAGE_SIZE, PAGE_SIZE)
    (incident,) = core.fail(two, 1)
    pfn = pfn_of(core, one, 1)
    assert {(m.mapping, m.index, m.count, m.pfn) for m in incident.mappings} == {
        (one, 1, 1, pfn),
        (two, 1, 1, pfn),
        (three, 4, 1, pfn),
    }


def test_a_file_that_uses_the_block_twice_is_named_twice(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    core.fs.remap_file_range(ino, 0, ino, 2 * PAGE_SIZE, PAGE_SIZE)
    (incident,) = core.fail(ino, 0)
    assert sorted(m.index for m in incident.mappings) == [0, 2]


def test_a_range_of_any_length_is_one_mapping_range(core: Core) -> None:
    ino = core.file(data=bytes(600 * PAGE_SIZE))
    place = max(core.fs.device_ranges(ino, 0, 600 * PAGE_SIZE), key=lambda place: place.length)
    incident = notify(core, place.start, place.length)
    assert [m.count for m in incident.mappings] == [place.length // PAGE_SIZE]
    assert place.length >= 300 * PAGE_SIZE


def test_a_file_with_its_own_copy_is_not_named(core: Core) -> None:
    one = core.file(b"1", pages("AB"))
    two = core.clone(one, b"2")
    core.fs.write(two, 0, b"mine")
    (incident,) = core.fail(one, 0)
    assert [m.mapping for m in incident.mappings] == [one]


def test_a_failure_of_free_blocks_names_no_file(core: Core) -> None:
    incident = notify(core, 1000 * PAGE_SIZE, 10 * PAGE_SIZE)
    assert incident.mappings == []
    assert core.fs.shutdown_reason is None


def test_a_range_that_reaches_beyond_the_device_is_cut(core: Core) -> None:
    ino = core.file(data=bytes(core.fs.statfs().free * PAGE_SIZE))
    last = core.pmem.dax.size - PAGE_SIZE
    incident = notify(core, last, U64_MAX - last)
    assert [(m.mapping, m.count) for m in incident.mappings] == [(ino, 1)]
    assert notify(core, core.pmem.dax.size, PAGE_SIZE).mappings == []


@pytest.mark.parametrize("which", [0, 1, 2, -1])
def test_a_failure_of_metadata_is_a_shutdown_and_an_error(core: Core, which: int) -> None:
    ino = core.file(data=pages("A"))
    block = [owner.dev_block for owner in core.fs.rmap.owners(0, 1 << 40) if owner.ino == METADATA_INO][which]
    with pytest.raises(CorruptMetadata):
        notify(core, block * PAGE_SIZE, PAGE_SIZE)
    assert core.fs.shutdown_reason is not None
    assert len(core.of_type(FilesystemShutdown)) == 1
    with pytest.raises(Shutdown):
        core.fs.read(ino, 0, 1)


def test_a_range_over_metadata_and_files_names_the_files_too(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    incident = core.mm.draft(core.pmem.dax.base_pfn, 0, MF_MEM_PRE_REMOVE)
    with core.mm.during(incident), pytest.raises(CorruptMetadata):
        core.pmem.dax.notify_failure(0, core.pmem.dax.size, 0)
    assert [(m.mapping, m.index, m.count) for m in incident.mappings] == [(ino, 0, 2)]


def test_removal_is_one_call_for_everything_and_a_shutdown(core: Core) -> None:
    core.file(data=pages("ABC"))
    incident = notify(core, 0, U64_MAX, MF_MEM_PRE_REMOVE)
    assert incident.whole_device
    assert incident.mappings == []
    assert core.fs.shutdown_reason == "Device is about to be removed!"


def test_data_written_before_a_shutdown_is_kept(core: Core) -> None:
    ino = core.file(data=pages("ABC"))
    notify(core, 0, U64_MAX, MF_MEM_PRE_REMOVE)
    core.reopen()
    assert core.read(ino) == pages("ABC")


def test_the_event_of_a_file_with_a_name_that_is_not_utf8_can_be_encoded(core: Core) -> None:
    ino = core.file(b"\xff\xfe name", pages("A"))
    core.fail(ino, 0)
    (event,) = core.of_type(FileDamaged)
    assert b"name" in encode(event)
