"""kill -9 at each point of a device's first mount: the next mount works, and the device is sound."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daxemu.errors import DaxemuError
from daxemu.host.proc.device_lock import wait_for_last_mount
from tests.support.mount import clear_away
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount

POINTS = (1, 2, 3, 5, 8, 20, 60, 150, 400, 800, 1000, 1060, 1400)
"""Accesses to the media at which to kill; a first mount makes some 1,070."""


def first_mount(mount: QuickMount, point: int) -> bool:
    """Mount, with a kill at the ``point``-th access; return True if the mount was killed before use."""
    try:
        mount.mount("die_at_access", point)
    except DaxemuError:
        clear_away(mount.path)
        wait_for_last_mount(mount.device)
        return True
    mount.kill()
    return False


def test_the_next_mount_works(tmp_path: Path, zygote: Zygote) -> None:
    killed = []
    for point in POINTS:
        scratch = tmp_path / str(point)
        scratch.mkdir()
        with quick_mount_at(scratch, zygote, 8 << 20, mount=False) as mount:
            killed.append(first_mount(mount, point))
            assert mount.fsck().wrong == []
            mount.mount()
            assert os.listdir(mount.path) == []
            (mount.path / "f").write_bytes(b"data" * 3000)
            mount.umount()
            mount.check()
            mount.mount()
            assert (mount.path / "f").read_bytes() == b"data" * 3000
    assert killed[0]
    assert not killed[-1]
