"""Data promised by fsync survives kill -9 of the supervisor and a power failure; other data may be lost, and
no more.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.files import Files, is_clone
from tests.support.mount import PATIENCE
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.syscalls import (
    KEEP_SIZE,
    PUNCH_HOLE,
    RENAME_EXCHANGE,
    ZERO_RANGE,
    clone_range,
    fallocate,
    renameat2,
)

pytestmark = [pytest.mark.mount, pytest.mark.parametrize("how", ["kill", "powerfail"])]

MIB = 1 << 20


def sync(path: Path) -> None:
    """fsync(2) of a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def close(fd: int) -> None:
    """close(2) of a file whose mount is gone."""
    with suppress(OSError):
        os.close(fd)


def tree(path: Path) -> dict[str, object]:
    """Return every path below a directory, with the result of stat(2) and the content."""
    found: dict[str, object] = {}
    for directory, _, files in os.walk(path):
        for name in [".", *files]:
            at = Path(directory) / name
            s = at.lstat()
            times = (s.st_mtime_ns, s.st_ctime_ns)
            data = str(at.readlink()) if at.is_symlink() else at.read_bytes() if at.is_file() else b""
            attributes = (
                {key: os.getxattr(at, key) for key in os.listxattr(at)} if not at.is_symlink() else {}
            )
            what = (s.st_ino, s.st_mode, s.st_nlink, s.st_uid, s.st_gid, s.st_size, s.st_blocks, times)
            found[str(at.relative_to(path))] = (what, attributes, data)
    return found


# -- data


@pytest.mark.parametrize("flush", ["fsync", "fdatasync", "O_SYNC", "O_DSYNC"])
def test_written(quick_mount: QuickMount, how: str, flush: str) -> None:
    path = quick_mount.path / "f"
    flags = getattr(os, flush) if flush.startswith("O_") else 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags)
    data = random.Random(1).randbytes(3 * MIB + 5)
    os.write(fd, data)
    if not flags:
        getattr(os, flush)(fd)
    quick_mount.crash(how)
    close(fd)
    assert path.read_bytes() == data


@pytest.mark.parametrize("flush", ["msync", "fsync"])
def test_stored_through_a_mapping(quick_mount: QuickMount, how: str, flush: str) -> None:
    path = quick_mount.path / "f"
    path.write_bytes(b"a" * 16 * PAGE)
    fd = os.open(path, os.O_RDWR)
    os.ftruncate(fd, 32 * PAGE)
    view = mmap.mmap(fd, 32 * PAGE)
    for page in (0, 7, 20, 31):
        view[page * PAGE + 5] = ord("s")
    if flush == "msync":
        view.flush()
    else:
        os.fsync(fd)
    for page in (1, 7, 21):
        view[page * PAGE + 9] = ord("l")
    quick_mount.crash(how)
    view.close()
    close(fd)
    expected = bytearray(b"a" * 16 * PAGE + bytes(16 * PAGE))
    for page in (0, 7, 20, 31):
        expected[page * PAGE + 5] = ord("s")
    assert path.read_bytes() == bytes(expected), "not what was synced, or more than that"


def test_a_clone_and_its_source(quick_mount: QuickMount, how: str) -> None:
    """Shared blocks stay shared; bytes written to either file after the clone stay separate."""
    with Files(quick_mount) as files:
        one, two = files.letters("one", 64), files.open("two")
        clone_range(two, one)
        os.pwrite(two, b"2" * PAGE, 5 * PAGE)
        os.pwrite(one, b"1" * PAGE, 9 * PAGE)
        os.fsync(two)
        before = [(quick_mount.path / name).read_bytes() for name in ("one", "two")]
        shared = [files.shared_by(name) for name in ("one", "two")]
        quick_mount.crash(how)
    assert [(quick_mount.path / name).read_bytes() for name in ("one", "two")] == before
    with Files(quick_mount) as files:
        assert [files.shared_by(name) for name in ("one", "two")] == shared
        os.copy_file_range(files.open("one"), files.open("three"), 64 * PAGE, 0, 0)
        os.fsync(files.open("three"))
        quick_mount.crash(how)
    with Files(quick_mount) as files:
        assert is_clone(files.open("one"), files.open("three"))


# -- names and attributes


def rename_files(top: Path) -> None:
    (top / "a").rename(top / "d" / "moved")
    (top / "b").replace(top / "c")
    renameat2(top / "d", top / "e", RENAME_EXCHANGE)


def remove(top: Path) -> None:
    (top / "a").unlink()
    (top / "e" / "deep").rmdir()
    (top / "s").unlink()


def make(top: Path) -> None:
    (top / "new").write_bytes(b"new" * 5000)
    (top / "dir").mkdir(mode=0o2751)
    (top / "dir" / "x").touch()
    (top / "dir" / "link").hardlink_to(top / "b")
    (top / "dir" / "sym").symlink_to("nowhere" * 30)
    os.mkfifo(top / "fifo")


