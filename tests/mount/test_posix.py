"""Rules of POSIX and Linux for names, attributes and permissions, beyond the checks of pjdfstest."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.elsewhere import NOBODY, python
from tests.support.mount import PATIENCE
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

pytestmark = pytest.mark.mount


@pytest.fixture
def top(quick_mount: QuickMount) -> Path:
    quick_mount.path.chmod(0o755)
    return quick_mount.path


def refused(number: int) -> pytest.RaisesExc[OSError]:
    """Check for an error with the given errno in the block."""
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


# -- names


@pytest.mark.parametrize(
    "name", [b"x" * 255, "ü".encode() * 127, b"\xff\xfe\x80 \n\t'\"\\", b" ", b"...", b"-"]
)
def test_names_that_can_be(quick_mount: QuickMount, name: bytes) -> None:
    path = os.fsencode(quick_mount.path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(b"data")
    assert os.listdir(os.fsencode(quick_mount.path)) == [name]
    quick_mount.remount()
    assert os.listdir(os.fsencode(quick_mount.path)) == [name]
    assert Path(os.fsdecode(path)).read_bytes() == b"data"


def test_names_that_cannot_be(top: Path) -> None:
    (top / "f").touch()
    long = top / ("x" * 256)
    for action in (
        long.touch,
        long.mkdir,
        long.stat,
        lambda: long.symlink_to("x"),
        lambda: (top / "f").rename(long),
        lambda: long.hardlink_to(top / "f"),
        lambda: (top / "link").symlink_to("x" * 4096),
    ):
        with refused(errno.ENAMETOOLONG):
            action()
    assert os.listdir(top) == ["f"]


def test_symlinks(top: Path) -> None:
    target = "t" * 4095
    (top / "s").symlink_to(target)
    assert os.readlink(top / "s") == target  # noqa: PTH115
    assert (top / "s").lstat().st_size == 4095
    (top / "loop").symlink_to("loop")
    with refused(errno.ELOOP):
        (top / "loop").read_bytes()


def test_hard_links(top: Path) -> None:
    (top / "a").write_bytes(b"x")
    (top / "d").mkdir()
    for i in range(100):
        (top / "d" / f"l{i}").hardlink_to(top / "a")
    assert (top / "a").stat().st_nlink == 101
    (top / "d" / "l7").write_bytes(b"changed")
    assert (top / "a").read_bytes() == b"changed"
    with refused(errno.EPERM):
        (top / "e").hardlink_to(top / "d")
    for i in range(100):
        (top / "d" / f"l{i}").unlink()
    assert (top / "a").stat().st_nlink == 1
    assert top.stat().st_nlink == 3


def test_renames_of_open_files(top: Path) -> None:
    (top / "a").write_bytes(b"aaaa")
    (top / "b").write_bytes(b"bbbb")
    with (top / "a").open("r+b") as a, (top / "b").open("r+b") as b:
        (top / "a").rename(top / "b")
        assert (a.read(), b.read()) == (b"aaaa", b"bbbb")
        assert (os.fstat(a.fileno()).st_nlink, os.fstat(b.fileno()).st_nlink) == (1, 0)
        b.write(b"more")
        b.flush()
        assert (top / "b").read_bytes() == b"aaaa"
        assert os.pread(b.fileno(), 100, 0) == b"bbbbmore"


def test_rename_flags(top: Path) -> None:
    (top / "a").write_bytes(b"a")
    (top / "d" / "sub").mkdir(parents=True)
    with refused(errno.EEXIST):
        renameat2(top / "a", top / "d", RENAME_NOREPLACE)
    renameat2(top / "a", top / "d" / "sub", RENAME_EXCHANGE)
    assert (top / "d" / "sub").read_bytes() == b"a"
    assert (top / "a").is_dir()
    assert (top.stat().st_nlink, (top / "d").stat().st_nlink) == (4, 2)
    renameat2(top / "a", top / "new", RENAME_NOREPLACE)
    for flags in (RENAME_EXCHANGE, RENAME_NOREPLACE):
        with refused(errno.ENOENT):
            renameat2(top / "missing", top / "d", flags)
    with refused(errno.EINVAL):
        (top / "d").rename(top / "d" / "below")
    with refused(errno.EINVAL):
        renameat2(top / "new", top / "d", RENAME_EXCHANGE | RENAME_NOREPLACE)


def test_inode_numbers_are_never_used_again(quick_mount: QuickMount) -> None:
    seen: set[int] = set()
    for _ in range(4):
        for i in range(20):
            path = quick_mount.path / f"f{i}"
            path.touch()
            assert path.stat().st_ino not in seen
            seen.add(path.stat().st_ino)
            path.unlink()
        quick_mount.remount()


# -- times


def test_times_are_exact(quick_mount: QuickMount) -> None:
    path = quick_mount.path / "f"
    path.touch()
    for times in ((1, 999_999_999), (-1, -1_500_000_001), (1 << 60, 4_000_000_000_123_456_789)):
        os.utime(path, ns=times)
        s = path.stat()
        assert (s.st_atime_ns, s.st_mtime_ns) == times
        quick_mount.remount()
        s = path.stat()
        assert (s.st_atime_ns, s.st_mtime_ns) == times


@pytest.mark.parametrize(("asked", "kept"), [(-(1 << 55), -9_223_372_036), (1 << 55, 9_223_372_036)])
def test_times_that_cannot_be_kept(quick_mount: QuickMount, asked: int, kept: int) -> None:
    """The nearest is, and at once; everything else is committed all the same."""
    path = quick_mount.path / "f"
    path.touch()
    os.utime(path, (asked, asked))
    (quick_mount.path / "other").write_bytes(b"data")
    for _ in range(2):
        assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (kept * 10**9, kept * 10**9)
        quick_mount.remount()
    assert (quick_mount.path / "other").read_bytes() == b"data"


def test_each_operation_changes_ctime_and_mtime_as_in_posix(top: Path) -> None:
    """Times change as POSIX states, for the file and the directory."""
    path = top / "d" / "f"
    (top / "d").mkdir()
    path.write_bytes(b"x" * 100)

    def times(of: Path) -> tuple[int, int]:
        s = of.stat()
        return s.st_mtime_ns, s.st_ctime_ns

    def changed(action: object) -> list[str]:
        before, above = times(path), times(path.parent)
        assert callable(action)
        action()
        now, above_now = times(path), times(path.parent)
        names = ["mtime", "ctime", "dir mtime", "dir ctime"]
        return [n for n, a, b in zip(names, (*before, *above), (*now, *above_now), strict=True) if b > a]

    assert changed(lambda: path.chmod(0o600)) == ["ctime"]
    assert changed(lambda: os.chown(path, 1, 1)) == ["ctime"]
    assert changed(lambda: os.setxattr(path, "user.a", b"x")) == ["ctime"]
    assert changed(lambda: os.removexattr(path, "user.a")) == ["ctime"]
    assert changed(lambda: os.truncate(path, 50)) == ["mtime", "ctime"]
    assert changed(lambda: path.write_bytes(b"y")) == ["mtime", "ctime"]
    assert changed(path.read_bytes) == []
    assert changed(lambda: os.listdir(top / "d")) == []
    assert changed(lambda: (top / "d" / "l").hardlink_to(path)) == ["ctime", "dir mtime", "dir ctime"]
    assert changed(lambda: (top / "d" / "l").unlink()) == ["ctime", "dir mtime", "dir ctime"]
    assert changed(lambda: (top / "d" / "new").touch()) == ["dir mtime", "dir ctime"]
    assert changed(lambda: (top / "d" / "new").unlink()) == ["dir mtime", "dir ctime"]


# -- owners and modes


def test_setgid_directories_and_sticky_ones(top: Path) -> None:
    shared = top / "shared"
    shared.mkdir()
    os.chown(shared, 0, 4242)
    shared.chmod(0o3777)
    (shared / "roots").touch(0o644)
    assert (shared / "roots").stat().st_gid == 4242
    code = """
