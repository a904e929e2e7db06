"""Checking and repairing a device that is not mounted (xfs_repair): what ``daxemu fsck`` does."""

from __future__ import annotations

from dataclasses import dataclass, field

from daxemu.errors import CorruptMetadata
from daxemu.events import Event
from daxemu.fs.allocator import Allocator
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.metadata_page import CopyState
from daxemu.fs.metadata_region import REPLICAS, MetadataRegion
from daxemu.fs.rmap import METADATA_INO, Rmap
from daxemu.fs.store import FSCK_HINT, Store
from daxemu.fs.upgrade import is_former, upgrade
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem


@dataclass
class Report:
    """What was found. ``wrong`` is of the filesystem, ``damaged`` of the files' data; a line each.
    ``mendable``: how many lines of ``wrong`` a repair would mend. ``upgraded``: whether a repair rewrote the
    records of a former format.
    """

    inodes: int = 0
    healed: int = 0
    mendable: int = 0
    upgraded: bool = False
    wrong: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def check_device(directory: DeviceDir, *, repair: bool) -> Report:
    """Check a device whose lock is held; with ``repair`` first heal what the metadata's other copy allows.

    Raises NotADevice. A filesystem that cannot be read at all is a report, not an error.
    """
    report = Report()
    pmem = Pmem(directory)
    try:
        if repair:
            report.upgraded = _upgrade(pmem)
            report.healed = _heal(pmem)
        _check(pmem, report)
    except CorruptMetadata as error:
        report.wrong += _why_unreadable(pmem, error)
        # What cannot be read has no good copy: a repair has nothing to take it from.
        report.mendable = int(not repair and is_former(pmem.dax))
    finally:
        pmem.close()
    return report


def _why_unreadable(pmem: Pmem, error: CorruptMetadata) -> list[str]:
    """A line for each superblock or value that keeps the filesystem from being read; else what ``error``
    says.
    """
    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    store = Store(region, pmem.name)
    try:
        store.open(read_only=True)
        found = store.bad_values()
    except CorruptMetadata:
        bad = region.damaged_superblocks(is_clean=True)
        lost = [damage.line for damage in bad if not damage.line.endswith(CopyState.STALE)]
        found = lost if len(lost) == REPLICAS else []
    finally:
        store.close()
    return found or [str(error).removesuffix(FSCK_HINT)]


def _upgrade(pmem: Pmem) -> bool:
    if not is_former(pmem.dax):
        return False
    upgrade(pmem.dax)
    return True


def _heal(pmem: Pmem) -> int:
    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    if not region.is_formatted():
        return 0
    region.load()
    return region.repair()


def _check(pmem: Pmem, report: Report) -> None:
    def ignore(event: Event) -> None:
        """Nobody follows."""

    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    if not region.is_formatted():
        region.check_blank()
        return  # the first mount makes the filesystem
    fs = Filesystem(pmem.dax, MemoryFailures(ignore), ignore, read_only=True)
    try:
        report.inodes = len(fs.names)
        report.wrong = fsck(fs)
        if report.wrong:
            damage = fs.region.damaged_pages(is_clean=fs.store.is_clean)
            report.mendable = sum(found.mendable for found in damage)
        report.damaged = [
            f"{lost.path}: {lost.length} bytes at {lost.offset:#x} are poison"
            for lost in fs.damaged()
            if lost.ino != METADATA_INO
        ]
    finally:
        fs.close()