def attributes(top: Path) -> None:
    os.setxattr(top / "a", b"user.one", b"1" * 3000)
    os.setxattr(top / "b", b"user.keep", b"other")
    os.removexattr(top / "c", b"user.keep")
    (top / "b").chmod(0o4711)
    os.chown(top / "c", 1234, 4321)
    os.utime(top / "e", ns=(1_000_000_007, 1 << 60))


def sizes(top: Path) -> None:
    os.truncate(top / "a", 5)
    os.truncate(top / "b", 3 * PAGE + 7)
    os.truncate(top / "c", 1 << 40)
    os.truncate(top / "c", 100 * PAGE)
    with (top / "b").open("r+b") as file:
        fallocate(file.fileno(), PUNCH_HOLE | KEEP_SIZE, 100, 2 * PAGE)
    with (top / "a").open("r+b") as file:
        fallocate(file.fileno(), ZERO_RANGE, 3, 10 * PAGE)
        fallocate(file.fileno(), KEEP_SIZE, 20 * PAGE, 10 * PAGE)


@pytest.mark.parametrize("change", [make, rename_files, remove, attributes, sizes])
def test_after_one_fsync_all_is_there(
    quick_mount: QuickMount, how: str, change: Callable[[Path], None]
) -> None:
    """One fsync of a directory, or of any file, makes everything durable: more than POSIX asks for."""
    top = quick_mount.path
    for name in "abc":
        (top / name).write_bytes(name.encode() * 4 * PAGE)
        os.setxattr(top / name, b"user.keep", b"x")
    (top / "d").mkdir()
    (top / "e" / "deep").mkdir(parents=True)
    (top / "s").symlink_to("a")
    sync(top)
    before = tree(top)
    quick_mount.crash(how)
    assert tree(top) == before
    change(top)
    sync(top / "b" if (top / "b").exists() else top / "c")
    before = tree(top)
    quick_mount.crash(how)
    assert tree(top) == before


def test_unsynced_data_is_gone_or_present(quick_mount: QuickMount, how: str) -> None:
    top = quick_mount.path
    (top / "old").write_bytes(b"o" * 3 * PAGE)
    sync(top)
    (top / "new").write_bytes(b"n" * 3 * PAGE)
    (top / "old").rename(top / "renamed")
    os.truncate(top / "renamed", 0)
    quick_mount.crash(how)
    found = {p.name: p.read_bytes() for p in top.iterdir()}
    assert found in ({"old": b"o" * 3 * PAGE}, {"renamed": b"", "new": b"n" * 3 * PAGE})


def test_unlinked_but_open_is_gone(quick_mount: QuickMount, how: str) -> None:
    free = os.statvfs(quick_mount.path).f_bavail
    fd = os.open(quick_mount.path / "f", os.O_RDWR | os.O_CREAT)
    (quick_mount.path / "f").unlink()
    os.write(fd, b"x" * MIB)
    os.fsync(fd)
    quick_mount.crash(how)
    with pytest.raises(OSError, match=r"not connected|abort"):
        os.fsync(fd)
    close(fd)
    assert os.listdir(quick_mount.path) == []
    assert os.statvfs(quick_mount.path).f_bavail == free


def test_beyond_the_old_end_are_zeros(quick_mount: QuickMount, how: str) -> None:
    """Bytes appended to a block and not synced do not come back when the file grows."""
    path = quick_mount.path / "f"
    path.write_bytes(b"a" * 100)
    sync(path)
    with path.open("ab") as file:
        file.write(b"b" * 2 * PAGE)
    quick_mount.crash(how)
    size = path.stat().st_size
    assert size in (100, 100 + 2 * PAGE)
    os.truncate(path, 3 * PAGE)
    kept = (b"a" * 100 + b"b" * 2 * PAGE)[:size]
    assert path.read_bytes() == kept + bytes(3 * PAGE - size)


def test_crash_after_crash(quick_mount: QuickMount, how: str) -> None:
    """Each round adds and syncs a little, which every later crash keeps."""
    top = quick_mount.path
    for i in range(6):
        (top / f"f{i}").write_bytes(bytes([65 + i]) * (i * 1000 + 1))
        subprocess.run(["sync", top / f"f{i}"], check=True, timeout=PATIENCE)
        (top / f"lost{i}").write_bytes(b"lost" * 10000)
        quick_mount.crash(how)
        names = {p.name for p in top.iterdir()}
        assert {f"f{j}" for j in range(i + 1)} <= names
        for j in range(i + 1):
            assert (top / f"f{j}").read_bytes() == bytes([65 + j]) * (j * 1000 + 1)
