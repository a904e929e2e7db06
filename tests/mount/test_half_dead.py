"""Supervisor killed while one of its own threads waited on the supervisor's mount.

The thread cannot die before the connection is cut. Until then the whole process lingers with open
descriptors: /dev/fuse, so the kernel waits for answers for ever, and the control socket, so clients wait,
too.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.mount import PATIENCE, daxemu
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.zygote import wait_for_death

pytestmark = pytest.mark.mount

CLONE = """
import sys
from tests.support.syscalls import clone_range
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    clone_range(target.fileno(), source.fileno())
"""


def test_users_of_the_mount_are_let_go(quick_mount: QuickMount) -> None:
    quick_mount.make_file("f", 4)
    quick_mount.umount()
    quick_mount.mount("die_at_own_open")
    process = subprocess.Popen(
        [sys.executable, "-c", CLONE, quick_mount.path / "f", quick_mount.path / "g"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_death(quick_mount.pid, process.pid)
        _, said = process.communicate(timeout=PATIENCE)
        assert "OSError" in said, said
    finally:
        quick_mount.bury()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("options", [[], ["--force"]])
def test_umount_clears_it_away(quick_mount: QuickMount, options: list[str]) -> None:
    os.truncate(quick_mount.make_file("f", 4), 8 * PAGE)
    quick_mount.umount()
    quick_mount.mount("die_at_own_open")
    pid = os.fork()
    if not pid:
        try:
            source = os.open(quick_mount.path / "f", os.O_RDONLY)
            os.lseek(source, 0, os.SEEK_HOLE)
        finally:
            os._exit(0)
    try:
        wait_for_death(quick_mount.pid, pid)
        daxemu("umount", *options, quick_mount.path)
    finally:
        quick_mount.bury()
        os.waitpid(pid, 0)
    quick_mount.mount()
    assert (quick_mount.path / "f").stat().st_size == 8 * PAGE
