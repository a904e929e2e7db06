"""POSIX access control lists through setfacl and getfacl, and the mode bits derived by the kernel."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.mount import DaxMount

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(
        shutil.which("setfacl") is None, reason="setfacl is not installed: make setup installs it"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users, which only root can"),
]


def acl(path: Path) -> set[str]:
    """Return the output of getfacl without comments."""
    shown = subprocess.run(["getfacl", "-pcn", path], capture_output=True, text=True, check=True).stdout
    return set(shown.split())


def setfacl(*arguments: str | Path) -> None:
    subprocess.run(["setfacl", *arguments], check=True)


def may_read(uid: int, path: Path) -> bool:
    # By its name alone: other users cannot walk the path to the mount.
    command = ["setpriv", f"--reuid={uid}", "--regid=4000", "--clear-groups", "cat", path.name]
    return subprocess.run(command, capture_output=True, cwd=path.parent).returncode == 0


def test_a_list_decides_and_the_mode_follows(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 1)
    file.chmod(0o600)
    assert not may_read(4001, file)
    setfacl("-m", "u:4001:r", file)
    assert may_read(4001, file)
    assert not may_read(4002, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640, "the group bits show the mask"
    assert acl(file) == {"user::rw-", "user:4001:r--", "group::---", "mask::r--", "other::---"}
    file.chmod(0o600)
    assert "mask::---" in acl(file)
    assert not may_read(4001, file)
    setfacl("-b", file)
    assert acl(file) == {"user::rw-", "group::---", "other::---"}


def test_a_default_list_is_inherited_instead_of_the_umask(dax_mount: DaxMount) -> None:
    directory = dax_mount.path / "d"
    directory.mkdir()
    setfacl("-d", "-m", "u::rwx,g::r-x,o::---,u:4001:rwx,m::rwx", directory)
    before = os.umask(0o077)
    try:
        (directory / "f").touch(mode=0o666)
        (directory / "sub").mkdir()
    finally:
        os.umask(before)
    assert "user:4001:rwx" in acl(directory / "f")
    assert "mask::rw-" in acl(directory / "f")
    assert stat.S_IMODE((directory / "f").stat().st_mode) == 0o660
    assert "default:user:4001:rwx" in acl(directory / "sub")
    (directory / "sub" / "g").touch()
    assert "user:4001:rwx" in acl(directory / "sub" / "g")


def test_lists_survive_a_remount(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 1)
    setfacl("-m", "g:4000:r", file)
    before = acl(file)
    dax_mount.umount()
    dax_mount.mount()
    assert acl(file) == before


def test_the_umask_counts_without_a_default_list(dax_mount: DaxMount) -> None:
    before = os.umask(0o027)
    try:
        (dax_mount.path / "f").touch(mode=0o666)
        (dax_mount.path / "d").mkdir(mode=0o777)
        os.mkfifo(dax_mount.path / "p", 0o666)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((dax_mount.path / name).stat().st_mode) for name in "fdp"]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.parametrize(
    ("gid", "groups", "kept"), [(4000, "4001", True), (4001, "4000", True), (4001, "4002", False)]
)
def test_setfacl_by_an_owner_outside_of_the_group_clears_setgid(
    dax_mount: DaxMount, gid: int, groups: str, kept: bool
) -> None:
    """setfacl clears the set-group-ID bit as chmod(2) does: an owner outside of the file's group loses the
    bit.
    """
    file = dax_mount.make_file("f", 1)
    os.chown(file, 4000, 4000)
    file.chmod(0o2755)
    owner = ["setpriv", "--reuid=4000", f"--regid={gid}", f"--groups={groups}"]
    subprocess.run([*owner, "setfacl", "-m", "u::rwx,g::rwx,o::rwx", file.name], check=True, cwd=file.parent)
    assert stat.S_IMODE(file.stat().st_mode) == (0o2777 if kept else 0o777)


def test_root_keeps_setgid(dax_mount: DaxMount) -> None:
    file = dax_mount.make_file("f", 1)
    os.chown(file, 4000, 4000)
    file.chmod(0o2755)
    setfacl("-m", "u:4002:rw", file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o2775
