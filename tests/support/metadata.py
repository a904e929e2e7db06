"""Places of a device's metadata, and damage to metadata while the device is not mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.metadata_region import REPLICAS, MetadataRegion
from daxemu.fs.rmap import Rmap
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.inject import inject
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE


class Page(NamedTuple):
    """Page of a metadata file; ``offsets``: device offsets of the copies."""

    file: MetadataFile
    number: int
    offsets: tuple[int, ...]


@contextmanager
def probed(device: Path) -> Iterator[Pmem]:
    """Probe a device that is not mounted."""
    with DeviceDir.open(device) as directory, closing(Pmem(directory)) as pmem:
        yield pmem


def metadata_pages(device: Path) -> list[Page]:
    """Return all metadata pages, without the superblocks."""
    with probed(device) as pmem:
        region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
        region.load()
        return [
            Page(
                file,
                number,
                tuple(region._device_offset(file, replica, number) for replica in range(REPLICAS)),
            )
            for file in MetadataFile
            for number in range(region.pages(file))
        ]


def superblocks(device: Path) -> tuple[int, int]:
    """The device offsets of both."""
    with probed(device) as pmem:
        region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
        first, second = (blocks.start * PAGE_SIZE for blocks in region.superblocks.blocks)
        return first, second


def poison(device: Path, *offsets: int, length: int = PAGE_SIZE) -> None:
    """Make device bytes unreadable; latent for a later mount."""
    with probed(device) as pmem:
        for offset in offsets:
            inject(pmem, offset, length)


def overwrite(device: Path, offset: int, data: bytes) -> None:
    """Change the media without the knowledge of any process."""
    with (device / "media").open("r+b") as media:
        media.seek(offset)
        media.write(data)


def restore(pristine: Path, device: Path) -> None:
    """Restore ``device`` from ``pristine``, an earlier copy."""
    shutil.rmtree(device, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", pristine, device], check=True, timeout=30)


def in_pages(offset: int, data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """Split a write into pieces of a page, each with its offset: a crash may cut the write between pieces."""
    view = memoryview(data)
    for start in range(0, len(view), PAGE_SIZE):
        yield offset + start, view[start : start + PAGE_SIZE]
