"""Our ioctls on a real mount: cloning a range, and the extent map."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.fs.inode_flags import APPEND
from daxemu.host.fuse.extra_operations import (
    CLONE_RANGE,
    DAXEMU_IOC_CLONE_RANGE,
    DAXEMU_IOC_MAP,
    MAP_HEADER,
    MAP_ROOM,
)
from daxemu.host.fuse.fileattr import FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
from tests.support.files import Files, content, is_clone
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.scene import PAGE, Scene
from tests.support.syscalls import Extent, clone_range, extent_map
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount

BAD = 40


@pytest.fixture
def dax_mount(quick_mount: QuickMount) -> QuickMount:
    return quick_mount


@pytest.fixture
def files(quick_mount: QuickMount) -> Iterator[Files]:
    with Files(quick_mount) as made:
        yield made


def test_the_clone_ioctl(files: Files) -> None:
    one, two = files.letters("one", 8), files.letters("two", 2, "M")
    clone_range(two, one, 2 * PAGE, 3 * PAGE, PAGE)
    assert content(two) == b"M" * PAGE + b"C" * PAGE + b"D" * PAGE + b"E" * PAGE
    whole = files.open("whole")
    clone_range(whole, one)
    assert is_clone(one, whole)
    assert os.fstat(whole).st_size == 8 * PAGE
    with mmap.mmap(whole, 8 * PAGE) as view:
        assert view[5 * PAGE] == ord("F")
        clone_range(whole, two, 0, PAGE, 5 * PAGE)
        assert view[5 * PAGE] == ord("M")


def test_a_clone_replaces_what_was_stored_before(files: Files) -> None:
    """Stored through a mapping, and not written back yet."""
    one, two = files.letters("one", 4), files.letters("two", 4, "M")
    with mmap.mmap(two, 4 * PAGE) as view:
        view[PAGE] = ord("z")
        clone_range(two, one)
        assert view[:] == content(two) == content(one)
    assert is_clone(one, two)


def test_the_clone_ioctl_shares_poison(scene: Scene) -> None:
    scene.poison(BAD)
    with (scene.mount.path / "f").open("rb") as source, (scene.mount.path / "g").open("wb") as target:
        clone_range(target.fileno(), source.fileno())
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE), ("/g", BAD * PAGE, PAGE)]


def test_the_clone_ioctl_beside_a_mount_with_an_odd_name(
    files: Files, tmp_path: Path, zygote: Zygote
) -> None:
    """The name of a foreign mountpoint does not matter to daxemu."""
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    one, two = files.letters("one", 2), files.letters("two", 2, "M")
    with quick_mount_at(odd, zygote):
        clone_range(two, one)
    assert is_clone(one, two)


def test_the_clone_ioctl_refuses_bad_arguments(files: Files) -> None:
    one, two = files.letters("one", 8), files.letters("two", 8, "M")
    directory = files.open(".", os.O_RDONLY)
    cases = [
        ((two, 999, 0, 0, 0), errno.EBADF),
        ((two, -1, 0, 0, 0), errno.EBADF),
        ((two, one, 100, PAGE, 0), errno.EINVAL),
        ((two, one, 0, 100, 0), errno.EINVAL),
        ((two, one, 0, PAGE, 100), errno.EINVAL),
        ((two, one, 0, 9 * PAGE, 0), errno.EINVAL),
        ((two, one, 1 << 62, 1 << 62, 0), errno.EINVAL),
        ((one, one, 0, 2 * PAGE, PAGE), errno.EINVAL),
        ((two, directory, 0, 0, 0), errno.EISDIR),
    ]
    got = [_errno_of_clone(*arguments) for arguments, _ in cases]
    assert got == [expected for _, expected in cases]
    assert content(two) == b"".join(bytes([77 + i]) * PAGE for i in range(8))


def test_the_clone_ioctl_respects_how_files_were_opened(files: Files) -> None:
    """A target open for reading only stays unchanged, a source open for writing only is not read."""
    one, two = files.letters("one", 8), files.letters("two", 8, "M")
    reader, writer = files.open("one", os.O_RDONLY), files.open("two", os.O_WRONLY)
    assert _errno_of_clone(reader, two, 0, 0, 0) == errno.EBADF
    assert content(one)[:PAGE] == b"A" * PAGE
    assert _errno_of_clone(one, writer, 0, 0, 0) == errno.EBADF
    assert content(one)[:PAGE] == b"A" * PAGE


def test_the_clone_ioctl_takes_no_descriptor_of_another_filesystem(
    files: Files, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A foreign inode number may equal one of the mount: the ioctl would name a file that the caller may not
    even open.
    """
    files.letters("secret", 8)
    target = files.open("target")
    with (
        quick_mount_at(tmp_path_factory.mktemp("other"), zygote, 16 << 20) as other,
        (other.path / "mine").open("w+b") as mine,
    ):
        assert os.fstat(mine.fileno()).st_ino == (files.mount.path / "secret").stat().st_ino
        assert _errno_of_clone(target, mine.fileno(), 0, 0, 0) == errno.EXDEV
    assert content(target) == b""


