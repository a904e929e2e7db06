"""Full devices, and devices with a full backing store: the program gets ENOSPC, without other harm."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import DaxMount, clear_away, daxemu
from tests.support.scene import PAGE, append_until_full, ask, refused

pytestmark = pytest.mark.mount

MIB = 1 << 20


def fill(directory: Path, most: int) -> list[Path]:
    """Write files of a mebibyte until ENOSPC, then one of the remaining size; return the complete files."""
    made: list[Path] = []
    for i in range(most):
        file = directory / f"fill{i}"
        try:
            file.write_bytes(bytes([i % 251 + 1]) * MIB)
        except OSError as error:
            file.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            append_until_full(directory / "rest", b"r")
            return made
        made.append(file)
    raise AssertionError(f"{most} MiB, and still there is space")


def are_whole(files: list[Path]) -> None:
    for i, file in enumerate(files):
        assert file.read_bytes() == bytes([i % 251 + 1]) * MIB
    rest = files[0].with_name("rest").read_bytes()
    assert rest == b"r" * len(rest)


@pytest.mark.parametrize("dax_mount", ["8M"], indirect=True)
def test_full_device(dax_mount: DaxMount) -> None:
    path = dax_mount.path
    free = os.statvfs(path).f_bavail
    assert 0 < free * PAGE < 8 << 20
    (path / "one").write_bytes(b"o" * PAGE)
    large = fill(path, 10)
    usage = os.statvfs(path)
    assert usage.f_bavail == 0
    assert usage.f_blocks * PAGE <= 8 << 20
    are_whole(large)
    with Actor.spawn(cwd=path) as p0:
        ask(p0, "open 0 one rw")
        assert refused(p0, f"pwrite 0 {PAGE} {PAGE} x") == "ENOSPC"
        assert ask(p0, f"pwrite 0 0 {PAGE} x") == PAGE
        assert ask(p0, f"trunc 0 {MIB}") == 0
        assert ask(p0, "fsync 0") == 0
    large.pop().unlink()
    assert os.statvfs(path).f_bavail == MIB // PAGE
    (path / "again").write_bytes(b"a" * MIB)
    dax_mount.umount()
    dax_mount.mount()
    are_whole(large)
    assert (path / "again").read_bytes() == b"a" * (1 << 20)
    for file in path.iterdir():
        file.unlink()
    assert os.statvfs(path).f_bavail == free


@pytest.mark.parametrize("dax_mount", ["8M"], indirect=True)
def test_copy_on_write_on_a_full_device(dax_mount: DaxMount) -> None:
    """A store to shared blocks is refused whole; the other owners keep their data."""
    path = dax_mount.path
    dax_mount.make_file("f", 8)
    dax_mount.run("reflink", path / "f", path / "g")
    fill(path, 10)
    with Actor.spawn(cwd=path) as p0:
        ask(p0, "open 0 g rw")
        assert refused(p0, f"pwrite 0 0 {2 * PAGE} x") == "ENOSPC"
        assert p0.cmd(f"pread 0 0 {2 * PAGE}").pages == "AB"
        ask(p0, "mmap 0 0 0 8 shared")
        assert p0.cmd("tw 0 3 x").ok == "x"
        assert refused(p0, "fsync 0") == "ENOSPC"
        assert ask(p0, "fsync 0") == 0
    assert (path / "f").read_bytes()[:PAGE] == b"A" * PAGE


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[DaxMount]:
    """A device of 1 GiB in a tmpfs of 64 MiB."""
    store, path = tmp_path / "store", tmp_path / "mnt"
    store.mkdir()
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", store], check=True)
    made = DaxMount(store / "pmem", path)
    try:
        daxemu("mkfs", made.device, "--size", "1G")
        made.mount()
        yield made
        made.umount("--force")
        daxemu("fsck", made.device)
    finally:
        clear_away(path)
        subprocess.run(["umount", "-l", store], check=True)


def test_full_backing_store(small_store: DaxMount) -> None:
    path = small_store.path
    pid = small_store.json("status", path)["pid"]
    large = fill(path, 100)
    assert len(large) > 20
    are_whole(large)
    with Actor.spawn(cwd=path) as p0:
        ask(p0, "open 0 sparse creat")
        ask(p0, f"trunc 0 {16 * PAGE}")
        assert refused(p0, f"pwrite 0 0 {16 * PAGE} x") == "ENOSPC"
        ask(p0, "mmap 0 0 0 16 shared")
        assert p0.cmd("tw 0 3 x").ok == "x"
        assert refused(p0, "fsync 0") == "ENOSPC"
    (path / "sparse").unlink()
    report = small_store.json("status", path)
    assert (report["state"], report["pid"]) == ("mounted", pid)
    for file in large[-4:]:
        file.unlink()
    del large[-4:]
    (path / "again").write_bytes(b"a" * (3 << 20))
    assert (path / "again").read_bytes() == b"a" * (3 << 20)
    are_whole(large)


def test_unmount_and_mount_with_a_full_backing_store(small_store: DaxMount) -> None:
    """All written data is present again, although no space was left for records."""
    path = small_store.path
    large = fill(path, 100)
    small_store.umount()
    small_store.mount()
    are_whole(large)


def test_poison_and_repair_with_a_full_backing_store(small_store: DaxMount) -> None:
    """The record of poison can be written, and the record of clearing."""
    path = small_store.path
    file = small_store.make_file("f", 8)
    small_store.inject("f", (PAGE, PAGE))
    fill(path, 100)
    small_store.inject("f", (5 * PAGE, PAGE))
    with Actor.spawn(cwd=path) as p0:
        ask(p0, "open 0 f rw")
        for page in (1, 5):
            assert refused(p0, f"pread 0 {page * PAGE} {PAGE}") == "EIO"
        assert ask(p0, f"pwrite 0 {PAGE} {PAGE} n") == PAGE
        assert p0.cmd(f"pread 0 0 {2 * PAGE}").pages == "An"
    small_store.umount()
    small_store.mount()
    with file.open("rb") as reopened:
        assert reopened.read(2 * PAGE)[PAGE:] == b"n" * PAGE
    assert small_store.json("badblocks", path)["sectors"] == 8
