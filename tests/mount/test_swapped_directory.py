"""Unmounting goes by the mount, not by a path: another user may replace a directory of the path by a link."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from daxemu.errors import DaxemuError
from daxemu.host.fuse.session import Session
from daxemu.host.proc.mountinfo import mount_at
from tests.support.mount import dax_mount_at
from tests.support.quick import SHM, QuickMount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="fusermount3 unmounts for other users"),
]


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """A directory; the owner may rename its entries."""
    directory = tmp_path / "user" / "inner"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """Another filesystem, mounted on a directory ``mnt``."""
    mountpoint = tmp_path / "victim" / "mnt"
    mountpoint.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "victim", mountpoint], check=True)
    yield mountpoint
    subprocess.run(["umount", "-l", mountpoint], check=False)


@pytest.mark.parametrize("method", ["unmount", "detach"])
def test_a_directory_that_became_a_link_leads_to_no_other_mount(
    user: Path, victim: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange comes after mountinfo was read."""
    with dax_mount_at(user) as mount:
        found = mount_at(mount.path)
        assert found is not None
        moved = user.with_name("moved")
        user.rename(moved)
        user.symlink_to(victim.parent)
        monkeypatch.setattr("daxemu.host.fuse.session.mount_at", lambda path: found)
        monkeypatch.setattr("daxemu.host.fuse.session.mounts", lambda: [found], raising=False)
        try:
            with suppress(DaxemuError):
                getattr(Session(-1, found), method)()
            assert victim.is_mount()
            assert (moved / "mnt").is_mount()
        finally:
            monkeypatch.undo()
            user.unlink()
            moved.rename(user)


@pytest.mark.parametrize("method", ["unmount", "detach"])
def test_a_mount_whose_directory_was_renamed_is_still_unmounted(
    user: Path, victim: Path, method: str
) -> None:
    with dax_mount_at(user) as mount:
        found = mount_at(mount.path)
        assert found is not None
        moved = user.with_name("moved")
        user.rename(moved)
        user.symlink_to(victim.parent)
        try:
            getattr(Session(-1, found), method)()
            assert not (moved / "mnt").is_mount()
            assert victim.is_mount()
        finally:
            user.unlink()
            moved.rename(user)


def test_a_mount_that_got_a_freed_number_stays(quick_mount: QuickMount) -> None:
    """The kernel gives the numbers of an ended mount (mount and device) to the next mount anywhere."""
    there = mount_at(quick_mount.path)
    assert there is not None
    for ended in (
        there._replace(device=SHM / "another", mountpoint=quick_mount.path.parent),
        there._replace(device=SHM / "another"),
    ):
        Session(-1, ended).detach()
        assert mount_at(quick_mount.path) == there


def test_a_dead_connection_cuts_no_other(quick_mount: QuickMount, tmp_path: Path) -> None:
    """The next mount gets the device number of an ended mount, and its file in /sys/fs/fuse/connections."""
    (tmp_path / "ended").mkdir()
    session = Session.open(tmp_path / "no device", tmp_path / "ended")
    try:
        session.detach()
        session.mount = session.mount._replace(dev=mount_at(quick_mount.path).dev)  # type: ignore[union-attr]
        assert session.abort()
        quick_mount.make_file("f", 1)
    finally:
        os.close(session.fd)
