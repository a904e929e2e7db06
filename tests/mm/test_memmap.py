"""The memmap: the kind of each pfn, known without reading a struct page, and PG_hwpoison by range."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from mmap_ninja import numpy as ninja

from daxemu.errors import Busy, NoDevice, NoSpace
from daxemu.mm.memmap import Memmap
from daxemu.mm.memmap_arrays import PAGES_PER_SECTION
from daxemu.mm.pfn_kinds import PfnKind
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet

S = PAGES_PER_SECTION
BASE = 32 * S
SIX_T = (6 << 40) >> 12


def allocated(directory: Path) -> int:
    """Return the allocated size of all files in ``directory``, in bytes."""
    return sum(p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="daxemu-memmap-", dir="/dev/shm"))
    yield path / "struct_page"
    shutil.rmtree(path)


def private(path: Path) -> PrivatePath:
    return PrivatePath.at(path.parent) / path.name


def a_device(directory: Path, pages: int, altmap: int = 0, at: int = BASE) -> Memmap:
    memmap = Memmap.create(private(directory), Range(at, at + pages))
    memmap.add_pages(Range(at, at + pages), altmap)
    memmap.memmap_init_zone_device(Range(at, at + pages))
    return memmap


def walked(memmap: Memmap) -> list[tuple[int, int, PfnKind, bool]]:
    return [(*pages, kind, bad) for pages, kind, bad in memmap.walk()]


def fill_with_garbage(memmap: Memmap, directory: Path) -> None:
    """Fill the struct pages with the value of uninitialised struct pages (page_init_poison())."""
    ninja.open_existing(directory / "pages", mode="r+")[:] = 0xFF


# -- the kinds of pfn


@pytest.fixture
def mixed(directory: Path) -> Memmap:
    """Return a memmap with each kind of pfn: hole, offline, and a device with an altmap.

    The device begins and ends inside sections.
    """
    memmap = Memmap.create(private(directory), Range(BASE, BASE + 8 * S))
    fill_with_garbage(memmap, directory)
    memmap.add_offline(Range(BASE, BASE + S))
    memmap.add_pages(Range(BASE + 2 * S + 100, BASE + 5 * S + 50), altmap_pages=64)
    memmap.memmap_init_zone_device(Range(BASE + 2 * S + 100, BASE + 4 * S + 7))
    return memmap


KINDS = [
    (0, BASE, PfnKind.HOLE, False),
    (BASE, BASE + S, PfnKind.OFFLINE, False),
    (BASE + S, BASE + 2 * S, PfnKind.HOLE, False),
    (BASE + 2 * S, BASE + 2 * S + 100, PfnKind.PARTIAL, False),
    (BASE + 2 * S + 100, BASE + 2 * S + 164, PfnKind.RESERVED, False),
    (BASE + 2 * S + 164, BASE + 4 * S + 7, PfnKind.ZONE_DEVICE, False),
    (BASE + 4 * S + 7, BASE + 5 * S + 50, PfnKind.UNINITIALISED, False),
    (BASE + 5 * S + 50, BASE + 6 * S, PfnKind.PARTIAL, False),
    (BASE + 6 * S, BASE + 8 * S, PfnKind.HOLE, False),
]


def test_walk_names_every_kind_and_reads_no_garbage(mixed: Memmap) -> None:
    assert walked(mixed) == KINDS


def test_kind_of_each_pfn_equals_the_walk(mixed: Memmap) -> None:
    for start, end, kind, _ in KINDS:
        for pfn in (start, (start + end) // 2, end - 1):
            assert mixed.kind(pfn) is kind
            assert mixed.pfn_zone_device(pfn) == (kind is PfnKind.ZONE_DEVICE)
            if kind is PfnKind.ZONE_DEVICE:
                assert not mixed.page_hwpoison(pfn)
            else:
                with pytest.raises(NoDevice, match=kind.value):
                    mixed.page_hwpoison(pfn)


def test_counts_equal_the_walk(mixed: Memmap) -> None:
    totals: dict[tuple[PfnKind, bool], int] = {}
    for pages, kind, bad in mixed.walk():
        totals[kind, bad] = totals.get((kind, bad), 0) + pages.length
    assert mixed.count() == totals
    assert sum(totals.values()) == BASE + 8 * S


def test_set_hwpoison_of_everything_marks_only_initialised_struct_pages(mixed: Memmap) -> None:
    mixed.set_hwpoison(Range(0, BASE + 8 * S))
    assert [each[:3] for each in walked(mixed)] == [each[:3] for each in KINDS]
    assert [kind for _, _, kind, bad in walked(mixed) if bad] == [PfnKind.ZONE_DEVICE]


def test_further_initialisation_clears_garbage_and_keeps_hwpoison(mixed: Memmap) -> None:
    mixed.set_hwpoison(Range(BASE + 4 * S, BASE + 4 * S + 3))
    mixed.memmap_init_zone_device(Range(BASE + 2 * S + 100, BASE + 5 * S + 50))
    assert mixed.kind(BASE + 5 * S + 49) is PfnKind.ZONE_DEVICE
    assert [(s, e) for s, e, _, bad in walked(mixed) if bad] == [(BASE + 4 * S, BASE + 4 * S + 3)]


def test_struct_pages_cannot_be_added_twice(mixed: Memmap) -> None:
    with pytest.raises(Busy):
        mixed.add_pages(Range(BASE + 3 * S, BASE + 7 * S))
    with pytest.raises(Busy):
        mixed.add_offline(Range(BASE + S - 1, BASE + S + 1))
    with pytest.raises(NoDevice):
        mixed.add_pages(Range(BASE + 7 * S, BASE + 9 * S))
    assert walked(mixed) == KINDS


def test_struct_pages_are_removed_with_the_device_and_can_be_added_again(directory: Path) -> None:
    memmap = Memmap.create(private(directory), Range(0, 6 * S))
    memmap.add_pages(Range(10, 3 * S + 5))
    memmap.add_pages(Range(3 * S + 5, 4 * S + 1))
    memmap.add_pages(Range(5 * S, 6 * S), altmap_pages=7)
    memmap.memmap_init_zone_device(Range(0, 6 * S))
    memmap.set_hwpoison(Range(0, 6 * S))
    memmap.remove_pages(Range(0, 3 * S + 5))
    assert walked(memmap) == [
        (0, 3 * S, PfnKind.HOLE, False),
        (3 * S, 3 * S + 5, PfnKind.PARTIAL, False),  # the section is the other device's, too
        (3 * S + 5, 4 * S + 1, PfnKind.ZONE_DEVICE, True),
        (4 * S + 1, 5 * S, PfnKind.PARTIAL, False),
        (5 * S, 5 * S + 7, PfnKind.RESERVED, False),
        (5 * S + 7, 6 * S, PfnKind.ZONE_DEVICE, True),
    ]
    memmap.remove_pages(Range(3 * S, 5 * S))
    memmap.remove_pages(Range(5 * S + 1, 6 * S))  # a part of a device cannot be removed
    assert walked(memmap)[0] == (0, 5 * S, PfnKind.HOLE, False)
    assert memmap.count()[PfnKind.ZONE_DEVICE, True] == S - 7
    memmap.add_pages(Range(10, 3 * S + 5))
    memmap.memmap_init_zone_device(Range(10, 3 * S + 5))
    assert memmap.count()[PfnKind.ZONE_DEVICE, False] == 3 * S - 5


def test_a_concurrent_walker_sees_each_page_unchanged_or_as_a_hole(directory: Path) -> None:
    outside_looks = threading.Event()
    counts: list[dict[tuple[PfnKind, bool], int]] = []

    def look() -> None:
        outside = Memmap.open(private(directory))
        while (PfnKind.HOLE, False) not in (counts[-1] if counts else {}):
            counts.append(outside.count())
            outside_looks.set()
        outside.close()

    memmap = a_device(directory, SIX_T, at=0)
    memmap.set_hwpoison(Range(0, SIX_T // 2))
    looker = threading.Thread(target=look)
    looker.start()
    assert outside_looks.wait(10)
    memmap.remove_pages(Range(0, SIX_T))
    looker.join(10)
    assert not looker.is_alive()
    kinds = {(PfnKind.ZONE_DEVICE, True), (PfnKind.ZONE_DEVICE, False), (PfnKind.HOLE, False)}
    assert all(set(count) <= kinds and sum(count.values()) == SIX_T for count in counts)
    assert memmap.count() == {(PfnKind.HOLE, False): SIX_T}


def test_more_than_64_spans_are_refused(directory: Path) -> None:
    memmap = Memmap.create(private(directory), Range(0, S))
    for index in range(64):
        memmap.add_pages(Range(index * 2, index * 2 + 1))
    with pytest.raises(NoSpace):
        memmap.add_pages(Range(500, 501))


# -- PG_hwpoison


def test_hwpoison_equals_a_set_of_ranges(directory: Path) -> None:
    chance = random.Random(4)
    memmap, model = a_device(directory, 5 * S + 77, altmap=10, at=BASE + 5), RangeSet()
    first, last = BASE + 15, BASE + 5 + 5 * S + 77
    for _ in range(300):
        start = chance.randrange(BASE, last)
        length = chance.choice([1, 1, 7, 512, S, S + 1, 3 * S, 6 * S])
        if chance.random() < 0.3:
            start = start // S * S
        clipped = Range(start, start + length).clip(first, last)
        if chance.random() < 0.5:
            memmap.set_hwpoison(Range(start, start + length))
            model.add(*clipped)
        else:
            memmap.clear_hwpoison(Range(start, start + length))
            model.remove(*clipped)
        assert [Range(s, e) for s, e, _, bad in walked(memmap) if bad] == list(model)
        assert memmap.count().get((PfnKind.ZONE_DEVICE, True), 0) == model.total
        assert memmap.page_hwpoison(first) == (first in model)


def test_6_tib_take_less_than_512_kib_and_2_seconds(directory: Path) -> None:
    memmap = a_device(directory, SIX_T)
    empty = allocated(directory)
    assert empty < 256 << 10
    assert (directory / "pages" / "data.ninja").stat().st_size >= SIX_T
    start = time.process_time()
    memmap.set_hwpoison(Range(BASE + 3, BASE + SIX_T - 3))
    assert memmap.count()[PfnKind.ZONE_DEVICE, True] == SIX_T - 6
    memmap.clear_hwpoison(Range(BASE, BASE + SIX_T // 2 + 1))
    memmap.clear_hwpoison(Range(BASE, BASE + SIX_T))
    assert (PfnKind.ZONE_DEVICE, True) not in memmap.count()
    assert time.process_time() - start < 2
    assert allocated(directory) < empty + (256 << 10)


def test_poison_in_every_section_is_walked_in_seconds(directory: Path) -> None:
    memmap = a_device(directory, SIX_T)
    for section in range(0, SIX_T // S, 16):
        memmap.set_hwpoison(Range(BASE + section * S + 9, BASE + section * S + 10))
    start = time.process_time()
    assert Memmap.open(private(directory)).count()[PfnKind.ZONE_DEVICE, True] == SIX_T // S // 16
    assert time.process_time() - start < 5


# -- seen from outside


def test_another_process_sees_changes(directory: Path) -> None:
    memmap = a_device(directory, 3 * S)
    outside = Memmap.open(private(directory))
    memmap.set_hwpoison(Range(BASE + 1, BASE + 2 * S))
    assert walked(outside) == walked(memmap)
    assert outside.page_hwpoison(BASE + 1)
    with pytest.raises(ValueError, match="read-only"):
        outside.set_hwpoison(Range(BASE, BASE + S))


def test_a_walker_keeps_the_old_memmap_when_the_machine_is_created_again(directory: Path) -> None:
    a_device(directory, 3 * S).set_hwpoison(Range(BASE, BASE + 1))
    outside = Memmap.open(private(directory))
    fresh = a_device(directory, S)
    assert outside.page_hwpoison(BASE)
    assert len(walked(outside)) == 3
    assert not Memmap.open(private(directory)).page_hwpoison(BASE)
    fresh.discard()
    assert not directory.exists()
    assert outside.count()[PfnKind.ZONE_DEVICE, False] == 3 * S - 1


def test_open_without_a_machine_is_file_not_found(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Memmap.open(private(directory))
    directory.mkdir()
    with pytest.raises(FileNotFoundError):
        Memmap.open(private(directory))


def test_walking_allocates_nothing(directory: Path) -> None:
    memmap = a_device(directory, 100 * S)
    for section in range(100):
        memmap.set_hwpoison(Range(BASE + section * S, BASE + section * S + 1))
    before = allocated(directory)
    outside = Memmap.open(private(directory))
    assert sum(bad for _, _, bad in outside.walk()) == 100
    assert outside.count()[PfnKind.ZONE_DEVICE, True] == 100
    assert allocated(directory) == before


def test_a_full_host_filesystem_leaves_hwpoison_unchanged(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memmap = a_device(directory, 3 * S)
    memmap.set_hwpoison(Range(BASE + S, BASE + 2 * S))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    memmap.set_hwpoison(Range(BASE, BASE + 1))
    memmap.clear_hwpoison(Range(BASE + S, BASE + S + 1))
    assert memmap.count()[PfnKind.ZONE_DEVICE, True] == S
    with pytest.raises(NoSpace):
        Memmap.create(private(directory.with_name("other")), Range(0, S))
    assert not directory.with_name("other.new").exists()


def test_mmap_ninja_opens_the_sections_as_uint8(directory: Path) -> None:
    a_device(directory, S)
    assert ninja.open_existing(directory / "sections").dtype == np.uint8
