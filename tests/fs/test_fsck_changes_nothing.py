"""fsck of an unmounted device reads, and changes nothing."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from daxemu.events import Event
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO, Credentials
from daxemu.fs.offline import check_device
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.pmem import Pmem


def ignore(event: Event) -> None:
    """Drop an event."""


def digest(device: Path) -> str:
    return hashlib.sha256((device / "media").read_bytes()).hexdigest()


def used(device: Path) -> bytes:
    """Return the allocated size of the media in KiB, by du."""
    return subprocess.run(["du", "-k", device / "media"], capture_output=True, check=True).stdout.split()[0]


def with_files(path: Path) -> None:
    """Create a device whose last supervisor died.

    The WAL has records, and blocks were written but never committed.
    """
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


def test_fsck_of_a_device_never_mounted_changes_nothing(tmp_path: Path) -> None:
    DeviceDir.create(tmp_path / "dev", DeviceConfig(size=16 << 20))
    before = digest(tmp_path / "dev")
    with DeviceDir.open(tmp_path / "dev") as directory:
        report = check_device(directory, repair=False)
    assert (report.inodes, report.wrong, report.damaged) == (0, [], [])
    assert digest(tmp_path / "dev") == before
