"""lseek(2) with SEEK_HOLE and SEEK_DATA on a real mount."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.mount import DaxMount
from tests.support.quick import QuickMount
from tests.support.scene import PAGE, Scene
from tests.support.syscalls import KEEP_SIZE, fallocate

pytestmark = pytest.mark.mount


@pytest.fixture
def dax_mount(quick_mount: QuickMount) -> QuickMount:
    return quick_mount


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Return the file's data ranges as ``cp --sparse`` would find them."""
    fd, found, at = os.open(path, os.O_RDONLY), [], 0
    try:
        while True:
            start = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return found
    finally:
        os.close(fd)


def test_holes_and_data(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    with path.open("wb") as file:
        for page in (2, 3, 7):
            file.seek(page * PAGE + 10)
            file.write(b"x")
        file.truncate(12 * PAGE + 5)
        fd = file.fileno()
        file.flush()
        assert data_ranges(path) == [(2 * PAGE, 4 * PAGE), (7 * PAGE, 8 * PAGE)]
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert os.lseek(fd, 2 * PAGE + 100, os.SEEK_DATA) == 2 * PAGE + 100
        assert os.lseek(fd, 2 * PAGE + 100, os.SEEK_HOLE) == 4 * PAGE
        assert os.lseek(fd, 5 * PAGE + 100, os.SEEK_HOLE) == 5 * PAGE + 100
        assert os.lseek(fd, 12 * PAGE, os.SEEK_HOLE) == 12 * PAGE
        assert os.lseek(fd, 0, os.SEEK_CUR) == 12 * PAGE, "the position is what was found"


def test_the_end_of_the_file_is_a_hole(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    path.write_bytes(b"x" * (PAGE + 10))
    assert data_ranges(path) == [(0, PAGE + 10)]
    fd = os.open(path, os.O_RDWR)
    try:
        fallocate(fd, KEEP_SIZE, 0, 8 * PAGE)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == PAGE + 10
    finally:
        os.close(fd)


def test_there_is_none(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    path.write_bytes(b"x" * PAGE)
    os.truncate(path, 4 * PAGE)
    fd = os.open(path, os.O_RDONLY)
    try:
        for whence, offset in (
            (os.SEEK_DATA, PAGE),
            (os.SEEK_DATA, 4 * PAGE),
            (os.SEEK_HOLE, 4 * PAGE),
            (os.SEEK_DATA, 1 << 40),
            (os.SEEK_HOLE, 1 << 40),
            (os.SEEK_DATA, -1),
            (os.SEEK_HOLE, -1),
        ):
            with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                os.lseek(fd, offset, whence)
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            os.lseek(fd, 0, 17)
    finally:
        os.close(fd)


def test_an_empty_file(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    path.touch()
    assert data_ranges(path) == []


def test_a_store_through_a_mapping_is_data(dax_mount: DaxMount) -> None:
    """The kernel writes dirty pages back before lseek(2) looks for a hole."""
    path = dax_mount.path / "f"
    with path.open("w+b") as file:
        file.truncate(8 * PAGE)
        with mmap.mmap(file.fileno(), 8 * PAGE) as view:
            view[5 * PAGE] = 1
            assert data_ranges(path) == [(5 * PAGE, 6 * PAGE)]


def test_cp_copies_stores_through_a_mapping(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    with path.open("w+b") as file:
        file.truncate(8 * PAGE)
        with mmap.mmap(file.fileno(), 8 * PAGE) as view:
            view[5 * PAGE] = 1
            subprocess.run(["cp", path, dax_mount.path / "copy"], check=True, timeout=30)
            assert (dax_mount.path / "copy").read_bytes() == view[:]


def test_poison_is_data(scene: Scene) -> None:
    scene.poison(3)
    assert data_ranges(scene.mount.path / "f") == [(0, 128 * PAGE)]


def test_far_out(dax_mount: DaxMount) -> None:
    path = dax_mount.path / "f"
    with path.open("wb") as file:
        file.seek(1 << 50)
        file.write(b"x")
    assert data_ranges(path) == [(1 << 50, (1 << 50) + 1)]
