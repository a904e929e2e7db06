"""Records of format 2, which had no checksums: a mount upgrades them, or refuses in one line.

The last commit with format 2 made the images in tests/fs/format2: one with a clean end, the other with kill
-9.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from daxemu.errors import CorruptMetadata, NoSpace
from daxemu.events import Event, MetadataUpgraded
from daxemu.fs.allocator import Allocator
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.offline import check_device
from daxemu.fs.rmap import Rmap
from daxemu.fs.superblock import VERSION, newest
from daxemu.fs.upgrade import _FormerRegion
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.dax_device import DaxDevice
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.inject import inject
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE
from tests.support.corruption import Tree, tree
from tests.support.metadata import overwrite

IMAGES = Path(__file__).parent / "format2"


@pytest.fixture(params=["clean", "crashed"])
def former(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A device of format 2."""
    scratch = Path("/dev/shm") / f"daxemu-core-{os.getpid()}-{request.param}"
    scratch.mkdir()
    try:
        subprocess.run(["tar", "-C", scratch, "-xJf", IMAGES / f"{request.param}.tar.xz"], check=True)
        yield scratch / "device"
    finally:
        shutil.rmtree(scratch)


def mounted(path: Path) -> tuple[Tree, list[Event]]:
    """Mount the device. Return its contents and events; the filesystem is sound in the end."""
    events: list[Event] = []
    with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
        fs = Filesystem(pmem.dax, MemoryFailures(events.append), events.append)
        try:
            assert fsck(fs) == []
            return tree(fs), events
        finally:
            fs.close()


def expect_files(seen: Tree) -> None:
    assert set(seen) == {
        *(b"/", b"/f", b"/clone", b"/dir", b"/dir/another name", b"/dir/s"),
        *(b"/dir/file %d" % number for number in range(30)),
    }
    assert seen[b"/f"][-1] == seen[b"/clone"][-1] == seen[b"/dir/another name"][-1] == b"data" * 3000
    assert seen[b"/dir/s"][-4] == b"../f"
    assert seen[b"/f"][-3] == [(b"user.x", b"value")]
    assert [seen[b"/dir/file %d" % number][-1] for number in range(30)] == [b"%d" % n for n in range(30)]


def test_a_mount_upgrades_once(former: Path) -> None:
    seen, events = mounted(former)
    expect_files(seen)
    (event,) = events
    assert isinstance(event, MetadataUpgraded)
    assert (event.before, event.now) == (2, VERSION)
    assert mounted(former) == (seen, [])
    with DeviceDir.open(former) as directory:
        assert check_device(directory, repair=False).wrong == []


def test_fsck_names_the_format_and_changes_nothing_but_with_repair(former: Path) -> None:
    before = (former / "media").read_bytes()
    with DeviceDir.open(former) as directory:
        report = check_device(directory, repair=False)
        assert report.wrong == [
            "device: the filesystem has format 2, this daxemu reads 3: a mount, or fsck --repair, upgrades it"
        ]
        assert report.mendable == 1
        assert (former / "media").read_bytes() == before
        report = check_device(directory, repair=True)
        assert (report.upgraded, report.wrong, report.inodes) == (True, [], 35)
    seen, events = mounted(former)
    expect_files(seen)
    assert events == []


def test_an_upgrade_that_was_killed_is_begun_anew(
    former: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt the upgrade at each write to the media: before the write, and after a part of the write."""
    copies: list[Path] = []
    store, recovery_write = MetadataRegion._store, DaxDevice.recovery_write

    def look() -> None:
        copies.append(tmp_path / str(len(copies)))
        shutil.copytree(former, copies[-1])

    def stored(self: MetadataRegion, file: MetadataFile, replica: int, first: int, data: memoryview) -> None:
        look()
        store(self, file, replica, first, data[:PAGE_SIZE])
        look()
        store(self, file, replica, first, data)

    def recovered(self: DaxDevice, offset: int, data: bytes | memoryview) -> object:
        look()
        found = recovery_write(self, offset, data[:512])
        look()
        return [*found, *recovery_write(self, offset, data)]

    with monkeypatch.context() as patched:
        patched.setattr(MetadataRegion, "_store", stored)
        patched.setattr(DaxDevice, "recovery_write", recovered)
        with DeviceDir.open(former) as directory:
            check_device(directory, repair=True)
    upgraded = 0
    for copy in copies:
        seen, events = mounted(copy)
        expect_files(seen)
        upgraded += sum(type(event) is MetadataUpgraded for event in events)
        shutil.rmtree(copy)
    assert 0 < upgraded < len(copies)


def places(path: Path) -> list[tuple[int, ...]]:
    """Return the device offsets of both copies of each page of the database."""
    with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
        region = _FormerRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
        region.load()
        return [
            tuple(region._device_offset(MetadataFile.DB, replica, page) for replica in (0, 1))
            for page in range(region.pages(MetadataFile.DB))
        ]


@pytest.mark.parametrize("former", ["clean"], indirect=True)
@pytest.mark.parametrize("copy", [0, 1])
def test_copies_that_differ_are_refused(former: Path, copy: int) -> None:
    overwrite(former, places(former)[1][copy] + 4090, b"junk")
    before = (former / "media").read_bytes()
    with pytest.raises(CorruptMetadata, match="copies of page 1 of db differ"):
        mounted(former)
    assert (former / "media").read_bytes() == before


@pytest.mark.parametrize("copy", [0, 1])
def test_a_poisoned_copy_is_made_up_for(former: Path, copy: int) -> None:
    offsets = [page[copy] for page in places(former)]
    with DeviceDir.open(former) as directory, closing(Pmem(directory)) as pmem:
        for offset in offsets:
            inject(pmem, offset, 1)
    expect_files(mounted(former)[0])


def test_both_copies_poisoned_are_refused(former: Path) -> None:
    offsets = places(former)[0]
    with DeviceDir.open(former) as directory, closing(Pmem(directory)) as pmem:
        for offset in offsets:
            inject(pmem, offset, 1)
    with pytest.raises(CorruptMetadata, match="both copies of metadata page 0 of db are poisoned"):
        mounted(former)


def test_without_room_for_both_formats_nothing_changes(former: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise NoSpace("the device is full")

    before = (former / "media").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Allocator, "allocate_for", full)
        with pytest.raises(NoSpace):
            mounted(former)
    with DeviceDir.open(former) as directory, closing(Pmem(directory)) as pmem:
        assert newest(pmem.dax, version=2).version == 2
    assert (former / "media").read_bytes() == before
