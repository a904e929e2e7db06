"""overlayfs with the upper directory on a mount, as container engines use it."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.quick import QuickMount
from tests.support.syscalls import RENAME_EXCHANGE, renameat2

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="mount(2) of overlayfs is for root"),
    pytest.mark.skipif(
        "\toverlay\n" not in Path("/proc/filesystems").read_text(), reason="this kernel has no overlayfs"
    ),
]

_libc = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2


class Overlay(NamedTuple):
    """Merged tree at ``top``; changes go to ``upper``."""

    top: Path
    upper: Path


@pytest.fixture
def overlay(quick_mount: QuickMount, tmp_path: Path) -> Iterator[Overlay]:
    """Overlay on a lower directory with the file ``f`` and the directory ``d`` with ``d/g``."""
    lower, top = tmp_path / "lower", tmp_path / "merged"
    upper, work = quick_mount.path / "upper", quick_mount.path / "work"
    for directory in (lower, lower / "d", top, upper, work):
        directory.mkdir()
    (lower / "f").write_text("lower")
    (lower / "d" / "g").write_text("deep")
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on"
    done = _libc.mount(b"overlay", os.fsencode(top), b"overlay", 0, os.fsencode(options))
    assert done == 0, os.strerror(ctypes.get_errno())
    try:
        yield Overlay(top, upper)
    finally:
        assert _libc.umount2(os.fsencode(top), MNT_DETACH) == 0


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def test_files(overlay: Overlay) -> None:
    (overlay.top / "new").write_text("new")
    with (overlay.top / "f").open("a") as file:
        file.write(" and more")
    assert (overlay.upper / "f").read_text() == "lower and more"
    (overlay.top / "f").rename(overlay.top / "moved")
    assert is_whiteout(overlay.upper / "f")
    assert (overlay.top / "moved").read_text() == "lower and more"
    renameat2(overlay.top / "new", overlay.top / "moved", RENAME_EXCHANGE)
    assert (overlay.top / "new").read_text() == "lower and more"
    (overlay.top / "moved").unlink()
    assert sorted(os.listdir(overlay.top)) == ["d", "new"]


def test_directories(overlay: Overlay) -> None:
    (overlay.top / "d" / "g").unlink()
    assert is_whiteout(overlay.upper / "d" / "g")
    (overlay.top / "d").rmdir()
    assert is_whiteout(overlay.upper / "d")
    (overlay.top / "d").mkdir()
    assert os.getxattr(overlay.upper / "d", "trusted.overlay.opaque") == b"y"
    assert os.listdir(overlay.top / "d") == []
    (overlay.top / "d").rename(overlay.top / "e")
    assert sorted(os.listdir(overlay.top)) == ["e", "f"]


def test_a_directory_from_below_is_renamed(overlay: Overlay) -> None:
    (overlay.top / "d").rename(overlay.top / "e")
    assert os.getxattr(overlay.upper / "e", "trusted.overlay.redirect") == b"d"
    assert (overlay.top / "e" / "g").read_text() == "deep"
