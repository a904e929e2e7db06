"""Crash at each write to the metadata, whole and torn: the filesystem opens, is sound, and has the state of
one of two commits.

One run of a fixed workload. At each write, a copy of the media in the state of a crash is opened.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.dax_device import DaxDevice
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core, core_at, pages
from tests.support.metadata import in_pages

Tree = dict[str, tuple[Any, ...]]


def tree(fs: Filesystem) -> Tree:
    """Return the contents of a filesystem, by inode."""
    found: Tree = {}
    for inode in fs.names:
        if not inode.nlink:
            continue
        places = [(e.file_block, e.dev_block, e.length) for e in inode.extents or ()]
        data = bytes(fs.read(inode.ino, 0, inode.size)) if inode.extents is not None else b""
        what = (inode.mode, inode.nlink, inode.uid, inode.size, inode.mtime, inode.ctime, inode.target)
        names = dict(inode.entries or {}), dict(inode.xattrs)
        found[str(inode.ino)] = (*what, *names, _joined(places), data)
    return found


def _joined(places: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Block by block: links may be cut differently."""
    return [(block + i, dev + i) for block, dev, length in places for i in range(length)]


def open_copy(path: Path) -> tuple[list[str], Tree]:
    """Return the problems of fsck and the contents of a device. Raises as a mount of the device."""
    with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
        fs = Filesystem(pmem.dax, MemoryFailures(lambda event: None), lambda event: None)
        try:
            return fsck(fs), tree(fs)
        finally:
            fs.abandon()
            fs.close()


class Crashes:
    """Check the device in the state of a crash, at every write. ``old`` and ``new``: the permitted
    contents.
    """

    def __init__(self, core: Core, scratch: Path) -> None:
        self.core = core
        self.scratch = scratch
        self.old = tree(core.fs)
        self.new = self.old
        self.points = self.kept = self.gone = 0
        self.writes: Counter[MetadataFile] = Counter()

    def look(self, torn: Callable[[int], None] | None = None) -> None:
        """``torn`` is given the copy's media to change first."""
        self.points += 1
        copy = self.scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.core.path, copy)
        if torn is not None:
            fd = os.open(copy / "media", os.O_RDWR)
            try:
                torn(fd)
            finally:
                os.close(fd)
        wrong, found = open_copy(copy)
        assert wrong == []
        assert found in (self.old, self.new), f"neither the old nor the new state at point {self.points}"
        self.kept += found == self.new != self.old
        self.gone += found == self.old != self.new

    def commit(self) -> None:
        """Commit, with a crash at each write of the commit."""
        self.new = tree(self.core.fs)
        self.core.fs.fsync()
        self.look()
        assert open_copy(self.scratch / "copy")[1] == self.new
        self.old = self.new


@pytest.fixture
def crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crashes]:
    with core_at() as core:
        made = Crashes(core, tmp_path)
        watch(made, monkeypatch)
        yield made


def watch(crashes: Crashes, monkeypatch: pytest.MonkeyPatch, every: int = 1) -> None:
    """Crash before each write to the tables and the superblocks, within the write, and between the two
    replicas.

    ``every``: check only each ``every``-th write.
    """
    store, recovery_write = MetadataRegion._store, DaxDevice.recovery_write
    core = crashes.core

    def watched(
        region: MetadataRegion, file: MetadataFile, replica: int, first: int, blocks: memoryview
    ) -> None:
        if region is not core.fs.region:
            store(region, file, replica, first, blocks)
            return
        for at, page in in_pages(0, blocks):
            crashes.writes[file] += 1
            number = first + at // PAGE_SIZE
            if sum(crashes.writes.values()) % every == 0:
                crashes.look()
                place = region._device_offset(file, replica, number)
                for cut in (512, PAGE_SIZE // 2, PAGE_SIZE - 512):
                    crashes.look(lambda fd, at=place, n=cut, page=page: _pwrite(fd, at, page[:n]))  # type: ignore[misc]
            store(region, file, replica, number, page)

    def watched_recovery(dax: DaxDevice, offset: int, data: bytes | memoryview) -> list[Range]:
        if dax is core.pmem.dax:
            crashes.look()
            crashes.look(lambda fd: _pwrite(fd, offset, data[: len(data) // 1024 * 512]))
        return recovery_write(dax, offset, data)

    monkeypatch.setattr(MetadataRegion, "_store", watched)
    monkeypatch.setattr(DaxDevice, "recovery_write", watched_recovery)


def _pwrite(fd: int, offset: int, data: bytes | memoryview) -> None:
    os.pwrite(fd, data, offset)


def test_names_sizes_extents_attributes(crashes: Crashes) -> None:
    core = crashes.core
    fs = core.fs
    one = core.file(b"one", pages("ABCDEFGH"))
    crashes.commit()
    directory = core.dir(b"d").ino
    two = core.clone(one, b"two")
    core.file(b"three", b"x" * 5000, directory)
    fs.symlink(ROOT_INO, b"s", b"target" * 50, ROOT)
    fs.setxattr(one, b"user.a", b"v" * 700, 0)
    crashes.commit()
    fs.rename((ROOT_INO, b"two"), (directory, b"three"), 0)
    fs.fallocate(one, 3, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    fs.set_size(two, 4 * PAGE_SIZE)
    fs.link(one, directory, b"link")
    crashes.commit()
    fs.unlink(ROOT_INO, b"one")
    fs.mknod(directory, b"fifo", stat.S_IFIFO | 0o600, 0, ROOT)
    fs.removexattr(one, b"user.a")
    fs.setattr(two, mode=0o600, uid=7, gid=8, mtime=123)
    crashes.commit()
    assert crashes.kept > 4
    assert crashes.gone > 20


def test_checkpoints_and_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits of many pages: SQLite copies the WAL back, and the region grows by new extents."""
    with core_at() as core:
        crashes = Crashes(core, tmp_path)
        watch(crashes, monkeypatch, every=7)
        generation = core.fs.region.superblocks.generation
        for number in range(3):
            for i in range(100):
                core.file(b"%d-%d" % (number, i) + b"x" * 220)
            crashes.commit()
        for i in range(0, 100, 2):
            core.fs.unlink(ROOT_INO, b"1-%d" % i + b"x" * 220)
        crashes.commit()
        assert crashes.writes[MetadataFile.DB] > 20
        assert crashes.writes[MetadataFile.WAL] > 50
        assert core.fs.region.superblocks.generation > generation


def test_unmounting(crashes: Crashes) -> None:
    """Crash during the last commit, and during the writes of SQLite at its end."""
    core = crashes.core
    core.file(b"f", pages("ABC"))
    crashes.new = tree(core.fs)
    core.close()
    crashes.look()
    assert open_copy(crashes.scratch / "copy")[1] == crashes.new
