"""The request ``who_maps``: mappings of files of the mount, of all processes."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from daxemu.client import Client
from daxemu.protocol import MappedFile, WhoMaps
from tests.support.scene import PAGE, Scene, ask

pytestmark = pytest.mark.mount


def mapped(scene: Scene) -> list[MappedFile]:
    with Client.at(scene.mount.path) as client:
        return client.ask(WhoMaps()).mapped


def test_each_mapping_is_listed_touched_or_not(scene: Scene, tmp_path: Path) -> None:
    p0 = scene.mapper("p0", touch=[3])
    ask(p0, "mmap 1 0 8 2 private")
    ino = (scene.mount.path / "f").stat().st_ino
    whole, part = sorted(mapped(scene), key=lambda each: each.length, reverse=True)
    assert (whole.pid, whole.comm, whole.ino, whole.offset) == (p0.pid, "p0", ino, 0)
    assert part == MappedFile(p0.pid, "p0", ino, 8 * PAGE, 2 * PAGE)


def test_files_of_other_filesystems_are_not_listed(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(bytes(PAGE))
    with (tmp_path / "elsewhere").open("rb") as file, mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ):
        assert mapped(scene) == []
