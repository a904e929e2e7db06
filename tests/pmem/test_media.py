"""Media: shared bytes with memory behind them, and poison that outlives the process."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from daxemu.errors import DaxemuError, NoSpace, NotADevice
from daxemu.pmem.media import Media
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE
from daxemu.units import sectors_at

SIZE = 1 << 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    Media.create(PrivatePath.at(tmp_path), SIZE)
    return tmp_path


@contextmanager
def opened(directory: Path) -> Iterator[Media]:
    media = Media(PrivatePath.at(directory), SIZE)
    try:
        yield media
    finally:
        media.close()


@contextmanager
def files_cannot_grow(at: int = 0) -> Iterator[None]:
    """Writes to a file fail from byte ``at`` on, as on a full disk (RLIMIT_FSIZE; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_sectors_are_rounded_out() -> None:
    assert sectors_at(0, 1) == Range(0, 1)
    assert sectors_at(511, 2) == Range(0, 2)
    assert sectors_at(512, 512) == Range(1, 2)


def test_a_new_media_is_zeros_and_takes_no_memory(directory: Path) -> None:
    with opened(directory) as media:
        assert bytes(media.view(0, SIZE)) == bytes(SIZE)
    assert (directory / "media").stat().st_size == SIZE


def test_stores_are_shared_and_stay(directory: Path) -> None:
    with opened(directory) as media, opened(directory) as other:
        media.reserve(PAGE_SIZE, PAGE_SIZE)
        media.view(PAGE_SIZE + 5, 5)[:] = b"hello"
        assert bytes(other.view(PAGE_SIZE + 5, 5)) == b"hello"
    with opened(directory) as media:
        assert bytes(media.view(PAGE_SIZE + 5, 5)) == b"hello"


def test_reserve_and_release(directory: Path) -> None:
    with opened(directory) as media:
        before = (directory / "media").stat().st_blocks
        media.reserve(0, 8 * PAGE_SIZE)
        assert (directory / "media").stat().st_blocks == before + 64
        media.view(0, 4)[:] = b"full"
        media.release(0, 8 * PAGE_SIZE)
        assert (directory / "media").stat().st_blocks == before
        assert bytes(media.view(0, 4)) == bytes(4)


@pytest.mark.parametrize("limited", [False, True])
def test_a_store_to_new_memory_is_in_the_view(directory: Path, limited: bool) -> None:
    with opened(directory) as media:
        media.reserve(0, 2 * PAGE_SIZE)
        with files_cannot_grow() if limited else nullcontext():
            media.store(5, b"x" * PAGE_SIZE)
        assert bytes(media.view(0, 2 * PAGE_SIZE)) == bytes(5) + b"x" * PAGE_SIZE + bytes(PAGE_SIZE - 5)


def test_reserving_keeps_what_is_there(directory: Path) -> None:
    with opened(directory) as media:
        media.reserve(0, PAGE_SIZE)
        media.view(0, 4)[:] = b"kept"
        media.reserve(0, 2 * PAGE_SIZE)
        assert bytes(media.view(0, 4)) == b"kept"


# -- poison


def test_poison_counts_by_sector(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(3, 5))
        assert media.is_poisoned(2047, 1) is True
        assert media.is_poisoned(1535, 1) is False
        assert media.is_poisoned(2560, 100) is False
        assert list(media.poisoned(0, SIZE)) == [Range(1536, 2560)]
        assert list(media.poisoned(2048, 1)) == [Range(2048, 2560)]


def test_clearing_says_what_was_poison(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(3, 5))
        assert media.clear_poison(Range(4, 10)) == [Range(4, 5)]
        assert media.clear_poison(Range(4, 10)) == []
        assert list(media.poison) == [Range(3, 4)]


def test_many_ranges_go_bad_at_once_or_not_at_all(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(directory) as media:
        media.add_poison(Range(3, 5))
        saved: list[list[Range]] = []
        monkeypatch.setattr(media, "_save_poison", lambda poison: saved.append(list(poison)))
        media.add_poison(Range(4, 8), Range(20, 21))
        assert saved == [[Range(3, 8), Range(20, 21)]]

        def full(poison: RangeSet) -> None:
            raise NoSpace("full")

        monkeypatch.setattr(media, "_save_poison", full)
        with pytest.raises(NoSpace):
            media.add_poison(Range(0, 4), Range(30, 31), Range(30, 32))
        assert list(media.poison) == [Range(3, 8), Range(20, 21)]


def test_what_is_cleared_together_is_recorded_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(directory) as media:
        media.add_poison(Range(3, 5), Range(8, 9), Range(20, 30))
        saved: list[list[Range]] = []
        monkeypatch.setattr(media, "_save_poison", lambda poison: saved.append(list(poison)))
        with media.clearing([Range(0, 5), Range(22, 24)]):
            assert media.clear_poison(Range(0, 5)) == [Range(3, 5)]
            assert media.is_poisoned(22 * 512, 512)
            assert media.clear_poison(Range(22, 24)) == [Range(22, 24)]
        assert saved == [[Range(8, 9), Range(20, 22), Range(24, 30)]]
        with pytest.raises(ZeroDivisionError), media.clearing([Range(8, 9)]):
            raise ZeroDivisionError
        assert saved[1:] == [[Range(20, 22), Range(24, 30)], [Range(8, 9), Range(20, 22), Range(24, 30)]]
        media.clear_poison(Range(8, 9))
        assert len(saved) == 4


def test_clearing_that_cannot_be_recorded_changes_nothing(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(*(Range(sector, sector + 2) for sector in range(0, 3000, 5)))
        before = list(media.poison)
        more = [Range(sector + 1, sector + 2) for sector in range(0, 3000, 5)]
        scratch = directory / "poison"
        scratch.unlink()
        scratch.mkdir()
        with pytest.raises(NoSpace), media.clearing(more):
            pass
        assert list(media.poison) == before


def test_poison_survives_the_process(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(Range(3, 5))
        media.add_poison(Range(100, 101))
        media.clear_poison(Range(3, 4))
    with opened(directory) as media:
        assert media.poison == RangeSet([(4, 5), (100, 101)])
    assert (directory / "poison").read_text().split() == ["4", "1", "100", "1"]


def test_much_poison_is_appended_and_read_back(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past _FEW ranges a change is recorded without writing the whole file."""
    with opened(directory) as media:
        many = [Range(sector, sector + 1) for sector in range(0, 1400, 2)]
        media.add_poison(*many)

        def whole(poison: RangeSet) -> None:
            raise AssertionError("the whole file is written")

        with monkeypatch.context() as patched:
            patched.setattr(media, "_save_poison", whole)
            media.make_room(600)
            size = (directory / "poison").stat().st_size
            media.add_poison(Range(1500, 1502), Range(1600, 1610))
            assert media.clear_poison(Range(0, 3)) == [Range(0, 1), Range(2, 3)]
            with media.clearing([Range(1601, 1605)]):
                media.clear_poison(Range(1601, 1605))
            assert (directory / "poison").stat().st_size == size
        expected = list(media.poison)
    with opened(directory) as media:
        assert list(media.poison) == expected
        media.add_poison(Range(1700, 1701))
    with opened(directory) as media:
        assert list(media.poison) == sorted([*expected, Range(1700, 1701)])
        media.clear_poison(Range(0, 1390))
        assert len((directory / "poison").read_text().strip().split("\n")) == len(media.poison)


def test_an_exception_while_much_is_cleared_leaves_the_file_right(directory: Path) -> None:
    with opened(directory) as media:
        media.add_poison(*(Range(sector, sector + 1) for sector in range(0, 1400, 2)))
        expected = list(media.poison)
        with pytest.raises(ZeroDivisionError), media.clearing([Range(0, 8)]):
            raise ZeroDivisionError
    with opened(directory) as media:
        assert list(media.poison) == expected


def test_a_device_without_the_file_has_no_poison(directory: Path) -> None:
    (directory / "poison").unlink()
    with opened(directory) as media:
        assert len(media.poison) == 0


@pytest.mark.parametrize(
    "text",
    [
        b"x",
        b"1",
        b"1 2 3",
        b"-1 2",
        b"1 0",
        b"1 -5",
        b"2048 1",
        b"0 99999999999999999999",
        b"1 2\n3",
        b"\xff",
    ],
)
def test_a_damaged_poison_file_is_refused(directory: Path, text: bytes) -> None:
    (directory / "poison").write_bytes(text)
    with pytest.raises(NotADevice, match="poison"):
        Media(PrivatePath.at(directory), SIZE)


def test_a_refused_media_leaves_no_file_open(directory: Path) -> None:
    before = open_files()
    with pytest.raises(NotADevice):
        Media(PrivatePath.at(directory), SIZE + PAGE_SIZE)
    (directory / "poison").write_text("garbage")
    with pytest.raises(NotADevice) as caught:
        Media(PrivatePath.at(directory), SIZE)
    assert str(directory) in str(caught.value)
    del caught
    assert open_files() == before


def test_a_media_of_another_size_is_refused(directory: Path) -> None:
    with pytest.raises(NotADevice, match=f"{SIZE} bytes"):
        Media(PrivatePath.at(directory), 2 * SIZE)


def test_no_media_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADevice, match="mkfs"):
        Media(PrivatePath.at(tmp_path), SIZE)
    (tmp_path / "media").mkdir()
    with pytest.raises(NotADevice):
        Media(PrivatePath.at(tmp_path), SIZE)


def test_poison_that_cannot_be_recorded_is_refused_and_not_there(directory: Path) -> None:
    """Otherwise the truth would be forgotten at the next mount."""
    with opened(directory) as media:
        media.add_poison(Range(7, 9))
        with files_cannot_grow(), pytest.raises(DaxemuError):
            media.add_poison(Range(3, 5))
        assert list(media.poison) == [Range(7, 9)]
        with files_cannot_grow(), pytest.raises(DaxemuError):
            media.clear_poison(Range(0, 8))
        assert list(media.poison) == [Range(7, 9)]
    with opened(directory) as media:
        assert list(media.poison) == [Range(7, 9)]


def test_a_list_of_poison_that_has_no_room_to_grow_stays_what_it_was(directory: Path) -> None:
    """A long list takes more than a block of the disk: half of a new one must not replace the old one."""
    with opened(directory) as media:
        sector = 0
        while (directory / "poison").stat().st_size <= PAGE_SIZE:
            sector += 3
            media.add_poison(Range(sector, sector + 1))
        media.clear_poison(Range(sector, sector + 1))
        media._save_poison(media.poison)  # as short as possible
        before = list(media.poison)
        with files_cannot_grow(at=PAGE_SIZE), pytest.raises(DaxemuError):
            media.add_poison(Range(sector, sector + 1))
        assert list(media.poison) == before
    with opened(directory) as media:
        assert list(media.poison) == before


def test_more_than_the_host_has_is_enospc() -> None:
    memory = os.statvfs("/dev/shm")
    if not memory.f_blocks:
        pytest.skip("/dev/shm has no limit here")
    directory = Path("/dev/shm") / f"daxemu-media-{os.getpid()}"
    size = memory.f_blocks * memory.f_frsize + PAGE_SIZE
    directory.mkdir()
    try:
        Media.create(PrivatePath.at(directory), size)
        media = Media(PrivatePath.at(directory), size)
        with pytest.raises(NoSpace):
            media.reserve(0, size)
        assert (directory / "media").stat().st_blocks == 0
        media.close()
    finally:
        for name in ("media", "poison"):
            (directory / name).unlink()
        directory.rmdir()
