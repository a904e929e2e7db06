"""Mount of a path, found without a touch of the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from daxemu.errors import NotMounted
from daxemu.host.proc import mountinfo
from daxemu.host.proc.mountinfo import Mount, mount_of, printable


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mount]:
    """Three mounts that do not exist: one inside another, and one on top of the inner mount."""
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    made = [
        Mount(outer, Path("/dev/one"), (0, 50)),
        Mount(inner, Path("/dev/two"), (0, 51)),
        Mount(inner, Path("/dev/three"), (0, 52)),
    ]
    monkeypatch.setattr(mountinfo, "mounts", lambda: made)
    return made


def test_the_innermost_and_topmost_mount_is_it(table: list[Mount]) -> None:
    outer, _, top = table
    assert mount_of(outer.mountpoint) == outer
    assert mount_of(outer.mountpoint / "no" / "such" / "file") == outer
    assert mount_of(top.mountpoint / "file") == top
    assert mount_of(outer.mountpoint / "inner" / ".." / "file") == outer


def test_links_are_followed_outside_of_mounts(table: list[Mount], tmp_path: Path) -> None:
    (tmp_path / "to-file").symlink_to("outer/file")
    (tmp_path / "to-link").symlink_to("to-file")
    (tmp_path / "directory").symlink_to(table[0].mountpoint)
    assert mount_of(tmp_path / "to-link") == table[0]
    assert mount_of(tmp_path / "directory" / "x") == table[0]


@pytest.mark.parametrize("path", ["elsewhere", "outerother/file", "."])
def test_other_paths_are_refused_with_what_to_do(table: list[Mount], tmp_path: Path, path: str) -> None:
    with pytest.raises(NotMounted, match="daxemu mount"):
        mount_of(tmp_path / path)


def test_a_ring_of_links_ends(table: list[Mount], tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(NotMounted):
        mount_of(tmp_path / "a")


def test_paths_that_are_no_utf8_are_printable() -> None:
    assert printable(Path("/tmp/\udcff")) == "/tmp/\\xff"
