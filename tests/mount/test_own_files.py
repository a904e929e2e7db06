"""Files of the mount opened by the supervisor: unlinked files, and paths swapped for a FIFO."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daxemu import protocol as p
from daxemu.host.page_cache import own_files
from daxemu.host.proc.mountinfo import mount_of
from tests.support.actor import Actor
from tests.support.elsewhere import NOBODY, SYSTEM_PYTHON
from tests.support.mount import PATIENCE, DaxMount
from tests.support.scene import PAGE, Scene, ask, present, signals_of
from tests.support.syscalls import clone_range

pytestmark = pytest.mark.mount
HOLE_PAGES = 256
NOT_PERMITTED = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
ROUNDS = 200


def poison_hole(scene: Scene, ino: int, page: int) -> list[str]:
    """Poison one page of a file by inode number; return the outcomes."""
    with scene.mount.client() as client:
        request = p.Inject(ino=ino, ranges=[(page * PAGE, PAGE)])
        return [r.outcome for r in client.ask(request).ranges]


def sparse(scene: Scene, name: str, *, has_name: bool) -> tuple[list[Actor], int]:
    """Three processes with a mapping of a sparse file, the first with a store to page 64; and the inode
    number.
    """
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
        assert [(s.get("code"), s.get("addr")) for s in signals_of(actor)] == [
            ("BUS_MCEERR_AO" if early_kill else "BUS_MCEERR_AR", f"m0+{64 * PAGE:#x}")
        ]
    assert signals_of(actors[2]) == []


@pytest.mark.parametrize("early_kill", [0, 1])
@pytest.mark.parametrize("has_name", [True, False])
@pytest.mark.parametrize("order", [(64, 192), (192, 64)], ids=["forward", "backward"])
def test_poison_of_two_stores_in_either_order(
    scene: Scene, order: tuple[int, int], has_name: bool, early_kill: int
) -> None:
    """The first injection writes both pages back; the second still finds them present."""
    scene.set(early_kill=early_kill)
    actors, ino = sparse(scene, "h", has_name=has_name)
    for actor in reversed(actors[:2]):  # the reader of page 64 is the first to store to page 192
        assert actor.cmd("tw 0 192 y").ok == "y"
    code = "BUS_MCEERR_AO" if early_kill else "BUS_MCEERR_AR"
    for page in order:
        assert poison_hole(scene, ino, page) == ["Recovered"]
        for actor in actors[:2]:
            if not early_kill:
                assert actor.cmd(f"tr 0 {page}").faulted
            assert [(s.get("code"), s.get("addr")) for s in signals_of(actor)] == [
                (code, f"m0+{page * PAGE:#x}")
            ]
    assert signals_of(actors[2]) == []


def test_a_clone_of_an_unlinked_file_revokes_no_page(early: Scene) -> None:
    """The clone has the stores that were not written back; the source's processes keep the page present."""
    actors, ino = sparse(early, "h", has_name=False)
    source = os.open(f"/proc/{actors[2].pid}/fd/{_descriptor(actors[2], ino)}", os.O_RDONLY)
    clone = os.open(early.mount.path / "clone", os.O_RDWR | os.O_CREAT)
    try:
        clone_range(clone, source)
        assert os.pread(clone, PAGE, 64 * PAGE)[:1] == b"x"
        assert os.fstat(clone).st_size == HOLE_PAGES * PAGE
    finally:
        os.close(clone)
        os.close(source)
    if os.geteuid() == 0:
        assert all(present(actor, 0, 64) for actor in actors[:2])
    (outcome,) = early.poison(64, file="clone")
    assert (outcome["outcome"], outcome["processes"]) == ("Recovered", 2)
    for actor in actors[:2]:
        assert [(s["code"], s["addr"]) for s in signals_of(actor)] == [
            ("BUS_MCEERR_AO", f"m0+{64 * PAGE:#x}")
        ]
    assert signals_of(actors[2]) == []


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
        assert [s["code"] for s in signals_of(actor)] == ["BUS_MCEERR_AO"]
    assert signals_of(actors[2]) == []


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


def test_opening_is_safe_while_directories_are_swapped(dax_mount: DaxMount, tmp_path: Path) -> None:
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


SWAP = f"""
os.mkdir("d")
with open("d/f", "wb") as file:
    file.truncate({HOLE_PAGES * PAGE})
print("ready", flush=True)
swaps = 0
os.set_blocking(0, False)
while sys.stdin.buffer.read(1) is None:
    os.rename("d", "e")
    os.symlink(sys.argv[1], "d")
    os.unlink("d")
    os.rename("e", "d")
    swaps += 1
print(swaps)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_swaps_a_directory_for_a_link_to_their_fifo(dax_mount: DaxMount) -> None:
    """The supervisor is root's, the directory, the link and the FIFO are another user's."""
    outside = Path(tempfile.mkdtemp(prefix="daxemu-swap-", dir="/dev/shm"))
    os.mkfifo(outside / "f")
    home = dax_mount.path / "home"
    home.mkdir()
    for theirs in (outside, outside / "f", home):
        os.chown(theirs, 65534, 65534)
    command = [*NOBODY, SYSTEM_PYTHON, "-c", "import os, sys\n" + SWAP, str(outside)]
    swapper = subprocess.Popen(command, cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert swapper.stdout is not None
    try:
        assert swapper.stdout.readline() == "ready\n"
        fd = _open_while_swapped(home / "d" / "f")
        try:
            for _ in range(ROUNDS):
                with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                    os.lseek(fd, 0, os.SEEK_DATA)
        finally:
            os.close(fd)
        swaps = int(swapper.communicate("x", timeout=PATIENCE)[0])
        assert swaps > 0
        dax_mount.umount()
    finally:
        swapper.kill()
        swapper.wait()
        shutil.rmtree(outside)


def _open_while_swapped(path: Path) -> int:
    """Open a file whose directory is replaced now and then; the FIFO at the same path is opened, too, and
    closed again.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
