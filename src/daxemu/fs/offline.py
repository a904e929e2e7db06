"""Check and repair of an unmounted device, for ``daxemu fsck`` (xfs_repair)."""

from __future__ import annotations

from dataclasses import dataclass, field

from daxemu.errors import CorruptMetadata
from daxemu.events import no_log
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
    """Result of a check. ``wrong``: problems of the filesystem. ``damaged``: damaged ranges of files. Each
    entry is one line. ``mendable``: number of lines of ``wrong`` that a repair would fix. ``healed``: number
    of rewritten copies of metadata pages. ``upgraded``: True if a repair rewrote records of a former format.
    """

    inodes: int = 0
    healed: int = 0
    mendable: int = 0
    upgraded: bool = False
    wrong: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def check_device(directory: DeviceDir, *, repair: bool) -> Report:
    """Check a device. With ``repair``, rewrite each bad copy of metadata from a good copy first.
    Precondition: the lock of the device is held.

    Raises NotADevice. An unreadable filesystem is a report, not an error.
    """
    report = Report()
    pmem = Pmem(directory)
    try:
        if repair:
            report.upgraded = _upgrade(pmem)
            report.healed = _rewrite_copies(pmem)
        _check(pmem, report)
    except CorruptMetadata as error:
        report.wrong += _why_unreadable(pmem, error)
        # An unreadable page has no good copy that a repair could use.
        report.mendable = int(not repair and is_former(pmem.dax))
    finally:
        pmem.close()
    return report


def _why_unreadable(pmem: Pmem, error: CorruptMetadata) -> list[str]:
    """Return a line for each superblock or value that makes the filesystem unreadable; without such a value,
    the text of ``error``.
    """
    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    store = Store(region, pmem.name)
    try:
        store.open(read_only=True)
        found = store.wrong_values()
    except CorruptMetadata:
        damaged = region.superblocks.damaged(is_clean=True)
        lost = [damage.line for damage in damaged if not damage.line.endswith(CopyState.STALE)]
        found = lost if len(lost) == REPLICAS else []
    finally:
        store.close()
    return found or [str(error).removesuffix(FSCK_HINT)]


def _upgrade(pmem: Pmem) -> bool:
    if not is_former(pmem.dax):
        return False
    upgrade(pmem.dax)
    return True


def _rewrite_copies(pmem: Pmem) -> int:
    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    if not region.superblocks.is_formatted():
        return 0
    region.load()
    return region.repair()


def _check(pmem: Pmem, report: Report) -> None:
    region = MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax))
    if not region.superblocks.is_formatted():
        region.superblocks.check_blank()
        return  # the first mount makes the filesystem
    fs = Filesystem(pmem.dax, MemoryFailures(no_log), no_log, read_only=True)
    try:
        report.inodes = len(fs.names)
        report.wrong = fsck(fs)
        if report.wrong:
            damage = fs.region.damaged_pages(is_clean=fs.store.is_clean)
            report.mendable = sum(found.is_repairable for found in damage)
        report.damaged = [
            f"{lost.path}: {lost.length} bytes at {lost.offset:#x} are poison"
            for lost in fs.damaged()
            if lost.ino != METADATA_INO
        ]
    finally:
        fs.close()
