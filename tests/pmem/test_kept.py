"""Media with direct mappings: pages with poison are not in the media, and lose no readable sector."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from daxemu.errors import MediaError, NoSpace
from daxemu.fs.fsck import fsck
from daxemu.pmem import backing
from daxemu.pmem.inject import inject, uninject
from daxemu.pmem.kept import KeptPages
from daxemu.pmem.media import Media
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, SECTOR_SIZE
from tests.pmem.test_media import files_cannot_grow
from tests.support.core import Core, core_at, pages

SIZE = 1 << 20
LETTERS = "ABCDEFGH"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A device in shared memory with a page of each letter, and holes."""
    with core_at() as core:
        path = core.path.with_name(core.path.name + "-media")
        path.mkdir()
        try:
            Media.create(PrivatePath.at(path), SIZE)
            with opened(path, None) as media:
                media.store(0, pages(LETTERS))
            yield path
        finally:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


@contextmanager
def opened(directory: Path, is_direct: bool | None = True) -> Iterator[Media]:
    media = Media(PrivatePath.at(directory), SIZE, is_direct=is_direct)
    try:
        yield media
    finally:
        media.close()


def data_pages(directory: Path, name: str = "media") -> set[int]:
    """Return the numbers of the pages with data."""
    fd = os.open(directory / name, os.O_RDONLY)
    try:
        return {at // PAGE_SIZE for run in backing.data_runs(fd) for at in range(*run, PAGE_SIZE)}
    finally:
        os.close(fd)


def sector(media: Media, number: int) -> bytes:
    return bytes(media.view(number * SECTOR_SIZE, SECTOR_SIZE))


def test_a_page_with_poison_leaves_the_media_and_keeps_its_other_sectors(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(9, 10))
        assert 1 not in data_pages(directory)
        assert sector(media, 8) == sector(media, 15) == b"B" * SECTOR_SIZE
        media.view(8 * SECTOR_SIZE, 4)[:] = b"more"
        assert 1 not in data_pages(directory)
        assert sector(media, 8).startswith(b"moreBB")


def test_a_clear_brings_the_page_back_with_zeros_in_the_cleared_sectors(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(9, 11))
        media.clear_poison(Range(9, 10))
        assert 1 not in data_pages(directory)
        assert sector(media, 9) == bytes(SECTOR_SIZE)
        media.clear_poison(Range(8, 16))
        assert 1 in data_pages(directory)
        assert data_pages(directory, "kept") == set()
        expected = b"B" * SECTOR_SIZE + bytes(2 * SECTOR_SIZE) + b"B" * 5 * SECTOR_SIZE
        assert bytes(media.view(PAGE_SIZE, PAGE_SIZE)) == expected


def test_a_page_that_is_poison_as_a_whole_keeps_nothing(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(10, 40))
        assert data_pages(directory) == {0, 5, 6, 7}
        assert data_pages(directory, "kept") == {1}
        media.clear_poison(Range(16, 17))
        assert sector(media, 16) == bytes(SECTOR_SIZE)
        assert data_pages(directory) == {0, 5, 6, 7}


def test_a_long_range_of_poison_is_punched_by_one_call(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(backing, "punch", lambda fd, offset, length: calls.append(length))
    with opened(directory) as media:
        media.add_poison(Range(1, SIZE // SECTOR_SIZE - 1))
    assert calls == [SIZE]


def test_a_range_partly_on_pages_put_aside_has_no_view_but_pieces(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(15, 16))
        with pytest.raises(MediaError):
            media.view(0, PAGE_SIZE + SECTOR_SIZE)
        assert media.pieces(SECTOR_SIZE, PAGE_SIZE) == [
            Range(SECTOR_SIZE, PAGE_SIZE),
            Range(PAGE_SIZE, PAGE_SIZE + SECTOR_SIZE),
        ]
        assert 1 not in data_pages(directory)


def test_reserve_and_release_leave_a_page_put_aside_out_of_the_media(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(15, 16))
        media.reserve(0, SIZE)
        media.view(0, 1)
        assert media.count_pages(PAGE_SIZE, PAGE_SIZE) == 0
        assert media.count_pages(0, SIZE) == SIZE // PAGE_SIZE - 1
        media.release(0, 2 * PAGE_SIZE)
        assert sector(media, 8) == bytes(SECTOR_SIZE)
        media.clear_poison(Range(15, 16))
        assert sector(media, 8) == bytes(SECTOR_SIZE)


def test_an_overwrite_goes_to_the_copy_of_a_page_put_aside(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(15, 16))
        media.overwrite(PAGE_SIZE - SECTOR_SIZE, b"x" * 2 * SECTOR_SIZE)
        assert (sector(media, 7), sector(media, 8)) == (b"x" * SECTOR_SIZE, b"x" * SECTOR_SIZE)
        assert 1 not in data_pages(directory)


@pytest.mark.parametrize(
    "modes", [(True, False), (True, None), (False, True), (True, False, True), (None, True, True)]
)
def test_a_mount_of_the_other_mode_has_the_same_bytes(
    directory: Path, modes: tuple[bool | None, ...]
) -> None:
    for number, mode in enumerate(modes):
        with opened(directory, mode) as media:
            media.add_poison(Range(9 + number, 10 + number))
    with opened(directory, modes[-1]) as media:
        assert sector(media, 8) == sector(media, 15) == b"B" * SECTOR_SIZE
        assert (1 in data_pages(directory)) is (modes[-1] is False)
        assert KeptPages.exists(PrivatePath.at(directory)) is (modes[-1] is not False)


@pytest.mark.parametrize("step", ["reserve", "record"])
def test_a_full_host_refuses_poison_and_nothing_has_changed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with opened(directory) as media:
        if step == "record":
            monkeypatch.setattr(media, "_record", _refuse)
            with pytest.raises(NoSpace):
                media.add_poison(Range(9, 10))
        else:
            with files_cannot_grow(), pytest.raises(NoSpace):
                media.add_poison(Range(9, 10))
        assert not media.poison
        assert bytes(media.view(PAGE_SIZE, PAGE_SIZE)) == pages("B")
    with opened(directory) as media:
        assert bytes(media.view(PAGE_SIZE, PAGE_SIZE)) == pages("B")


def test_a_refused_clear_changes_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(directory) as media:
        media.add_poison(Range(9, 10))
        monkeypatch.setattr(media, "_record", _refuse)
        with pytest.raises(NoSpace):
            media.clear_poison(Range(9, 10))
        assert 1 not in data_pages(directory)
        assert sector(media, 8) == b"B" * SECTOR_SIZE


def _refuse(*_: Any, **__: Any) -> None:
    raise NoSpace("a test")


class Crash(BaseException):
    """End of the process."""


POINTS: list[tuple[Any, str]] = [
    (KeptPages, "reserve"),
    (KeptPages, "put"),
    (KeptPages, "forget"),
    (Media, "_record"),
    (Media, "_save_poison"),
    (Media, "store"),
    (backing, "punch"),
]


@contextmanager
def crash_before(call: int) -> Iterator[None]:
    """Raise Crash before change number ``call`` of a file, and before each later change."""
    numbers = count()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in POINTS:
            real = getattr(owner, name)

            def wrapped(*args: Any, _real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                if next(numbers) >= call:
                    raise Crash
                return _real(*args, **kwargs)

            patch.setattr(owner, name, wrapped)
        yield


def change(media: Media) -> None:
    media.add_poison(Range(9, 12), Range(20, 30))
    media.clear_poison(Range(9, 10))
    media.clear_poison(Range(10, 12))
    with media.clearing([Range(20, 30)]):
        media.clear_poison(Range(20, 25))
        media.clear_poison(Range(25, 30))


@pytest.mark.parametrize("then", [True, False, None])
def test_a_crash_at_any_point_loses_no_readable_sector(directory: Path, then: bool | None) -> None:
    for call in count():
        with opened(directory, False) as media:
            media.clear_poison(Range(0, SIZE // SECTOR_SIZE))
            media.store(0, pages(LETTERS))
        with opened(directory) as media:
            try:
                with crash_before(call):
                    change(media)
            except Crash:
                pass
            else:
                assert call > 15
                return
        with opened(directory, then) as media:
            touched = {*range(9, 12), *range(20, 30)}
            for number in range(8 * len(LETTERS)):
                if not media.is_poisoned(number * SECTOR_SIZE, SECTOR_SIZE):
                    old = LETTERS[number // 8].encode() * SECTOR_SIZE
                    allowed = {old, bytes(SECTOR_SIZE)} if number in touched else {old}
                    assert sector(media, number) in allowed, (call, number)
            if media.is_direct:
                bad = {run.start // 8 for run in media.poison} | {(run.end - 1) // 8 for run in media.poison}
                assert bad.isdisjoint(data_pages(directory))


def test_a_kill_between_two_modes_is_completed_by_the_next_mount(directory: Path) -> None:
    for call in count():
        with opened(directory) as media:
            media.add_poison(Range(9, 10), Range(20, 30))
        try:
            with crash_before(call), opened(directory, False):
                pass
        except Crash:
            continue
        with opened(directory, False) as media:
            assert sector(media, 8) == b"B" * SECTOR_SIZE
            assert sector(media, 19) == b"C" * SECTOR_SIZE
        assert call > 3
        return


def test_a_poisoned_block_of_a_file_is_never_touched_by_the_filesystem() -> None:
    with core_at(is_direct=True) as core:
        ino = core.file(data=pages("ABCD"))
        block = core.fs.extents_of(ino).lookup(1, 2)[0].dev_block
        core.poison(ino, 1)
        core.fs.write(ino, PAGE_SIZE, pages("x"))
        assert core.read(ino) == pages("AxCD")
        core.poison(ino, 1, latent=True)
        core.fs.set_size(ino, 0)
        core.fs.commit()
        core.fs.allocator.allocate(1, goal=block)
        core.sound = False
        assert bytes(core.fs.dax.direct_access(block * PAGE_SIZE, PAGE_SIZE)) == bytes(PAGE_SIZE)


def test_fsck_finds_a_page_with_poison_in_the_media() -> None:
    with core_at(is_direct=True) as core:
        ino = core.file(data=pages("ABCD"))
        core.poison(ino, 1)
        block = core.fs.extents_of(ino).lookup(1, 2)[0].dev_block
        assert fsck(core.fs) == []
        with open(core.path / "media", "r+b") as media:
            media.seek(block * PAGE_SIZE)
            media.write(b"x")
        (found,) = fsck(core.fs)
        assert f"page {block} of the device" in found
        core.sound = False


def test_a_store_beyond_the_end_in_a_page_with_poison_is_gone_at_the_next_mount() -> None:
    with core_at(is_direct=True) as core:
        ino = core.file(data=b"A" * 100)
        run = core.fs.fault(ino, 0, is_store=True, limit=1)
        core.fs.dax.direct_access(run.dev_block * PAGE_SIZE + 3000, 1)[:] = b"m"
        at = run.dev_block * PAGE_SIZE + SECTOR_SIZE
        inject(core.pmem, at, 1)
        core.reopen()
        uninject(core.pmem, at, 1)
        core.fs.set_size(ino, PAGE_SIZE)
        assert core.read(ino) == b"A" * 100 + bytes(PAGE_SIZE - 100)


def test_the_device_is_wiped_with_the_kept_pages(core: Core) -> None:
    core.close()
    core.is_direct = True
    core.open()
    core.close()
    assert (core.path / "kept").exists()
    core.device.open(core.path).wipe()
    assert not core.path.exists()
    core.path.mkdir()