def _errno_of_clone(target: int, source: int, offset: int, length: int, target_offset: int) -> int:
    try:
        clone_range(target, source, offset, length, target_offset)
    except OSError as error:
        return error.errno or -1
    return 0


def test_the_map_ioctl(files: Files) -> None:
    fd, other = files.open("f"), files.open("g")
    for page in (0, 1, 5):
        os.pwrite(fd, b"x" * PAGE, page * PAGE)
    os.copy_file_range(fd, other, PAGE, PAGE, 0)
    first, shared, last = extent_map(fd)
    assert (first.offset, first[2:]) == (0, (PAGE, 1, 0))
    assert (shared.offset, shared[2:]) == (PAGE, (PAGE, 2, 0))
    assert (last.offset, last[2:]) == (5 * PAGE, (PAGE, 1, 0))
    assert extent_map(other) == [Extent(0, shared.device_offset, PAGE, 2, 0)]
    assert extent_map(fd, PAGE, PAGE) == [shared]
    assert extent_map(fd, 2 * PAGE, 3 * PAGE) == []
    assert extent_map(fd, 2 * PAGE) == [last]
    assert extent_map(fd, 1 << 60) == []
    files.mount.inject("f", (5 * PAGE, 512))
    assert extent_map(fd, 5 * PAGE)[0].poisoned == 1
    for page in range(10, 10 + 4 * MAP_ROOM, 2):
        os.pwrite(fd, b"x", page * PAGE)
    assert len(extent_map(fd)) == MAP_ROOM
    assert extent_map(fd, 1 << 63, 1 << 63) == []


def test_other_ioctls(files: Files) -> None:
    fd = files.letters("f", 1)
    directory = os.open(files.mount.path, os.O_RDONLY)
    try:
        for command, argument in (
            (0x5401, bytearray(64)),
            (DAXEMU_IOC_CLONE_RANGE ^ 1, bytearray(CLONE_RANGE.size)),
            (3 << 30 | MAP_HEADER.size << 16 | 0xDA << 8 | 11, bytearray(MAP_HEADER.size)),
            (3 << 30 | 8 << 16 | 0xDA << 8 | 11, bytearray(8)),
        ):
            with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
                fcntl.ioctl(fd, command, argument)
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            fcntl.ioctl(directory, 0x5401, bytearray(64))
    finally:
        os.close(directory)
    assert content(fd) == b"A" * PAGE


def test_an_ioctl_on_a_directory_is_about_the_directory(files: Files) -> None:
    """A directory's handle is a small number that is also the inode number of some file."""
    fds = [files.letters(f"f{number}", 1) for number in range(8)]
    flags = struct.Struct("=I")
    for fd in fds:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.pack(APPEND))
    inos = {os.fstat(fd).st_ino for fd in fds}
    directories = [files.open(".", os.O_RDONLY) for _ in range(2 * max(inos))]
    for directory in directories:
        with pytest.raises(OSError, match=os.strerror(errno.EISDIR)):
            fcntl.ioctl(directory, DAXEMU_IOC_MAP, bytearray(DAXEMU_IOC_MAP >> 16 & 0x3FFF))
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            fcntl.ioctl(directory, DAXEMU_IOC_CLONE_RANGE, CLONE_RANGE.pack(fds[0], 0, 0, 0))
        assert flags.unpack(fcntl.ioctl(directory, FS_IOC_GETFLAGS, bytes(4))) == (0,)
    for fd in fds:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.pack(0))
