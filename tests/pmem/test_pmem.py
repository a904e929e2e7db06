"""Pmem: probing finds poison, pfns and offsets agree, an altmap shifts both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daxemu.errors import InvalidArgument, NoDevice
from daxemu.events import Outcome
from daxemu.mm.memory_failure import MappingRange
from daxemu.mm.pfn_kinds import PfnKind
from daxemu.pmem.inject import failed_pages, inject
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core, core_at, pages

BASE, ALTMAP = 0x240000, 1 << 20


@pytest.fixture
def altmap_core() -> Iterator[Core]:
    """A device with the memmap in the first MiB of the device."""
    with core_at(size=16 << 20, base_pfn=BASE, altmap=ALTMAP) as core:
        yield core


def test_pfn_of_and_offset_of_are_inverse(core: Core) -> None:
    for offset in (0, PAGE_SIZE, (8 << 20) - PAGE_SIZE):
        assert core.pmem.offset_of(core.pmem.pfn_of(offset)) == offset
    assert core.pmem.pfn_of(PAGE_SIZE + 5) == core.pmem.pfn_of(PAGE_SIZE)


def test_probing_finds_all_poison_even_latent(core: Core) -> None:
    inject(core.pmem, 1000 * PAGE_SIZE, 512)
    inject(core.pmem, 1001 * PAGE_SIZE, 512, latent=True)
    core.reopen()
    assert core.pmem.badblocks.sysfs_text() == "8000 1\n8008 1\n"


@pytest.mark.parametrize("struct_pages", [True, False])
def test_memory_of_a_detached_device_is_enxio(struct_pages: bool) -> None:
    with core_at(struct_pages=struct_pages) as core:
        pfn = core.pmem.pfn_of(0)
        core.fail(core.file(data=pages("a")), 0)
        core.without_filesystem()
        core.pmem.make_struct_pages()
        core.pmem.detach(core.mm)
        with pytest.raises(NoDevice, match="outside kernel control"):
            core.mm.memory_failure(pfn, 1, 0)
        if core.pmem.pgmap is not None:
            assert core.pmem.pgmap.memmap is not None
            assert core.pmem.pgmap.memmap.kind(pfn) is PfnKind.HOLE
        core.pmem.attach(core.mm)
        assert core.mm.memory_failure(pfn, 1, 0).parts != []


def test_an_altmap_shifts_the_data(altmap_core: Core) -> None:
    pmem = altmap_core.pmem
    assert pmem.dax.size == 15 << 20
    assert pmem.pfn_of(0) == BASE + ALTMAP // PAGE_SIZE
    assert pmem.offset_of(BASE) == -ALTMAP
    pmem.dax.reserve(0, PAGE_SIZE)
    pmem.dax.direct_access(0, 5)[:] = b"hello"
    assert bytes(pmem.media.view(ALTMAP, 5)) == b"hello"
    altmap_core.sound = False


def test_poison_and_badblocks_count_from_the_first_data_byte(altmap_core: Core) -> None:
    pmem = altmap_core.pmem
    inject(pmem, 2000 * PAGE_SIZE, 512)
    assert pmem.badblocks.sysfs_text() == "16000 1\n"
    assert (altmap_core.path / "poison").read_text().split("\n")[0] == f"{16000 + ALTMAP // 512} 1"
    altmap_core.reopen()
    assert altmap_core.pmem.badblocks.sysfs_text() == "16000 1\n"
    assert altmap_core.pmem.dax.clear_poison(2000 * PAGE_SIZE, 1)
    assert (altmap_core.path / "poison").read_text().strip() == ""


def test_a_failure_behind_an_altmap_reaches_the_file(altmap_core: Core) -> None:
    ino = altmap_core.file(data=pages("AB"))
    (incident,) = altmap_core.fail(ino, 1)
    (place,) = altmap_core.fs.device_ranges(ino, PAGE_SIZE, PAGE_SIZE)
    pfn = BASE + (ALTMAP + place.start) // PAGE_SIZE
    assert incident.pfn == pfn
    assert incident.mappings == [MappingRange(ino, 1, 1, pfn)]


def test_a_failure_in_the_altmap_is_not_recoverable(altmap_core: Core) -> None:
    """As in memory_failure_dev_pagemap(): -ENXIO, logged and counted as "dax page: Failed"."""
    incident = altmap_core.mm.memory_failure(BASE, ALTMAP // PAGE_SIZE, 0)
    assert isinstance(incident.error, NoDevice)
    assert incident.mappings == []
    assert altmap_core.mm.action_result(incident, 0) is Outcome.FAILED
    assert altmap_core.pmem.pgmap is not None
    with pytest.raises(InvalidArgument):
        altmap_core.pmem.memory_failure(altmap_core.pmem.pgmap, BASE, 1, 0)


def test_the_whole_filesystem_works_behind_an_altmap(altmap_core: Core) -> None:
    ino = altmap_core.file(data=pages("ABC"))
    altmap_core.poison(ino, 1)
    altmap_core.reopen()
    assert [damage.offset for damage in altmap_core.fs.damaged()] == [PAGE_SIZE]
    altmap_core.fs.write(ino, PAGE_SIZE, pages("x"))
    assert altmap_core.read(ino) == pages("AxC")


def test_failed_pages_count_from_the_first_data_page(altmap_core: Core) -> None:
    bad = inject(altmap_core.pmem, 2000 * PAGE_SIZE + 700, 1)
    assert failed_pages(altmap_core.pmem, bad) == (BASE + ALTMAP // PAGE_SIZE + 2000, 1)