os.mkdir(sys.argv[1] + "/sub")
open(sys.argv[1] + "/mine", "w").close()
os.unlink(sys.argv[1] + "/mine")
os.unlink(sys.argv[1] + "/roots")
"""
    assert python(code, "shared", cwd=top, wrapper=NOBODY) == "EPERM"
    assert sorted(os.listdir(shared)) == ["roots", "sub"]
    sub = (shared / "sub").stat()
    assert (sub.st_uid, sub.st_gid, sub.st_mode & stat.S_ISGID) == (65534, 4242, stat.S_ISGID)


def test_suid_goes_with_a_write_and_a_chown(top: Path) -> None:
    path = top / "f"
    path.touch()
    path.chmod(0o6777)
    assert python("open('f', 'w').write('x')", cwd=top, wrapper=NOBODY) == ""
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    path.chmod(0o6777)
    os.chown(path, 7, 7)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_permissions_are_checked(top: Path) -> None:
    (top / "secret").write_bytes(b"x")
    (top / "secret").chmod(0o600)
    (top / "closed").mkdir(mode=0o700)
    assert python("open('secret')", cwd=top, wrapper=NOBODY) == "EACCES"
    assert python("os.listdir('closed')", cwd=top, wrapper=NOBODY) == "EACCES"
    assert python("os.chmod('secret', 0o777)", cwd=top, wrapper=NOBODY) == "EPERM"
    assert python("os.mkdir('new')", cwd=top, wrapper=NOBODY) == "EACCES"


# -- extended attributes, counts


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("none", errno.EOPNOTSUPP),
        ("User.a", errno.EOPNOTSUPP),
        ("system.a", errno.EOPNOTSUPP),
        ("user.", errno.EINVAL),
        ("security.", errno.EINVAL),
    ],
)
def test_names_of_xattrs(quick_mount: QuickMount, name: str, number: int) -> None:
    """Names are accepted and refused as on ext4 and XFS, for every user."""
    path = quick_mount.path / "f"
    path.touch()
    with pytest.raises(OSError, match=os.strerror(number)):
        os.setxattr(path, name, b"")
    with pytest.raises(OSError, match=os.strerror(number)):
        os.getxattr(path, name)
    with pytest.raises(OSError, match=os.strerror(number)):
        os.removexattr(path, name)
    assert os.listxattr(path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="trusted.* are for root")
def test_trusted_xattrs_are_not_listed_for_others(quick_mount: QuickMount) -> None:
    path = quick_mount.path / "f"
    path.touch()
    os.setxattr(path, "trusted.a", b"1")
    os.setxattr(path, "user.a", b"2")
    assert sorted(os.listxattr(path)) == ["trusted.a", "user.a"]
    assert python("print(os.listxattr('f'))", cwd=quick_mount.path, wrapper=NOBODY) == "['user.a']"


def test_xattrs(quick_mount: QuickMount) -> None:
    path = quick_mount.path / "f"
    path.touch()
    with refused(errno.ENODATA):
        os.getxattr(path, "user.a")
    with refused(errno.ENODATA):
        os.setxattr(path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    os.setxattr(path, "user.empty", b"")
    os.setxattr(path, "user.large", bytes(range(256)) * 256)
    os.setxattr(path, "user." + "n" * 250, b"long")
    os.setxattr(path, b"user.\xff\xfe", b"\0\xff")
    with refused(errno.E2BIG):
        os.setxattr(path, "user.larger", bytes(65537))
    with refused(errno.ERANGE):
        os.setxattr(path, "user." + "n" * 251, b"")
    expected = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    assert len(expected) == 5
    assert expected["user.large"] == bytes(range(256)) * 256
    quick_mount.remount()
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == expected


def test_statfs_counts(top: Path) -> None:
    before = os.statvfs(top)
    (top / "f").write_bytes(bytes(100 * PAGE))
    (top / "g").touch()
    after = os.statvfs(top)
    assert (after.f_bsize, after.f_frsize, after.f_namemax) == (PAGE, PAGE, 255)
    assert after.f_blocks == (1 << 30) // PAGE
    assert before.f_bavail - after.f_bavail == before.f_bfree - after.f_bfree == 100
    assert (after.f_files - after.f_ffree) - (before.f_files - before.f_ffree) == 2
    df = subprocess.run(["df", "-B1", top], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert str(1 << 30) in df.stdout
