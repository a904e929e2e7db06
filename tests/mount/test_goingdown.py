"""The shutdown ioctl of XFS and ext4, which fstests use for a crash without a power failure."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from daxemu.host.fuse.extra_operations import XFS_IOC_GOINGDOWN
from tests.support.elsewhere import NOBODY, python
from tests.support.quick import QuickMount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="the shutdown ioctl is for CAP_SYS_ADMIN"),
]

DEFAULT, LOGFLUSH, NOLOGFLUSH = 0, 1, 2


def go_down(mount: QuickMount, how: int) -> None:
    top = os.open(mount.path, os.O_RDONLY)
    try:
        fcntl.ioctl(top, XFS_IOC_GOINGDOWN, struct.pack("=I", how))
    finally:
        os.close(top)


@pytest.mark.parametrize("how", [DEFAULT, LOGFLUSH, NOLOGFLUSH])
def test_nothing_works_until_the_next_mount(quick_mount: QuickMount, how: int) -> None:
    """After the next mount synced data is present; other data is, too, unless the log was not flushed."""
    with (quick_mount.path / "synced").open("w") as file:
        os.fsync(file.fileno())
    (quick_mount.path / "later").touch()
    go_down(quick_mount, how)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (quick_mount.path / "new").touch()
    assert [event["reason"] for event in quick_mount.events("FilesystemShutdown")] == [
        "User initiated shutdown received.  Shutting down filesystem."
    ]
    quick_mount.remount()
    there = set(os.listdir(quick_mount.path))
    assert "synced" in there
    assert how == NOLOGFLUSH or "later" in there


def test_refused(quick_mount: QuickMount) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        go_down(quick_mount, 3)
    code = f"import fcntl; fcntl.ioctl(os.open('.', os.O_RDONLY), {XFS_IOC_GOINGDOWN}, bytes(4))"
    assert python(code, cwd=quick_mount.path, wrapper=NOBODY) == "EPERM"
    (quick_mount.path / "f").touch()
