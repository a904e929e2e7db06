"""Immutable and append-only inodes: chattr(1), lsattr(1), their ioctls, and the operations that the flags
refuse.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from daxemu.fs.inode_flags import APPEND, IMMUTABLE, KEY
from daxemu.host.fuse.fileattr import (
    FLAGS,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    FSXATTR,
)
from tests.support.elsewhere import NOBODY, python
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.syscalls import clone_range

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="the flags are for CAP_LINUX_IMMUTABLE"),
]

NODUMP = 0x40
NOREPLACE = 1
XFLAG_IMMUTABLE, XFLAG_APPEND = 0x08, 0x10


def ioctl(path: Path, command: int, argument: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, command, argument)
    finally:
        os.close(fd)


def flags_of(path: Path) -> int:
    return int(FLAGS.unpack(ioctl(path, FS_IOC_GETFLAGS, bytes(FLAGS.size)))[0])


def chattr(path: Path, flags: int) -> None:
    ioctl(path, FS_IOC_SETFLAGS, FLAGS.pack(flags))


def errno_of(verb: Callable[[], object]) -> str:
    try:
        verb()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "OK"


def opens(path: Path, flags: int) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags))


@pytest.fixture
def top(quick_mount: QuickMount) -> Path:
    """A mount with a file ``f``, a directory ``d`` with ``d/in``, and a file ``other``."""
    (quick_mount.path / "f").write_bytes(bytes(2 * PAGE))
    (quick_mount.path / "d").mkdir()
    (quick_mount.path / "d/in").touch()
    (quick_mount.path / "other").write_bytes(bytes(2 * PAGE))
    return quick_mount.path


@pytest.mark.parametrize("name", ["f", "d", "."])
def test_flags_stay_over_a_remount(quick_mount: QuickMount, top: Path, name: str) -> None:
    assert flags_of(top / name) == 0
    before = (top / name).stat()
    chattr(top / name, IMMUTABLE | APPEND)
    assert flags_of(top / name) == IMMUTABLE | APPEND
    assert (top / name).stat().st_ctime_ns > before.st_ctime_ns
    quick_mount.remount()
    assert flags_of(top / name) == IMMUTABLE | APPEND
    chattr(top / name, APPEND)
    assert errno_of(lambda: (top / name).chmod(0o700)) == "EPERM"
    chattr(top / name, 0)
    quick_mount.remount()
    assert flags_of(top / name) == 0
    (top / name).chmod(0o700)


def test_flags_survive_a_power_failure_once_synced(quick_mount: QuickMount, top: Path) -> None:
    chattr(top / "f", IMMUTABLE)
    with (top / "f").open("rb") as file:
        os.fsync(file.fileno())
    quick_mount.powerfail()
    quick_mount.mount()
    assert flags_of(top / "f") == IMMUTABLE


@pytest.mark.parametrize("flag", [IMMUTABLE, APPEND])
def test_a_flagged_file_refuses_changes(top: Path, flag: int) -> None:
    f, other = top / "f", top / "other"
    os.setxattr(f, "user.old", b"x")
    before = os.open(f, os.O_RDWR)
    with other.open("rb") as source, f.open("r+b") as opened:
        chattr(f, flag)
        refused = {
            "write": opens(f, os.O_WRONLY),
            "read and write": opens(f, os.O_RDWR),
            "O_TRUNC": opens(f, os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
            "O_RDONLY|O_TRUNC": opens(f, os.O_RDONLY | os.O_TRUNC),
            "truncate": lambda: os.truncate(f, 0),
            "ftruncate": lambda: os.ftruncate(before, 0),
            "chmod": lambda: f.chmod(0o600),
            "chown": lambda: os.chown(f, 1, 1),
            "utime": lambda: os.utime(f, ns=(1, 1)),
            "unlink": f.unlink,
            "rename": lambda: f.rename(top / "new"),
            "rename onto": lambda: other.rename(f),
            "link": lambda: os.link(f, top / "new"),
            "setxattr": lambda: os.setxattr(f, "user.x", b"x"),
            "removexattr": lambda: os.removexattr(f, "user.old"),
        }
        assert {what: errno_of(verb) for what, verb in refused.items()} == dict.fromkeys(refused, "EPERM")
        if flag == IMMUTABLE:
            assert errno_of(lambda: os.posix_fallocate(before, 0, PAGE)) == "EPERM"
            assert errno_of(lambda: clone_range(opened.fileno(), source.fileno())) == "EPERM"
            assert errno_of(lambda: os.copy_file_range(source.fileno(), before, PAGE)) == "EPERM"
            assert errno_of(lambda: os.utime(f)) == "EPERM"
            assert errno_of(opens(f, os.O_WRONLY | os.O_APPEND)) == "EPERM"
    os.close(before)
    assert f.read_bytes() == bytes(2 * PAGE)
    assert os.listxattr(f) == ["user.old"]
    chattr(f, 0)
    other.rename(f)


def test_an_append_only_file_grows(top: Path) -> None:
    f = top / "f"
    chattr(f, APPEND)
    with f.open("ab") as file:
        file.write(b"more")
    os.utime(f)
    assert f.read_bytes() == bytes(2 * PAGE) + b"more"


def test_a_descriptor_from_before_goes_on(top: Path) -> None:
    """write(2) and stores through a mapping still reach an immutable file: open(2) gave the right."""
    with (top / "f").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        chattr(top / "f", IMMUTABLE)
        assert os.pwrite(file.fileno(), b"x", 0) == 1
        view[PAGE] = ord("y")
        view.flush()
    assert (top / "f").read_bytes() == b"x".ljust(PAGE, b"\0") + b"y".ljust(PAGE, b"\0")


@pytest.mark.parametrize("flag", [IMMUTABLE, APPEND])
def test_a_flagged_directory_refuses_changes(top: Path, flag: int) -> None:
    """An append-only directory gets new names, and loses none."""
    d = top / "d"
    (d / "sub").mkdir()
    chattr(d, flag)
    made = {
        "create": opens(d / "new", os.O_CREAT | os.O_WRONLY),
        "mkdir": (d / "dir").mkdir,
        "mknod": lambda: os.mknod(d / "node"),
        "symlink": lambda: (d / "sym").symlink_to("x"),
        "link": lambda: os.link(top / "other", d / "hard"),
        "rename into": lambda: (top / "f").rename(d / "f"),
    }
    gone = {
        "unlink": (d / "in").unlink,
        "rmdir": (d / "sub").rmdir,
        "rename from": lambda: (d / "in").rename(top / "in"),
        "rename in": lambda: (d / "in").rename(d / "out"),
        "rename onto": lambda: (top / "other").rename(d / "in"),
        "rename": lambda: d.rename(top / "elsewhere"),
        "rmdir itself": d.rmdir,
        "chmod": lambda: d.chmod(0o700),
        "setxattr": lambda: os.setxattr(d, "user.x", b"x"),
    }
    making = "EPERM" if flag == IMMUTABLE else "OK"
    assert {what: errno_of(verb) for what, verb in made.items()} == dict.fromkeys(made, making)
    assert errno_of(opens(d, os.O_TMPFILE | os.O_RDWR)) in (making, "ENOTSUP")  # the latter before Linux 6.1
    assert {what: errno_of(verb) for what, verb in gone.items()} == dict.fromkeys(gone, "EPERM")
    (d / "in").write_text("bytes of its files are their own affair")
    assert "new" not in os.listdir(d) or flag == APPEND
    chattr(d, 0)
    assert flags_of(d / "in") == 0
    shutil.rmtree(d)


def test_flags_as_fsxattr(top: Path) -> None:
    """xfs_io(8) sets and reads the flags as fsxattr."""
    f = top / "f"
    ioctl(f, FS_IOC_FSSETXATTR, FSXATTR.pack(XFLAG_APPEND, 0, 0, 0, 0))
    assert flags_of(f) == APPEND
    chattr(f, IMMUTABLE | APPEND)
    found = FSXATTR.unpack(ioctl(f, FS_IOC_FSGETXATTR, bytes(FSXATTR.size)))
    assert found == (XFLAG_IMMUTABLE | XFLAG_APPEND, 0, 0, 0, 0)
    chattr(f, 0)


def test_other_flags_are_refused(top: Path) -> None:
    f = top / "f"
    assert errno_of(lambda: chattr(f, NODUMP | IMMUTABLE)) == "ENOTSUP"
    for other in ((0x80, 0, 0, 0, 0), (XFLAG_APPEND, 0, 0, 7, 0)):
        argument = FSXATTR.pack(*other)
        assert errno_of(lambda argument=argument: ioctl(f, FS_IOC_FSSETXATTR, argument)) == "ENOTSUP"  # type: ignore[misc]
    assert flags_of(f) == 0


def test_setting_flags_needs_the_owner_and_a_capability(top: Path) -> None:
    """Only the file's owner with CAP_LINUX_IMMUTABLE may change a flag. A call that changes no flag needs no
    capability.
    """
    f, other = top / "f", top / "other"
    os.chown(f, 65534, 65534)
    code = "fd = os.open(sys.argv[1], os.O_RDONLY); "
    code += f"fcntl.ioctl(fd, {FS_IOC_SETFLAGS}, bytes([int(sys.argv[2]), 0, 0, 0]))"

    def as_nobody(path: Path, flags: int) -> str:
        return python(f"{code}; print('OK')", path.name, str(flags), cwd=top, wrapper=NOBODY).strip()

    assert as_nobody(f, IMMUTABLE) == "EPERM"
    assert as_nobody(f, 0) == "OK"
    assert as_nobody(other, 0) == "EPERM"
    chattr(f, IMMUTABLE)
    assert as_nobody(f, 0) == "EPERM"
    assert flags_of(f) == IMMUTABLE
    chattr(f, 0)


def test_flags_are_no_extended_attribute(top: Path) -> None:
    f, name = top / "f", KEY.decode()
    chattr(f, APPEND)
    assert os.listxattr(f) == []
    assert errno_of(lambda: os.getxattr(f, name)) == "ENOTSUP"
    chattr(f, 0)
    assert errno_of(lambda: os.setxattr(f, name, struct.pack("=I", IMMUTABLE))) == "ENOTSUP"
    chattr(f, APPEND)
    assert errno_of(lambda: os.removexattr(f, name)) != "OK"
    assert flags_of(f) == APPEND


@pytest.mark.skipif(shutil.which("chattr") is None, reason="needs e2fsprogs")
def test_chattr_and_lsattr(top: Path) -> None:
    def run(*command: str) -> str:
        return subprocess.run(command, cwd=top, check=True, capture_output=True, text=True).stdout

    run("chattr", "+ia", "f")
    assert set(run("lsattr", "f").split()[0]) == {"i", "a", "-"}
    assert run("lsattr", "-d", "d").split()[0].strip("-") == ""
    run("chattr", "-R", "+a", "d")
    assert run("lsattr", "d/in").split()[0].strip("-") == "a"
    run("chattr", "-i", "-a", "f")
    (top / "f").unlink()
    refused = subprocess.run(["chattr", "+d", "other"], cwd=top, capture_output=True, text=True)
    assert refused.returncode
    assert os.strerror(errno.EOPNOTSUPP) in refused.stderr
