"""inject, uninject and scrub: rounding, latent poison, and the bytes after clearing."""

from __future__ import annotations

import pytest

from daxemu.errors import InvalidArgument, MediaError
from daxemu.pmem.inject import check_range, failed_pages, inject, scrub, uninject
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core

AT = 1000 * PAGE_SIZE


@pytest.fixture
def full(core: Core) -> Core:
    """Write four pages of letters from AT on, in free space."""
    core.sound = False
    core.pmem.dax.reserve(AT, 4 * PAGE_SIZE)
    core.pmem.dax.direct_access(AT, 4 * PAGE_SIZE)[:] = b"ABCD" * PAGE_SIZE
    return core


@pytest.mark.parametrize(
    ("offset", "length", "bad"),
    [
        (0, 1, (0, 512)),
        (511, 1, (0, 512)),
        (511, 2, (0, 1024)),
        (512, 512, (512, 1024)),
        (100, 5000, (0, 5120)),
    ],
)
def test_poison_is_rounded_out_to_sectors(core: Core, offset: int, length: int, bad: tuple[int, int]) -> None:
    assert inject(core.pmem, AT + offset, length) == Range(AT + bad[0], AT + bad[1])
    assert core.pmem.badblocks.count == (bad[1] - bad[0]) // 512
    assert core.pmem.dax.poisoned(0, core.pmem.dax.size) == [Range(AT + bad[0], AT + bad[1])]


@pytest.mark.parametrize(
    ("offset", "length", "says"),
    [
        (-1, 10, "negative"),
        (0, 0, "not positive"),
        (0, -5, "not positive"),
        (8 << 20, 1, "past the end"),
        (0, (8 << 20) + 1, "past the end"),
    ],
)
def test_a_range_outside_the_device_is_refused_and_changes_nothing(
    core: Core, offset: int, length: int, says: str
) -> None:
    for verb in (inject, uninject):
        with pytest.raises(InvalidArgument, match=says):
            verb(core.pmem, offset, length)
    assert len(core.pmem.media.poison) == 0
    with pytest.raises(InvalidArgument, match=says):
        check_range(offset, length, 8 << 20, "the device")


def test_the_last_byte_can_be_poisoned(core: Core) -> None:
    core.without_filesystem()
    assert inject(core.pmem, (8 << 20) - 1, 1) == Range((8 << 20) - 512, 8 << 20)


def test_latent_poison_is_found_by_a_scrub(core: Core) -> None:
    inject(core.pmem, AT, 512, latent=True)
    inject(core.pmem, AT + 512, 512)
    inject(core.pmem, AT + 1024, 512, latent=True)
    assert core.pmem.badblocks.count == 1
    with pytest.raises(MediaError):
        core.pmem.dax.direct_access(AT, 1)
    assert scrub(core.pmem) == [Range(AT, AT + 512), Range(AT + 1024, AT + 1536)]
    assert scrub(core.pmem) == []
    assert core.pmem.badblocks.count == 3


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (100, 600), (0, PAGE_SIZE), (512, PAGE_SIZE), (3000, 9000), (0, 4 * PAGE_SIZE), (4000, 100)],
)
def test_cleared_sectors_are_zero_and_other_sectors_are_unchanged(
    full: Core, offset: int, length: int
) -> None:
    bad = inject(full.pmem, AT + offset, length)
    assert uninject(full.pmem, AT + offset, length) == [bad]
    full.pmem.dax.reserve(AT, 4 * PAGE_SIZE)
    expected = bytearray(b"ABCD" * PAGE_SIZE)
    expected[bad.start - AT : bad.end - AT] = bytes(bad.length)
    assert bytes(full.pmem.dax.direct_access(AT, 4 * PAGE_SIZE)) == expected
    assert full.pmem.badblocks.count == 0


def test_uninject_returns_exactly_the_poisoned_ranges(full: Core) -> None:
    inject(full.pmem, AT, 512)
    inject(full.pmem, AT + 2 * PAGE_SIZE, 512, latent=True)
    assert uninject(full.pmem, AT, 3 * PAGE_SIZE) == [
        Range(AT, AT + 512),
        Range(AT + 2 * PAGE_SIZE, AT + 2 * PAGE_SIZE + 512),
    ]
    assert uninject(full.pmem, AT, 3 * PAGE_SIZE) == []
    assert bytes(full.pmem.dax.direct_access(AT + PAGE_SIZE, PAGE_SIZE)) == b"ABCD" * (PAGE_SIZE // 4)


def test_a_part_of_a_poisoned_page_can_be_cleared(full: Core) -> None:
    inject(full.pmem, AT, PAGE_SIZE)
    assert uninject(full.pmem, AT + 1024, 512) == [Range(AT + 1024, AT + 1536)]
    assert bytes(full.pmem.dax.direct_access(AT + 1024, 512)) == bytes(512)
    assert full.pmem.dax.is_poisoned(AT, 1024)
    assert full.pmem.dax.is_poisoned(AT + 1536, 1)


@pytest.mark.parametrize(
    ("start", "end", "first", "count"), [(0, 512, 0, 1), (4095, 4097, 0, 2), (4096, 12288, 1, 2)]
)
def test_failed_pages_hold_every_poisoned_byte(
    core: Core, start: int, end: int, first: int, count: int
) -> None:
    base = core.pmem.dax.base_pfn
    assert failed_pages(core.pmem, Range(start, end)) == (base + first, count)
