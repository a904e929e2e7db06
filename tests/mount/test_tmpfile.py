"""O_TMPFILE: files without a name, and naming them by linkat(2)."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from daxemu.host.fuse import supplement
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.syscalls import link_open_file

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not supplement.READS, reason="libfuse before 3.14: O_TMPFILE is EOPNOTSUPP"),
]


def make(top: Path, flags: int = 0) -> int:
    """Open a file without a name; skip the test where the kernel does not ask for one (before 6.1)."""
    try:
        return os.open(top, os.O_TMPFILE | os.O_RDWR | flags, 0o640)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 1):
            pytest.skip("this kernel has no FUSE_TMPFILE")
        raise


def test_the_name_comes_with_all_bytes(quick_mount: QuickMount) -> None:
    """The named file also has the bytes passed over by an earlier commit, stored through a mapping or not,
    and keeps the bytes.
    """
    fd = make(quick_mount.path)
    assert (os.fstat(fd).st_nlink, os.fstat(fd).st_mode & 0o777) == (0, 0o640)
    assert os.listdir(quick_mount.path) == []
    os.write(fd, b"a" * PAGE)
    os.ftruncate(fd, 3 * PAGE)
    os.fsync(fd)
    with mmap.mmap(fd, 3 * PAGE) as view:
        view[2 * PAGE] = ord("c")
        link_open_file(fd, quick_mount.path / "f")
    os.fsync(fd)
    os.close(fd)
    expected = b"a" * PAGE + bytes(PAGE) + b"c".ljust(PAGE, b"\0")
    for how in ("powerfail", "kill"):
        assert (quick_mount.path / "f").read_bytes() == expected
        assert (quick_mount.path / "f").stat().st_nlink == 1
        quick_mount.crash(how)


def test_a_second_name(quick_mount: QuickMount) -> None:
    fd = make(quick_mount.path)
    link_open_file(fd, quick_mount.path / "f")
    os.link(quick_mount.path / "f", quick_mount.path / "g")
    assert os.fstat(fd).st_nlink == 2
    (quick_mount.path / "f").unlink()
    (quick_mount.path / "g").unlink()
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        link_open_file(fd, quick_mount.path / "h")
    os.close(fd)


def test_without_a_name_the_blocks_come_back(quick_mount: QuickMount) -> None:
    (quick_mount.path / "f").write_bytes(b"x")
    os.sync()
    free = os.statvfs(quick_mount.path).f_bfree
    fd = make(quick_mount.path, os.O_EXCL)
    os.write(fd, bytes(64 * PAGE))
    assert os.statvfs(quick_mount.path).f_bfree <= free - 64
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        link_open_file(fd, quick_mount.path / "g")
    os.close(fd)
    top = os.open(quick_mount.path, os.O_RDONLY)
    os.fsync(top)
    os.close(top)
    quick_mount.remount()
    assert os.statvfs(quick_mount.path).f_bfree >= free
    assert os.listdir(quick_mount.path) == ["f"]
