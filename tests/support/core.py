"""The core of a machine without a mount: device, pmem, memory failures, filesystem, and their events."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from daxemu.events import Event
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO, Credentials, Inode
from daxemu.mm.memory_failure import Incident, MemoryFailures
from daxemu.pmem import inject
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import bytes_of_sectors

ROOT = Credentials(0, 0)
SHM = Path("/dev/shm")


def sweep() -> None:
    """Remove the devices of test runs that were killed."""
    for stale in SHM.glob("daxemu-core-*"):
        if not Path("/proc", stale.name.split("-")[2]).exists():
            shutil.rmtree(stale, ignore_errors=True)


sweep()


class Core:
    """Device with its filesystem. ``sound``: fsck finds no problem at the end. ``is_direct``: see Media."""

    def __init__(self, path: Path, config: DeviceConfig, *, is_direct: bool | None = None) -> None:
        self.path = path
        self.config = config
        self.is_direct = is_direct
        self.sound = True
        self.events: list[Event] = []
        DeviceDir.create(path, config)
        self.open()

    def open_pmem(self) -> None:
        """Take the lock and probe the device."""
        self.device = DeviceDir.open(self.path)
        self.pmem = Pmem(self.device, is_direct=self.is_direct)

    def open(self) -> None:
        """Probe the device and mount it."""
        self.open_pmem()
        self.mm = MemoryFailures(self.events.append)
        self.pmem.attach(self.mm)
        self.fs = Filesystem(self.pmem.dax, self.mm, self.events.append)
        self.is_open = True

    def close(self, *, save: bool = True) -> None:
        """Unmount; without ``save``, as if the supervisor had been killed."""
        if not self.is_open:
            return
        self.is_open = False
        try:
            if save:
                self.fs.close()
            else:
                self.fs.store.close()
        finally:
            self.drop_pmem()

    def drop_pmem(self) -> None:
        """Release media and lock; a failed test's traceback may still hold views of the media."""
        try:
            self.pmem.close()
        finally:
            self.device.close()

    def reopen(self) -> None:
        """Unmount and mount again."""
        self.close()
        self.open()

    def without_filesystem(self) -> None:
        """Release the device, for a test of the layers below."""
        self.sound = False
        self.fs.close()
        self.fs.shutdown_reason = "not in this test"

    # -- short cuts

    def file(self, name: bytes = b"f", data: bytes = b"", parent: Ino = ROOT_INO) -> Ino:
        """Make a file with the content ``data``."""
        ino = self.fs.mknod(parent, name, stat.S_IFREG | 0o644, 0, ROOT).ino
        if data:
            self.fs.write(ino, 0, data)
        return ino

    def dir(self, name: bytes, parent: Ino = ROOT_INO) -> Inode:
        """A new directory."""
        return self.fs.mkdir(parent, name, 0o755, ROOT)

    def clone(self, src: Ino, name: bytes) -> Ino:
        """Make a file that shares all blocks of ``src``."""
        ino = self.file(name)
        self.fs.remap_file_range(src, 0, ino, 0, 0)
        return ino

    def read(self, ino: Ino) -> bytes:
        """Return all bytes of a file."""
        return bytes(self.fs.read(ino, 0, self.fs.names.get(ino).size))

    def poison(self, ino: Ino, page: int, *, latent: bool = False, pages: int = 1) -> None:
        """Poison pages of a file on the media, latent."""
        for part in self.fs.device_ranges(ino, page * PAGE_SIZE, pages * PAGE_SIZE):
            inject.inject(self.pmem, part.start, part.length, latent=latent)

    def fail(self, ino: Ino, page: int, pages: int = 1) -> list[Incident]:
        """Poison pages of a file and let memory_failure() handle it, up to the incident."""
        incidents = []
        for part in self.fs.device_ranges(ino, page * PAGE_SIZE, pages * PAGE_SIZE):
            bad = inject.inject(self.pmem, part.start, part.length)
            incidents.append(self.mm.memory_failure(*inject.failed_pages(self.pmem, bad), 0))
        return incidents

    def of_type(self, kind: type[Event]) -> list[Event]:
        """The events of one type so far."""
        return [event for event in self.events if type(event) is kind]


@contextmanager
def core_at(
    path: Path | None = None, size: int = 8 << 20, *, is_direct: bool | None = None, **config: Any
) -> Iterator[Core]:
    """A fresh core on ``path`` or in shared memory, deleted afterwards."""
    path = path or SHM / f"daxemu-core-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        core = Core(path, DeviceConfig(size, **config), is_direct=is_direct)
        try:
            yield core
            if core.is_open and core.sound:
                assert fsck(core.fs) == []
        finally:
            core.close(save=False)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def core(request: pytest.FixtureRequest) -> Iterator[Core]:
    """A core on 8 MiB; ``@pytest.mark.parametrize("core", [6 << 40], indirect=True)`` for another size."""
    with core_at(size=getattr(request, "param", 8 << 20)) as made:
        yield made


def pages(text: str) -> bytes:
    """Return one page for each letter, filled with the letter."""
    return b"".join(letter.encode() * PAGE_SIZE for letter in text)


def touched_poison(core: Core) -> list[Range]:
    """Return the pages with poison that have memory in the media, in bytes; none without direct mappings."""
    if not core.pmem.media.is_direct:
        return []
    media = core.pmem.media
    pages = [bytes_of_sectors(bad).outer(PAGE_SIZE) for bad in media.poison]
    return [page for page in pages if media.count_pages(page.start, page.length) != 0]
