"""The PMDs (2 MiB) of a file mapped by one fault each: MappingRange.pmds of a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from daxemu.pmem.inject import inject
from daxemu.ranges import Range
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, PAGE_SIZE, PMD_SIZE, Ino
from daxemu.uapi import HPAGE_PMD_NR as NR
from tests.support.core import Core, core_at


@pytest.fixture
def core() -> Iterator[Core]:
    with core_at(size=32 * PMD_SIZE, align=PMD_SIZE) as made:
        yield made


@pytest.fixture
def ino(core: Core) -> Ino:
    """A file of 5 MiB: two whole PMDs and a half."""
    return core.file(data=os.urandom(5 * PMD_SIZE // 2))


def pmds(core: Core, ino: Ino, page: int, pages: int = 1) -> list[Range]:
    """Return the PMDs of the file in a failure of the pages."""
    return [
        part
        for failure in core.fail(ino, page, pages)
        for failed in failure.mappings
        if failed.mapping == ino
        for part in failed.pmds
    ]


@pytest.mark.parametrize(("page", "expected"), [(3, [Range(0, NR)]), (NR, [Range(NR, 2 * NR)]), (2 * NR, [])])
def test_a_failed_page_has_its_pmd_if_the_file_has_all_of_the_2_mib(
    core: Core, ino: Ino, page: int, expected: list[Range]
) -> None:
    assert pmds(core, ino, page) == expected


def test_a_long_failure_has_all_its_pmds(core: Core, ino: Ino) -> None:
    assert pmds(core, ino, 100, 2 * NR) == [Range(0, 2 * NR)]


def test_a_pmd_may_end_with_a_partial_page(core: Core) -> None:
    ino = core.file(data=bytes(PMD_SIZE - PAGE_SIZE + 1))
    assert pmds(core, ino, 0) == [Range(0, NR)]


def test_a_device_with_4k_alignment_has_no_pmds() -> None:
    with core_at(size=16 * PMD_SIZE) as core:
        for run in core.fs.allocator.free_ranges():
            if part := run.clip(0, 3 * NR):
                core.fs.allocator.take(part)
        ino = core.file(data=bytes(2 * PMD_SIZE))
        assert core.fs.extents_of(ino).lookup(0, 1)[0].dev_block == 3 * NR
        assert pmds(core, ino, 0) == []
        core.sound = False  # blocks taken without a file


def test_another_bad_block_splits_its_pmd(core: Core, ino: Ino) -> None:
    core.poison(ino, 3)
    assert pmds(core, ino, 4) == []
    assert pmds(core, ino, NR + 4) == [Range(NR, 2 * NR)]


def test_latent_poison_does_not_split_its_pmd(core: Core, ino: Ino) -> None:
    core.poison(ino, 3, latent=True)
    assert pmds(core, ino, 4) == [Range(0, NR)]


def test_a_punched_page_splits_its_pmd(core: Core, ino: Ino) -> None:
    core.fs.fallocate(ino, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 9 * PAGE_SIZE, PAGE_SIZE)
    assert pmds(core, ino, 4) == []
    assert pmds(core, ino, NR + 4) == [Range(NR, 2 * NR)]


def test_a_new_end_inside_a_pmd_splits_it_until_the_file_grows_again(core: Core, ino: Ino) -> None:
    core.fs.set_size(ino, PMD_SIZE + PAGE_SIZE)
    assert pmds(core, ino, NR) == []
    core.fs.commit()
    core.fs.write(ino, PMD_SIZE + PAGE_SIZE, bytes(PMD_SIZE - PAGE_SIZE))
    core.pmem.dax.clear_poison(0, core.pmem.dax.size)
    assert pmds(core, ino, NR) == [Range(NR, 2 * NR)]


def test_a_clone_of_a_whole_file_has_the_same_pmds(core: Core, ino: Ino) -> None:
    clone = core.clone(ino, b"clone")
    (failure,) = core.fail(ino, 3)
    assert {(m.mapping, m.pmds) for m in failure.mappings} == {(i, (Range(0, NR),)) for i in (ino, clone)}


def test_a_clone_of_a_part_or_at_another_offset_has_no_pmds(core: Core, ino: Ino) -> None:
    shifted, part = core.file(b"shifted"), core.file(b"part")
    core.fs.remap_file_range(ino, 0, shifted, PAGE_SIZE, PMD_SIZE)
    core.fs.remap_file_range(ino, PMD_SIZE, part, 0, PAGE_SIZE)
    (failure,) = core.fail(ino, 3)
    assert {(m.mapping, m.pmds) for m in failure.mappings} == {(ino, (Range(0, NR),)), (shifted, ())}
    (failure,) = core.fail(ino, NR)
    assert {(m.mapping, m.pmds) for m in failure.mappings} == {(ino, ()), (part, ())}


def test_copy_on_write_of_a_page_splits_the_pmds_of_both_files(core: Core, ino: Ino) -> None:
    clone = core.clone(ino, b"clone")
    core.fs.write(ino, 9 * PAGE_SIZE, bytes(PAGE_SIZE))
    core.fs.commit()
    assert pmds(core, ino, 3) == []
    (failure,) = core.fail(clone, 3)
    assert [m.pmds for m in failure.mappings] == [(), ()]


def test_2_mib_that_are_not_contiguous_have_no_pmd(core: Core) -> None:
    free = core.fs.allocator.free_ranges()
    for run in free:
        whole = run.inner(NR)
        for unit in range(whole.start, whole.end, NR):
            core.fs.allocator.take(Range(unit, unit + 1))
    ino = core.file(data=bytes(PMD_SIZE))
    assert pmds(core, ino, 0) == []
    core.sound = False  # blocks taken without a file


def test_a_failure_of_metadata_names_no_mapping(core: Core) -> None:
    inject(core.pmem, 0, PAGE_SIZE)
    assert core.mm.memory_failure(core.pmem.dax.base_pfn, 1, 0).mappings == []
    core.sound = False
