"""The supervisor opens files of its mount: those without a name, and those that are swapped for a FIFO."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daxemu import protocol as p
from daxemu.host import own_files
from daxemu.host.mountinfo import mount_of
from tests.support.actor import Actor
from tests.support.mount import DaxMount
from tests.support.scene import PAGE, Scene, ask, present, told

pytestmark = pytest.mark.mount
HOLE_PAGES = 256
NOT_PERMITTED = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
ROUNDS = 200


def poison_hole(scene: Scene, ino: int, page: int) -> list[str]:
    """Poison one page of a file by its inode number; the outcomes."""
    with scene.mount.client() as client:
        request = p.Inject(ino=ino, ranges=[(page * PAGE, PAGE)])
        return [r.outcome for r in client.ask(request).ranges]


def sparse(scene: Scene, name: str, *, has_name: bool) -> tuple[list[Actor], int]:
    """Three processes that map a sparse file; the first has stored to page 64. And its inode number."""
    path = scene.mount.path / name
    path.touch()
    os.truncate(path, HOLE_PAGES * PAGE)
    ino = path.stat().st_ino
    actors = [scene.actor(f"p{index}") for index in range(3)]
    for actor in actors:
        ask(actor, f"open 0 {name} rw")
    if not has_name:
        path.unlink()
    for actor in actors:
        ask(actor, f"mmap 0 0 0 {HOLE_PAGES} shared")
    assert actors[0].cmd("tw 0 64 x").ok == "x"
    assert actors[1].cmd("tr 0 64").ok == "x"
    return actors, ino


@pytest.mark.parametrize("early_kill", [0, 1])
@pytest.mark.parametrize("has_name", [True, False])
def test_poison_of_a_hole_that_was_stored_to(scene: Scene, has_name: bool, early_kill: int) -> None:
    """mce-test's tinjpage. Early: each process with the page present gets AO. Late: the next load is AR."""
    scene.set(early_kill=early_kill)
    actors, ino = sparse(scene, "h", has_name=has_name)
    assert poison_hole(scene, ino, 64) == ["Recovered"]
    for actor in actors[:2]:
        if not early_kill:
            assert actor.cmd("tr 0 64").faulted
        assert [(s.get("code"), s.get("addr")) for s in told(actor)] == [
            ("BUS_MCEERR_AO" if early_kill else "BUS_MCEERR_AR", f"m0+{64 * PAGE:#x}")
        ]
    assert told(actors[2]) == []


@pytest.mark.parametrize("has_name", [True, False])
def test_seek_data_takes_no_page_away(early: Scene, has_name: bool) -> None:
    actors, ino = sparse(early, "h", has_name=has_name)
    fd = os.open(f"/proc/{actors[2].pid}/fd/{_descriptor(actors[2], ino)}", os.O_RDONLY)
    try:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 64 * PAGE
    finally:
        os.close(fd)
    if os.geteuid() == 0 or has_name:
        assert all(present(actor, 0, 64) for actor in actors[:2])
    assert poison_hole(early, ino, 64) == ["Recovered"]
    for actor in actors[:2]:
        assert [s["code"] for s in told(actor)] == ["BUS_MCEERR_AO"]
    assert told(actors[2]) == []


def _descriptor(actor: Actor, ino: int) -> str:
    """The number of a process's descriptor of a file."""
    return next(entry.name for entry in Path(f"/proc/{actor.pid}/fd").iterdir() if entry.stat().st_ino == ino)


def test_a_directory_swapped_for_a_link_leads_nowhere(
    dax_mount: DaxMount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without handles, as an ordinary user's supervisor: a link's target, a FIFO too, is not opened."""
    os.mkfifo(tmp_path / "f")
    root = dax_mount.path
    (root / "d").mkdir()
    (root / "d" / "f").write_bytes(b"x")
    ino = (root / "d" / "f").stat().st_ino
    mount = mount_of(root)

    def refused(*_: object) -> int:
        raise NOT_PERMITTED

    monkeypatch.setattr(own_files, "_by_handle", refused)
    os.close(own_files.open_inode(mount, ino, b"/d/f"))
    (root / "d").rename(root / "e")
    (root / "d").symlink_to(tmp_path)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        own_files.open_inode(mount, ino, b"/d/f")
    (root / "d").unlink()
    (root / "d").mkdir()
    os.mkfifo(root / "d" / "f")
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        own_files.open_inode(mount, ino, b"/d/f")
    with pytest.raises(PermissionError):
        own_files.open_inode(mount, ino, None)


def test_somebody_swaps_directories_all_the_while(dax_mount: DaxMount, tmp_path: Path) -> None:
    """SEEK_DATA has the supervisor open the file; the mount goes on, and can be ended."""
    os.mkfifo(tmp_path / "f")
    root = dax_mount.path
    (root / "d").mkdir()
    path = root / "d" / "f"
    path.touch()
    os.truncate(path, HOLE_PAGES * PAGE)
    fd = os.open(path, os.O_RDWR)

    def swap() -> None:
        for _ in range(ROUNDS):
            (root / "d").rename(root / "e")
            (root / "d").symlink_to(tmp_path)
            (root / "d").unlink()
            (root / "e").rename(root / "d")

    try:
        with ThreadPoolExecutor(1) as pool:
            swapping = pool.submit(swap)
            while not swapping.done():
                with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                    os.lseek(fd, 0, os.SEEK_DATA)
            swapping.result()
    finally:
        os.close(fd)
    dax_mount.umount()
