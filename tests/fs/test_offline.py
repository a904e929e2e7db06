"""Checking and repairing a device that is not mounted."""

from __future__ import annotations

import pytest

from daxemu.errors import Busy
from daxemu.fs.offline import Report, check_device
from daxemu.fs.rmap import METADATA_INO
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.inject import inject
from daxemu.uapi import PAGE_SIZE
from tests.fs.test_store import a_bit_of_everything, state
from tests.support.core import Core, pages


def check(core: Core, *, repair: bool = False) -> Report:
    with DeviceDir.open(core.path) as directory:
        return check_device(directory, repair=repair)


def test_a_sound_device(core: Core) -> None:
    a_bit_of_everything(core)
    count = len(core.fs.names)
    core.close()
    for repair in (False, True):
        assert check(core, repair=repair) == Report(inodes=count)


def test_checking_changes_nothing_that_a_mount_would_see(core: Core) -> None:
    a_bit_of_everything(core)
    before = state(core.fs)
    core.close()
    check(core)
    core.open()
    assert state(core.fs) == before


def test_a_mounted_device_is_busy(core: Core) -> None:
    with pytest.raises(Busy):
        check(core)


def test_damaged_files_are_no_fault_of_the_filesystem(core: Core) -> None:
    ino = core.file(b"f", pages("AB"))
    core.poison(ino, 1)
    core.close()
    report = check(core)
    assert report.wrong == []
    assert report.damaged == [f"/f: {PAGE_SIZE} bytes at {PAGE_SIZE:#x} are poison"]


def test_a_poisoned_copy_of_metadata_is_found_and_healed(core: Core) -> None:
    a_bit_of_everything(core)
    before = state(core.fs)
    first = next(owner for owner in core.fs.rmap.owners(0, 1) if owner.ino == METADATA_INO)
    inject(core.pmem, first.dev_block * PAGE_SIZE, 1)
    core.close(save=False)
    assert check(core).wrong == ["the first superblock is poisoned"]
    report = check(core, repair=True)
    assert (report.healed, report.wrong) == (1, [])
    core.open()
    assert core.pmem.badblocks.count == 0
    assert len(core.fs.names) < len(before)  # that was not committed


def test_what_cannot_be_read_is_reported_and_not_repaired(core: Core) -> None:
    for owner in list(core.fs.rmap.owners(0, 1 << 40)):
        inject(core.pmem, owner.dev_block * PAGE_SIZE, owner.length * PAGE_SIZE)
    core.close(save=False)
    for repair in (False, True):
        report = check(core, repair=repair)
        assert len(report.wrong) == 1
        assert report.healed == 0
    core.open_pmem()
    assert core.pmem.badblocks.count > 0
    core.drop_pmem()


"""fsck of a device that is not mounted looks, and changes nothing."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from daxemu.events import Event
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.namespace import ROOT_INO, Credentials
from daxemu.fs.offline import check_device
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.inject import inject
from daxemu.pmem.pmem import Pmem


def ignore(event: Event) -> None:
    """Nobody follows."""


def digest(device: Path) -> str:
    return hashlib.sha256((device / "media").read_bytes()).hexdigest()


def used(device: Path) -> bytes:
    """How much of the media is backed by memory, by du."""
    return subprocess.run(["du", "-k", device / "media"], capture_output=True, check=True).stdout.split()[0]


def with_files(path: Path) -> None:
    """A device whose last supervisor died: records in the WAL, blocks that were written and never committed."""
    DeviceDir.create(path, DeviceConfig(size=16 << 20))
    with DeviceDir.open(path) as directory:
        pmem = Pmem(directory)
        fs = Filesystem(pmem.dax, MemoryFailures(ignore), ignore)
        file = fs.mknod(ROOT_INO, b"f", 0o100644, 0, Credentials(0, 0))
        fs.write(file.ino, 0, b"x" * 50_000)
        fs.fsync()
        lost = fs.mknod(ROOT_INO, b"lost", 0o100644, 0, Credentials(0, 0))
        fs.write(lost.ino, 0, b"y" * 50_000)
        fs.abandon()
        fs.close()
        pmem.close()


def test_fsck_changes_nothing(tmp_path: Path) -> None:
    device = tmp_path / "dev"
    with_files(device)
    before = digest(device), used(device)
    with DeviceDir.open(device) as directory:
        report = check_device(directory, repair=False)
    assert (report.inodes, report.wrong, report.damaged) == (2, [], [])
    assert (digest(device), used(device)) == before


def test_fsck_of_a_device_that_was_never_mounted(tmp_path: Path) -> None:
    DeviceDir.create(tmp_path / "dev", DeviceConfig(size=16 << 20))
    before = digest(tmp_path / "dev")
    with DeviceDir.open(tmp_path / "dev") as directory:
        report = check_device(directory, repair=False)
    assert (report.inodes, report.wrong, report.damaged) == (0, [], [])
    assert digest(tmp_path / "dev") == before


def test_repair_heals_what_a_copy_allows_and_then_all_is_well(tmp_path: Path) -> None:
    device = tmp_path / "dev"
    with_files(device)
    with DeviceDir.open(device) as directory:
        pmem = Pmem(directory)
        inject(pmem, 0, 4096)
        pmem.close()
        assert check_device(directory, repair=False).wrong == ["the first superblock is poisoned"]
        report = check_device(directory, repair=True)
        assert (report.healed, report.wrong) == (1, [])
        assert check_device(directory, repair=False).wrong == []
