"""fallocate(2) and SEEK_HOLE/SEEK_DATA on a real mount: bytes, sizes, blocks, mappings, poison."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import DaxMount
from tests.support.quick import QuickMount
from tests.support.scene import PAGE, Scene, append_until_full, ar, ask, consumes, letter, signals_of
from tests.support.syscalls import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    UNSHARE_RANGE,
    ZERO_RANGE,
    fallocate,
)

pytestmark = pytest.mark.mount


@pytest.fixture
def dax_mount(quick_mount: QuickMount) -> QuickMount:
    return quick_mount


PUNCH = PUNCH_HOLE | KEEP_SIZE
BAD = 40


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(fd: int, length: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(fd, length) as view:
        yield view


def blocks(fd: int) -> int:
    """Return the file's number of 4 KiB blocks as of stat(2)."""
    sectors = os.fstat(fd).st_blocks
    assert sectors % 8 == 0
    return sectors // 8


def letters(text: str) -> bytes:
    return b"".join(c.encode() * PAGE if c != "0" else bytes(PAGE) for c in text)


@pytest.fixture
def fd(dax_mount: DaxMount) -> Iterator[int]:
    """A file of 8 pages, A to H."""
    dax_mount.make_file("f", 8)
    with opened(dax_mount.path / "f") as descriptor:
        yield descriptor


def content(fd: int) -> bytes:
    return os.pread(fd, 1 << 20, 0)


# -- preallocation


def test_plain_fallocate_grows_and_keeps_the_bytes(fd: int) -> None:
    before = os.fstat(fd)
    fallocate(fd, 0, 7 * PAGE + 100, 4 * PAGE)
    after = os.fstat(fd)
    assert after.st_size == 11 * PAGE + 100
    assert blocks(fd) == 12
    assert content(fd) == letters("ABCDEFGH000") + bytes(100)
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns > before.st_ctime_ns


def test_fallocate_inside_fills_holes_only(dax_mount: DaxMount) -> None:
    with opened(dax_mount.path / "f") as fd:
        os.pwrite(fd, b"x", 5 * PAGE)
        os.ftruncate(fd, 10 * PAGE)
        assert blocks(fd) == 1
        fallocate(fd, 0, 3 * PAGE + 1, 4 * PAGE)
        assert (blocks(fd), os.fstat(fd).st_size) == (5, 10 * PAGE)
        assert content(fd) == bytes(5 * PAGE) + b"x" + bytes(5 * PAGE - 1)


def test_keep_size_preallocates_beyond_the_end(fd: int) -> None:
    fallocate(fd, KEEP_SIZE, 8 * PAGE, 8 * PAGE)
    assert (blocks(fd), os.fstat(fd).st_size) == (16, 8 * PAGE)
    assert content(fd) == letters("ABCDEFGH")
    os.pwrite(fd, b"x", 12 * PAGE)
    assert blocks(fd) == 16
    assert content(fd)[8 * PAGE :] == letters("0000") + b"x"
    os.ftruncate(fd, 8 * PAGE)
    assert blocks(fd) == 8


@pytest.mark.parametrize("quick_mount", [16 << 20], indirect=True)
def test_preallocated_room_is_there_on_a_full_device(dax_mount: DaxMount) -> None:
    with opened(dax_mount.path / "f") as fd, opened(dax_mount.path / "rest") as rest:
        fallocate(fd, KEEP_SIZE, 0, 32 * PAGE)
        free = os.statvfs(dax_mount.path).f_bavail
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            fallocate(rest, 0, 0, (free + 1) * PAGE)
        assert (blocks(rest), os.fstat(rest).st_size) == (0, 0)
        assert os.statvfs(dax_mount.path).f_bavail == free
        append_until_full(dax_mount.path / "rest", b"r")
        assert os.pwrite(fd, b"y" * 32 * PAGE, 0) == 32 * PAGE


def test_posix_fallocate_and_huge_ranges(dax_mount: DaxMount) -> None:
    with opened(dax_mount.path / "f") as fd:
        os.posix_fallocate(fd, 0, 3 * PAGE)
        assert (blocks(fd), os.fstat(fd).st_size) == (3, 3 * PAGE)
        for mode in (0, KEEP_SIZE):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                fallocate(fd, mode, 0, 1 << 40)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            fallocate(fd, 0, (1 << 63) - PAGE, PAGE - 1)
        fallocate(fd, PUNCH, PAGE, 1 << 50)
        assert (blocks(fd), os.fstat(fd).st_size) == (1, 3 * PAGE)


def test_a_zero_range_that_does_not_fit_changes_nothing(fd: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        fallocate(fd, ZERO_RANGE, PAGE, 1 << 40)
    assert (blocks(fd), os.fstat(fd).st_size) == (8, 8 * PAGE)
    assert content(fd) == letters("ABCDEFGH")


# -- punching and zeroing


@pytest.mark.parametrize(
    ("offset", "length", "left"),
    [(PAGE, PAGE, 7), (0, 8 * PAGE, 0), (100, 3 * PAGE, 6), (PAGE + 5, 10, 8), (6 * PAGE, 100 * PAGE, 6)],
)
def test_punch_hole(fd: int, offset: int, length: int, left: int) -> None:
    before = content(fd)
    fallocate(fd, PUNCH, offset, length)
    end = min(offset + length, len(before))
    assert content(fd) == before[:offset] + bytes(end - offset) + before[end:]
    assert blocks(fd) == left


@pytest.mark.parametrize("keep", [0, KEEP_SIZE])
@pytest.mark.parametrize(("offset", "length"), [(PAGE, PAGE), (100, 3 * PAGE), (7 * PAGE + 9, 3 * PAGE)])
def test_zero_range(fd: int, offset: int, length: int, keep: int) -> None:
    before = content(fd)
    fallocate(fd, ZERO_RANGE | keep, offset, length)
    size = len(before) if keep else max(len(before), offset + length)
    expected = bytearray(before.ljust(size, b"\0"))
    expected[offset : offset + length] = bytes(len(expected[offset : offset + length]))
    assert content(fd) == bytes(expected)
    assert os.fstat(fd).st_size == size
    assert blocks(fd) == max(8, -(-(offset + length) // PAGE))


def test_punched_blocks_are_free_after_a_sync(dax_mount: DaxMount) -> None:
    with opened(dax_mount.path / "f") as fd:
        before = os.statvfs(dax_mount.path).f_bavail
        fallocate(fd, 0, 0, 1000 * PAGE)
        assert os.statvfs(dax_mount.path).f_bavail == before - 1000
        fallocate(fd, PUNCH, 0, 900 * PAGE)
        os.fsync(fd)
        assert os.statvfs(dax_mount.path).f_bavail == before - 100


@pytest.mark.parametrize("mode", [PUNCH, ZERO_RANGE])
def test_mapped_pages_of_the_range_read_zeros(fd: int, mode: int) -> None:
    """Pages of the range read as zeros in every mapping, clean or dirty; dirty neighbours keep their
    stores.
    """
    with mapped(fd, 8 * PAGE) as one, mapped(fd, 8 * PAGE) as other:
        assert one[:] == other[:] == letters("ABCDEFGH")
        for page in (1, 2, 3, 4):
            one[page * PAGE + 7] = ord("z")
        fallocate(fd, mode, 2 * PAGE, 2 * PAGE)
        for view in (one, other):
            assert view[2 * PAGE : 4 * PAGE] == bytes(2 * PAGE)
            assert (view[PAGE + 7], view[4 * PAGE + 7]) == (ord("z"), ord("z"))
        other[3 * PAGE] = ord("n")
        one.flush()
    expected = bytearray(letters("AB00EFGH"))
    expected[PAGE + 7] = expected[4 * PAGE + 7] = ord("z")
    expected[3 * PAGE] = ord("n")
    assert content(fd) == bytes(expected)
    assert blocks(fd) == (7 if mode == PUNCH else 8)


def test_punching_inside_dirty_pages_keeps_the_rest_of_them(fd: int) -> None:
    with mapped(fd, 8 * PAGE) as view:
        view[0 : 8 * PAGE] = letters("abcdefgh")
        fallocate(fd, PUNCH, PAGE + 1000, PAGE)
        assert view[PAGE : 3 * PAGE] == b"b" * 1000 + bytes(PAGE) + b"c" * (PAGE - 1000)
    os.fsync(fd)
    assert content(fd)[PAGE : 3 * PAGE] == b"b" * 1000 + bytes(PAGE) + b"c" * (PAGE - 1000)


def test_modes_that_there_are_not(fd: int) -> None:
    for mode in (UNSHARE_RANGE, COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE | KEEP_SIZE, 1 << 20, PUNCH_HOLE):
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            fallocate(fd, mode, PAGE, PAGE)
    for offset, length in ((0, 0), (-1, PAGE), (0, -1)):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            fallocate(fd, 0, offset, length)
    assert content(fd) == letters("ABCDEFGH")


def test_descriptors_that_cannot_be_allocated_to(dax_mount: DaxMount, fd: int) -> None:
    with opened(dax_mount.path / "f", os.O_RDONLY) as reader, pytest.raises(OSError, match=r"Bad file"):
        fallocate(reader, 0, 0, PAGE)
    with opened(dax_mount.path, os.O_RDONLY) as directory, pytest.raises(OSError, match=r"Bad file"):
        fallocate(directory, PUNCH, 0, PAGE)


# -- over poison


@pytest.mark.parametrize("mode", [PUNCH, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
@pytest.mark.parametrize("dirty", [False, True])
def test_over_poison_the_page_is_usable_again(scene: Scene, mode: int, dirty: bool) -> None:
    """A punched or zeroed page over poison is usable again (`g9-punch-clean`, `g10-zero-range-clean`,
    `m1-mce-ao-nobody`).
    """
    p0 = scene.mapper(touch=[BAD])
    if dirty:
        assert p0.cmd(f"tw 0 {BAD} d").ok == "d"
        ask(p0, "fsync 0")
        assert p0.cmd(f"tw 0 {BAD} e").ok == "e"
    scene.poison(BAD)
    bad_device = scene.badblocks()[0][0] * 512
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    with opened(scene.mount.path / "f") as fd:
        fallocate(fd, mode, BAD * PAGE, PAGE)
        _usable_again(scene, p0, fd, bad_device)


def _usable_again(scene: Scene, p0: Actor, fd: int, bad_device: int) -> None:
    around = os.pread(fd, 3 * PAGE, (BAD - 1) * PAGE)
    assert around == letters(f"{letter(BAD - 1)}0{letter(BAD + 1)}")
    assert p0.cmd(f"tr 0 {BAD}").ok == "0"
    assert p0.cmd(f"tw 0 {BAD} p").ok == "p"
    ask(p0, "fsync 0")
    assert os.pread(fd, PAGE, BAD * PAGE) == b"p" + bytes(PAGE - 1)
    assert scene.device_offset("f", BAD) != bad_device
    assert scene.damaged() == []
    assert [[bad_device // 512, 8]] == scene.badblocks(), "the freed block stays known as bad"
    assert signals_of(p0) == []


@pytest.mark.parametrize("mode", [PUNCH, ZERO_RANGE])
def test_a_poisoned_line_of_a_page(scene: Scene, mode: int) -> None:
    """One bad sector: a range with an edge inside the page cannot be zeroed, the whole page can
    (`m5-mce-cacheline`).
    """
    p0 = scene.mapper()
    scene.mount.inject("f", (BAD * PAGE + 1024, 512))
    with opened(scene.mount.path / "f") as fd:
        before = scene.mount.json("map", scene.mount.path / "f")
        for offset, length in ((BAD * PAGE + 1024, 512), (BAD * PAGE, 512), ((BAD - 1) * PAGE, PAGE + 2048)):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                fallocate(fd, mode, offset, length)
        assert os.pread(fd, PAGE, (BAD - 1) * PAGE) == letters(letter(BAD - 1)), "a refusal changes nothing"
        assert scene.mount.json("map", scene.mount.path / "f") == before
        fallocate(fd, mode, BAD * PAGE, PAGE)
        assert os.pread(fd, PAGE, BAD * PAGE) == bytes(PAGE)
    assert p0.cmd(f"tr 0 {BAD}").ok == "0"
    assert scene.damaged() == []


def test_plain_fallocate_leaves_poison_alone(scene: Scene) -> None:
    scene.poison(BAD)
    with opened(scene.mount.path / "f") as fd:
        fallocate(fd, 0, 0, 200 * PAGE)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(fd, PAGE, BAD * PAGE)
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]
